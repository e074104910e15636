"""Scores of a shot: motion, area of text, and, if weights are given, CLIP similarity and aesthetic score.

This module only measures. The selection applies thresholds, percentiles of the whole list, afterwards, so a change of
a threshold does not decode a video again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...system.errors import ReducioError, first_line

# Least confidence of the text recogniser: real text scored 0.99, a face mistaken for a letter 0.75.
MIN_CONFIDENCE = 0.85
MOTION_SIDE = 128  # pixels of the short side at which flow is measured


def motion(gray: Iterable[np.ndarray]) -> float | None:
    """Mean length of Farneback's optical flow between neighbouring frames, uint8 [h, w], in percent of the short side.

    The frames are half a second apart, because a slow pan barely moves between consecutive frames. None for fewer than
    two frames. Of an iterator that reads them, only two are in memory at a time.
    """
    cv2 = opencv()
    lengths = []
    for a, b in itertools.pairwise(gray):
        flow = cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        lengths.append(float(np.hypot(flow[..., 0], flow[..., 1]).mean()) / min(a.shape))
    return 100 * float(np.mean(lengths)) if lengths else None


def text_area(frames: Sequence[np.ndarray]) -> float:
    """The largest share of a frame, uint8 [H, W, 3], that text covers, 0..1.

    RapidOCR's detector finds boxes and its recogniser reads them; boxes that it cannot read do not count. In two real
    clips the detector alone reported a whole frame as one letter (scores of 0.5 to 0.74).
    """
    return max((_text_share(frame) for frame in frames), default=0.0)


def _text_share(frame: np.ndarray) -> float:
    result = text_reader()(np.ascontiguousarray(frame[..., ::-1]), use_det=True, use_cls=False, use_rec=True)
    boxes = () if getattr(result, "boxes", None) is None else result.boxes
    return min(1.0, sum(polygon_area(np.asarray(box, np.float64)) for box in boxes) / (frame.shape[0] * frame.shape[1]))


def polygon_area(corners: np.ndarray) -> float:
    """Area of a polygon with corners [n, 2], by the shoelace formula."""
    x, y = corners[:, 0], corners[:, 1]
    return 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))


@functools.cache
def text_reader() -> Any:
    """RapidOCR, loaded once per process. Raises `ReducioError` if it is not installed."""
    try:
        import rapidocr
    except ImportError as error:
        raise ReducioError('text in pictures needs rapidocr; pip install "reducio-fast[curate]"') from error
    threads = {"EngineConfig.onnxruntime.intra_op_num_threads": 1, "EngineConfig.onnxruntime.inter_op_num_threads": 1}
    return rapidocr.RapidOCR(params={"Global.log_level": "critical", "Global.text_score": MIN_CONFIDENCE, **threads})


def small_gray(frame: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> [h, w] in gray, `MOTION_SIDE` on the short side."""
    cv2 = opencv()
    height, width = frame.shape[:2]
    scale = MOTION_SIDE / min(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.cvtColor(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)


class ClipScorer:
    """Scores the middle frame with open_clip: similarity to a caption, and LAION's aesthetic score by a linear head.

    `weights`: a folder in open_clip's format; `head`: safetensors with `weight` [1, C] and `bias` [1], or None. Raises
    `ReducioError` if one of them cannot be loaded.
    """

    def __init__(self, weights: str | Path, head: str | Path | None = None, device: Any = "cpu") -> None:
        import open_clip
        import torch

        self.head = None if head is None else _load_head(head)
        name = f"local-dir:{Path(weights).resolve()}"
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(name)
            self.tokenizer = open_clip.get_tokenizer(name)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise ReducioError(f"{weights} holds no open_clip model: {first_line(error)}") from error
        width = self.model.visual.output_dim
        if self.head is not None and (self.head["weight"].shape != (1, width) or self.head["bias"].numel() != 1):
            shape = list(self.head["weight"].shape)
            raise ReducioError(f"the aesthetic head {head} has weight {shape}, the open_clip model needs [1, {width}]")
        self.model.eval().to(device)
        self._torch, self._device = torch, device

    def __call__(self, frame: np.ndarray, caption: str | None) -> dict[str, float | None]:
        """`clip_similarity` (cosine, None without a caption) and `aesthetic` (about 1..10, None without a head)."""
        from PIL import Image

        torch = self._torch
        with torch.inference_mode():
            image = self.model.encode_image(self.preprocess(Image.fromarray(frame))[None].to(self._device))
            image = torch.nn.functional.normalize(image, dim=-1)
            scores: dict[str, float | None] = {"clip_similarity": None, "aesthetic": None}
            if caption:
                text = self.model.encode_text(self.tokenizer([caption]).to(self._device))
                text = torch.nn.functional.normalize(text, dim=-1)
                scores["clip_similarity"] = float((image * text).sum())
            if self.head is not None:
                scores["aesthetic"] = float((image.cpu() @ self.head["weight"].T + self.head["bias"]).squeeze())
        return scores


def _load_head(path: str | Path) -> Any:
    """The tensors `weight` and `bias` of a linear head."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        head = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ReducioError(f"the aesthetic head {path} cannot be read: {first_line(error)}") from error
    if not {"weight", "bias"} <= head.keys():
        raise ReducioError(f"the aesthetic head {path} must hold weight and bias; it holds {', '.join(head)}")
    return head


def opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ReducioError('curation needs OpenCV; pip install "reducio-fast[curate]"') from error
    cv2.setNumThreads(1)  # there is one worker per core, so more threads would only compete for the cores
    return cv2
