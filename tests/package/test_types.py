"""mypy passes on the public modules, with the settings of pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_mypy(root: Path, tmp_path: Path) -> None:
    """mypy reads folders, not setup.py: here each package lies under the name it is installed as."""
    package = tmp_path / "reducio_fast"
    package.mkdir()
    mapped = [root / name for name in ("reference", "compile", "triton_kernels")]
    for entry in [*(root / "reducio_fast").iterdir(), *mapped]:
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    # The cache stays in the checkout: without one torch's own types take most of the time.
    cache = f"--cache-dir={root / '.mypy_cache'}"
    config = f"--config-file={root / 'pyproject.toml'}"
    command = [sys.executable, "-P", "-m", "mypy", config, cache, "-p", "reducio_fast"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no issues found" in done.stdout
