"""One process against two Ray replicas: clips a second and waiting times; then a replica is killed in mid job.

    python benchmarks/serving/replicas.py --clips 40 --out benchmarks/results/serving_replicas.json

Needs the extras [serve], [ray] and [test]. Every job must be completed, the same seed must give the same bytes in both
homes, and the job of the killed replica must be made on its second attempt; else the status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from clip_server import PROMPT, ClipServer  # noqa: E402
from percentiles import percentile, system  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    homes = {"one process": [], "two replicas": ["--ray", "local", "--min-replicas", "2", "--max-replicas", "2"]}
    result: dict[str, object] = {"clips": arguments.clips, "clients": arguments.clients} | system()
    hashes = {}
    for name, options in homes.items():
        with tempfile.TemporaryDirectory() as folder:
            server = ClipServer(Path(folder) / "data", *options).ready(600)
            try:
                result[name], hashes[name] = load(server, arguments)
                if options:
                    result["replica killed"] = kill_a_replica(server)
            finally:
                server.end(120)
    same = hashes["one process"] == hashes["two replicas"]
    result["same bytes in both homes"] = same
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n")
    killed = result["replica killed"]
    good = (
        same and isinstance(killed, dict) and killed["statuses"] == ["completed"] * 2 and killed["attempts"] == [1, 2]
    )
    return 0 if good else 1


def load(server: ClipServer, arguments: argparse.Namespace) -> tuple[dict[str, float], list[str]]:
    """Seconds of each job as its client sees them, and the hashes of the clips in order of seeds."""
    client = server.client()

    def one(seed: int) -> tuple[float, str]:
        begun = time.perf_counter()
        extra = {"seed": seed, "num_inference_steps": arguments.steps}
        video = client.videos.create_and_poll(prompt=PROMPT, extra_body=extra)
        seconds = time.perf_counter() - begun
        assert video.status == "completed", video
        return seconds, hashlib.sha256(client.videos.download_content(video.id).content).hexdigest()

    begun = time.perf_counter()
    with ThreadPoolExecutor(arguments.clients) as pool:
        out = list(pool.map(one, range(arguments.clips)))
    wall = time.perf_counter() - begun
    seconds = [each for each, _ in out]
    row = {"clips_per_second": arguments.clips / wall, "p50": percentile(seconds, 50), "p95": percentile(seconds, 95)}
    return {name: round(value, 3) for name, value in row.items()}, [digest for _, digest in out]


def kill_a_replica(server: ClipServer) -> dict[str, object]:
    """SIGKILL one of two replicas that both make a clip."""
    client = server.client()
    extra = {"num_inference_steps": 100, "guidance_scale": 3}
    ids = [client.videos.create(prompt=PROMPT, extra_body=extra | {"seed": seed}).id for seed in range(2)]
    while any(client.videos.retrieve(id).progress < 10 for id in ids):
        time.sleep(0.005)
    victims = [pid for pid in children(server.process.pid) if "ServeReplica" in command(pid)]
    assert len(victims) == 2, victims
    os.kill(victims[0], signal.SIGKILL)
    videos = [client.videos.poll(id) for id in ids]
    attempts = sorted(client.videos.retrieve(id).attempts for id in ids)
    return {"statuses": [video.status for video in videos], "attempts": attempts}


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def children(pid: int) -> list[int]:
    """Of a process, at any depth."""
    below: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        below.setdefault(parent, []).append(int(folder.name))
    found, left = [], [pid]
    while left:
        left += (more := below.get(left.pop(), []))
        found += more
    return found


if __name__ == "__main__":
    sys.exit(main())
