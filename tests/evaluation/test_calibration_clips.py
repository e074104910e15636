"""Clips of many videos to calibrate on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from reducio_fast.data import photos
from reducio_fast.evaluation import calibration, video_report
from reducio_fast.media import ffmpeg
from reducio_fast.media.video_files import write_video


def test_no_video_is_open_between_two_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn, each video would hold a decoder until the end. The clips are those of `windows`."""
    frames, is_open = ffmpeg.frames, list[Path]()

    def counted(path: Path, start: int = 0) -> Iterator[tuple[np.ndarray, float]]:
        is_open.append(path)
        try:
            yield from frames(path, start)
        finally:
            is_open.remove(path)

    monkeypatch.setattr(ffmpeg, "frames", counted)
    film = photos.render(np.random.default_rng(3), 96, 40, name="flower")
    for i in range(3):
        write_video(film, tmp_path / f"{i}.mp4", 24)
    taken = []
    for clip in calibration.video_clips([tmp_path], 64, 16, 6):
        taken.append(clip)
        assert not is_open
    expected = list(itertools.islice(video_report.windows(str(tmp_path / "0.mp4"), 64, 16), 2))
    assert len(taken) == 6 and all(np.array_equal(clip, expected[i // 3]) for i, clip in enumerate(taken))
