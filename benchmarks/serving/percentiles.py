"""What the scripts of this folder share."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that so many percent of all do not exceed."""
    return sorted(values)[max(0, -(-len(values) * int(percent) // 100) - 1)]


def system() -> dict[str, Any]:
    """Where a row was measured."""
    text = Path("/proc/cpuinfo").read_text()
    cpu = next((line.partition(": ")[2] for line in text.splitlines() if line.startswith("model name")), "")
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    names = ("torch", "fastapi", "uvicorn", "ray", "openai")
    versions = {name: version(name) for name in names}
    return {"cpu": cpu, "cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version(),
            "versions": versions, "commit": commit.stdout.strip()}  # fmt: skip
