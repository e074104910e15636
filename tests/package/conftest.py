"""The package as a wheel has it: tools that read folders, not setup.py, need each package under its installed name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

MAPPED = ("reference", "compile", "triton_kernels")  # root folders that are installed inside reducio_fast


@pytest.fixture(scope="session")
def layout(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `reducio_fast` with links to all of its entries."""
    folder = tmp_path_factory.mktemp("layout")
    package = folder / "reducio_fast"
    package.mkdir()
    for entry in [*(root / "reducio_fast").iterdir(), *(root / name for name in MAPPED)]:
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def copied_layout(layout: Path, tmp_path: Path) -> Path:
    """A copy of the layout that a test may break."""
    skipped = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(layout, tmp_path / "layout", symlinks=False, ignore=skipped)
    return tmp_path / "layout"
