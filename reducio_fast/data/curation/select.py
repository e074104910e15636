"""Selects clips by thresholds (values, or percentiles of the list) and writes an HTML report of the selection."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...system.atomic_files import written_whole
from ...system.errors import ReducioError
from . import manifest

SCORES = ("motion", "text_area", "clip_similarity", "aesthetic")
SIDES = ("min", "max")


@dataclass(frozen=True, slots=True)
class Threshold:
    """Keep clips whose score is at least ("min") or at most ("max") a value, or a percentile of all clips' scores."""

    score: str
    side: str
    amount: float
    percentile: bool

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Parse "motion.min=20%" or "text_area.max=0.05". Raises `ReducioError` for another form."""
        name, _, amount = text.partition("=")
        score, _, side = name.partition(".")
        if score not in SCORES or side not in SIDES:
            raise ReducioError(f"threshold {text!r}: must be SCORE.min=X or SCORE.max=X, SCORE of {', '.join(SCORES)}")
        try:
            value = float(amount.removesuffix("%"))
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise ReducioError(f"threshold {text!r}: {amount!r} is neither a number nor a percentage")
        if amount.endswith("%") and not 0 <= value <= 100:
            raise ReducioError(f"threshold {text!r}: a percentile lies in 0..100")
        return cls(score, side, value, amount.endswith("%"))

    def value(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """The threshold in the unit of the score. Raises `ReducioError` if no clip has the score."""
        known = [row[self.score] for row in rows if row[self.score] is not None]
        if not known:
            raise ReducioError(f"threshold on {self.score}: no clip of the manifest has that score")
        return float(np.percentile(known, self.amount)) if self.percentile else self.amount

    def __str__(self) -> str:
        return f"{self.score}.{self.side}={self.amount:g}{'%' * self.percentile}"


def select(
    rows: Sequence[dict[str, Any]], thresholds: Sequence[Threshold], shortest: int = 1
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The clips that pass all thresholds, and how many clips each threshold drops on its own.

    A clip without a score passes the thresholds on that score. `shortest` is the least length in frames.
    """
    clips = [row for row in rows if row["error"] is None]
    drops = {"unreadable": len(rows) - len(clips)}
    passed = [row["end"] - row["start"] >= shortest for row in clips]
    drops[f"shorter than {shortest} frames"] = passed.count(False)
    for threshold in thresholds:
        value = threshold.value(clips)
        dropped = 0
        for number, row in enumerate(clips):
            score = row[threshold.score]
            if score is not None and (score < value if threshold.side == "min" else score > value):
                dropped, passed[number] = dropped + 1, False
        drops[str(threshold)] = dropped
    return [row for row, passes in zip(clips, passed, strict=True) if passes], drops


def write_report(
    folder: Path, rows: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]], drops: Mapping[str, int],
    thresholds: Sequence[Threshold],
) -> None:  # fmt: skip
    """Write `report.html` into a manifest's folder: counts, a histogram per score with its thresholds, thumbnails."""
    clips = [row for row in rows if row["error"] is None]
    chosen = {(row["id"], row["video"]) for row in kept}
    parts = ["<!doctype html><meta charset=utf-8><title>Curation</title>", _STYLE, "<h1>Curation</h1>"]
    parts.append(f"<p>{len({row['video'] for row in rows})} videos, {len(clips)} clips, <b>{len(kept)} kept</b>.</p>")
    lines = "".join(f"<tr><td>{html.escape(name)}<td>{count}" for name, count in drops.items())
    parts.append(f"<table><tr><th>alone drops<th>clips{lines}</table>")
    for score in SCORES:
        values = np.array([row[score] for row in clips if row[score] is not None])
        if len(values):
            lines_at = [t.value(clips) for t in thresholds if t.score == score]
            parts.append(f"<h2>{score}</h2>{_histogram(values, lines_at)}")
        else:
            parts.append(f"<h2>{score}</h2><p>not measured</p>")
    left = [row for row in clips if (row["id"], row["video"]) not in chosen]
    for title, group in (("kept", kept), ("dropped", left)):
        parts.append(f"<h2>{title}</h2>{_contact_sheet(group, folder)}")
    errors = [row for row in rows if row["error"] is not None]
    if errors:
        listed = "".join(f"<li>{html.escape(row['video'])}: {html.escape(row['error'])}" for row in errors)
        parts.append(f"<h2>unreadable</h2><ul>{listed}</ul>")
    with written_whole(folder / "report.html") as temporary:
        temporary.write_text("\n".join(parts) + "\n", encoding="utf-8")


_STYLE = (
    "<style>body{font:14px sans-serif;max-width:75em;margin:2em auto}td,th{text-align:left;padding-right:2em}"
    "figure{display:inline-block;margin:2px;width:144px}figcaption{font-size:11px}</style>"
)
_SHOWN = 96  # clips on a contact sheet


def _histogram(values: np.ndarray, lines: Sequence[float], bins: int = 40) -> str:
    counts, edges = np.histogram(values, bins)
    width, height, span = 640, 120, max(edges[-1] - edges[0], 1e-9)
    bars = "".join(
        f'<rect x="{i * width / bins:.1f}" y="{height - height * n / counts.max():.1f}" width="{width / bins - 1:.1f}" '
        f'height="{height * n / counts.max():.1f}" fill="#68a"/>'
        for i, n in enumerate(counts)
    )
    marks = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#c33" stroke-width="2"/>'
        for x in ((line - edges[0]) / span * width for line in lines)
    )
    labels = f"{edges[0]:.3g} to {edges[-1]:.3g}, median {np.median(values):.3g}, {len(values)} clips"
    return f'<svg width="{width}" height="{height}">{bars}{marks}</svg><p>{labels}</p>'


def _contact_sheet(rows: Sequence[dict[str, Any]], folder: Path) -> str:
    """HTML of at most `_SHOWN` clips, spaced evenly in the order of their motion."""
    ordered = sorted(rows, key=lambda row: (row["motion"] or 0.0, row["id"]))
    places = np.unique(np.linspace(0, len(ordered) - 1, min(_SHOWN, len(ordered))).round().astype(int))
    shown = [ordered[i] for i in places]
    pictures, figures = manifest.thumbnails(folder, shown), []
    for row in shown:
        picture = base64.b64encode(pictures.get(row["id"], b"")).decode()
        scores = " ".join(f"{name} {row[name]:.2g}" for name in SCORES if row[name] is not None)
        name = html.escape(f"{Path(row['video']).name} {row['start']}-{row['end']}")
        figures.append(
            f'<figure><img width=144 src="data:image/jpeg;base64,{picture}">'
            f"<figcaption>{name}<br>{scores}</figcaption></figure>"
        )
    return f"<p>{len(rows)} clips</p>{''.join(figures)}"
