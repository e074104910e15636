"""Formats the rows of `reducio-fast bench` as a table and a plot: `python benchmarks/report.py [--into README.md]`.

Reads the latest `bench-*.json` of each workload, device and precision under `benchmarks/results/`. Prints a markdown
table, or writes it between `<!-- bench:begin -->` and `<!-- bench:end -->` of a file. `--picture` plots the seconds of
each stage and its rate beside the roof that was measured in the same run (needs the `bench` extra).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
Row = dict[str, Any]


def rows(folder: Path) -> list[Row]:
    """The latest row of each workload, device and dtypes of its contenders, sorted by these."""
    latest: dict[tuple[str, ...], Row] = {}
    for path in sorted(folder.glob("bench-*.json")):
        row = json.loads(path.read_text())
        if row.get("benchmark") != "bench" or not timed(row):
            continue
        row["file"] = path.name
        key = (row["what"], row["machine"]["device"]["name"], *sorted({f["dtype"] for f in timed(row).values()}))
        if key not in latest or row["machine"]["date"] >= latest[key]["machine"]["date"]:
            latest[key] = row
    return [latest[key] for key in sorted(latest)]


def timed(row: Row, part: str = "contenders") -> dict[str, Row]:
    """The figures of contenders that were timed: not skipped, and not after the time ran out."""
    return {name: f for name, f in row[part].items() if "clip_s" in f}


def table(row: Row) -> list[str]:
    """Markdown of a row: seconds per stage and clip, first clip, speed-up with range, share of roof, memory, energy."""
    found, machine = timed(row), row["machine"]
    versions = ", ".join(f"{n} {machine['packages'][n]}" for n in ("torch", "triton") if n in machine["packages"])
    first = next(iter(found))
    lines = [
        f"**{row['what']}**, {machine['device']['name']}, {versions}, commit `{(machine['commit'] or '?')[:10]}`, "
        f"{machine['date']}; {row['pairs']} turns in one process, medians"
        + (f"; {row['note']}" if row["note"] else ""),
        "",
        "| | " + " | ".join(f"{name} ({f['dtype']})" for name, f in found.items()) + " |",
        "|---|" + "---|" * len(found),
    ]

    def line(title: str, cells: list[str]) -> None:
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    for stage in dict.fromkeys(s for f in found.values() for s in f["stages_s"]):
        cells = []
        for name, f in found.items():
            if stage not in f["stages_s"]:
                cells.append("")
                continue
            ratio = f["stages_speed_up"].get(stage, {}).get("median")
            share = f["share_of_roof"].get(stage)
            notes = ([f"{ratio:.2f}x"] if ratio and name != first else []) + ([f"{share:.0%} of roof"] if share else [])
            cells.append(_seconds(f["stages_s"][stage]["median"]) + (f" ({', '.join(notes)})" if notes else ""))
        line(f"`{stage}`", cells)
    line("**clip**", [f"**{_seconds(f['clip_s']['median'])}**" for f in found.values()])
    ratios = [f["speed_up"] for f in found.values()]
    spreads = [f"**{r['median']:.2f}x** ({r['min']:.2f} to {r['max']:.2f})" for r in ratios]
    line("speed-up (least to most)", ["1", *spreads[1:]])
    line("first clip of this process", [_seconds(f["first_s"]) for f in found.values()])
    for state in ("empty_caches", "warm_caches"):
        if any(state in cold for cold in row["cold"].values()):
            cells = [_cold(row["cold"].get(name, {}).get(state)) for name in found]
            line(f"fresh process, {state.replace('_', ' ')}", cells)
    line("memory above the start", [f"{f['above_start_gb']:.2f} GB" for f in found.values()])
    if any(f["joules"] for f in found.values()):
        line("energy", [f"{f['joules']:.0f} J" if f["joules"] else "" for f in found.values()])
    roof = row["roof"]
    lines += [
        "",
        f"Roof, measured in the same run: {roof['matmul_tflops']:g} TFLOP/s by matrix product in "
        f"{roof['dtype']}, {roof['copy_gbs']:g} GB/s by copy.",
    ]
    for name, f in row["contenders"].items():
        if "skipped" in f:
            lines.append(f"{name} was skipped: {f['skipped']}.")
    if ladder := timed(row, "ladder"):
        lines += ["", "| rung | clip | over the reference | over the rung before | what it adds |"]
        lines.append("|---|---|---|---|---|")
        before = None
        for name, f in ladder.items():
            step = f"{before / f['clip_s']['median']:.2f}x" if before else ""
            before = f["clip_s"]["median"]
            lines.append(f"| {name} | {_seconds(before)} | {f['speed_up']['median']:.2f}x | {step} | {f['what']} |")
    return lines


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms" if value >= 0.01 else f"{value * 1e3:.1f} ms"


def _cold(state: dict[str, float] | None) -> str:
    return "" if state is None else f"load {state['load_s']:.1f} s, clip {state['first_clip_s']:.1f} s"


def put(text: str, lines: list[str]) -> str:
    """`text` with `lines` between its markers. Raises ValueError unless each marker occurs once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the file needs one {BEGIN} and, after it, one {END}")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    return "\n".join([head + BEGIN, *lines, END]) + tail


def picture(found: list[Row], path: Path) -> None:
    """Draw two plots per row: seconds per stage, and the rate of each stage's arithmetic below the measured roof."""
    from matplotlib.figure import Figure

    colours = {"reference": "#9aa5b1", "compiled": "#e0a458", "fast": "#2a7f62"}
    figure = Figure(figsize=(10, 3.4 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 2, squeeze=False, width_ratios=(3, 2))
    for (bars, rates), row in zip(axes, found, strict=True):
        contenders = timed(row)
        stages = list(dict.fromkeys(s for f in contenders.values() for s in f["stages_s"]))
        height = 0.8 / len(contenders)
        for i, (name, f) in enumerate(contenders.items()):
            at = [k + (i - (len(contenders) - 1) / 2) * height for k in range(len(stages))]
            values = [f["stages_s"].get(s, {"median": 0, "min": 0, "max": 0}) for s in stages]
            medians = [v["median"] for v in values]
            spread = [[v["median"] - v["min"] for v in values], [v["max"] - v["median"] for v in values]]
            bars.barh(at, medians, height, color=colours.get(name), label=f"{name}, {f['dtype']}",
                      xerr=spread, error_kw={"ecolor": "#444444", "elinewidth": 0.8})  # fmt: skip
        bars.set_yticks(range(len(stages)), stages)
        bars.invert_yaxis()
        bars.set_xlabel("seconds: median, least and most")
        bars.legend(frameon=False, fontsize=8)
        bars.set_title(f"{row['what'].split(',')[0]}\n{row['machine']['device']['name']}", loc="left", fontsize=9)

        counted = list(row["flops"]["direct"])
        for i, (name, f) in enumerate(contenders.items()):
            at = [k + (i - (len(contenders) - 1) / 2) * 0.8 / len(contenders) for k in range(len(counted))]
            shown = [f["tflops"][s] for s in counted]
            rates.bar(at, shown, 0.8 / len(contenders), color=colours.get(name))
            for x, stage, value in zip(at, counted, shown, strict=True):
                if (share := f["share_of_roof"].get(stage)) is not None:  # none in another dtype than the roof's
                    rates.annotate(f"{share:.0%}", (x, value), ha="center", va="bottom", fontsize=8)
        roof = row["roof"]["matmul_tflops"]
        rates.axhline(roof, color="#b03a2e", linewidth=1.2)
        rates.annotate("matrix product, measured", (1, roof), xycoords=("axes fraction", "data"), ha="right",
                       va="bottom", fontsize=8, color="#b03a2e")  # fmt: skip
        rates.set_ylim(0, 1.15 * max(roof, *(v for f in contenders.values() for v in f["tflops"].values())))
        rates.set_xticks(range(len(counted)), counted)
        rates.set_ylabel("TFLOP/s")
        for plot in (bars, rates):
            plot.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of rows (default: benchmarks/results)")
    parser.add_argument("--into", type=Path, metavar="FILE", help="file with the two markers; default: print")
    parser.add_argument("--picture", type=Path, metavar="FILE", help=".png or .svg to draw")
    args = parser.parse_args()
    found = rows(args.results)
    if not found:
        parser.error(f"no row of `reducio-fast bench` in {args.results}")
    lines = [line for i, row in enumerate(found) for line in ([""] if i else []) + table(row)]
    if args.into:
        try:
            args.into.write_text(put(args.into.read_text(), lines))
        except ValueError as error:
            parser.error(f"{args.into}: {error}")
    else:
        print("\n".join(lines))
    if args.picture:
        try:
            picture(found, args.picture)
        except ImportError as error:
            parser.error(f'--picture: {error}; pip install "reducio-fast[bench]"')


if __name__ == "__main__":
    main()
