"""Rows of a manifest whose values cannot be right are refused where they are read, in one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from reducio_fast.data.clip_files import ClipFiles
from reducio_fast.data.curation import manifest
from reducio_fast.system.errors import ReducioError


def row(name: str = "a", **changes: Any) -> dict[str, Any]:
    values = {"id": name, "video": f"{name}.mp4", "start": 0, "end": 40, "fps": 24.0, "height": 64, "width": 96}
    return values | changes


def refused(path: Path) -> str:
    with pytest.raises(ReducioError) as caught:
        ClipFiles(path, 16, 24.0)
    line = str(caught.value)
    assert "\n" not in line and line.endswith("run reducio-fast curate again")
    return line


WRONG: dict[str, tuple[object, ...]] = {
    "id": (None, "", "a\0b"),
    "video": (None, "", "a\0.mp4"),
    "start": (None, -5, 10**18),
    "end": (None, 0, -1, 10**18),
    "fps": (None, math.nan, math.inf, 0.0, -1.0, 1e300),
    "height": (None, 0, -1, 10**18),
    "width": (None, 0, -1, 10**18),
    "motion": (math.nan, math.inf),
    "aesthetic": (math.nan, -math.inf),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_named_with_its_row(name: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "clips.parquet"
    manifest.write([row("z"), row(**{name: value})], path)
    assert refused(path).startswith(f"{path}: row 1: {name} is {value!r}, it must be ")


def test_a_row_with_an_error_needs_an_id_and_a_video_alone(tmp_path: Path) -> None:
    path = tmp_path / "clips.parquet"
    manifest.write([row("b"), {"id": "a", "video": "v", "error": "broken"}], path)
    assert [made["id"] for made in manifest.read(path)] == ["a", "b"]
    for name in ("id", "video"):
        manifest.write([{"id": "a", "video": "v", "error": "broken"} | {name: None}], path)
        assert f"row 0: {name} is None" in refused(path)


@pytest.mark.parametrize("end", [16, 15])
def test_a_clip_has_a_frame(end: int, tmp_path: Path) -> None:
    manifest.write([row(start=16, end=end)], tmp_path / "clips.parquet")
    assert f"row 0: end is {end}, it must be above start" in refused(tmp_path / "clips.parquet")


@pytest.mark.parametrize("name", ["id", "fps", "error"])
def test_a_column_of_another_type_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "clips.parquet"
    manifest.write([row()], path)
    table = parquet.read_table(path)
    place, lists = table.schema.get_field_index(name), pyarrow.array([[1]])
    parquet.write_table(table.set_column(place, name, lists), path)
    assert f"{path}: {name} is of type list" in refused(path)


def test_a_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "clips.parquet"
    manifest.write([row()], path)
    table = parquet.read_table(path)
    place, damaged = table.schema.get_field_index("video"), pyarrow.array([b"\xff.mp4"]).view(pyarrow.string())
    parquet.write_table(table.set_column(place, "video", damaged), path)
    assert "Invalid UTF8" in refused(path)


@pytest.mark.parametrize("changes", [{}, {"video": "b.mp4"}, {"video": "b.mp4", "sha256": "0", "end": 41}])
def test_an_id_of_two_clips_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    """In one file and in two parts. The files of latents find a clip's sample by its id."""
    (tmp_path / manifest.PARTS).mkdir()
    rows = [row(sha256="0"), row(sha256="0") | changes] if "sha256" in changes else [row(), row(**changes)]
    paths = [tmp_path / manifest.PARTS / f"part-{i}.parquet" for i in range(2)]
    for path, made in zip(paths, rows, strict=True):
        manifest.write([row(path.stem), made], path)
    message = "row 1: id is 'a', it must differ from that of row"
    assert refused(tmp_path).startswith(f"{paths[1]}: {message} 1 of {paths[0]}; remove part-1.parquet")
    manifest.write(rows, tmp_path / manifest.CHOSEN)
    assert refused(tmp_path).startswith(f"{tmp_path / manifest.CHOSEN}: {message} 0 of ")


def test_copies_of_a_video_have_the_same_ids(tmp_path: Path) -> None:
    """As `curate` writes them, also for a video that was moved after an earlier run."""
    manifest.write([row(sha256="0", video=f"{i}.mp4", caption=f"{i}") for i in range(3)], tmp_path / manifest.CHOSEN)
    assert [made["video"] for made in ClipFiles(tmp_path, 16, 24.0).rows] == ["0.mp4", "1.mp4", "2.mp4"]
