"""One process against two Ray replicas: clips a second and waiting times. Then a running job is cancelled, a replica is
killed in mid job, and one replica becomes two under load.

    python benchmarks/serving/replicas.py --clips 40 --out benchmarks/results/serving_replicas.json

Needs the extras [serve], [ray] and [test]. Every job must be completed, the same seed must give the same bytes in both
homes, a cancelled job must be gone, the job of the killed replica must be made
on its second attempt, and a second replica must come; else the status is 1.
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
                    result["cancelled"] = cancel_a_job(server)
                    result["replica killed"] = kill_a_replica(server)
            finally:
                server.end(120)
    result["autoscaling"] = scale_up()
    same = hashes["one process"] == hashes["two replicas"]
    result["same bytes in both homes"] = same
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n")
    killed, cancelled, scaled = (result[name] for name in ("replica killed", "cancelled", "autoscaling"))
    assert isinstance(killed, dict) and isinstance(cancelled, dict) and isinstance(scaled, dict)
    good = same and killed["statuses"] == ["completed"] * 2 and killed["attempts"] == [1, 2]
    good = good and cancelled["status"] == 404
    return 0 if good and scaled["most_replicas"] == 2 and scaled["completed"] == scaled["jobs"] else 1


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


def cancel_a_job(server: ClipServer) -> dict[str, object]:
    """Delete one of two running jobs while a third waits, which then begins: at once where it waits at that
    replica, else when the other replica's job has ended."""
    client = server.client()
    extra = {"num_inference_steps": 100, "guidance_scale": 3}
    ids = [client.videos.create(prompt=PROMPT, extra_body=extra | {"seed": seed}).id for seed in range(3)]
    while min(client.videos.retrieve(id).progress for id in ids[:2]) < 45:
        time.sleep(0.005)
    waiting = client.videos.retrieve(ids[2]).progress
    client.videos.delete(ids[0])
    begun = time.perf_counter()
    while client.videos.retrieve(ids[2]).progress <= waiting:
        time.sleep(0.005)
    seconds = time.perf_counter() - begun
    status, _ = server.get(f"/v1/videos/{ids[0]}")
    for id in ids[1:]:
        client.videos.delete(id)
    return {"status": status, "seconds_until_the_next": round(seconds, 3)}


def scale_up() -> dict[str, object]:
    """One replica, two allowed, and two minutes of work for one: Ray looks at the queue for half a minute first."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--ray", "local", "--min-replicas", "1", "--max-replicas", "2"]
        server = ClipServer(Path(folder) / "data", *options).ready(600)
        try:
            client, begun, most, seconds = server.client(), time.perf_counter(), 0, None
            extra = {"num_inference_steps": 100, "guidance_scale": 3}
            ids = [client.videos.create(prompt=PROMPT, extra_body=extra | {"seed": seed}).id for seed in range(24)]
            while any(client.videos.retrieve(id).status in ("queued", "in_progress") for id in ids):
                replicas = sum("ServeReplica" in command(pid) for pid in children(server.process.pid))
                if replicas == 2 and most < 2:
                    seconds = round(time.perf_counter() - begun, 1)
                most = max(most, replicas)
                time.sleep(0.25)
            completed = sum(client.videos.retrieve(id).status == "completed" for id in ids)
        finally:
            server.end(120)
    return {"jobs": len(ids), "completed": completed, "most_replicas": most, "seconds_until_the_second": seconds}


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
