"""schemathesis against the server's own OpenAPI page: no request may be answered with 5xx.

    python benchmarks/serving/fuzz.py --examples 50

Needs `pip install schemathesis` beside the extras [serve] and [test]. The status is that of schemathesis.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from clip_server import ClipServer  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=50, help="of each operation and phase")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = ClipServer(Path(folder) / "data", "--sizes", "64x64", "--max-steps", "2").ready(600)
        try:
            command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--seed", "1"]
            command += ["--checks", "not_a_server_error", "--max-examples", str(arguments.examples)]
            # 503 is what /readyz says by design, and no other path may.
            command += ["--exclude-path", "/readyz"]
            status = subprocess.run(command, check=False, cwd=folder).returncode
            assert server.get("/healthz")[0] == 200
        finally:
            server.end()
    return status


if __name__ == "__main__":
    sys.exit(main())
