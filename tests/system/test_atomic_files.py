"""Atomic writes of files and folders."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from reducio_fast.system.atomic_files import written_whole


def test_a_file_is_renamed_when_the_block_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "new" / "row.json"
    with written_whole(target) as part:
        assert part.parent == target.parent and part.suffix == ".json" and not target.exists()
        part.write_text("whole")
        part.chmod(0o600)  # the mode of files that safetensors writes
    assert target.read_text() == "whole" and list(target.parent.iterdir()) == [target]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_folder_can_be_written_too(tmp_path: Path) -> None:
    with written_whole(tmp_path / "frames") as part:
        part.mkdir()
        (part / "0.png").write_text("x")
    assert (tmp_path / "frames" / "0.png").read_text() == "x"


@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_keeps_the_old_contents(kind: str, error: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "clip.mp4"
    target.write_text("old")
    with pytest.raises(type(error)), written_whole(target) as part:
        if kind == "folder":
            part.mkdir()
            (part / "half").write_text("ne")
        elif kind == "file":
            part.write_text("ne")
        raise error
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_two_writers_of_one_name_use_different_temporary_names(tmp_path: Path) -> None:
    with written_whole(tmp_path / "a.json") as one, written_whole(tmp_path / "a.json") as two:
        assert one != two
        one.write_text("1")
        two.write_text("2")
    assert (tmp_path / "a.json").read_text() == "1" and len(os.listdir(tmp_path)) == 1
