"""Peers: other image-to-video models, run through diffusers behind the words, seeds and output of our own pipeline.

They are here for the comparison a user would make on one machine: what a second of video, or a megapixel of it, costs.
A peer is named like a model: `svd` (its hub repository), `svd:FOLDER`, a folder whose model_index.json names one of
the pipelines below, or `svd:random` and `svd:random-tiny`: random weights at the published size, or small enough for
any CPU. Speed does not depend on what the weights are.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import checkpoints, content, inputs
from .errors import ReducioError
from .measure import clock
from .output import ReducioOutput, stack, to_output
from .peer_models import PEERS, Peer, build_random, diffusers_class

RANDOM, RANDOM_TINY = "random", "random-tiny"
DECODE_CHUNK = 8  # frames SVD decodes at once: what diffusers' own example uses; all 25 need tens of gigabytes


@dataclass(frozen=True, slots=True)
class Source:
    """A peer and where its weights come from: `weights` is a folder, a hub id, "random" or "random-tiny"."""

    peer: Peer
    weights: str

    @property
    def defaults(self) -> dict[str, Any]:
        """The call that is made where the caller says nothing."""
        return self.peer.call | (self.peer.tiny_call if self.weights == RANDOM_TINY else {})


def find(model: Any) -> Source | None:
    """The peer that `model` names, by word or by a folder's index; None where it names none, so is one of ours."""
    if not isinstance(model, str | os.PathLike):
        return None
    name, _, weights = str(model).partition(":")
    if name in PEERS and not (weights == "" and Path(model).is_dir()):
        return Source(PEERS[name], weights or PEERS[name].hub_id)
    index = Path(model).expanduser() / checkpoints.INDEX
    if not index.is_file():
        return None
    class_name = checkpoints.read_json(index).get("_class_name")
    return next((Source(p, str(model)) for p in PEERS.values() if class_name in p.pipelines), None)


class PeerPipeline:
    """A loaded peer. Call it with the words of `ReducioPipeline`; what it gives back is the same kind of output."""

    def __init__(self, source: Source, pipeline: Any) -> None:
        self.source, self.pipeline = source, pipeline
        accepted = inspect.signature(type(pipeline).__call__).parameters
        self.reads_text, self.takes_image = "prompt" in accepted, "image" in accepted

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | Source,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> PeerPipeline:
        """Load a peer by the words that `find` knows. Raises ReducioError for anything else, and for broken files."""
        source = model if isinstance(model, Source) else find(model)
        if source is None:
            raise ReducioError(f"model: {str(model)!r} is no peer; known are {', '.join(PEERS)}, or a folder of one")
        device = inputs.resolve_device(device)
        dtype = inputs.resolve_dtype(dtype, None, device)
        peer = source.peer
        if source.weights in (RANDOM, RANDOM_TINY):
            return cls(source, build_random(peer, source.weights == RANDOM_TINY, dtype, device))
        folder = checkpoints.find_model(source.weights)
        class_name = checkpoints.read_json(folder / checkpoints.INDEX).get("_class_name")
        if class_name not in peer.pipelines:
            raise ReducioError(
                f"{folder / checkpoints.INDEX}: is of a {class_name}, {peer.name} takes {', '.join(peer.pipelines)}"
            )
        pipeline = content.load_text_to_image(folder, {}, dtype, device)
        if class_name == "LTXPipeline":
            pipeline = diffusers_class("LTXImageToVideoPipeline")(**pipeline.components)
        return cls(source, pipeline)

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = 0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        progress: bool = True,
    ) -> ReducioOutput:
        """Make one clip, or one of each prompt (where the peer reads none: of each image) in a list.

        Sizes, frames, steps and guidance default to the published call of the peer (`source.defaults`). The image is
        scaled to cover the clip and cropped. For SVD, `guidance_scale` is that of the last frame; the first frame's
        is 1. Clips are made one after the other, clip i from a CPU generator of seed + i. `timings` has our stages;
        `dit.step` is the whole denoising loop, whichever network runs in it. `callback_on_step_end` is handed on to
        diffusers; to set `pipe._interrupt` ends the loop of LTX-Video and Wan, diffusers' SVD cannot be stopped.

        Raises ReducioError before any work for an argument that does not fit.
        """
        defaults = self.source.defaults
        height = defaults["height"] if height is None else height
        width = defaults["width"] if width is None else width
        steps = defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        guidance = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        frames = self._num_frames(num_frames)
        max_steps = self.pipeline.scheduler.config.num_train_timesteps
        inputs.check_sampling(steps, max_steps, guidance, output_type)
        inputs.check_callback(callback_on_step_end, ["latents"], ["latents"])
        for name, value in (("height", height), ("width", width)):
            inputs.check_multiple(name, value, self._size_factor())
        prompts, negatives, images, is_list = self._check_inputs(prompt, negative_prompt, image)
        generators = inputs.check_generators(len(images), seed, generator)

        words: dict[str, Any] = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": steps}
        if self.source.peer.name == "svd":
            words |= {"max_guidance_scale": guidance, "fps": defaults["fps"], "decode_chunk_size": DECODE_CHUNK}
        else:
            words["guidance_scale"] = guidance
        if self.source.peer.name == "ltx":
            words["frame_rate"] = defaults["fps"]
        self.pipeline.set_progress_bar_config(disable=not progress, desc="dit.step")
        timings: dict[str, float] = {}
        clips: list[Any] = []
        fitted: list[np.ndarray] = []
        for text, negative, picture, each in zip(prompts, negatives, images, generators, strict=True):
            if picture is not None:
                fitted.append(content.fit_image(picture, height, width))
                words["image"] = Image.fromarray(fitted[-1])
            if self.reads_text:
                words |= {"prompt": text, "negative_prompt": negative}
            clips.append(self._clip(words, each, output_type, callback_on_step_end, timings))
            if getattr(self.pipeline, "interrupt", False):
                break
        return ReducioOutput(
            frames=stack(clips) if is_list else clips[0],
            content=np.stack(fitted) if is_list and fitted else fitted[0] if fitted else None,
            seeds=[g.initial_seed() for g in generators[: len(clips)]],
            fps=defaults["fps"],
            timings=timings,
            output_type=output_type,
            is_list=is_list,
            interrupted=bool(getattr(self.pipeline, "interrupt", False)),
        )

    def _clip(
        self,
        words: dict[str, Any],
        generator: torch.Generator,
        output_type: str,
        callback: Callable[..., Any] | None,
        timings: dict[str, float],
    ) -> Any:
        kind = "latent" if output_type == "latent" else "pt"
        try:
            with _stages(self.pipeline, self.source.peer.denoiser, timings) as step_end:
                video = self.pipeline(
                    **words,
                    generator=generator,
                    output_type=kind,
                    callback_on_step_end=functools.partial(_step_end, callback, step_end),
                ).frames[0]
        except ReducioError:
            raise
        except ValueError as error:  # a word that diffusers' own checks refuse
            raise ReducioError(f"{self.source.peer.name}: {error}") from error
        if not torch.isfinite(video).all():
            raise ReducioError("vae.decode: the clip has values that are not finite (NaN or infinite)")
        if kind == "latent":
            return video
        return to_output(video.float().transpose(0, 1) * 2 - 1, output_type)

    def _check_inputs(
        self, prompt: Any, negative_prompt: Any, image: Any
    ) -> tuple[list[str | None], list[str | None], list[np.ndarray | None], bool]:
        """Prompts, negative prompts and images as lists of one length, and whether the caller gave a list."""
        title = self.source.peer.title
        if not self.reads_text:
            for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
                if value:
                    raise ReducioError(f"{name}: {title} animates an image and reads no text, so leave out {value!r}")
        if not self.takes_image and image is not None:
            raise ReducioError(f"image: {title} makes clips from text alone, so leave the image out")
        if self.takes_image and image is None:
            raise ReducioError(f"image: None given; {title} animates an image")
        if self.reads_text:
            prompts, negatives, is_list = inputs.check_prompts(prompt, negative_prompt)
            return [*prompts], [*negatives], content.read_images(image, len(prompts)), is_list
        is_list = isinstance(image, list | tuple) or (isinstance(image, np.ndarray) and image.ndim == 4)
        count = len(image) if is_list else 1
        if count == 0:
            raise ReducioError("image: the list is empty")
        return [None] * count, [None] * count, content.read_images(image, count), is_list

    def _num_frames(self, asked: Any) -> int:
        """A count the VAE can hold: any for SVD, which has no compression in time, else k x factor + 1."""
        if asked is None:
            published = self.source.defaults.get("num_frames")
            return self.pipeline.unet.config.num_frames if published is None else published
        names = ("vae_temporal_compression_ratio", "vae_scale_factor_temporal")  # LTX's, Wan's
        factor: int = next((getattr(self.pipeline, name) for name in names if hasattr(self.pipeline, name)), 1)
        asked = inputs.check_count("num_frames", asked)
        if factor > 1 and asked % factor != 1:
            below = (asked - 1) // factor * factor + 1
            raise ReducioError(
                f"num_frames: {asked} is not a multiple of {factor} plus 1; "
                f"the two nearest legal counts are {below} and {below + factor}"
            )
        return asked

    def _size_factor(self) -> int:
        """What height and width must be multiples of: the VAE's compression times that of the network behind it."""
        pipe = self.pipeline
        if self.source.peer.name == "svd":  # the U-Net halves again at each level but the last
            return pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
        if self.source.peer.name == "ltx":
            return pipe.vae_spatial_compression_ratio * pipe.transformer_spatial_patch_size
        return pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[-1]


def check_words(source: Source, backend: str, words: Iterable[str]) -> None:
    """Refuse, by name, words of our call that a peer does not have."""
    if backend not in ("auto", "reference"):
        raise ReducioError(f"backend: {backend!r} asked for, but a peer runs through diffusers; leave it out")
    known = inspect.signature(PeerPipeline.__call__).parameters
    if unknown := sorted(set(words) - set(known)):
        raise ReducioError(f"{unknown[0]}: not a word of the peer {source.peer.name}")


# ---- measuring ------------------------------------------------------------------------------------------------------


def bench_row(
    model: str | os.PathLike[str] | None,
    *,
    prompt: str | None = "a red circle moving right on a black background",
    image: Any = None,
    repeats: int = 3,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    progress: bool = False,
    **words: Any,
) -> dict[str, Any]:
    """Time one model, a peer or one of ours, at its own published call: a row of the comparison.

    A peer named without weights gets random ones of the published size, and a grey image where it needs one. `cold`
    is the first call with everything it compiles and loads; `seconds` is the median of `repeats` further ones, and
    `stages` its parts. Of them follow `per_video_second`, the seconds that one second of video costs at the model's
    own frame rate, and `per_megapixel`. `peak_memory` in bytes is measured on a GPU, null elsewhere.
    """
    from .pipeline import ReducioPipeline

    device = inputs.resolve_device(device)
    dtype = inputs.resolve_dtype(dtype, None, device)
    if isinstance(model, str) and model in PEERS:
        model = f"{model}:{RANDOM}"
    source = find(model)
    pipe: Any
    if source is None:
        folder = model or checkpoints.embedded_model()
        pipe = ReducioPipeline.from_pretrained(folder, dtype=dtype, device=device, backend=backend)
        name, weights, networks = "reducio", str(model or "the embedded default"), pipe._networks()
    else:
        pipe = PeerPipeline.from_pretrained(source, dtype, device)
        name, weights, networks = source.peer.name, source.weights, content.networks(pipe.pipeline)
        if pipe.takes_image and image is None:
            image = Image.new("RGB", (512, 512), "grey")
        if not pipe.reads_text:
            prompt = None
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    runs: list[tuple[float, ReducioOutput]] = []
    for _ in range(1 + repeats):
        start = clock(device)
        out = pipe(prompt, image, progress=progress, **words)
        runs.append((clock(device) - start, out))
    seconds, out = sorted(runs[1:] or runs, key=lambda run: run[0])[len(runs[1:]) // 2]
    frames, height, width = out.frames.shape[:3]
    return {
        "model": name,
        "weights": weights,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for network in networks for p in network.parameters()),
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": out.fps,
        "cold": runs[0][0],
        "seconds": seconds,
        "stages": dict(out.timings),
        **rates(seconds, frames, height, width, out.fps),
        "peak_memory": torch.cuda.max_memory_allocated(device) if cuda else None,
        "versions": {library: metadata.version(library) for library in ("torch", "diffusers", "transformers")},
    }


def named(text: str) -> list[str]:
    """The peers of a list with commas. Raises ReducioError for one that is none."""
    models = text.split(",")
    if unknown := [model for model in models if find(model) is None]:
        raise ReducioError(f"peer: {unknown[0]!r} is unknown; known are {', '.join(PEERS)}, or a folder of one")
    return models


def compare(
    row: dict[str, Any],
    models: Sequence[str],
    repeats: int,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    log: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """What `bench.bench` has measured of ours, then each peer, as rows of one table.

    Ours have no `peak_memory` here: several contenders are loaded at once.
    """
    rows = []
    for name, figures in row["contenders"].items():
        if "skipped" not in figures:
            seconds = figures["clip_s"]["median"]
            stages = {stage: spread["median"] for stage, spread in figures["stages_s"].items()}
            rows.append(
                {"model": f"ours, {name}", "weights": row["workload"], "dtype": figures["dtype"], **row["shape"]}
                | {"cold": figures["first_s"], "seconds": seconds, "stages": stages, "peak_memory": None}
                | rates(seconds, **row["shape"])
            )
    for model in models:
        log(f"{model}: loading, then {1 + repeats} clips")
        rows.append(bench_row(model, repeats=repeats, dtype=dtype, device=device))
        log(f"{model}: {rows[-1]['seconds']:.2f} s")
    return rows


def rates(seconds: float, num_frames: int, height: int, width: int, fps: float) -> dict[str, float]:
    """What a clip of that size cost, by the two measures that compare models with unlike clips."""
    return {
        "per_video_second": seconds / (num_frames / fps),
        "per_megapixel": seconds / (num_frames * height * width / 1e6),
    }


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of `bench_row` as a table for people."""
    head = ("model", "weights", "clip", "cold s", "warm s", "s per video s", "s per megapixel", "peak GB")
    table = [head]
    for row in rows:
        memory = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e9:.1f}"
        clip = f"{row['num_frames']}x{row['height']}x{row['width']}@{row['fps']:g}"
        figures = (row["cold"], row["seconds"], row["per_video_second"], row["per_megapixel"])
        table.append((row["model"], row["weights"], clip, *(f"{value:.3g}" for value in figures), memory))
    widths = [max(len(cells[column]) for cells in table) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in table]


# ---- building and timing --------------------------------------------------------------------------------------------


@contextmanager
def _stages(pipeline: Any, denoiser: str, timings: dict[str, float]) -> Iterator[Callable[[], None]]:
    """Time a diffusers pipeline by our stages, from outside; yields what must be called at the end of each step.

    Encoders and decoder are timed around their calls. The loop lasts from the first call of the denoiser to the end
    of the last step, so it has the scheduler and guidance in it.
    """
    device = pipeline._execution_device
    loop: list[float] = []

    def step_end() -> None:
        timings["dit.step"] = timings.get("dit.step", 0.0) + clock(device) - loop[-1]
        loop.append(clock(device))

    def around(call: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **words: Any) -> Any:
            start = clock(device)
            result = call(*args, **words)
            timings[stage] = timings.get(stage, 0.0) + clock(device) - start
            return result

        return timed

    def start_loop(*_: Any) -> None:
        if not loop:
            loop.append(clock(device))

    with ExitStack() as undo:
        network = getattr(pipeline, denoiser)
        undo.callback(network.register_forward_pre_hook(start_loop).remove)
        for component, method, stage in (
            ("text_encoder", "forward", "text.encode"),
            ("image_encoder", "forward", "image.encode"),
            ("vae", "encode", "image.encode"),
            ("vae", "decode", "vae.decode"),
        ):
            module = getattr(pipeline, component, None)
            if module is not None:
                setattr(module, method, around(getattr(module, method), stage))
                undo.callback(delattr, module, method)  # what is left is the class's own
        yield step_end


def _step_end(
    callback: Callable[..., Any] | None, timed: Callable[[], None], pipe: Any, step: int, timestep: Any, tensors: Any
) -> dict[str, Tensor]:
    timed()
    return (callback(pipe, step, timestep, tensors) or {}) if callback is not None else {}
