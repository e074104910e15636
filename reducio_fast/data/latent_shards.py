"""Latents and conditions on disk: written once, read by row.

    latents.json                          settings of the whole folder, with checksums of the encoders
    index.parquet                         one row per clip: its shard, row and checksum, or the error of its extraction
    text/shard-00000.safetensors          each caption once, without padding: `text` [sum of L, C], `offsets` [n + 1],
                                          and checksums `sha256` [n, 32]
    256x256/shard-00000.safetensors       `latent` [N, C, t, h, w], `content` [N, 4, H/8, W/8], `semantic` [N, S, C]
    256x256/shard-00000.parquet           the shard's rows of the index; written last, so it marks the shard as complete

The list of clips alone determines the shard of each clip, so any process can write shards in any order, and a stopped
extraction resumes with the missing shards. With padding, T5-XXL's text would be three times as large as all the rest.
"""

from __future__ import annotations

import functools
import hashlib
import logging
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
from ..system.paths import is_file
from ..system.real_numbers import LARGEST
from .latent_settings import About, read_about
from .parquet import above_zero, between, first_fault, pyarrow_modules

LOG = logging.getLogger("reducio_fast")

INDEX, TEXT = "index.parquet", "text"
TENSORS = ("latent", "content", "semantic")


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
        table = pyarrow.Table.from_pylist(rows, schema=_schema())
        parquet.write_table(table, temporary, write_page_checksum=True)


def write_text(folder: Path, number: int, texts: Sequence[Tensor]) -> None:
    """Write the embeddings [L, C] of captions, concatenated along L, with their offsets and checksums."""
    path = folder / TEXT / f"shard-{number:05d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    offsets = torch.tensor([0, *np.cumsum([len(text) for text in texts]).tolist()])
    digests = torch.tensor([list(_digest([text])) for text in texts], dtype=torch.uint8)
    with written_whole(path) as temporary:
        save_tensors({"text": torch.cat(list(texts)), "offsets": offsets, "sha256": digests}, temporary)


def missing(folder: Path, shards: Sequence[Shard]) -> list[Shard]:
    """Shards that are not completely written yet."""
    return [shard for shard in shards if not shard.path(folder).with_suffix(".parquet").is_file()]


def join_index(folder: Path, shards: Sequence[Shard]) -> dict[str, int]:
    """Write `index.parquet` from the parts of all shards; return the counts of `clips` and `errors`.

    Raises `ReducioError` if the number of rows differs from the number of clips in `latents.json`.
    """
    pyarrow, parquet = pyarrow_modules()
    about = read_about(folder)
    tables = [_read_index(shard.path(folder).with_suffix(".parquet"), about) for shard in shards]
    table = pyarrow.concat_tables(tables) if tables else _schema().empty_table()
    with written_whole(folder / INDEX) as temporary:
        parquet.write_table(table, temporary, write_page_checksum=True)
    if len(table) != about.count:
        raise ReducioError(f"{folder}: the index has {len(table)} rows for {about.count} clips; run extract again")
    return {"clips": len(table), "errors": len(table) - table.column("error").null_count}


def sample_checksum(sample: Mapping[str, Tensor]) -> str:
    """SHA-256 of a clip's tensors, read in the order of `TENSORS`."""
    return _digest([sample[name] for name in TENSORS if name in sample]).hex()


def _digest(tensors: Iterable[Tensor]) -> bytes:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return digest.digest()


def files_checksum(folder: Path) -> str:
    """SHA-256 over the names and contents of a component's .safetensors and .json files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(file_sha256(path).encode())
    return digest.hexdigest()


class LatentDataset:
    """The clips of a folder, by bucket. Files are memory-mapped, so reading a row costs only the row's bytes.

    The first read of each clip and of each caption compares its checksum. Text shards of older folders have none.

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
        if not is_file(self.folder / INDEX):
            raise ReducioError(f"{self.folder} has no {INDEX}: the extraction was stopped; run it again")
        self._tables = _by_bucket(_read_index(self.folder / INDEX, self.about))
        if not self._tables:
            raise ReducioError(f"{self.folder} holds no clip that could be read")
        self._left_out: set[str] = set()
        self._checked = {bucket: np.zeros(count, bool) for bucket, count in self.counts.items()}
        self._checked_captions = np.zeros(self.about.captions, bool)
        self._said_no_checksums = False

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

    def sample(self, bucket: str, index: int) -> dict[str, Any]:
        """A clip's tensors in float32, its `text` [L, C], and `fps`, `motion`, `id`."""
        index = range(len(self._tables[bucket]))[index]
        row, check = self.row(bucket, index), not self._checked[bucket][index]
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
        self._checked[bucket][index] = True
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
            text = file.get_slice("text")[first:last]
            if not self._checked_captions[caption]:
                self._check_text(file, place, text)
                self._checked_captions[caption] = True
            return text.float()
        except (OSError, SafetensorError, ValueError, IndexError, OverflowError) as error:
            raise ReducioError(f"{path} is damaged: {first_line(error)}; remove it, extract again") from error

    def _check_text(self, file: Any, place: int, text: Tensor) -> None:
        if "sha256" in file.keys():  # noqa: SIM118 - not a dict
            if bytes(file.get_slice("sha256")[place].tolist()) != _digest([text]):
                raise ValueError("a caption has another checksum")
        elif not self._said_no_checksums:
            LOG.warning("%s: texts without checksums, of an older version; damage to them stays unseen", self.folder)
            self._said_no_checksums = True


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


def _read_index(path: Path, about: About) -> Any:
    """The rows of an index, or of a shard's part of it. Raises `ReducioError` for values that cannot be right."""
    table = _read_parquet(path)
    if table.schema.names != _schema().names:
        raise ReducioError(f"{path} is of another version; remove it, run reducio-fast extract again")

    def rules(table: Any) -> dict[str, tuple[Any, str]]:
        import pyarrow.compute as pc

        below = {"shard": about.count, "row": min(about.count, about.shard_size), "caption": about.captions}
        rules = {name: (between(table[name], 0, n - 1), f"a whole number below {n}") for name, n in below.items()} | {
            "id": (table["id"].is_valid(), "a text"),
            "bucket": (pc.match_substring_regex(table["bucket"], r"^\d{1,5}x\d{1,5}$"), "a size such as 256x256"),
            "fps": (above_zero(table["fps"]), "a finite number above 0"),
            "motion": (between(table["motion"], -LARGEST, LARGEST).fill_null(True), "a finite number or null"),
        }
        failed = table["error"].is_valid()
        return {name: (pc.or_kleene(failed, mask), right) for name, (mask, right) in rules.items()}

    if fault := first_fault(table, _schema(), rules):
        raise ReducioError(f"{path}: {fault}; remove it, run reducio-fast extract again")
    return table


def _read_parquet(path: Path) -> Any:
    pyarrow, parquet = pyarrow_modules()
    try:
        table = parquet.read_table(path, page_checksum_verification=True)
        table.validate(full=True)  # also that its texts are UTF-8
        return table
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
