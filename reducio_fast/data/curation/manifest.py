"""The list of clips: one Parquet part per source video, written atomically; the list is the union of the parts.

So the list depends neither on the order in which the videos were processed nor on the process that did it, and a
stopped run resumes with the videos that have no part, or one of other settings. A video that cannot be read is a row
with an error message.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from ...system.atomic_files import written_whole
from ...system.errors import ReducioError, first_line, shown
from ...system.paths import is_file, is_folder
from ...system.real_numbers import LARGEST
from ..parquet import above_zero, between, first_fault, pyarrow_modules

VERSION = "1"
PARTS, CHOSEN, THUMBNAIL = "parts", "clips.parquet", "thumbnail"
MOST_FRAMES = 10**8  # of a video: 46 days at 25 frames a second; `extract` lists 6 million clips of it
MOST_SIDE = 16384  # pixels, as in a call of a pipeline
# Column -> type. `start` and `end` are frame numbers of `media.ffmpeg.frames`; `motion` is in percent of the short side
# per half second, `text_area` is a share of the frame. A row with `error` has no scores.
COLUMNS: dict[str, str] = {
    "id": "string",
    "video": "string",
    "sha256": "string",
    "start": "int64",
    "end": "int64",
    "fps": "float64",
    "height": "int64",
    "width": "int64",
    "caption": "string",
    "motion": "float64",
    "text_area": "float64",
    "clip_similarity": "float64",
    "aesthetic": "float64",
    THUMBNAIL: "binary",
    "error": "string",
}


def write(rows: Iterable[Mapping[str, Any]], path: Path, made_with: Mapping[str, Any] | None = None) -> None:
    """Write a manifest of these rows; columns that a row lacks are null. `made_with`: plain data for `made_with`."""
    pyarrow, parquet = pyarrow_modules()
    complete = [{name: row.get(name) for name in COLUMNS} for row in rows]
    with written_whole(path) as temporary:
        table = pyarrow.Table.from_pylist(complete, schema=_schema(made_with))
        parquet.write_table(table, temporary, write_page_checksum=True)


def part_path(folder: str | os.PathLike[str], video: str) -> Path:
    """Path of a video's part. Its name is a hash of the video's path, so a check for it reads no video."""
    name = hashlib.sha256(os.fsencode(os.path.abspath(video))).hexdigest()[:20]
    return Path(folder) / PARTS / f"part-{name}.parquet"


def made_with(path: Path) -> dict[str, Any] | None:
    """The settings that `write` stored in a manifest file; None if there are none or there is no such file."""
    return _read_file(path, [])[0].get("made_with") if is_file(path) else None


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a manifest file, sorted by id, without the pictures (`thumbnails`).

    Of a folder, the rows of its clips.parquet, which are the selected clips; without that file, of all parts. Raises
    `ReducioError`, with the command to run, if there is no manifest or it is damaged or of another version.
    """
    path = Path(path)
    if is_folder(path):
        if not is_file(path / CHOSEN):
            return read_parts(path)
        path /= CHOSEN
    return _sorted([path])


def read_parts(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of all parts of a folder, as `read` returns them and with its errors."""
    parts = sorted((Path(folder) / PARTS).glob("part-*.parquet"))
    if not parts:
        raise ReducioError(
            f"{folder} holds no manifest (no {PARTS}/part-*.parquet); make one with: reducio-fast curate"
        )
    return _sorted(parts)


def without_moved(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without those whose video is gone while a copy of it is there, as after a folder was moved."""
    kept: list[dict[str, Any]] = []
    for _, group in groupby(rows, key=itemgetter("id")):
        same = list(group)
        there = [row for row in same if is_file(row["video"])] if len(same) > 1 else same
        kept += there or same[:1]
    return kept


def thumbnails(folder: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> dict[str, bytes]:
    """JPEG pictures of clips by id, from the parts of their videos. Five million of them would be 20 GB."""
    wanted = {row["id"]: part_path(folder, row["video"]) for row in rows}
    pictures = {
        row["id"]: row["thumbnail"] for part in set(wanted.values()) for row in _read_file(part, ["id", THUMBNAIL])[1]
    }
    return {name: pictures[name] for name in wanted if pictures.get(name)}


def _rules(table: Any) -> dict[str, tuple[Any, str]]:
    """What `first_fault` checks. `read` sorts all rows by id and a report names all videos, also those with errors."""
    import pyarrow.compute as pc

    def text(column: Any) -> Any:
        return pc.and_(pc.greater(pc.binary_length(column), 0), pc.invert(pc.match_substring(column, "\0")))

    def score(column: Any) -> Any:
        return between(column, -LARGEST, LARGEST).fill_null(True)

    scores = [name for name, kind in COLUMNS.items() if kind == "float64" and name != "fps"]
    start, end, failed = table["start"], table["end"], table["error"].is_valid()
    rules = {
        "start": (between(start, 0, MOST_FRAMES), f"a whole number from 0 to {MOST_FRAMES}"),
        "end": (pc.and_(between(end, 1, MOST_FRAMES), pc.less(start, end)), f"above start and at most {MOST_FRAMES}"),
        "fps": (above_zero(table["fps"]), "a finite number above 0"),
        **{n: (between(table[n], 1, MOST_SIDE), f"a whole number from 1 to {MOST_SIDE}") for n in ("height", "width")},
        **{n: (score(table[n]), "a finite number or null") for n in scores},
    }
    texts = {name: (text(table[name]), "a text, not empty and without a zero byte") for name in ("id", "video")}
    return texts | {name: (pc.or_kleene(failed, mask), right) for name, (mask, right) in rules.items()}


def _sorted(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of manifest files, sorted by id. Raises `ReducioError` for an id of two clips.

    Copies of a video have the same ids and the same clips, of which a latent is the same too.
    """
    files = [(path, _read_file(path)[1]) for path in paths]
    rows = sorted((row for _, group in files for row in group), key=itemgetter("id"))
    for name, group in groupby(rows, key=itemgetter("id")):
        same = list(group)
        if len(same) > 1 and not _are_copies(same):
            places = [(path, i) for path, listed in files for i, row in enumerate(listed) if row["id"] == name]
            (first, i), (path, number) = places[0], places[-1]
            raise ReducioError(
                f"{path}: row {number}: id is {shown(name)}, it must differ from that of row {i} of {first}; "
                f"remove {path.name} and run reducio-fast curate again"
            )
    return rows


def _are_copies(rows: Sequence[Mapping[str, Any]]) -> bool:
    contents = {tuple(row[name] for name in ("sha256", "start", "end", "fps", "height", "width")) for row in rows}
    return len(contents) == 1 and bool(rows[0]["sha256"]) and len({row["video"] for row in rows}) == len(rows)


def _read_file(path: Path, columns: Sequence[str] | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metadata of a manifest file and these columns of its rows; by default all but the pictures."""
    rules = _rules if columns is None else lambda table: {}
    if columns is None:
        columns = [name for name in COLUMNS if name != THUMBNAIL]
    pyarrow, parquet = pyarrow_modules()
    again = f"remove {path.name} and run reducio-fast curate again"
    try:
        about = dict(json.loads((parquet.read_schema(path).metadata or {}).get(b"reducio-fast", b"{}")))
        if "manifest" not in about:
            raise ReducioError(f"{path} is a Parquet file, but no manifest; reducio-fast curate makes one")
        table = parquet.read_table(path, columns=columns, page_checksum_verification=True)
        table.validate(full=True)  # also that its texts are UTF-8
    except ReducioError:
        raise
    except FileNotFoundError:
        raise ReducioError(f"no such manifest: {path}") from None
    except (OSError, ValueError, TypeError, RecursionError, pyarrow.ArrowException) as error:
        raise ReducioError(f"{path} is damaged: {first_line(error)}; {again}") from error
    if about.get("manifest") != VERSION:
        raise ReducioError(f"{path} is a manifest of version {about.get('manifest')}, this reads {VERSION}; {again}")
    if fault := first_fault(table, [field for field in _schema(None) if field.name in columns], rules):
        raise ReducioError(f"{path}: {fault}; {again}")
    return about, table.to_pylist()


def _schema(made_with: Mapping[str, Any] | None) -> Any:
    pyarrow, _ = pyarrow_modules()
    fields = [(name, getattr(pyarrow, kind)()) for name, kind in COLUMNS.items()]
    about = {"manifest": VERSION} | ({} if made_with is None else {"made_with": dict(made_with)})
    return pyarrow.schema(fields, metadata={"reducio-fast": json.dumps(about)})
