"""Encodes a curated list of clips into latents and conditions, as the released extraction does.

Each 16-frame chunk yields the motion latent (a sample of the posterior, layer-normed) and, from its centre frame, the
content autoencoder's latent and the semantic tokens; each distinct caption yields its embedding. The encoders are
frozen during the transformer's training, so each clip is encoded only once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import queue
import threading
import zlib
from collections import defaultdict
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...checkpoints.layouts import REDUCIO
from ...checkpoints.networks import load_foreign, load_model, read_config
from ...checkpoints.strict_files import INDEX as MODEL_INDEX
from ...checkpoints.strict_files import embedded_model, read_json
from ...data import latent_shards
from ...data.clip_files import MOST_READERS
from ...data.curation import manifest
from ...data.curation.on_ray import map_on_ray
from ...data.latent_settings import About, write_about
from ...data.latent_shards import Clip, Shard
from ...media import ffmpeg
from ...media.aspect_buckets import BASES, Size, buckets, towards_square
from ...media.image_files import cover_crop
from ...media.pixels import to_unit
from ...pipelines.reducio.component_table import check_encoder_settings
from ...pipelines.reducio.encoders import ContentEncoder, SemanticEncoder, TextEncoder
from ...reference import ReducioVAE, VAEConfig
from ...system import cores
from ...system.devices import resolve_device, resolve_dtype
from ...system.errors import ReducioError, first_line, lacks_space
from ...system.paths import is_file, missing_room

ENCODERS = ("vae", "content_encoder", "image_encoder", "text_encoder", "tokenizer")
RATE = 16.0  # the release's training frame rate: every round(fps / 16)-th frame of a video is used


@dataclass(frozen=True, slots=True)
class ExtractSettings:
    """Settings of an extraction. Plain data, since Ray pickles it for other machines."""

    model: str
    out: str
    size: int = 256  # 256, 512 or 1024 with their aspect buckets; any other multiple of 32 gives squares only
    shard_size: int = 256
    seed: int = 0
    device: str | None = None  # a GPU if there is one
    dtype: str | None = None  # of the encoders; float32 on a CPU, bfloat16 on a GPU
    caption_length: int = 120

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:  # an encoder's generator takes 64 bits, of which a clip's id fills the lower 32
            raise ReducioError(f"seed={self.seed}: must be a whole number from 0 to {2**32 - 1}")
        for name in ("shard_size", "caption_length"):
            if getattr(self, name) < 1:
                raise ReducioError(f"{name}={getattr(self, name)}: must be at least 1")


def extract(
    clips: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    ray: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> dict[str, int]:
    """Write the latents of a manifest's clips into `out`; resume a stopped extraction.

    Args:
        clips: a manifest written by `reducio-fast curate` or `select`.
        model: model folder with the encoders; None means the embedded model.
        ray: address of a Ray cluster to run on.
        settings: see `ExtractSettings`.

    Returns:
        Counts: `clips`, `errors` (clips that could not be decoded or encoded), `shards` (written by this call).

    Raises:
        ReducioError: the manifest or the model cannot be read, `out` holds latents of other clips or encoders, or its
            disk has no space for the latents.
    """
    folder = Path(model) if model is not None else embedded_model()
    if not is_file(folder / MODEL_INDEX, "model"):
        raise ReducioError(f"{folder} is no model folder (no {MODEL_INDEX})")
    chosen = ExtractSettings(model=str(folder), out=str(out), **settings)
    device = resolve_device(chosen.device)
    dtype = str(resolve_dtype(chosen.dtype, None, device)).removeprefix("torch.")
    chosen = dataclasses.replace(chosen, device=str(device), dtype=dtype)  # the same on all machines
    config = read_config(VAEConfig, folder / "vae")
    table = _table(chosen.size, config)
    captions, chunks = chunks_of(manifest.read(clips), config.num_frames, table)
    if not chunks:
        reason = "no clip" if captions else "none of its rows is a clip that can be read, so none"
        raise ReducioError(f"{clips}: {reason} is {config.num_frames} frames long at {RATE:g} frames a second")
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
        encoder_dtype=str(encoders.dtype).removeprefix("torch."),
        caption_length=chosen.caption_length,
        **encoder_settings(folder),
    )
    write_about(target, about)
    todo = latent_shards.missing(target, shards)
    # "at least", because the captions, whose numbers of tokens are not known, and the index come on top.
    if reason := missing_room(target, sum(len(shard.clips) * encoders.clip_bytes(shard.bucket) for shard in todo)):
        raise ReducioError(f"no space left in {target} for the latents: at least {reason}")
    encode_captions(encoders, captions, target, chosen.shard_size)
    if ray is not None:
        # Ray gives each task a GPU, which is the only one that the task sees, whatever the number in `device`.
        shared = dataclasses.replace(
            chosen, model=os.path.abspath(folder), out=os.path.abspath(out), device=device.type
        )
        results: Any = map_on_ray(
            todo, lambda shard: extract_shard(shared, config, shard), ray, gpu=device.type == "cuda"
        )
    else:
        results = (write_clips(encoders, shard, target) for shard in todo)
    made = sum(1 for _ in tqdm(results, desc="extract", total=len(todo), disable=not progress, unit="shard"))
    return {**latent_shards.join_index(target, shards), "shards": made}


def chunks_of(rows: Sequence[dict[str, Any]], num_frames: int, table: Sequence[Size]) -> tuple[list[str], list[Clip]]:
    """The distinct captions, sorted, and all complete chunks of all clips, at about `RATE` frames a second."""
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
    """The frozen encoders of a model folder."""

    def __init__(self, settings: ExtractSettings, config: VAEConfig) -> None:
        folder, device = Path(settings.model), resolve_device(settings.device)
        dtype, chosen = resolve_dtype(settings.dtype, None, device), encoder_settings(folder)
        self.settings, self.config, self.device, self.dtype = settings, config, device, dtype
        self.vae = load_model(ReducioVAE, VAEConfig, folder / "vae", dtype, device).eval()
        self.content = ContentEncoder(
            load_foreign("diffusers", "AutoencoderKL", folder / "content_encoder", dtype, device).eval(),
            chosen["content_scaling_factor"],
        )
        self.semantic = SemanticEncoder.from_pretrained(folder / "image_encoder", dtype, device).eval()
        text_model = load_foreign("transformers", "T5EncoderModel", folder / "text_encoder", dtype, device).eval()
        entry = read_json(folder / MODEL_INDEX).get("tokenizer")
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
            raise ReducioError(f"{folder / MODEL_INDEX}: tokenizer must be [library, class], is {entry!r}")
        tokenizer = load_foreign("transformers", entry[1], folder / "tokenizer", dtype, "cpu")
        self.text = TextEncoder(text_model, tokenizer, settings.caption_length, chosen["clean_caption"])

    @torch.no_grad()
    def encode(self, frames: np.ndarray, clip_id: str) -> dict[str, Tensor]:
        """Encode a chunk, uint8 [T, H, W, 3], into float16 tensors. Sampling depends only on the seed and the id.

        Raises `ReducioError` if a value does not fit float16.
        """
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

    def clip_bytes(self, bucket: Size) -> int:
        """Bytes of the tensors that `encode` returns for a clip of this size."""
        (height, width), (rows, columns), factor = bucket, self.semantic.visual.grid_size, self.content.factor
        latent = math.prod(self.config.latent_shape(height, width))
        content = self.content.vae.config.latent_channels * (height // factor) * (width // factor)
        semantic = rows * columns * self.semantic.visual.conv1.out_channels
        return (latent + content + semantic) * torch.float16.itemsize


def encode_captions(encoders: Encoders, captions: Sequence[str], out: Path, shard_size: int) -> None:
    """Write the missing text shards."""
    for number in range(-(-len(captions) // shard_size)):
        if (out / latent_shards.TEXT / f"shard-{number:05d}.safetensors").is_file():
            continue
        texts = []
        for caption in captions[number * shard_size : (number + 1) * shard_size]:
            text, mask = encoders.text([caption])  # one by one, so that no other caption affects an embedding's bytes
            texts.append(text[0, mask[0]].half().cpu())
        latent_shards.write_text(out, number, texts)


def write_clips(encoders: Encoders, shard: Shard, out: Path) -> int:
    """Encode and write a shard, decoding each video once; return the shard's number of clips."""
    samples: dict[str, dict[str, Tensor] | str] = {}
    with closing(_decoded(shard.clips, encoders.config.num_frames)) as decoded:
        for clip, frames in decoded:
            if isinstance(frames, str) and clip.id in samples:  # a copy of a video that could be read
                continue
            try:
                samples[clip.id] = frames if isinstance(frames, str) else encoders.encode(frames, clip.id)
            except ReducioError as error:
                samples[clip.id] = first_line(error)
    latent_shards.write_shard(out, shard, samples)
    return len(samples)


def _decoded(clips: Sequence[Clip], count: int) -> Generator[tuple[Clip, np.ndarray | str], None, None]:
    """Yield each clip, in any order, with its frames, cropped to its bucket, or with the reason why it has none.

    The videos are decoded in threads, a few clips ahead: 16 frames of 1280x720, cropped to 256, take 0.7 s of a core of
    a Xeon, their encoders 25 ms of an H100 (predicted from 9.4 TFLOP at 40% of its peak).
    """
    by_video = defaultdict(list)
    for clip in clips:
        by_video[clip.video].append(clip)
    readers = min(cores.usable(), len(by_video), MOST_READERS)
    ready: queue.Queue[tuple[Clip, np.ndarray | str] | Exception] = queue.Queue(readers)
    stopped = threading.Event()

    def put(item: tuple[Clip, np.ndarray | str] | Exception) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def read(video: str) -> None:
        missing = {clip.id: clip for clip in by_video[video]}
        try:
            for clip, frames in _read(video, by_video[video], count):
                put((missing.pop(clip.id), cover_crop(frames, *clip.bucket)))
                if stopped.is_set():
                    return
            reason = "the video ends before the clip does"
        except Exception as error:
            if not isinstance(error, ReducioError | OSError) or lacks_space(error):
                return put(error)
            reason = first_line(error)
        for clip in missing.values():
            put((clip, reason))

    pool = ThreadPoolExecutor(readers, "extract")
    try:
        for video in by_video:
            pool.submit(read, video)
        for _ in clips:
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def _read(video: str, clips: Sequence[Clip], count: int) -> Any:
    """Decode a video once and yield each clip with its frames, uint8 [T, H, W, 3], as soon as they are complete.

    The decoder starts at the first of these clips: a film's clips fill many shards, and each of them would decode all
    that lies before.
    """
    waiting = {clip.id: (clip, list[np.ndarray]()) for clip in clips}
    first = min(clip.start for clip in clips)
    for number, (frame, _) in enumerate(ffmpeg.frames(Path(video), start=first), start=first):
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
    """Run `write_clips` on a Ray worker, which loads the encoders once per process."""
    if settings not in _loaded:
        _loaded[settings] = Encoders(settings, config)
    return write_clips(_loaded[settings], shard, Path(settings.out))


def encoder_checksums(model: str | os.PathLike[str]) -> dict[str, str]:
    """Checksums (component -> SHA-256) of the encoders of `model`; latents made with them state the same values."""
    folder = Path(model)
    assert set(ENCODERS) <= set(REDUCIO.names)
    return {name: latent_shards.files_checksum(folder / name) for name in ENCODERS if (folder / name).is_dir()}


def encoder_settings(model: str | os.PathLike[str]) -> dict[str, Any]:
    """Settings of `model` that change what its encoders return, by their names in `About`; a pipeline uses the same."""
    index = read_json(Path(model) / MODEL_INDEX)
    settings = {
        "clean_caption": index.get("clean_caption", False),
        "content_scaling_factor": index.get("content_scaling_factor", 1.0),
    }
    check_encoder_settings(**settings)
    return settings
