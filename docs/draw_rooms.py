"""Draws docs/rooms.png: the rooms of the package on their floors, and who imports whom, read from the source.

    python docs/draw_rooms.py [--out docs/rooms.png]

Needs matplotlib (the `bench` or `test` extra). Floors are those of the first import contract in pyproject.toml.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("reference", "triton_kernels", "compile")  # root folders that are installed inside reducio_fast


def floors() -> list[list[str]]:
    """Rooms by floor, the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c.get("containers") == ["reducio_fast"])
    return [[room.strip() for room in layer.split("|")] for layer in layers if layer != "__main__"]


def folder_of(room: str) -> Path:
    return ROOT / room if room in MAPPED else ROOT / "reducio_fast" / room


def arrows() -> Counter[tuple[str, str]]:
    """{(room, room that it imports): import statements}."""
    arrows: Counter[tuple[str, str]] = Counter()
    rooms = [room for floor in floors() for room in floor]
    for room in rooms:
        for file in folder_of(room).rglob("*.py"):
            depth = len(file.relative_to(folder_of(room)).parts)  # levels up to the package's root
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.ImportFrom) or node.level != depth + 1:
                    continue
                names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
                arrows.update((room, name) for name in names if name in rooms and name != room)
    return arrows


def draw(out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    levels, where = floors(), {}
    figure, axes = plt.subplots(figsize=(11, 7.2))
    for height, level in enumerate(reversed(levels)):
        for i, room in enumerate(level):
            where[room] = ((i + 0.5) / len(level) * 10, height * 1.5)
    for (source, target), count in sorted(arrows().items()):
        (x0, y0), (x1, y1) = where[source], where[target]
        style = {"arrowstyle": "-|>", "color": "#7a8aa0", "lw": 0.5 + min(count, 30) / 15, "alpha": 0.55}
        axes.annotate("", (x1, y1 + 0.27), (x0, y0 - 0.27), arrowprops=style)
    for room, (x, y) in where.items():
        box = {"boxstyle": "round,pad=0.5", "facecolor": "#eef2f7", "edgecolor": "#33475b"}
        axes.text(x, y, room, ha="center", va="center", fontsize=11, bbox=box)
    for height in range(len(levels)):
        axes.text(-0.9, height * 1.5, f"floor {height + 1}", va="center", fontsize=9, color="#666666")
    axes.set_xlim(-1.2, 10.2)
    axes.set_ylim(-0.7, (len(levels) - 1) * 1.5 + 0.7)
    axes.set_axis_off()
    axes.set_title("Rooms of reducio_fast: an arrow is an import, its width the number of them", fontsize=11)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "rooms.png")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
