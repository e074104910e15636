"""The `reducio-fast` command: one small function a sub-command, above the pipeline.

Results go to stdout (one JSON object with --json), progress and errors to stderr. A mistake the user can mend is one
line and exit status 2; Ctrl-C is 130. torch and the models are imported by the sub-command that needs them, so that
--help and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..system.errors import ReducioError, is_out_of_memory
from . import options

# Parts and settings of a model that the command line can name, and words for the first stage.
NAMED = ("text_to_image", "text_encoder", "image_encoder", "content_encoder", "clean_caption")
FIRST_STAGE = ("num_inference_steps", "guidance_scale")
SAMPLING = {"num_frames": 16, "num_inference_steps": 20, "guidance_scale": 4.5}  # of our models; a peer has its own


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` by default); returns the exit status."""
    args = options.parser(COMMANDS).parse_args(argv)
    try:
        args.run(args)
    except ReducioError as error:
        return _fail(args.command, str(error))
    except KeyboardInterrupt:
        print(f"reducio-fast {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_out_of_memory(error):
            raise  # a defect of ours: the traceback is wanted
        return _fail(args.command, f"out of memory: {str(error) or 'choose a smaller size'}")
    return 0


def generate(args: argparse.Namespace) -> None:
    """Text (and an image) -> a clip on disk."""
    from ..media.image_files import read_image
    from ..media.video_files import check_output_path

    check_output_path(args.out)
    # A broken file is refused now, not after the model has loaded.
    picture = None if args.image is None else read_image(args.image).shape[:2]
    if args.size is not None:
        args.height, args.width = _size_of(args, picture)
    import reducio_fast

    from ..pipelines.peers.pipeline import find

    peer = find(args.model)
    defaults = SAMPLING if peer is None else peer.defaults
    given = {name: getattr(args, name) for name in SAMPLING}
    sampling = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    config = {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "image": args.image,
        "model": args.model,
        "height": args.height,
        "width": args.width,
        **sampling,
        "seed": args.seed,
        "backend": args.backend,
        "compile": args.compile,
        "dtype": args.dtype,
        "device": args.device,
        **{name: getattr(args, name) for name in NAMED},
        "content_kwargs": _first_stage(args),
    }
    options = {name: value for name, value in config.items() if value is not None}
    started = time.perf_counter()
    out = reducio_fast.generate(**options, progress=args.progress)
    out.save(args.out)
    timings = {**out.timings, "total": time.perf_counter() - started}  # the total includes loading

    frames, height, width = out.frames.shape[:3]
    config |= {"num_frames": frames, "height": height, "width": width, "seed": out.seed}
    config["model"] = config["model"] or "the embedded default"
    result = {"path": args.out, "fps": out.fps, "seed": out.seed, "config": config, "timings": timings}
    lines = [f"  {name:<20} {value}" for name, value in config.items() if value is not None]
    lines += ["seconds"] + [f"  {name:<20} {seconds:.2f}" for name, seconds in timings.items()]
    lines += [f"wrote {args.out}: {frames} frames of {height}x{width} at {out.fps:g} frames a second"]
    _report(args, result, lines)


def _first_stage(args: argparse.Namespace) -> dict[str, Any] | None:
    """The words of the options that begin with --content-, for the text-to-image pipeline."""
    words = {word: getattr(args, f"content_{word}") for word in FIRST_STAGE}
    return {word: value for word, value in words.items() if value is not None} or None


def _size_of(args: argparse.Namespace, picture: tuple[int, int] | None) -> tuple[int, int]:
    """--size as height and width: the aspect bucket of the picture, the square without one."""
    from ..media.aspect_buckets import buckets, choose_size

    if args.height is not None or args.width is not None:
        given = f"--height {args.height} --width {args.width}"
        raise ReducioError(f"--size {args.size} and {given}: give one or the other")
    buckets(args.size)  # refuses a number that has no table
    return choose_size(None, None, (args.size, args.size), [picture] if picture else ())


def reconstruct(args: argparse.Namespace) -> None:
    """A clip -> VAE -> original and reconstruction side by side, with PSNR and SSIM."""
    from ..media.image_files import cover_crop
    from ..media.video_files import check_output_path, read_video, side_by_side, write_video

    check_output_path(args.out)
    read_video(args.input, args.start, 1)  # a missing or broken input is refused before torch is imported

    from ..evaluation import reconstruction
    from ..media.similarity import psnr, ssim
    from ..pipelines.call.validation import check_size

    vae, settings = _load_vae(args)
    wanted = vae.config.num_frames
    height, width = args.height or settings["sample_height"], args.width or settings["sample_width"]
    check_size(vae.config, height, width, wanted)
    clip, fps = read_video(args.input, args.start, wanted)
    if len(clip) < wanted:
        where = f" from number {args.start} on" if args.start else ""
        raise ReducioError(f"{args.input} has {len(clip)} frames{where}; the model takes {wanted}")
    clip = cover_crop(clip, height, width)
    started = time.perf_counter()
    restored = reconstruction.reconstruct(vae, clip)
    seconds = time.perf_counter() - started
    write_video(side_by_side(clip, restored), args.out, fps or settings["fps"])

    result = {"path": args.out, "frames": wanted, "height": height, "width": width}
    result |= {"psnr": psnr(clip, restored), "ssim": ssim(clip, restored), "seconds": seconds}
    lines = [
        f"PSNR {result['psnr']:.2f} dB",
        f"SSIM {result['ssim']:.4f}",
        f"wrote {args.out}: {wanted} frames of {height}x{width}, original left, reconstruction right ({seconds:.2f} s)",
    ]
    _report(args, result, lines)


def decode(args: argparse.Namespace) -> None:
    """Latents that a failed decode has kept -> a clip on disk."""
    from ..checkpoints.saved_latents import load
    from ..media.video_files import check_output_path

    check_output_path(args.out)
    kept = load(args.file)
    from ..checkpoints.strict_files import embedded_model
    from ..pipelines.call.output import ReducioOutput
    from ..pipelines.reducio.pipeline import ReducioPipeline

    model = embedded_model() if args.model is None else args.model
    pipe = ReducioPipeline.from_pretrained(model, dtype=args.dtype, device=args.device, backend=args.backend)
    started = time.perf_counter()
    frames = pipe.decode(kept.latents, kept.content)
    seconds, is_list = time.perf_counter() - started, len(frames) > 1
    out = ReducioOutput(frames if is_list else frames[0], kept.content, kept.seeds, kept.fps, {}, "np", is_list)
    paths = out.save(args.out)
    names = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    result = {"paths": names, "seeds": kept.seeds, "fps": kept.fps, "frames": frames.shape[1], "seconds": seconds}
    _report(args, result, [f"wrote {name}: {frames.shape[1]} frames ({seconds:.2f} s)" for name in names])


def warmup(args: argparse.Namespace) -> None:
    """Compile for this machine ahead of the first call; take what is compiled from or to another machine."""
    from .warmup import command

    result, lines = command(args)
    _report(args, result, lines)


def env(args: argparse.Namespace) -> None:
    """Versions, devices and CPU features, for a bug report."""
    from ..system.machine_report import describe, format_lines

    result = describe()
    _report(args, result, format_lines(result))


def train(args: argparse.Namespace) -> None:
    """Reproduce the embedded default model."""
    from ..training.tiny.recipe import train as train_tiny

    figures = train_tiny(
        args.out,
        stages=args.stages.split(",") if args.stages else None,
        scale=args.steps_scale,
        resume=args.resume,
        progress=args.progress,
        device=args.device,
    )
    lines = [f"{stage}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()) for stage, row in figures.items()]
    _report(args, {"out": args.out, "stages": figures}, [*lines, f"wrote {args.out}"])


def evaluate(args: argparse.Namespace) -> None:
    """Score a model on held-out prompts and clips."""
    from ..evaluation.toy_report import evaluate as score

    result = score(model=args.model, num_prompts=args.prompts, seed=args.seed, progress=args.progress)
    lines = [f"{'':<10}{'right':>8}{'share':>9}{'95% interval':>18}"]
    for name in ("colour", "motion", "shape", "all"):
        row = result[name]
        low, high = row["interval"]
        right = f"{row['right']}/{args.prompts}"
        lines.append(f"{name:<10}{right:>8}{row['share']:>9.1%}{f'{low:.1%} to {high:.1%}':>18}")
    lines += [f"  wrong: {failure}" for failure in result["failures"]]
    lines.append(f"{'VAE':<10}{'clips':>8}{'PSNR dB':>9}{'SSIM':>8}{'gain dB over the content frame repeated':>42}")
    for name, row in result["vae"].items():
        if "skipped" in row:
            lines.append(f"{name:<10}skipped: {row['skipped']}")
        else:
            lines.append(f"{name:<10}{row['clips']:>8}{row['psnr']:>9.2f}{row['ssim']:>8.4f}{row['gain_db']:>42.2f}")
    _report(args, result, lines)


def demo(args: argparse.Namespace) -> None:
    """A page in the browser that makes clips."""
    from ..server.demo_page import serve

    url, wait = serve(args.model, args.dtype, args.device, args.host, args.port)
    _report(args, {"url": url}, [f"{url} (Ctrl-C ends it)"])
    sys.stdout.flush()  # whoever started this in the background waits for the address
    wait()


def compile_check(args: argparse.Namespace) -> None:
    """Compile every kernel for every GPU target, with no GPU."""
    from ..measurement import kernel_builds as checker

    split = {name: text.split(",") if text else None for name, text in (("archs", args.targets), ("ops", args.kernels))}
    builds = []
    for build in checker.check(**split, only=args.only, jobs=args.jobs):
        builds.append(build)
        if build.problems and not args.json:
            print(f"{build.variant} on {build.arch}: {'; '.join(build.problems)}", file=sys.stderr)
    wrong = [build for build in builds if build.problems]
    _report(args, {"builds": [asdict(b) for b in builds], "wrong": len(wrong)}, checker.lines(builds))
    if wrong:
        raise ReducioError(
            f"{len(wrong)} of {len(builds)} builds are wrong, the first: {wrong[0].variant} on {wrong[0].arch}"
        )


def parity(args: argparse.Namespace) -> None:
    """Compare the fast path with the float32 reference on this machine."""
    from ..measurement import parity as comparison

    rows = comparison.compare(model=args.model, dtype=args.dtype, device=args.device, full_size=args.full_size)
    wrong = [row for row in rows if not row["right"]]
    _report(args, {"rows": rows, "wrong": len(wrong)}, comparison.lines(rows))
    if wrong:
        raise ReducioError(f"{len(wrong)} of {len(rows)} comparisons fail, the first: {wrong[0]['what']}")


def convert(args: argparse.Namespace) -> None:
    """Published weights -> a safetensors folder, and a vae back to the layout of the release."""
    from ..checkpoints import convert as conversion
    from ..checkpoints.strict_files import read_json
    from ..system.devices import DTYPES as dtypes

    if args.to == "official":
        others = [f"--{n}" for n in ("into", "component", "preset", "config", "dtype") if getattr(args, n) is not None]
        if args.out is None or others:
            raise ReducioError(f"--to official takes --out FILE and nothing else, not {', '.join(others) or 'none'}")
        result = conversion.export(args.source, args.out)
    else:
        config = read_json(Path(args.config)) if args.config else None
        words = (args.component, args.preset, config, dtypes.get(args.dtype))
        result = conversion.convert(args.source, args.out, args.into, *words)
    _report(args, result, conversion.lines(result))


def bench(args: argparse.Namespace) -> None:
    """Time the fast path, the reference and torch.compile in turns, against what this machine can do at best."""
    from ..measurement import bench as benchmark
    from ..measurement import tune_kernels

    log = (lambda line: print(line, file=sys.stderr)) if args.progress else lambda line: None
    if args.tune:
        row = tune_kernels.run(args.out, args.device, args.limit, log)
        _report(args, row, tune_kernels.lines(row))
        return
    models = []
    if args.peer:
        from ..measurement import compare_models  # a bare GPU machine, without diffusers, can bench too

        models = compare_models.named(args.peer)
    split = args.contenders.split(",") if args.contenders else None
    row = benchmark.bench(
        args.workload, args.model, args.dtype, args.device, split, args.ladder, args.pairs, args.cold, args.note, log
    )
    lines = benchmark.lines(row)
    if models:
        row["peers"] = compare_models.compare(row, models, args.pairs, args.dtype, args.device, log)
        lines += ["", *compare_models.lines(row["peers"])]
    if args.out:
        benchmark.write(row, args.out)
    _report(args, row, lines)


def profile(args: argparse.Namespace) -> None:
    """Trace one clip: a Chrome trace and a table of what each stage is spent on."""
    from ..measurement import profile as profiling

    words = (args.workload, args.model, args.contender, args.dtype, args.device)
    row = profiling.marked(*words) if args.ranges else profiling.profile(args.out, *words, shapes=args.shapes)
    _report(args, row, profiling.lines(row))


def _load_vae(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The VAE alone and the settings in the model's index: the text encoder of a full-size model is 9 GB."""
    from ..checkpoints.hub import find_model
    from ..checkpoints.networks import load_model
    from ..checkpoints.strict_files import INDEX, embedded_model, read_json
    from ..reference import ReducioVAE, VAEConfig
    from ..system.devices import resolve_device, resolve_dtype

    folder = embedded_model() if args.model is None else find_model(args.model)
    settings = read_json(folder / INDEX)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, None, device)
    return load_model(ReducioVAE, VAEConfig, folder / "vae", dtype, device), settings


def _report(args: argparse.Namespace, result: dict[str, Any], lines: list[str]) -> None:
    print(json.dumps(_finite(result), indent=2, allow_nan=False) if args.json else "\n".join(lines))


def _finite(value: Any) -> Any:
    """JSON has no infinity, which is what the PSNR of an exact copy is, and no NaN: both become null."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fail(command: str | None, message: str) -> int:
    name = f"reducio-fast {command}" if command else "reducio-fast"
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


COMMANDS = (
    generate, reconstruct, decode, warmup, env, train, evaluate, demo, compile_check, convert, parity, bench, profile,
)  # fmt: skip
