#!/usr/bin/env bash
# Trains the paper's four ablations on drawn scenes with known captions: benchmarks/ablations.sh OUT
#
# Writes OUT/NAME.csv, a row a run with its figures on held-out clips, and OUT/NAME-curves.csv, its training curve in 20
# means. A second call goes on where the first one was stopped. SEEDS: runs a variant (default 2). Takes three to four hours
# of one core of a Xeon. Needs pip install ".[train,curate]".
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 OUT" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
export PYTHONSAFEPATH=1
fast() { "$python" -m reducio_fast "$@"; }

if [ ! -e "$out/latents/128x128" ]; then
    "$python" - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

import numpy as np

from reducio_fast.data import toy_world
from reducio_fast.media.video_files import write_video

videos, captions = Path(sys.argv[1], "videos"), {}
videos.mkdir(exist_ok=True)
for i in range(640):
    rng = np.random.default_rng((7, i))
    scene = toy_world.sample_scene(rng)
    write_video(toy_world.render(scene, rng), str(videos / f"{i:04d}.mp4"), 16)
    captions[f"{i:04d}.mp4"] = scene.caption()
Path(sys.argv[1], "captions.json").write_text(json.dumps(captions))
PYTHON
    fast curate "$out/videos" --captions "$out/captions.json" --no-text --no-progress -o "$out/curated"
    fast extract "$out/curated/clips.parquet" --size 128 --no-progress -o "$out/latents"
fi

# ablation WHAT NAME DATA...: trains it and copies its table.
ablation() {
    local what=$1 name=$2
    shift 2
    fast train "$what" --recipe "ablation-$what" "$@" --ablation "$name" --seeds "${SEEDS:-2}" --no-progress -o "$out/$name"
    cp "$out/$name/ablation.csv" "$out/$name.csv"
    "$python" - "$out" "$name" <<'PYTHON'
import csv
import statistics
import sys
from pathlib import Path

out, name = Path(sys.argv[1]), sys.argv[2]
rows = []
for run in csv.DictReader((out / f"{name}.csv").open()):
    (log,) = (out / name / run["variant"] / f"seed-{run['seed']}").glob("runs/*/log.csv")
    steps = list(csv.DictReader(log.open()))
    figure = "psnr" if "psnr" in steps[0] else "error"
    share = -(-len(steps) // 20)
    for i in range(0, len(steps), share):
        part = steps[i : i + share]
        mean = statistics.mean(float(row[figure]) for row in part)
        rows.append([run["variant"], run["seed"], part[-1]["step"], f"{mean:.5g}"])
with (out / f"{name}-curves.csv").open("w", newline="") as file:
    csv.writer(file).writerows([["variant", "seed", "step", figure], *rows])
PYTHON
}
ablation dit condition --latents "$out/latents"
ablation dit attention --latents "$out/latents"
ablation vae fusion --clips "$out/curated/clips.parquet"
ablation vae latent-channels --clips "$out/curated/clips.parquet"
