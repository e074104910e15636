"""The import contracts of pyproject.toml hold, and they report imports that they forbid."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def lint(root: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as c; c()"
    command = [sys.executable, "-c", code, "--config", str(root / "pyproject.toml"), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_contracts_are_kept_without_exception(root: Path, layout: Path) -> None:
    done = lint(root, layout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 8 kept, 0 broken." in done.stdout
    assert "ignore_imports" not in (root / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("memory/fit.py", "from ..pipelines import generate", "Rooms stand on floors"),
        ("media/pixels.py", "from ..checkpoints import hub", "Rooms stand on floors"),
        ("helpers/__init__.py", "x = 1", "Rooms stand on floors"),
        ("pipelines/reducio/encoders.py", "from ..peers import models", "Inside pipelines"),
        ("compile/aot.py", "from . import graphs, cache\nimport PIL", "A bare GPU machine"),
        ("media/similarity.py", "from . import circle", "No circles"),
        ("reference/svd/layers.py", "from ..reducio import vae", "Families of networks"),
        ("fast/svd/layers.py", "from ..reducio import vae", "Nor do their fast twins"),
    ],
    ids=[
        "upwards",
        "sideways",
        "without-a-floor",
        "another-family",
        "bare-machine",
        "circle",
        "another-reference",
        "another-twin",
    ],
)
def test_contracts_bite(root: Path, copied_layout: Path, file: str, line: str, broken: str) -> None:
    path = copied_layout / "reducio_fast" / file
    path.parent.mkdir(exist_ok=True)
    text = path.read_text() if path.exists() else ""
    path.write_text(f"{text}\n{line}\n")
    (copied_layout / "reducio_fast" / "media" / "circle.py").write_text("from . import similarity\n")
    done = lint(root, copied_layout)
    assert done.returncode == 1 and f"{broken}" in done.stdout.split("Broken contracts")[1], done.stdout


def test_the_picture_shows_the_rooms_and_every_arrow_leads_down(root: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("draw_rooms", root / "docs" / "draw_rooms.py")
    assert spec is not None and spec.loader is not None
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    floors = drawing.floors()
    folders = {p.parent.name for p in (root / "reducio_fast").glob("*/__init__.py")} | set(drawing.MAPPED)
    assert {room for level in floors for room in level} == folders
    height = {room: number for number, level in enumerate(floors) for room in level}
    arrows = drawing.arrows()
    assert len(arrows) > 40 and all(height[source] < height[target] for source, target in arrows)
    page = (root / "docs" / "architecture.md").read_text()
    assert all(f"`{room}/`" in page for room in folders)
    drawing.draw(tmp_path / "rooms.png")
    assert (tmp_path / "rooms.png").stat().st_size > 50_000
