"""ComfyUI nodes (V3 schema): load a model, generate a motion latent, encode a clip to one, decode it, make a long clip.

IMAGE is float32 [B, H, W, 3] in 0..1, as everywhere in ComfyUI: a clip is a batch of its frames. Two types pass only
between these nodes: REDUCIO_MODEL, a loaded pipeline, and REDUCIO_MOTION, a latent [16, T/f, H/32, W/32]. Progress goes
to ComfyUI's bar, with previews; its interrupt ends a clip at the end of the current step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.latest import ComfyExtension, io
from PIL import Image

from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints.strict_files import embedded_model
from reducio_fast.media.contact_sheet import film_strip

Model, Motion = io.Custom("REDUCIO_MODEL"), io.Custom("REDUCIO_MOTION")
CATEGORY = "reducio"
MOST_SEEDS = 2**63 - 1001  # a call takes seed + i


def to_images(frames: np.ndarray) -> torch.Tensor:
    """uint8 [T, H, W, 3] or [H, W, 3] -> IMAGE."""
    batch = np.asarray(frames)
    return torch.from_numpy((batch if batch.ndim == 4 else batch[None]).astype(np.float32) / 255)


def to_frames(images: torch.Tensor) -> np.ndarray:
    """IMAGE -> uint8 [B, H, W, 3]; a fourth channel is left out."""
    return (images[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def report(steps: int, previews: bool) -> Any:
    """Arguments of a pipeline call: a callback that moves ComfyUI's progress bar and raises if its user interrupted."""
    bar, done = ProgressBar(steps), 0

    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        nonlocal done
        throw_exception_if_processing_interrupted()
        done += 1
        frames = tensors.get("frames")
        preview = None if frames is None else ("JPEG", Image.fromarray(film_strip(frames)), None)
        bar.update_absolute(done, steps, preview)

    return {"callback_on_step_end": step_end} | ({"preview_every": max(1, steps // 5)} if previews else {})


def sampling_inputs() -> list[Any]:
    return [
        Model.Input("model"),
        io.String.Input("prompt", multiline=True, default="a red circle moving right on a black background"),
        io.String.Input("negative_prompt", multiline=True, default="", tooltip="what guidance leads away from"),
        io.Int.Input("seed", default=0, min=0, max=MOST_SEEDS, control_after_generate=True),
        io.Int.Input("steps", default=20, min=1, max=1000),
        io.Float.Input("guidance", default=4.5, min=0.0, max=30.0, step=0.1),
        io.Boolean.Input("previews", default=False, tooltip="by the small decoder of the model, where it has one"),
        io.Image.Input("image", optional=True, tooltip="the content frame; without it the model draws one"),
    ]


def sampling_words(prompt: str, negative_prompt: str, seed: int, steps: int, guidance: float, image: Any) -> dict:
    picture = None if image is None else to_frames(image)[0]
    conditions = {"prompt": prompt, "negative_prompt": negative_prompt or None, "image": picture, "seed": seed}
    return conditions | {"num_inference_steps": steps, "guidance_scale": guidance, "progress": False}


class ReducioLoad(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="ReducioLoad",
            display_name="Load Reducio",
            category=CATEGORY,
            inputs=[
                io.String.Input("model", default="", tooltip="a model folder or hub id; empty: the embedded toy model"),
                io.Combo.Input("backend", options=["auto", "fast", "reference"]),
                io.Combo.Input("dtype", options=["auto", "float32", "bfloat16", "float16"]),
            ],
            outputs=[Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model: str, backend: str, dtype: str) -> Any:
        name = model.strip() or embedded_model()
        model_dtype = None if dtype == "auto" else dtype
        return io.NodeOutput(ReducioPipeline.from_pretrained(name, dtype=model_dtype, backend=backend))


class ReducioGenerate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="ReducioGenerate",
            display_name="Reducio: motion and content frame",
            category=CATEGORY,
            inputs=sampling_inputs(),
            outputs=[Motion.Output(display_name="motion"), io.Image.Output(display_name="content")],
        )

    @classmethod
    def execute(
        cls,
        model: ReducioPipeline,
        prompt: str,
        negative_prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        previews: bool,
        image: Any = None,
    ) -> Any:
        arguments = sampling_words(prompt, negative_prompt, seed, steps, guidance, image)
        out = model(**arguments, output_type="latent", **report(steps, previews))
        return io.NodeOutput(out.frames, to_images(out.content))


class ReducioEncodeMotion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="ReducioEncodeMotion",
            display_name="Reducio: motion of a clip",
            category=CATEGORY,
            inputs=[
                Model.Input("model"),
                io.Image.Input("images", tooltip="at least as many as the model has frames"),
                io.Int.Input(
                    "refine",
                    optional=True,
                    default=0,
                    min=0,
                    max=100,
                    tooltip="steps that fit the motion to them",
                ),
            ],
            outputs=[Motion.Output(display_name="motion"), io.Image.Output(display_name="content")],
        )

    @classmethod
    def execute(cls, model: ReducioPipeline, images: torch.Tensor, refine: int = 0) -> Any:
        frames = to_frames(images)
        motion = model.encode_motion(frames, refine=refine)
        return io.NodeOutput(motion, to_images(frames[model.vae.config.content_frame]))


class ReducioDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="ReducioDecode",
            display_name="Reducio: decode",
            category=CATEGORY,
            inputs=[
                Model.Input("model"),
                Motion.Input("motion"),
                io.Image.Input("content", tooltip="any picture: the motion moves it"),
                io.Float.Input("motion_strength", default=1.0, min=0.0, max=4.0, step=0.05),
                io.Boolean.Input("keep_content", default=False, tooltip="its own pixels where nothing moves"),
            ],
            outputs=[io.Image.Output(display_name="frames"), io.Float.Output(display_name="fps")],
        )

    @classmethod
    def execute(
        cls, model: ReducioPipeline, motion: Any, content: Any, motion_strength: float, keep_content: bool
    ) -> Any:
        picture = to_frames(content)[0]
        frames = model.decode(motion, picture, motion_strength=motion_strength, keep_content=keep_content)
        return io.NodeOutput(to_images(frames), float(model.fps))


class ReducioLongClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="ReducioLongClip",
            display_name="Reducio: long clip",
            category=CATEGORY,
            inputs=[
                *sampling_inputs(),
                io.Int.Input("num_frames", default=64, min=16, max=4096, step=8),
                io.Float.Input("motion_strength", default=1.0, min=0.0, max=4.0, step=0.05),
                io.Boolean.Input("loop", default=False, tooltip="there and back again"),
            ],
            outputs=[io.Image.Output(display_name="frames"), io.Float.Output(display_name="fps")],
        )

    @classmethod
    def execute(
        cls,
        model: ReducioPipeline,
        prompt: str,
        negative_prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        previews: bool,
        num_frames: int,
        motion_strength: float,
        loop: bool,
        image: Any = None,
    ) -> Any:
        arguments = sampling_words(prompt, negative_prompt, seed, steps, guidance, image)
        arguments |= {"num_frames": num_frames, "motion_strength": motion_strength, "loop": loop}
        chain = model.check_inputs(**arguments).chain
        total = steps * (1 if chain is None else chain.clips)
        out = model(**arguments, **report(total, previews))
        return io.NodeOutput(to_images(out.frames), float(out.fps))


class ReducioExtension(ComfyExtension):
    async def get_node_list(self) -> list[Any]:
        return [ReducioLoad, ReducioGenerate, ReducioEncodeMotion, ReducioDecode, ReducioLongClip]


async def comfy_entrypoint() -> ReducioExtension:
    return ReducioExtension()
