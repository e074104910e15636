"""Videos -> a list of clips with scores, and the page that helps to choose thresholds."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..system.errors import ReducioError
from . import options
from .printing import Printed

_OF_VIDEOS = ("captions", "clip", "aesthetic", "workers", "ray")  # options that a run without videos cannot follow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", nargs="*", metavar="PATH", help="videos, and folders of them; none to select only")
    options.add_out(
        parser, "DIR",
        "parts of the manifest, clips.parquet and report.html; a second run makes the parts that are missing, and "
        "those made with other options or captions or of files that have changed",
    )  # fmt: skip
    parser.add_argument("--captions", metavar="FILE", help="JSON: {file name, or path from here: caption}")
    parser.add_argument("--no-text", dest="text", action="store_false", help="do not look for text in the picture")
    parser.add_argument("--clip", metavar="DIR", help="an open_clip model, for similarity and the aesthetic head")
    parser.add_argument("--aesthetic", metavar="FILE", help="a linear head on it, .safetensors with weight and bias")
    parser.add_argument("--workers", type=options.positive, metavar="N", help="processes (default: one a usable core)")
    parser.add_argument("--ray", metavar="ADDRESS", help='run on this Ray cluster; "local" starts one here')
    parser.add_argument(
        "--keep", action="append", default=[], metavar="SCORE.min=X",
        help="thresholds, X or X%% for a percentile: motion.min=20%% text_area.max=0.05 (default: all clips)",
    )  # fmt: skip
    parser.add_argument(
        "--shortest", type=options.positive, default=16, metavar="N", help="least frames of a clip (default: 16)"
    )
    options.add_progress(parser)


def run(arguments: argparse.Namespace) -> Printed:
    from ..data.curation import manifest, select
    from ..data.curation.curate import Settings, curate

    thresholds = [select.Threshold.parse(text) for text in arguments.keep]
    given = [name for name in _OF_VIDEOS if getattr(arguments, name) is not None] + ["no-text"] * (not arguments.text)
    if given and not arguments.input:
        raise ReducioError(f"--{given[0]} needs videos; without videos, curate selects from the clips of earlier runs")
    out, result, lines = Path(arguments.out), dict[str, object](), list[str]()
    if arguments.input:
        settings = Settings(arguments.out, arguments.text, arguments.clip, arguments.aesthetic)
        done = curate(
            arguments.input,
            settings,
            options.captions(arguments.captions),
            arguments.workers,
            arguments.ray,
            arguments.progress,
        )
        result |= {"made": done.made, "kept_parts": done.kept, "broken": done.broken}
        lines.append(f"{done.made} videos looked at ({done.broken} cannot be read), {done.kept} were done before")
    rows = manifest.without_moved(manifest.read_parts(out))
    kept, drops = select.select(rows, thresholds, arguments.shortest)
    manifest.write(kept, out / manifest.CHOSEN)
    select.write_report(out, rows, kept, drops, thresholds)
    result |= {"clips": len(rows), "selected": len(kept), "drops": drops, "path": str(out / manifest.CHOSEN)}
    lines += [f"{name}: drops {count}" for name, count in drops.items()]
    lines.append(f"wrote {out / manifest.CHOSEN}: {len(kept)} of {len(rows)} clips; see {out / 'report.html'}")
    return result, lines
