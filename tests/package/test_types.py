"""mypy passes on the public modules, with the settings of pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_mypy(root: Path, layout: Path) -> None:
    # The cache stays in the checkout: without one, mypy spends most of its time on torch's types.
    cache = f"--cache-dir={root / '.mypy_cache'}"
    config = f"--config-file={root / 'pyproject.toml'}"
    command = [sys.executable, "-m", "mypy", config, cache, "-p", "reducio_fast"]
    done = subprocess.run(command, cwd=layout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no issues found" in done.stdout
