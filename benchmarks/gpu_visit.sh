#!/usr/bin/env bash
# Everything worth knowing from a short visit to a GPU: benchmarks/gpu_visit.sh OUT [--dry-run]
#
# Each part writes OUT/PART.json and has a limit in seconds; a call takes at most TOTAL seconds (600; the parts before
# Stable Video Diffusion take 570). The parts: kernels compiled by all cores at once, tests, parity, first measurements,
# tuning (its table goes to the cache folder, which later parts read, and to OUT/tables), a clip of the fast path, the
# same in FP8 and in FP8 with fewer steps (skipped on a GPU that has no FP8 kernels), one beside the reference, a
# profile with its trace, one tile under torch.compile, and, in a second call of ten minutes, Stable Video Diffusion:
# its kernels, the ladder at two steps, and the clip beside diffusers' (or, where diffusers is missing, our reference),
# eager and compiled. Parts write their file as they go, with "whole": false until the end, so a part whose time is up
# leaves its results so far. A part whose file exists is skipped: call again to continue, remove a file to repeat its
# part. If a part fails, it leaves OUT/PART.log, the others still run, and the exit status is 1.
# OUT/visit.tar.gz is packed after every part and holds all files.
# Needs torch, triton, numpy and safetensors; pytest for the tests. The package need not be installed.
# --dry-run: the same parts on narrow shapes on a CPU; those that need a GPU leave a file that says so.
set -uo pipefail

if [ $# -lt 1 ] || [ "${1#-}" != "$1" ] || { [ $# -gt 1 ] && [ "$2" != "--dry-run" ]; }; then
    echo "usage: $0 OUT [--dry-run]" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
dry=${2:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
total=${TOTAL:-600}
began=$SECONDS
failed=0

# If the package is not installed, a folder of links replaces setup.py's mapping of root folders into one package.
if ! (cd / && "$python" -c "import reducio_fast.triton_kernels" 2>/dev/null); then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    mkdir "$site/reducio_fast"
    ln -s "$root"/reducio_fast/* "$site/reducio_fast/"
    for folder in triton_kernels compile reference; do ln -sfn "$root/$folder" "$site/reducio_fast/$folder"; done
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1
cd "$out" || exit 2  # Python puts the current folder first, and folders of the repository's root would shadow packages

# part NAME SECONDS COMMAND...: runs COMMAND for at most SECONDS, unless NAME.json exists. COMMAND writes that file.
part() {
    local name=$1 seconds=$2 left=$((total - (SECONDS - began))) start=$SECONDS status
    shift 2
    if [ -s "$out/$name.json" ]; then
        echo "$name: done before"
        return
    fi
    [ "$left" -lt "$seconds" ] && seconds=$left
    if [ "$seconds" -lt 5 ]; then
        echo "$name: no time left; call again"
        failed=1
        return
    fi
    PART_SECONDS=$seconds timeout --kill-after=5 "$seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
    pack
    if [ -s "$out/$name.json" ]; then
        echo "$name: $((SECONDS - start)) s$([ "$status" -ne 0 ] && echo ", status $status, see $name.log")"
    else
        echo "$name: failed with status $status after $((SECONDS - start)) s, see $name.log: $(tail -n 1 "$out/$name.log")"
    fi
    [ "$status" -eq 0 ] || failed=1
}

# Packs everything into one file, since a machine may return only a few files.
pack() { (cd "$out" && rm -f visit.tar.gz && tar -czf ../visit.$$.tar.gz . && mv ../visit.$$.tar.gz visit.tar.gz); }

# needs_gpu NAME: skips a part that cannot run on a CPU.
needs_gpu() {
    [ -s "$out/$1.json" ] || echo "{\"skipped\": \"$1 needs a GPU\"}" >"$out/$1.json"
    echo "$1: skipped, it needs a GPU"
}

# in_fp8: a clip whose decoder runs in FP8, beside the fast path's own, where the GPU has FP8 kernels.
in_fp8() {
    local has
    has=$("$python" -c "import torch; from reducio_fast.triton_kernels import eight_bits, tables
print(tables.arch_of(torch.device('cuda', 0)) in eight_bits.FP8)") || return
    if [ "$has" = True ]; then
        bench 1024 --pairs 2 --contenders fast,fast-fp8,fast-fp8-balanced --out "$out/bench-1024-fp8.json"
    else
        echo '{"skipped": "bench-1024-fp8 needs a GPU with FP8 kernels"}' >"$out/bench-1024-fp8.json"
    fi
}

reducio() { "$python" -m reducio_fast "$@"; }

narrow_parity() {
    "$python" - <<'END'
import json, torch
from reducio_fast.measurement.contenders import workload

rows = workload("narrow", None, None, torch.device("cpu")).parity()
print(json.dumps({"rows": rows, "wrong": sum(not row["right"] for row in rows)}))
END
}

# precompile NAME: compiles the kernels that a clip launches, in the dtype of the later parts, by all cores but two,
# into Triton's cache.
precompile() {
    "$python" - "$1" "$out" <<'END'
import json, os, sys, time, torch
from reducio_fast.fast.launches import clip_launches, precompile_launches, svd_launches
from reducio_fast.measurement.quantised_decoder import unmeasured_quantisation
from reducio_fast.triton_kernels.eight_bits import WORDS
from reducio_fast.triton_kernels.tables import arch_of

if __name__ == "__main__":
    start, name, device = time.perf_counter(), sys.argv[1], torch.device("cuda", 0)
    arch, jobs = arch_of(device), max(1, (os.cpu_count() or 1) - 2)
    modes = [None, *(unmeasured_quantisation(word) for word, types in WORDS.items() if arch in types)]
    launches = (
        [launch for mode in modes for launch in clip_launches(arch, quantisation=mode)]
        if name == "precompile"
        else svd_launches(arch, torch.float16)
    )
    kernels, failures = precompile_launches(device, launches, jobs)
    row = {"benchmark": name, "kernels": kernels, "jobs": jobs, "failures": failures}
    json.dump(row | {"seconds": time.perf_counter() - start}, open(f"{sys.argv[2]}/{name}.json", "w"), indent=2)
    sys.exit(bool(failures))
END
}

# Writes pytest's results as JSON, read from its log, which lists finished tests even when time is up. Without diffusers
# the one file that compares with its schedulers cannot be collected. With pytest-xdist several processes share the GPU.
tests() {
    local paths=(tests/triton_kernels tests/compile/test_graphs.py tests/compile/test_graphs_of_twins.py tests/measurement/test_profile.py)
    local options=(-v -p no:cacheprovider)
    [ -n "$dry" ] && paths=(tests/triton_kernels/test_ada_layer_norm.py) || options+=(-m "gpu or not slow")
    "$python" -c "import diffusers" 2>/dev/null || options+=(--ignore=tests/triton_kernels/test_guidance_dpm_step.py)
    [ -z "$dry" ] && "$python" -c "import xdist" 2>/dev/null && options+=(-n 12)
    cd "$root" || return
    timeout --kill-after=2 $((PART_SECONDS > 20 ? PART_SECONDS - 8 : PART_SECONDS)) \
        "$python" -c "import sys; sys.path = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main())" \
        "${options[@]}" "${paths[@]}" 2>&1 | tee "$out/tests.lines"
    local status=${PIPESTATUS[0]}
    "$python" - "$out" "${options[*]} ${paths[*]}" "$status" <<'END' && rm -f "$out/tests.lines"
import json, re, sys

out, arguments, status = sys.argv[1:]
found = re.findall(r"^(?:\[gw.*?\] \[.*?\] (PASSED|FAILED|ERROR|SKIPPED) (\S+::.*?)|(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED))(?: .*)?$",
                   open(f"{out}/tests.lines").read(), re.M)
results = {(name or other).strip(): result or late for result, name, other, late in found}
count = {kind: list(results.values()).count(kind) for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
row = {"benchmark": "tests", "pytest": arguments, "whole": status in "01", "tests": len(results)} | count
row["failed"] = [name for name, result in results.items() if result in ("FAILED", "ERROR")]
json.dump(row, open(f"{out}/tests.json", "w"), indent=2)
END
    return "$status"
}

# Tunes settings for the hot shapes: the table goes to the cache folder, where later parts find it, and to OUT/tables.
tune() {
    to_json tune reducio bench --tune --limit 70 --json
    local status=$?
    "$python" - "$out" <<'END'
import json, pathlib, shutil, sys

out = pathlib.Path(sys.argv[1])
table = pathlib.Path(json.loads((out / "tune.json").read_text())["table"])
(out / "tables").mkdir(exist_ok=True)
shutil.copy(table, out / "tables" / table.name)
END
    return $status
}

# to_json NAME COMMAND...: writes the output of COMMAND to NAME.json, only if it is complete JSON.
to_json() {
    local name=$1 status
    shift
    "$@" >"$out/$name.part"
    status=$?
    if "$python" -c "import json, sys; json.load(open(sys.argv[1]))" "$out/$name.part" 2>/dev/null; then
        mv "$out/$name.part" "$out/$name.json"
    else
        rm -f "$out/$name.part"
    fi
    return $status
}

export -f reducio precompile tests tune to_json narrow_parity in_fp8
export out dry root python

if [ -z "$dry" ]; then
    "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || { echo "no GPU here; --dry-run runs the parts on a CPU" >&2; exit 2; }
    bench() { "$python" -m reducio_fast bench "$@" --no-cold; }
    export -f bench
    part precompile 60 bash -c "precompile precompile"
    part tests 60 bash -c tests
    part parity 60 "$python" -m reducio_fast parity --full-size --out "$out/parity.json"
    part first_measurements 50 "$python" "$root/benchmarks/first_measurements.py" --no-compiled --out "$out/first_measurements.json"
    part tune 90 bash -c tune
    part bench-1024 50 bash -c "bench 1024 --pairs 3 --contenders fast --out \"$out/bench-1024.json\""
    part bench-1024-fp8 45 bash -c in_fp8
    part bench-1024-reference 60 bash -c "bench 1024 --pairs 1 --contenders reference,fast --out \"$out/bench-1024-reference.json\""
    part profile 40 bash -c "to_json profile reducio profile 1024 --json --out \"$out/profile.trace.json.gz\""
    part compiled-tile 55 "$python" "$root/benchmarks/first_measurements.py" --only-tile --compile-mode default --out "$out/compiled-tile.json"
    part precompile-svd 60 bash -c "precompile precompile-svd"
    part ladder-svd 150 bash -c "bench svd-short --ladder --pairs 2 --dtype float16 --contenders fast --out \"$out/ladder-svd.json\""
    part bench-svd 380 bash -c "bench svd --pairs 1 --dtype float16 --contenders reference,fast,compiled --out \"$out/bench-svd.json\""
else
    needs_gpu precompile
    part tests 100 bash -c tests
    part parity 100 bash -c "to_json parity narrow_parity"
    part first_measurements 100 "$python" "$root/benchmarks/first_measurements.py" --narrow --no-compiled --out "$out/first_measurements.json"
    needs_gpu tune
    part bench-1024 100 "$python" -m reducio_fast bench narrow --ladder --pairs 1 --no-cold --contenders reference,fast --note "dry run" --device cpu --out "$out/bench-1024.json"
    needs_gpu bench-1024-fp8
    needs_gpu bench-1024-reference
    part profile 100 bash -c "to_json profile reducio profile narrow --device cpu --json --out \"$out/profile.trace.json.gz\""
    needs_gpu compiled-tile
    needs_gpu precompile-svd
    needs_gpu ladder-svd
    needs_gpu bench-svd
fi
pack
echo "took $((SECONDS - began)) of $total s; commit the JSON files to benchmarks/results/, a table to triton_kernels/tables/"
exit $failed
