"""Finds the shots of a video with PySceneDetect at three frame rates, as Stable Video Diffusion's curation does.

A hard cut is visible at every rate; a fade is visible only between frames that lie far apart. Three detectors run at
each rate: content (a jump in colour), adaptive (a jump larger than those around it) and threshold (a fade to black).
"""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np

from ...system.errors import ReducioError

STRIDES = (1, 3, 6)  # at 24 to 30 frames a second: every frame, 8 to 10 and 4 to 5 frames a second
MERGED = 12  # frames within which cuts count as one: at stride 6 a hard cut is found up to 10 frames late
SHORTEST = 15  # frames, PySceneDetect's default: a shorter shot is a flash


class ShotFinder:
    """Finds the shots of one video: call `add` with each small frame, uint8 [h, w, 3] in RGB, then `shots`."""

    def __init__(self, fps: float) -> None:
        try:
            from scenedetect import AdaptiveDetector, ContentDetector, ThresholdDetector
        except ImportError as error:
            raise ReducioError('curation needs scenedetect-headless; pip install "reducio-fast[curate]"') from error
        self.fps, self.count = fps, 0
        self._detectors: dict[int, list[Any]] = {}
        for stride in STRIDES:
            shortest = max(1, SHORTEST // stride)
            kinds = (ContentDetector, AdaptiveDetector, ThresholdDetector)
            self._detectors[stride] = [kind(min_scene_len=shortest) for kind in kinds]
        self._cuts: dict[int, set[int]] = {stride: set() for stride in STRIDES}

    def add(self, frame: np.ndarray) -> None:
        bgr = np.ascontiguousarray(frame[..., ::-1])
        for stride, detectors in self._detectors.items():
            if self.count % stride == 0:
                place = self._timecode(self.count // stride, stride)
                for detector in detectors:
                    self._cuts[stride].update(c.frame_num * stride for c in detector.process_frame(place, bgr))
        self.count += 1

    def shots(self) -> list[tuple[int, int]]:
        """(first frame, frame after the last) of each shot, in order."""
        if self.count == 0:
            return []
        for stride, detectors in self._detectors.items():
            last = self._timecode((self.count - 1) // stride, stride)
            for detector in detectors:
                self._cuts[stride].update(c.frame_num * stride for c in detector.post_process(last))
        return join_cuts(self._cuts, self.count)

    def _timecode(self, number: int, stride: int) -> Any:
        from scenedetect import FrameTimecode

        return FrameTimecode(number, self.fps / stride)


def join_cuts(cuts: dict[int, set[int]], count: int) -> list[tuple[int, int]]:
    """Shots of a video of `count` frames from the cuts found at each stride.

    Cuts within `MERGED` frames count as one, at the position found with the finest stride. A cut that only a coarser
    stride finds is a fade between two frames of that stride: one shot ends at the first of them, the next starts at
    the second, and no shot contains the frames between.
    """
    gaps: list[tuple[int, int]] = []  # in order, each more than `MERGED` frames from the next
    for stride in sorted(cuts):
        for cut in sorted(cuts[stride]):
            gap = (cut, cut) if stride == 1 else (max(0, cut - stride), cut)
            place = bisect.bisect(gaps, gap)
            beside = gaps[max(0, place - 1) : place + 1]
            if 0 < cut < count and all(gap[0] - MERGED > end or gap[1] + MERGED < start for start, end in beside):
                gaps.insert(place, gap)
    starts = [0, *(end for _, end in gaps)]
    stops = [*(start for start, _ in gaps), count]
    return [(a, b) for a, b in zip(starts, stops, strict=True) if b > a]
