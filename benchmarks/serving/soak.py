"""A thousand clips of four sizes through one server: memory, files, handles and waiting times.

    python benchmarks/serving/soak.py --clips 1000 --out benchmarks/results/serving_soak.json

The status is 1 where the server holds 15% more memory at the end than after 50 clips, where a file or an open handle is
left, or where a clip was not made.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from clip_server import PROMPT, ClipServer  # noqa: E402
from percentiles import percentile, system  # noqa: E402

SIZES = ("64x64", "96x64", "128x128", "160x96")
FIRST = 50  # clips after which memory is measured


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = ClipServer(Path(folder) / "data", "--sizes", ",".join(SIZES)).ready(600)
        try:
            first = min(FIRST, arguments.clips // 2)
            seconds = make(server, range(first), arguments.steps)
            before, handles = server.rss(), len(os.listdir(f"/proc/{server.process.pid}/fd"))
            begun = time.perf_counter()
            seconds += make(server, range(first, arguments.clips), arguments.steps)
            rate = (arguments.clips - first) / (time.perf_counter() - begun)
            after, handles_after = server.rss(), len(os.listdir(f"/proc/{server.process.pid}/fd"))
            left = server.files()
        finally:
            status = server.end()
    result = {
        "clips": arguments.clips, "sizes": SIZES, "p50": round(percentile(seconds, 50), 3),
        "p95": round(percentile(seconds, 95), 3), "clips_per_second": round(rate, 3),
        "rss_after_first": before, "rss_at_end": after, "growth": round(after / before - 1, 4),
        "handles_after_first": handles, "handles_at_end": handles_after, "files_left": len(left), "exit": status,
    } | system()  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n")
    return 0 if after < 1.15 * before and not left and handles_after <= handles + 2 and status in (0, 143) else 1


def make(server: ClipServer, seeds: range, steps: int) -> list[float]:
    """Two clients, each clip downloaded and deleted; seconds of each job as its client sees them."""
    client = server.client()
    extra = {"num_inference_steps": steps, "content_kwargs": {"num_inference_steps": steps}}

    def one(seed: int) -> float:
        begun = time.perf_counter()
        video = client.videos.create_and_poll(
            prompt=PROMPT, size=SIZES[seed % len(SIZES)], extra_body=extra | {"seed": seed}
        )
        seconds = time.perf_counter() - begun
        assert video.status == "completed", video
        assert client.videos.download_content(video.id).content
        client.videos.delete(video.id)
        return seconds

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, seeds))


if __name__ == "__main__":
    sys.exit(main())
