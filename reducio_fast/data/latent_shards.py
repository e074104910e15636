"""Latents and conditions on disk: written once, read by row.

    latents.json                          settings of the whole folder, with checksums of the encoders
    index.parquet                         one row per clip: its shard, row and checksum, or the error of its extraction
    text/shard-00000.safetensors          `text` [sum of L, C] and `offsets` [n + 1]: each caption once, without padding
    256x256/shard-00000.safetensors       `latent` [N, C, t, h, w], `content` [N, 4, H/8, W/8], `semantic` [N, S, C]
    256x256/shard-00000.parquet           the shard's rows of the index; written last, so it marks the shard as complete

The list of clips alone determines the shard of each clip, so any process can write shards in any order, and a stopped
extraction resumes with the missing shards. With padding, T5-XXL's text would be three times as large as all the rest.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints.strict_files import save_tensors
from ..media.aspect_buckets import Size
from ..system.atomic_files import written_whole
from ..system.checksum import file_sha256
from ..system.errors import ReducioError, first_line
from .parquet import pyarrow_modules

VERSION = 1
ABOUT, INDEX, TEXT = "latents.json", "index.parquet", "text"
TENSORS = ("latent", "content", "semantic")


@dataclass(frozen=True, slots=True)
class About:
    """Settings that all files of a folder share. `encoders` maps a component to the SHA-256 of its files."""

    encoders: dict[str, str]
    clips: str  # SHA-256 of the list of clips
    count: int  # number of clips
    captions: int  # number of distinct captions
    caption_channels: int
    shard_size: int
    seed: int
    dtype: str = "float16"
    version: int = VERSION
    # Settings of the encoders. A folder without the first two was made before they were read from the model, with these
    # values; None means that a folder does not say.
    clean_caption: bool = False
    content_scaling_factor: float = 1.0
    encoder_dtype: str | None = None
    caption_length: int | None = None


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip to encode: frames `start`, `start + step`, ... of a video; `caption` is the index of its text."""

    id: str
    video: str
    start: int
    step: int
    fps: float  # of the clip: the video's frame rate divided by `step`
    bucket: Size
    caption: int
    motion: float | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """The clips of one shard file, all of one bucket."""

    bucket: Size
    number: int
    clips: tuple[Clip, ...]

    def path(self, folder: Path) -> Path:
        """Path of the shard's files without their suffix."""
        return folder / bucket_name(self.bucket) / f"shard-{self.number:05d}"


def bucket_name(bucket: Size) -> str:
    return f"{bucket[0]}x{bucket[1]}"


def plan(clips: Sequence[Clip], shard_size: int) -> list[Shard]:
    """Group the clips by bucket and split each group, sorted by id, into shards of at most `shard_size` clips."""
    by_bucket = defaultdict(list)
    for clip in sorted(clips, key=lambda clip: clip.id):
        by_bucket[clip.bucket].append(clip)
    return [
        Shard(bucket, i // shard_size, tuple(rows[i : i + shard_size]))
        for bucket, rows in sorted(by_bucket.items())
        for i in range(0, len(rows), shard_size)
    ]


def write_shard(folder: Path, shard: Shard, samples: Mapping[str, dict[str, Tensor] | str]) -> None:
    """Write a shard and its part of the index. `samples` maps a clip's id to its tensors, or to an error message."""
    pyarrow, parquet = pyarrow_modules()
    rows, kept = [], list[dict[str, Tensor]]()
    for clip in shard.clips:
        sample = samples[clip.id]
        row = {**asdict(clip), "bucket": bucket_name(clip.bucket), "shard": shard.number}
        if isinstance(sample, str):
            rows.append({**row, "row": None, "sha256": None, "error": sample})
        else:
            rows.append({**row, "row": len(kept), "sha256": sample_checksum(sample), "error": None})
            kept.append(sample)
    path = shard.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kept:
        stacked = {name: torch.stack([sample[name] for sample in kept]) for name in TENSORS if name in kept[0]}
        with written_whole(path.with_suffix(".safetensors")) as temporary:
            save_tensors(stacked, temporary)
    with written_whole(path.with_suffix(".parquet")) as temporary:
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema=_schema()), temporary)


def write_text(folder: Path, number: int, texts: Sequence[Tensor]) -> None:
    """Write the embeddings [L, C] of captions, concatenated along L, with their offsets."""
    path = folder / TEXT / f"shard-{number:05d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    offsets = torch.tensor([0, *np.cumsum([len(text) for text in texts]).tolist()])
    with written_whole(path) as temporary:
        save_tensors({"text": torch.cat(list(texts)), "offsets": offsets}, temporary)


def missing(folder: Path, shards: Sequence[Shard]) -> list[Shard]:
    """Shards that are not completely written yet."""
    return [shard for shard in shards if not shard.path(folder).with_suffix(".parquet").is_file()]


def write_about(folder: Path, about: About) -> None:
    """Write `latents.json`. Raises `ReducioError` if the folder was started with other clips, encoders or settings."""
    path = folder / ABOUT
    if path.is_file():
        existing = read_about(folder)
        for name, digest in about.encoders.items():
            if existing.encoders.get(name) != digest:
                raise ReducioError(f"{folder} holds latents of another {name}; extract into another folder")
        wanted = asdict(about)
        for name, value in asdict(existing).items():
            if value is not None and value != wanted[name]:
                raise ReducioError(f"{folder} was begun with another {name}; extract into another folder, or remove it")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(asdict(about), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_about(folder: Path) -> About:
    """Read `latents.json`. Raises `ReducioError` if it is missing, damaged or of another version."""
    path = folder / ABOUT
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReducioError(f"{folder} holds no latents (no {ABOUT}); make them with: reducio-fast extract") from None
    except (OSError, ValueError) as error:
        raise ReducioError(f"{path} is damaged: {first_line(error)}; run reducio-fast extract again") from error
    if values.get("version") != VERSION:
        raise ReducioError(
            f"{path} has version {values.get('version')}, this reads {VERSION}; run reducio-fast extract again"
        )
    try:
        return About(**values)
    except TypeError as error:
        raise ReducioError(f"{path} is damaged: {first_line(error)}; run reducio-fast extract again") from error


def join_index(folder: Path, shards: Sequence[Shard]) -> dict[str, int]:
    """Write `index.parquet` from the parts of all shards; return the counts of `clips` and `errors`.

    Raises `ReducioError` if the number of rows differs from the number of clips in `latents.json`.
    """
    pyarrow, parquet = pyarrow_modules()
    tables = [_read_parquet(shard.path(folder).with_suffix(".parquet")) for shard in shards]
    table = pyarrow.concat_tables(tables) if tables else _schema().empty_table()
    with written_whole(folder / INDEX) as temporary:
        parquet.write_table(table, temporary)
    about = read_about(folder)
    if len(table) != about.count:
        raise ReducioError(f"{folder}: the index has {len(table)} rows for {about.count} clips; run extract again")
    return {"clips": len(table), "errors": len(table) - table.column("error").null_count}


def sample_checksum(sample: Mapping[str, Tensor]) -> str:
    """SHA-256 of a clip's tensors, read in the order of `TENSORS`."""
    digest = hashlib.sha256()
    for name in TENSORS:
        if name in sample:
            digest.update(np.ascontiguousarray(sample[name].numpy()).tobytes())
    return digest.hexdigest()


def files_checksum(folder: Path) -> str:
    """SHA-256 over the names and contents of a component's .safetensors and .json files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(file_sha256(path).encode())
    return digest.hexdigest()


class LatentDataset:
    """The clips of a folder, by bucket. Files are memory-mapped, so reading a row costs only the row's bytes.

    Raises `ReducioError` if the folder is incomplete or damaged, or if its latents come from encoders other than
    `encoders` (component -> SHA-256, see `files_checksum`) or from other `settings` (fields of `About`) of theirs.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        encoders: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.about = read_about(self.folder)
        for name, digest in (encoders or {}).items():
            if self.about.encoders.get(name) != digest:
                raise ReducioError(
                    f"{self.folder} holds latents that another {name} made "
                    f"({str(self.about.encoders.get(name))[:12]}, not {digest[:12]}); run reducio-fast extract again"
                )
        for name, value in (settings or {}).items():
            if (made := getattr(self.about, name)) != value:
                raise ReducioError(
                    f"{self.folder} holds latents made with {name}={made}, the model has {name}={value}; "
                    "run reducio-fast extract again"
                )
        if not (self.folder / INDEX).is_file():
            raise ReducioError(f"{self.folder} has no {INDEX}: the extraction was stopped; run it again")
        table = _read_parquet(self.folder / INDEX)
        if table.schema.names != _schema().names:
            raise ReducioError(f"{self.folder / INDEX} is of another version; run reducio-fast extract again")
        self._tables = _by_bucket(table)
        if not self._tables:
            raise ReducioError(f"{self.folder} holds no clip that could be read")
        self._left_out: set[str] = set()

    @property
    def counts(self) -> dict[str, int]:
        """Clips of each bucket."""
        return {bucket: len(table) for bucket, table in self._tables.items()}

    def row(self, bucket: str, index: int) -> dict[str, Any]:
        """A clip's row of the index; a negative `index` counts from the end."""
        table = self._tables[bucket]
        return table.slice(range(len(table))[index], 1).to_pylist()[0]

    def take_last(self, bucket: str, count: int) -> list[dict[str, Any]]:
        """Samples of a bucket's last clips, which are removed from the dataset."""
        table = self._tables[bucket]
        if count >= len(table):
            raise ReducioError(f"held_out={count}: bucket {bucket} has {len(table)} clips")
        samples = [self.sample(bucket, index) for index in range(-count, 0)]
        self._tables[bucket] = table.slice(0, len(table) - count)
        return samples

    def leave_out(self, names: Iterable[str]) -> None:
        """Do not read these entries of `TENSORS` in later calls of `sample`."""
        self._left_out = set(names)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def sample(self, bucket: str, index: int, check: bool = False) -> dict[str, Any]:
        """A clip's tensors in float32, its `text` [L, C], and `fps`, `motion`, `id`. `check` verifies its checksum."""
        row = self.row(bucket, index)
        path = self.folder / bucket / f"shard-{row['shard']:05d}.safetensors"
        try:
            file = _open(path)
            names = [name for name in TENSORS if name in file.keys()]  # noqa: SIM118 - not a dict
            tensors = {name: file.get_slice(name)[row["row"]] for name in names if check or name not in self._left_out}
        except (OSError, SafetensorError, IndexError) as error:
            raise ReducioError(
                f"{path} is damaged: {first_line(error)}; remove it and its .parquet, extract again"
            ) from error
        if check and sample_checksum(tensors) != row["sha256"]:
            raise ReducioError(f"{path}: clip {row['id']} is damaged; remove it and its .parquet, extract again")
        sample: dict[str, Any] = {name: value.float() for name, value in tensors.items()}
        for name in self._left_out:
            sample.pop(name, None)
        return {
            **sample,
            "text": self.text(row["caption"]),
            "fps": row["fps"],
            "motion": row["motion"],
            "id": row["id"],
        }

    def text(self, caption: int) -> Tensor:
        """Embedding of the caption with index `caption`, float32 [L, C]."""
        number, place = divmod(caption, self.about.shard_size)
        path = self.folder / TEXT / f"shard-{number:05d}.safetensors"
        try:
            file = _open(path)
            first, last = file.get_slice("offsets")[place : place + 2].tolist()
            return file.get_slice("text")[first:last].float()
        except (OSError, SafetensorError, ValueError) as error:
            raise ReducioError(f"{path} is damaged: {first_line(error)}; remove it, extract again") from error


class EpochOrder:
    """Maps the number of a step to its rows. An epoch visits every clip; all clips of a batch are of one bucket.

    The last batch of a bucket is filled up with rows from the start of the bucket's permutation, so no clip is left
    out and all batches have the same size.
    """

    def __init__(self, counts: Mapping[str, int], batch: int, seed: int) -> None:
        self.counts, self.batch, self.seed = dict(sorted(counts.items())), batch, seed
        self.length = sum(-(-count // batch) for count in self.counts.values())  # steps per epoch

    def rows(self, step: int) -> tuple[str, list[int]]:
        """The bucket of a step, and the step's rows in the order of the global batch."""
        epoch, place = divmod(step, self.length)
        bucket, rows = _epoch(tuple(self.counts.items()), self.batch, self.seed, epoch)[place]
        return bucket, rows.tolist()


@functools.lru_cache(maxsize=2)
def _epoch(counts: tuple[tuple[str, int], ...], batch: int, seed: int, epoch: int) -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng((seed, 1 << 20, epoch))
    batches = []
    for bucket, count in counts:
        order = rng.permutation(count)
        order = np.resize(order, -(-count // batch) * batch)  # np.resize repeats the array from its start
        batches += [(bucket, rows) for rows in order.reshape(-1, batch)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _open(path: Path) -> Any:
    status = path.stat()
    return _opened(str(path), status.st_ino, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _opened(path: str, _inode: int, _changed: int) -> Any:
    # A file that was replaced has another inode or time.
    return safe_open(path, framework="pt")


def _by_bucket(table: Any) -> dict[str, Any]:
    """The readable clips of an index, one table for each bucket, in the order of their names.

    Rows stay in pyarrow's columns: 500,000 take 106 MB there, and 742 MB as dictionaries.
    """
    import pyarrow.compute

    table = table.filter(table["error"].is_null())
    names = sorted(table["bucket"].unique().to_pylist())
    return {name: table.filter(pyarrow.compute.equal(table["bucket"], name)) for name in names}


def _read_parquet(path: Path) -> Any:
    pyarrow, parquet = pyarrow_modules()
    try:
        return parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ReducioError(
            f"{path} is damaged: {first_line(error)}; remove it, run reducio-fast extract again"
        ) from error


def _schema() -> Any:
    pa, _ = pyarrow_modules()
    text, number, real = pa.string(), pa.int64(), pa.float64()
    fields = {"id": text, "video": text, "start": number, "step": number, "fps": real, "bucket": text}
    fields |= {"caption": number, "motion": real, "shard": number, "row": number, "sha256": text, "error": text}
    return pa.schema(list(fields.items()))
