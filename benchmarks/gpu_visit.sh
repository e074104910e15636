#!/usr/bin/env bash
# Runs all tests and measurements of a short visit to a GPU: benchmarks/gpu_visit.sh OUT [--dry-run]
#
# Each part writes a file under OUT and has its own time limit; all parts together take at most TOTAL (600) seconds:
# tests.json, parity.json, first_measurements.json, bench-1024.json, tune.json with tables/, profile.json with
# profile.trace.json.gz, bench-1024-compiled.json, and, in a second call of ten minutes, bench-svd.json.
# A part whose file exists is skipped, so call again to continue, and remove a file to repeat its part. A part that
# fails leaves OUT/PART.log; the other parts still run, and the exit status is 1.
# Needs torch, triton, numpy and safetensors; pytest for the tests. The package need not be installed.
# --dry-run runs the same parts with narrow shapes on a CPU; parts that need a GPU write a file that says so.
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
total=${TOTAL:-600}
began=$SECONDS
failed=0

# If the package is not installed, a folder of links replaces setup.py's mapping of root folders into one package.
if ! (cd / && "$python" -P -c "import reducio_fast.triton_kernels" 2>/dev/null); then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    mkdir "$site/reducio_fast"
    ln -s "$root"/reducio_fast/* "$site/reducio_fast/"
    for room in triton_kernels compile reference; do ln -sfn "$root/$room" "$site/reducio_fast/$room"; done
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

# part NAME SECONDS COMMAND...: runs COMMAND, which writes NAME.json, for at most SECONDS, unless NAME.json exists.
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
    timeout --kill-after=5 "$seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
    if [ -s "$out/$name.json" ]; then
        echo "$name: $((SECONDS - start)) s$([ "$status" -ne 0 ] && echo ", status $status, see $name.log")"
    else
        echo "$name: failed with status $status after $((SECONDS - start)) s, see $name.log: $(tail -n 1 "$out/$name.log")"
    fi
    [ "$status" -eq 0 ] || failed=1
}

# needs_gpu NAME: marks a part that cannot run on a CPU as skipped.
needs_gpu() {
    [ -s "$out/$1.json" ] || echo "{\"skipped\": \"$1 needs a GPU\"}" >"$out/$1.json"
    echo "$1: skipped, it needs a GPU"
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

# Writes pytest's report as JSON. Without diffusers, pytest cannot collect the file that compares with its schedulers.
tests() {
    local where=(tests/triton_kernels) options=(-q -p no:cacheprovider)
    "$python" -c "import diffusers" 2>/dev/null || options+=(--ignore=tests/triton_kernels/test_guidance_dpm_step.py)
    [ -n "$dry" ] && where=(tests/triton_kernels/test_ada_layer_norm.py)
    cd "$root" || return
    "$python" -m pytest "${options[@]}" --junit-xml="$out/tests.xml" "${where[@]}"
    local status=$?
    "$python" - "$out" "${options[*]} ${where[*]}" <<'END' && rm -f "$out/tests.xml"
import json, sys, xml.etree.ElementTree as tree

out, arguments = sys.argv[1:]
suite = tree.parse(f"{out}/tests.xml").getroot().find("testsuite")
row = {"benchmark": "tests", "pytest": arguments} | {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")}
row["seconds"] = float(suite.get("time"))
row["failed"] = [f"{c.get('classname')}::{c.get('name')}" for c in suite.iter("testcase")
                 if c.find("failure") is not None or c.find("error") is not None]
json.dump(row, open(f"{out}/tests.json", "w"), indent=2)
END
    return $status
}

# to_json NAME COMMAND...: writes the output of COMMAND to NAME.json if it is valid JSON.
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

export -f reducio tests to_json narrow_parity
export out dry root python

if [ -z "$dry" ]; then
    "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || { echo "no GPU here; --dry-run runs the parts on a CPU" >&2; exit 2; }
    size=1024
    part tests 100 bash -c tests
    part parity 60 bash -c "to_json parity reducio parity --full-size --json"
    part first_measurements 60 "$python" "$root/benchmarks/first_measurements.py" --no-compiled --out "$out/first_measurements.json"
    part bench-1024 120 "$python" -m reducio_fast bench $size --ladder --pairs 3 --no-cold --contenders reference,fast --out "$out/bench-1024.json"
    mkdir -p "$out/tables"
    part tune 90 bash -c "to_json tune reducio bench --tune --limit 75 --json --out \"$out/tables\""
    part profile 40 bash -c "to_json profile reducio profile $size --json --out \"$out/profile.trace.json.gz\""
    part bench-1024-compiled 130 "$python" -m reducio_fast bench $size --pairs 3 --no-cold --contenders compiled,fast --out "$out/bench-1024-compiled.json"
    part bench-svd 180 "$python" -m reducio_fast bench svd --ladder --pairs 2 --no-cold --dtype float16 --contenders reference,fast --out "$out/bench-svd.json"
else
    part tests 100 bash -c tests
    part parity 100 bash -c "to_json parity narrow_parity"
    part first_measurements 100 "$python" "$root/benchmarks/first_measurements.py" --narrow --no-compiled --out "$out/first_measurements.json"
    part bench-1024 100 "$python" -m reducio_fast bench narrow --ladder --pairs 1 --no-cold --contenders reference,fast --note "dry run" --device cpu --out "$out/bench-1024.json"
    needs_gpu tune
    part profile 100 bash -c "to_json profile reducio profile narrow --device cpu --json --out \"$out/profile.trace.json.gz\""
    needs_gpu bench-1024-compiled
    needs_gpu bench-svd
fi
echo "took $((SECONDS - began)) of $total s; commit the JSON files to benchmarks/results/, a table to triton_kernels/tables/"
exit $failed
