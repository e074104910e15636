"""Clips over HTTP: jobs in a queue, by OpenAI's videos API."""

from __future__ import annotations

import argparse
import logging
import math
import re

from ..system.errors import ReducioError
from . import options
from .printing import Printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, ", hub id, or another model: svd, svd:DIR, ltx, wan")
    options.add_backend(parser)
    options.add_compile(parser)
    options.add_quantise(parser)
    options.add_encoding(parser)
    parser.add_argument("--name", help="of the model, for clients (default: that of its folder)")
    parser.add_argument(
        "--threads", type=options.positive, help="of torch on a CPU, up to its usable cores; they change the bytes"
    )
    parser.add_argument("--host", default="127.0.0.1", help="any other needs --api-keys (default: 127.0.0.1)")
    parser.add_argument("--port", type=options.not_negative, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--api-keys", metavar="FILE", help="lines NAME:SHA256; each key sees its own jobs alone")
    parser.add_argument("--data", metavar="DIR", help="jobs and clips (default: `serve` in the cache folder)")
    parser.add_argument("--sizes", metavar="WxH,...", help="width first (default: the model's own and the buckets)")
    parser.add_argument("--queue", type=options.positive, default=64, help="open jobs, above it 429 (default: 64)")
    parser.add_argument("--queue-per-key", type=options.positive, default=16, help="open jobs of one key (default: 16)")
    parser.add_argument("--max-body", type=options.positive, default=20_000_000, help="bytes (default: 20 million)")
    parser.add_argument("--max-prompt", type=options.positive, default=4000, help="characters (default: 4000)")
    parser.add_argument("--max-steps", type=options.positive, default=100, help="of a stage (default: 100)")
    parser.add_argument(
        "--job-seconds", type=float, default=600.0, help="a clip that takes longer fails (default: 600)"
    )
    parser.add_argument("--keep-hours", type=float, default=24.0, help="that a clip is kept (default: 24)")
    parser.add_argument(
        "--keep-bytes", type=options.positive, default=10**10, help="of all clips (default: 10 billion)"
    )
    parser.add_argument("--grace", type=float, default=30.0, help="seconds for a clip at the end (default: 30)")
    parser.add_argument("--ray", metavar="ADDRESS", help='make clips on this Ray cluster; "local" starts one here')
    options.add_replicas(parser)


def run(arguments: argparse.Namespace) -> Printed:
    from ..server.requests import Limits
    from ..server.serve import Settings, serve

    for name in ("job_seconds", "keep_hours"):
        value = getattr(arguments, name)
        if not 0 < 3600 * value < math.inf:  # hours as seconds too
            raise ReducioError(f"--{name.replace('_', '-')}: must be finite and above 0, is {value:g}")
    if not 0 <= arguments.grace < math.inf:
        raise ReducioError(f"--grace: must be finite and at least 0, is {arguments.grace:g}")
    replicas = options.replicas(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    limits = Limits(
        queue=arguments.queue,
        queue_per_key=arguments.queue_per_key,
        body_bytes=arguments.max_body,
        prompt_characters=arguments.max_prompt,
        steps=arguments.max_steps,
        sizes=_sizes(arguments.sizes),
        job_seconds=arguments.job_seconds,
        keep_seconds=3600 * arguments.keep_hours,
        keep_bytes=arguments.keep_bytes,
    )
    names = (
        "model dtype device backend compile quantise encoding threads name host port api_keys data grace ray".split()
    )
    settings = Settings(
        **{name: getattr(arguments, name) for name in names},
        limits=limits,
        replicas=replicas,
        gpus=arguments.gpus_per_replica,
    )
    url, arguments.afterwards = serve(settings)
    return {"url": url}, [f"{url} (Ctrl-C ends it; {url}/docs has the API)"]


def _sizes(text: str | None) -> tuple[tuple[int, int], ...] | None:
    if text is None:
        return None
    sizes = []
    for each in text.split(","):
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", each.strip())
        if match is None:
            raise ReducioError(f"--sizes: must be WIDTHxHEIGHT with commas between, is {text!r}")
        sizes.append((int(match[2]), int(match[1])))
    return tuple(sizes)
