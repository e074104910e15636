"""Latents and conditions of a curated list of clips, as the released extraction defines them.

Of each 16-frame chunk: the motion latent (a draw from the posterior, layer-normed), the content autoencoder's latent
and the semantic tokens of the centre frame; of each distinct caption its embedding. All encoders are frozen while the
transformer trains, so each clip is encoded once.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...checkpoints.layouts import REDUCIO
from ...checkpoints.networks import load_foreign, load_model
from ...checkpoints.strict_files import INDEX as MODEL_INDEX
from ...checkpoints.strict_files import embedded_model
from ...data import latent_shards
from ...data.curation import manifest
from ...data.curation.on_ray import map_on_ray
from ...data.latent_shards import About, Clip, Shard
from ...media import ffmpeg
from ...media.aspect_buckets import BASES, Size, buckets, towards_square
from ...media.image_files import cover_crop
from ...media.pixels import to_unit
from ...pipelines.reducio.encoders import ContentEncoder, SemanticEncoder, TextEncoder
from ...reference import ReducioVAE, VAEConfig
from ...system.errors import ReducioError, first_line

ENCODERS = ("vae", "content_encoder", "image_encoder", "text_encoder", "tokenizer")
RATE = 16.0  # frames a second that the release trains at: every round(fps / 16)-th frame of a video


@dataclass(frozen=True, slots=True)
class ExtractSettings:
    """What an extraction writes, and where. Plain data: it travels to other machines."""

    model: str
    out: str
    size: int = 256  # 256, 512 or 1024 with their aspect buckets, or any other multiple of 32: squares alone
    shard_size: int = 256
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"  # that the encoders run in
    caption_length: int = 120


def extract(
    clips: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    ray: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> dict[str, int]:
    """Writes the latents of a manifest's clips into `out`; goes on where a stopped run left off.

    Args:
        clips: a manifest, as `reducio-fast curate` and `select` write it.
        model: folder whose encoders are used; None is the embedded one.
        ray: address of a Ray cluster to run on.
        settings: see `ExtractSettings`.

    Returns counts: `clips`, `errors` (clips whose video could not be read again), `shards` made now.

    Raises `ReducioError` for a manifest or a model that cannot be read, and a folder of other clips or encoders.
    """
    folder = Path(model) if model is not None else embedded_model()
    if not (folder / MODEL_INDEX).is_file():
        raise ReducioError(f"{folder} is no model folder (no {MODEL_INDEX})")
    chosen = ExtractSettings(model=str(folder), out=str(out), **settings)
    config = VAEConfig.from_dict(json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8")))
    table = _table(chosen.size, config)
    captions, chunks = chunks_of(manifest.read(clips), config.num_frames, table)
    if not chunks:
        raise ReducioError(f"{clips}: no clip is {config.num_frames} frames long at {RATE:g} frames a second")
    shards = latent_shards.plan(chunks, chosen.shard_size)
    digest = hashlib.sha256(repr((captions, chunks)).encode()).hexdigest()
    target, encoders = Path(out), Encoders(chosen, config)
    about = About(
        encoders={name: latent_shards.files_checksum(folder / name) for name in ENCODERS},
        clips=digest,
        count=len(chunks),
        captions=len(captions),
        caption_channels=encoders.text.model.config.d_model,
        shard_size=chosen.shard_size,
        seed=chosen.seed,
    )
    latent_shards.write_about(target, about)
    encode_captions(encoders, captions, target, chosen.shard_size)
    todo = latent_shards.missing(target, shards)
    if ray is not None:
        results: Any = map_on_ray(todo, lambda shard: extract_shard(chosen, config, shard), ray)
    else:
        results = (write_clips(encoders, shard, target) for shard in todo)
    made = sum(1 for _ in tqdm(results, desc="extract", total=len(todo), disable=not progress, unit="shard"))
    return {**latent_shards.join_index(target, shards), "shards": made}


def chunks_of(rows: Sequence[dict[str, Any]], num_frames: int, table: Sequence[Size]) -> tuple[list[str], list[Clip]]:
    """The distinct captions, sorted, and every whole chunk of every clip, at about `RATE` frames a second."""
    rows = [row for row in rows if row["error"] is None]
    captions = sorted({row["caption"] or "" for row in rows})
    number = {caption: i for i, caption in enumerate(captions)}
    chunks = []
    for row in rows:
        step = max(1, round(row["fps"] / RATE))
        reach = step * num_frames
        for k in range((row["end"] - row["start"] + step - 1) // reach):
            start = row["start"] + k * reach
            chunks.append(
                Clip(
                    id=f"{row['id']}-{k:04d}",
                    video=row["video"],
                    start=start,
                    step=step,
                    fps=row["fps"] / step,
                    bucket=towards_square(row["height"], row["width"], table),
                    caption=number[row["caption"] or ""],
                    motion=row["motion"],
                )
            )
    return captions, chunks


def _table(size: int, config: VAEConfig) -> list[Size]:
    if size in BASES:
        return buckets(size, config.spatial_factor)
    if size < 1 or size % config.spatial_factor:
        raise ReducioError(f"size={size}: must be a multiple of {config.spatial_factor}")
    return [(size, size)]


class Encoders:
    """The frozen networks, once a process."""

    def __init__(self, settings: ExtractSettings, config: VAEConfig) -> None:
        folder, dtype, device = Path(settings.model), getattr(torch, settings.dtype), settings.device
        self.settings, self.config, self.device, self.dtype = settings, config, torch.device(device), dtype
        self.vae = load_model(ReducioVAE, VAEConfig, folder / "vae", dtype, device).eval()
        self.content = ContentEncoder(
            load_foreign("diffusers", "AutoencoderKL", folder / "content_encoder", dtype, device).eval()
        )
        self.semantic = SemanticEncoder.from_pretrained(folder / "image_encoder", dtype, device).eval()
        text_model = load_foreign("transformers", "T5EncoderModel", folder / "text_encoder", dtype, device).eval()
        tokenizer_class = json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))["tokenizer"][1]
        tokenizer = load_foreign("transformers", tokenizer_class, folder / "tokenizer", dtype, "cpu")
        self.text = TextEncoder(text_model, tokenizer, settings.caption_length)

    @torch.no_grad()
    def encode(self, frames: np.ndarray, clip_id: str) -> dict[str, Tensor]:
        """A chunk uint8 [T, H, W, 3] -> its tensors, float16. The draws depend on the seed and the clip's id alone."""
        video = to_unit(frames, self.device, self.dtype).transpose(0, 1)[None]
        tiled = self.config.needs_tiling(*frames.shape[1:3])
        generator = torch.Generator("cpu").manual_seed((self.settings.seed << 32) + zlib.crc32(clip_id.encode()))
        latent = self.vae.normalize_latent(self.vae.encode(video, tiled=tiled).sample(generator))
        image = video[:, :, self.config.content_frame]
        parts = {"latent": latent, "content": self.content(image, generator), "semantic": self.semantic(image)}
        parts = {name: value[0].half().cpu().contiguous() for name, value in parts.items()}
        for name, value in parts.items():
            if not torch.isfinite(value).all():
                raise ReducioError(f"{name} has values that do not fit float16")
        return parts


def encode_captions(encoders: Encoders, captions: Sequence[str], out: Path, shard_size: int) -> None:
    """Writes the text shards that are not there yet."""
    for number in range(-(-len(captions) // shard_size)):
        if (out / latent_shards.TEXT / f"shard-{number:05d}.safetensors").is_file():
            continue
        texts = []
        for caption in captions[number * shard_size : (number + 1) * shard_size]:
            text, mask = encoders.text([caption])  # one by one: an embedding's bytes depend on no other's
            texts.append(text[0, mask[0]].half().cpu())
        latent_shards.write_text(out, number, texts)


def write_clips(encoders: Encoders, shard: Shard, out: Path) -> int:
    """Encodes and writes a shard; each video is decoded once. -> its number of clips."""
    samples: dict[str, dict[str, Tensor] | str] = {}
    by_video = defaultdict(list)
    for clip in shard.clips:
        by_video[clip.video].append(clip)
    for video, wanted in by_video.items():
        try:
            for clip, frames in _read(video, wanted, encoders.config.num_frames):
                try:
                    samples[clip.id] = encoders.encode(cover_crop(frames, *clip.bucket), clip.id)
                except ReducioError as error:
                    samples[clip.id] = first_line(error)
            reason = "the video ends before the clip does"
        except (ReducioError, OSError) as error:
            reason = first_line(error)
        for clip in wanted:
            samples.setdefault(clip.id, reason)
    latent_shards.write_shard(out, shard, samples)
    return len(samples)


def _read(video: str, clips: Sequence[Clip], count: int) -> Any:
    """Each clip with its frames uint8 [T, H, W, 3], as soon as its last frame has come."""
    waiting = {clip.id: (clip, list[np.ndarray]()) for clip in clips}
    for number, (frame, _) in enumerate(ffmpeg.frames(Path(video))):
        for clip, frames in list(waiting.values()):
            place = number - clip.start
            if place >= 0 and place % clip.step == 0:
                frames.append(frame)
                if len(frames) == count:
                    del waiting[clip.id]
                    yield clip, np.stack(frames)
        if not waiting:
            return


_loaded: dict[ExtractSettings, Encoders] = {}


def extract_shard(settings: ExtractSettings, config: VAEConfig, shard: Shard) -> int:
    """`write_clips` on another machine: the encoders are loaded there, once a process."""
    if settings not in _loaded:
        _loaded[settings] = Encoders(settings, config)
    return write_clips(_loaded[settings], shard, Path(settings.out))


def encoder_checksums(model: str | os.PathLike[str]) -> dict[str, str]:
    """What a folder of latents has to state to fit `model`."""
    folder = Path(model)
    assert set(ENCODERS) <= set(REDUCIO.names)
    return {name: latent_shards.files_checksum(folder / name) for name in ENCODERS if (folder / name).is_dir()}
