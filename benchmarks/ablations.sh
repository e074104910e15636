#!/usr/bin/env bash
# Trains the paper's four ablations on drawn scenes with known captions: benchmarks/ablations.sh OUT
#
# Writes OUT/NAME.csv, a row a run, and OUT/NAME-curves.csv, the held-out figure's training curve thinned to 20 rows a
# run. A second call goes on where the first one was stopped. SEEDS (default 2) runs a variant. About two hours on one
# core. Needs pip install ".[train,curate]".
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
}
ablation dit condition --latents "$out/latents"
ablation dit attention --latents "$out/latents"
ablation vae fusion --clips "$out/curated/clips.parquet"
ablation vae latent-channels --clips "$out/curated/clips.parquet"
