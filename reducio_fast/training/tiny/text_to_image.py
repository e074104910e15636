"""The text-to-image transformer of the tiny model: diffusers' PixArt class, trained on latents of content frames."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ByT5Tokenizer, T5EncoderModel

from ...checkpoints.diffusers_folders import save_text_to_image
from ...checkpoints.networks import quiet_transformers
from ...data import toy_world
from ...data.toy_detector import detect
from ...pipelines.execution.drawing import DEFAULTS, PIPELINE_KWARGS, own_defaults
from ...system.atomic_files import written_whole
from ..loop import LoopConfig
from ..mixed_precision import autocast
from ..recipe import Context
from .content_autoencoder import encode, to_image
from .text_encoder import reword, tokenize


@dataclass(frozen=True, slots=True, kw_only=True)
class TextToImageSettings:
    """Settings of a narrow PixArt: 8 x 8 tokens of 2 x 2 latent pixels, no learned variance, v-prediction."""

    loop: LoopConfig
    batch: int = 64
    pool: int = 16_000  # scenes drawn and encoded once
    reworded_share: float = 0.15  # share of captions that are reworded
    empty_prompt_share: float = 0.15  # share of a batch with the empty prompt, for classifier-free guidance
    centre_weight: float = 3.0  # loss weight of the middle half of rows and columns, a portrait's place; elsewhere 1
    max_snr: float = 5.0  # caps the loss weight of nearly clean latents, whose detail is the autoencoder's noise
    guidance_scale: float = 2.0  # default of the pipeline's call; with the usual 4.5 it draws marks at corners
    prompts: int = 64  # held-out prompts evaluated at the end
    model: dict[str, Any] = field(
        default_factory=lambda: {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 7,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "cross_attention_dim": 128,
            "caption_channels": 128,
        }
    )
    scheduler: dict[str, Any] = field(
        default_factory=lambda: {
            "num_train_timesteps": 1000,
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "prediction_type": "v_prediction",
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
        }
    )


@dataclass(slots=True)
class Captions:
    """Embeddings of distinct captions, bfloat16 [n, L, D], and their lengths [n]; the last is the empty prompt."""

    text: Tensor
    lengths: Tensor

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings, float32 [B, L, D], and mask [B, L], cut to the batch's longest caption: the rest is padding."""
        lengths = self.lengths[index]
        longest = int(lengths.max())
        return self.text[index, :longest].float(), torch.arange(longest)[None] < lengths[:, None]


@torch.no_grad()
def initialize(model: PixArtTransformer2DModel) -> None:
    """PixArt-alpha's initialisation: Xavier; the output layers of cross-attention and of the network start at zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.flatten(1))
    for linear in (model.adaln_single.emb.timestep_embedder, model.caption_projection):
        nn.init.normal_(linear.linear_1.weight, std=0.02)
        nn.init.normal_(linear.linear_2.weight, std=0.02)
    nn.init.normal_(model.adaln_single.linear.weight, std=0.02)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
    nn.init.zeros_(model.proj_out.weight)


def train_text_to_image(context: Context, settings: TextToImageSettings) -> dict[str, float]:
    """Train and save `text_to_image/`: transformer, scheduler, index; the model shares its other components.

    It trains on portraits, with the shape near the middle: trained on shapes at any position, a model of this size
    draws blobs. The motion stage trains on all positions.
    """
    tokenizer = ByT5Tokenizer.from_pretrained(context.out / "tokenizer")
    with quiet_transformers():
        text_encoder = T5EncoderModel.from_pretrained(context.out / "text_encoder").eval().to(context.device)
    vae = AutoencoderKL.from_pretrained(context.out / "content_encoder").eval().to(context.device)
    latents, texts = _encode_pool(context, settings, vae)
    captions, caption_index = _embed(context, tokenizer, text_encoder, texts)

    torch.manual_seed(settings.loop.seed)
    model = PixArtTransformer2DModel(**settings.model)
    initialize(model)
    # Attention as plain matrix products: on a CPU the fused kernel's backward pass makes a step three times as long.
    model.set_attn_processor(AttnProcessor())
    scheduler = DPMSolverMultistepScheduler(**settings.scheduler)
    steps, empty_prompt = scheduler.config.num_train_timesteps, len(captions.lengths) - 1
    signal, noise_level = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    # 1 / (SNR + 1) is 1 - alphas_cumprod: this is min(1, (max_snr + 1) / (SNR + 1)), on the squared error of v.
    weights = ((settings.max_snr + 1) * (1 - scheduler.alphas_cumprod)).clamp(max=1)
    # Textures fill most of a frame and do not follow from the caption: unweighted, they are most of the loss.
    side = settings.model["sample_size"]
    place_weights = torch.ones(side, side, device=context.device)
    place_weights[side // 4 : -side // 4, side // 4 : -side // 4] = settings.centre_weight
    place_weights /= place_weights.mean()

    def loss_fn(step: int, _micro: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.from_numpy(rng.integers(len(latents), size=settings.batch))
        clean = latents[index].float()
        captioned = torch.where(
            torch.rand(settings.batch) < settings.empty_prompt_share, empty_prompt, caption_index[index]
        )
        text, mask = captions.take(captioned)
        # One timestep from each of B equal intervals: distributed like independent draws, but the loss varies less.
        times = ((torch.arange(settings.batch) + torch.rand(1)) * steps / settings.batch).long()
        times = times.clamp(max=steps - 1)  # 63 + (1 - 2^-20) is 64 in float32
        noise = torch.randn_like(clean)
        a, s = signal[times][:, None, None, None], noise_level[times][:, None, None, None]
        noisy, target = a * clean + s * noise, a * noise - s * clean
        noisy, target, text, mask, times = (x.to(context.device) for x in (noisy, target, text, mask, times))
        added = {"resolution": None, "aspect_ratio": None}
        velocity = model(noisy, text, times, added, encoder_attention_mask=mask).sample
        errors = (velocity.float() - target).square()
        loss = ((errors * place_weights).flatten(1).mean(1) * weights.to(times.device)[times]).mean()
        errors = errors.flatten(1).mean(1)
        return loss, {"v_error": errors.mean(), "late_v_error": errors[times >= steps // 2].mean()}

    outcome = context.train("text_to_image", model, loss_fn, settings, encoded=_pool_key(context, settings))
    model.set_attn_processor(AttnProcessor2_0())
    pipeline = PixArtAlphaPipeline(tokenizer, text_encoder, vae, model, scheduler)
    pipeline.call_defaults = {"guidance_scale": settings.guidance_scale}
    shared = {name: getattr(pipeline, name) for name in ("tokenizer", "text_encoder", "vae")}
    save_text_to_image(pipeline, context.out / "text_to_image", shared)
    figures = {"steps": outcome.step, "seconds": outcome.seconds, **score_prompts(pipeline, settings)}
    return context.record("text_to_image", figures)


def score_prompts(pipeline: PixArtAlphaPipeline, settings: TextToImageSettings, batch: int = 16) -> dict[str, float]:
    """Shares of held-out prompts whose content frame has the named colour and shape, measured by `toy_detector`."""
    rng = np.random.default_rng((settings.loop.seed, 1 << 40))
    scenes = [toy_world.sample_scene(rng, held_out=True) for _ in range(settings.prompts)]
    right = []
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        frames = draw(pipeline, [scene.caption() for scene in part], range(start, start + len(part)))
        # The detector needs a clip of two frames, so the still is repeated.
        right += [detect(np.stack([frame, frame])).matches(scene) for frame, scene in zip(frames, part, strict=True)]
    return {f"{name}_right": sum(match[name] for match in right) / len(right) for name in ("colour", "shape")}


def draw(pipeline: PixArtAlphaPipeline, prompts: list[str], seeds: range) -> np.ndarray:
    """Draw content frames, uint8 [B, H, W, 3], with the video pipeline's arguments."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    kwargs = {**DEFAULTS, **own_defaults(pipeline), **PIPELINE_KWARGS}
    images = pipeline(prompts, generator=generators, output_type="np", **kwargs).images
    return np.rint(images.clip(0, 1) * 255).astype(np.uint8)


def _pool_key(context: Context, settings: TextToImageSettings) -> str:
    shown = {name: getattr(settings, name) for name in ("pool", "reworded_share")}
    return context.pool_key(("content_encoder",), seed=settings.loop.seed, kind="portraits", **shown)


def _encode_pool(context: Context, settings: TextToImageSettings, vae: AutoencoderKL) -> tuple[Tensor, list[str]]:
    """Scaled latents, float16 [n, 4, h, w], and captions of the training scenes, cached on disk for a resumed run."""
    path, key = context.run_folder("text_to_image") / "pool.safetensors", _pool_key(context, settings)
    if context.has_pool(path, key):
        with safe_open(path, "pt") as file:
            return file.get_tensor("latents"), json.loads(file.metadata()["captions"])
    rng = np.random.default_rng((settings.loop.seed, 1 << 41))
    captions, frames, latents = [], [], []
    for _ in tqdm(range(settings.pool), desc="text_to_image: scenes", disable=not context.progress, mininterval=2.0):
        scene = toy_world.sample_scene(rng)
        frame = toy_world.portrait(scene, rng)
        # PixArt's pipeline converts every prompt to lower case.
        captions.append(reword(scene, rng)[0].lower() if rng.random() < settings.reworded_share else scene.caption())
        frames.append(frame)
        if len(frames) == 32 or len(captions) == settings.pool:
            with autocast(context.device, settings.loop.autocast):
                latents.append(encode(vae, to_image(np.stack(frames)).to(context.device)).float().cpu())
            frames.clear()
    pool = (torch.cat(latents) * vae.config.scaling_factor).half().contiguous()
    metadata = {"key": key, "captions": json.dumps(captions)}
    with written_whole(path) as temporary:
        save_file({"latents": pool}, temporary, metadata)
    return pool, captions


def _embed(
    context: Context, tokenizer: ByT5Tokenizer, text_encoder: T5EncoderModel, captions: list[str]
) -> tuple[Captions, Tensor]:
    """Embeddings of the distinct captions, the empty prompt last, and the index of each caption among them."""
    distinct = sorted(set(captions))
    rows, lengths = [], []
    for start in range(0, len(distinct) + 1, 64):
        ids, mask = tokenize(tokenizer, [*distinct, ""][start : start + 64])
        with torch.inference_mode():
            x = text_encoder(input_ids=ids.to(context.device), attention_mask=mask.to(context.device)).last_hidden_state
        rows += [row[:n].bfloat16().cpu() for row, n in zip(x, mask.sum(1), strict=True)]
        lengths.append(mask.sum(1))
    number = {caption: i for i, caption in enumerate(distinct)}
    return (
        Captions(nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.cat(lengths)),
        torch.tensor([number[caption] for caption in captions]),
    )
