"""Time the fast path, the reference and torch.compile in turns, against what this machine can do at best."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..system.errors import ReducioError
from ..system.paths import check_output_file
from . import options
from .printing import Printed

Row = dict[str, Any]
# Options that --tune does not use.
NOT_TUNING = ("model", "dtype", "contenders", "peer", "ladder", "pairs", "cold", "note")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..measurement.names import CONTENDERS

    options.add_workload(parser)
    options.add_model(parser)
    parser.add_argument("--contenders", metavar="A,B", help=f"of {','.join(CONTENDERS)} (default: the first three)")
    parser.add_argument(
        "--peer", metavar="A,B", help="svd, ltx, wan beside ours: random weights of the published size, or svd:DIR"
    )
    parser.add_argument(
        "--ladder", action="store_true", default=None, help="every optimisation that can be switched, one by one"
    )
    parser.add_argument("--pairs", type=options.positive, help="turns that are timed (default: 5)")
    parser.add_argument(
        "--cold", action=argparse.BooleanOptionalAction, help="first clips of fresh processes too (default: yes)"
    )
    parser.add_argument("--note", help="a line that stays with the row")
    options.add_out(parser, "FILE", "JSON row to write; with --tune the table", required=False)
    parser.add_argument(
        "--tune",
        action="store_true",
        help="instead: find launch settings for the GPU that is here; of Reducio's kernels, or of SVD's: svd --tune",
    )
    parser.add_argument("--limit", type=options.positive, metavar="SECONDS", help="for --tune (default: 120)")
    options.add_progress(parser)


def run(arguments: argparse.Namespace) -> Printed:
    from ..measurement import bench, tune_kernels

    log = (lambda line: print(line, file=sys.stderr)) if arguments.progress else lambda line: None
    if arguments.tune:
        if arguments.workload not in (None, "svd"):
            raise ReducioError(f"workload: {arguments.workload} given, --tune takes svd, or none for Reducio's kernels")
        options.refuse(arguments, NOT_TUNING, "has no effect with --tune")
        family = arguments.workload or "reducio"
        row = tune_kernels.run(arguments.out, arguments.device, arguments.limit or 120, log, family)
        return row, tuning_lines(row)
    options.refuse(arguments, ("limit",), "is of --tune")
    pairs = arguments.pairs or 5
    if arguments.out:
        check_output_file(arguments.out, "out")
    models = []
    if arguments.peer is not None:
        from ..measurement import compare_models  # a bare GPU machine, without diffusers, can bench too

        models = compare_models.named(arguments.peer)
    row = bench.bench(
        arguments.workload or "default",
        arguments.model,
        arguments.dtype,
        arguments.device,
        arguments.contenders.split(",") if arguments.contenders is not None else None,
        bool(arguments.ladder),
        pairs,
        arguments.cold is not False,
        arguments.note,
        log,
        (lambda row: bench.write(row, arguments.out)) if arguments.out else (lambda row: None),
    )
    text = lines(row)
    if models:
        row["peers"] = compare_models.compare(row, models, pairs, arguments.dtype, arguments.device, log)
        text += ["", *comparison_lines(row["peers"])]
    if arguments.out:
        bench.write(row, arguments.out)
    return row, text


def lines(row: Row) -> list[str]:
    """The row for people."""
    roof, machine = row["roof"], row["machine"]
    versions = ", ".join(
        f"{name} {machine['packages'][name]}" for name in ("torch", "triton") if name in machine["packages"]
    )
    out = [
        row["what"],
        f"{machine['device']['name']}; {versions}; commit {(machine['commit'] or 'unknown')[:10]}; {machine['date']}",
        f"roof, measured now: matrix product {roof['matmul_tflops']:g} TFLOP/s in {roof['dtype']}, "
        f"copy {roof['copy_gbs']:g} GB/s",
        f"parity: {len(row['parity'])} of {len(row['parity'])} right",
    ]
    if row["note"]:
        out.append(row["note"])
    for title, figures in (("", row["contenders"]), ("ladder", row["ladder"])):
        if figures:
            out += ["", *_table(title, figures)]
    if row["cold"]:
        out += ["", f"{'fresh process':<20}{'load s':>8}{'first clip s':>14}{'caches warm: load s':>21}{'clip s':>8}"]
        for name, states in row["cold"].items():
            if "skipped" in states:
                out.append(f"{name:<20}skipped: {states['skipped']}")
                continue
            values = [states[s][k] for s in ("empty_caches", "warm_caches") for k in ("load_s", "first_clip_s")]
            out.append(f"{name:<20}{values[0]:>8.2f}{values[1]:>14.2f}{values[2]:>21.2f}{values[3]:>8.2f}")
    return out


def _table(title: str, figures: dict[str, Row]) -> list[str]:
    head = (
        f"{title:<20}{'dtype':>14}{'first s':>9}{'clip s':>9}{'min':>8}{'max':>8}{'speed-up':>10}{'min':>7}{'max':>7}"
        f"{'peak GB':>9}{'over start':>11}{'J':>8}{'PSNR':>7}"
    )
    out = [head]
    for name, f in figures.items():
        if "skipped" in f:
            out.append(f"{name:<20}skipped: {f['skipped']}")
            continue
        clip, ratio = f["clip_s"], f["speed_up"]
        joules, psnr = (f"{x:.1f}" if x is not None else "-" for x in (f["joules"], f["psnr_db"]))
        out.append(
            f"{name:<20}{f['dtype']:>14}{f['first_s']:>9.2f}{clip['median']:>9.3f}{clip['min']:>8.3f}{clip['max']:>8.3f}"
            f"{ratio['median']:>10.2f}{ratio['min']:>7.2f}{ratio['max']:>7.2f}"
            f"{f['peak_gb']:>9.2f}{f['above_start_gb']:>11.2f}{joules:>8}{psnr:>7}"
        )
    timed = {name: f for name, f in figures.items() if "skipped" not in f}
    stages = list(dict.fromkeys(s for f in timed.values() for s in f["stages_s"]))
    out.append(f"{'stage':<20}{'contender':<20}{'s':>9}{'speed-up':>10}{'TFLOP/s':>10}{'of roof':>9}")
    for stage in stages:
        for name, f in timed.items():
            if stage in f["stages_s"]:
                ratio = f["stages_speed_up"].get(stage, {}).get("median")
                rate = f["tflops"].get(stage)
                share = f["share_of_roof"].get(stage)
                roofs = f"{rate:>10.3f}" if rate is not None else f"{'-':>10}"
                roofs += f"{share:>9.1%}" if share is not None else f"{'-':>9}"
                speed_up = f"{ratio:.2f}" if ratio is not None else "-"
                out.append(f"{stage:<20}{name:<20}{f['stages_s'][stage]['median']:>9.4f}{speed_up:>10}{roofs}")
    return out


def comparison_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of `bench_row` as a table for people."""
    head = ("model", "weights", "clip", "cold s", "warm s", "s per video s", "s per megapixel", "peak GB")
    table = [head]
    for row in rows:
        memory = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e9:.1f}"
        clip = f"{row['num_frames']}x{row['height']}x{row['width']}@{row['fps']:g}"
        figures = (row["cold"], row["seconds"], row["per_video_second"], row["per_megapixel"])
        table.append((row["model"], row["weights"], clip, *(f"{value:.3g}" for value in figures), memory))
    widths = [max(len(cells[column]) for cells in table) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in table]


def tuning_lines(row: dict[str, Any]) -> list[str]:
    """The row for people."""
    out = [f"{'kernel and class':<40}{'before ms':>11}{'after ms':>10}  settings (ms a clip)"]
    for r in (r for r in row["rows"] if "settings" in r):
        settings = " ".join(f"{name}={value}" for name, value in r["settings"].items())
        out.append(f"{r['op'] + ' ' + r['key']:<40}{r['before_s'] * 1e3:>11.2f}{r['after_s'] * 1e3:>10.2f}  {settings}")
    out.append(f"{'shape':<60}microseconds a call")
    for r in (r for r in row["rows"] if "plan" in r):
        times = ", ".join(f"{way} {seconds * 1e6:.1f}" for way, seconds in r["seconds"].items())
        out.append(f"{r['plan'] + ', ' + r['what']:<60}{times}")
    return [*out, f"wrote {row['table']}"]
