"""What the `reducio-fast` command line takes: the words of every sub-command, their defaults and their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import NoReturn

DTYPES = ("float32", "bfloat16", "float16")
BACKENDS = ("auto", "reference", "fast")
CONTENDERS = ("reference", "compiled", "fast", "fast-compiled")


class _Parser(argparse.ArgumentParser):
    """argparse prints its usage above each error; one line is the rule here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, is {value}")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, is {value}")
    return value


_positive.__name__ = _not_negative.__name__ = "whole number"  # what argparse calls the type in "invalid ... value"


def parser(functions: Iterable[Callable[[argparse.Namespace], None]]) -> argparse.ArgumentParser:
    """The parser whose result names in `run` one of `functions`, which are called like their sub-commands."""
    known = {function.__name__.replace("_", "-"): function for function in functions}
    parser = _Parser(prog="reducio-fast", description="Text and an image in, a short clip out.")
    parser.add_argument("--version", action="version", version=f"reducio-fast {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str) -> argparse.ArgumentParser:
        run = known[name]
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print one JSON object for machines")
        return command

    def add_size(command: argparse.ArgumentParser) -> None:
        command.add_argument("--height", type=_positive, help="multiple of 32 (default: the model's)")
        command.add_argument("--width", type=_positive, help="multiple of 32 (default: the model's)")

    def add_model(command: argparse.ArgumentParser, also: str = "") -> None:
        command.add_argument("--model", metavar="DIR", help=f"model folder{also} (default: the embedded toy model)")
        command.add_argument("--dtype", choices=DTYPES, help="(default: float32 on a CPU, bfloat16 on a GPU)")
        command.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")

    def add_compile(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--compile", action="store_true", default=None, help="compile the fast path's blocks, once on this machine"
        )

    def add_progress(command: argparse.ArgumentParser) -> None:
        command.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")

    command = add("generate")
    command.add_argument("prompt", metavar="PROMPT", nargs="?", help="what the clip shows (none for --model svd)")
    command.add_argument("--out", required=True, metavar="PATH", help=".mp4, .gif, .webp or a new folder for PNGs")
    command.add_argument("--image", metavar="FILE", help="your own content frame instead of the first stage's")
    command.add_argument("--negative-prompt", metavar="TEXT")
    add_size(command)
    command.add_argument(
        "--size", type=_positive, metavar="N", help="256, 512 or 1024: the aspect bucket of --image, else the square"
    )
    command.add_argument("--num-frames", type=_positive, help="(default: 16)")
    command.add_argument("--num-inference-steps", type=_positive, help="(default: 20, a peer's own)")
    command.add_argument("--guidance-scale", type=float, help="(default: 4.5, a peer's own)")
    command.add_argument("--seed", type=_not_negative, default=0)
    add_model(command, ", hub id, or a peer: svd, svd:DIR, svd:random, ltx, wan")
    command.add_argument("--backend", choices=BACKENDS, default="auto")
    add_compile(command)
    command.add_argument(
        "--text-to-image",
        metavar="DIR",
        help="first stage: a diffusers pipeline's folder or hub id (default: the model's)",
    )
    command.add_argument("--content-num-inference-steps", type=_positive, help="of the first stage (default: its own)")
    command.add_argument("--content-guidance-scale", type=float, help="of the first stage (default: its own)")
    command.add_argument("--text-encoder", metavar="DIR", help="a T5's folder or hub id (default: the model's)")
    command.add_argument("--image-encoder", metavar="DIR", help="an open_clip folder, hub id or MODEL/TAG")
    command.add_argument("--content-encoder", metavar="DIR", help="an AutoencoderKL's folder or hub id")
    command.add_argument(
        "--clean-caption",
        action=argparse.BooleanOptionalAction,
        help="clean the prompt as PixArt's captions were (default: as the model says)",
    )
    add_progress(command)

    command = add("reconstruct")
    command.add_argument("input", metavar="INPUT", help=".mp4, .gif, .webp or a folder of images")
    command.add_argument("--out", required=True, metavar="PATH", help=".mp4, .gif, .webp or a new folder for PNGs")
    command.add_argument("--start", type=_not_negative, default=0, help="first frame to use (default: 0)")
    add_size(command)
    add_model(command)

    command = add("decode")
    command.add_argument("file", metavar="FILE", help="the .safetensors file that the error named")
    command.add_argument("--out", required=True, metavar="PATH", help=".mp4, .gif, .webp or a new folder for PNGs")
    add_model(command)
    command.add_argument("--backend", choices=BACKENDS, default="auto")

    command = add("warmup")
    command.add_argument(
        "--sizes", nargs="+", default=[], metavar="SIZE", help="such as 256 or 512x768 (default: the model's own)"
    )
    command.add_argument("--deadline", type=float, metavar="SECONDS", help="give up after so long, with status 0")
    command.add_argument("--export", metavar="FILE", help="afterwards, pack all that is compiled into one archive")
    command.add_argument(
        "--import",
        dest="import_",
        metavar="FILE",
        help="before, unpack the archive of an equal machine; it holds code: take those of people you trust",
    )
    add_model(command)
    add_compile(command)
    add_progress(command)

    add("env")

    command = add("train")
    command.add_argument("model", choices=("tiny",))
    command.add_argument("--out", required=True, metavar="DIR", help="components, checkpoints and logs go here")
    command.add_argument("--stages", metavar="A,B", help="only these stages of the recipe")
    command.add_argument("--steps-scale", type=float, default=1.0, help="multiplies the steps of every stage")
    command.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    command.add_argument("--device", default="cpu")
    add_progress(command)

    command = add("evaluate")
    command.add_argument("--model", metavar="DIR", help="model folder (default: the embedded toy model)")
    command.add_argument("--prompts", type=_positive, default=64, help="held-out prompts to draw (default: 64)")
    command.add_argument("--seed", type=_not_negative, default=0)
    add_progress(command)

    command = add("demo")
    add_model(command)
    command.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens it to the network (default: this machine)")
    command.add_argument("--port", type=_positive, default=7860)

    command = add("compile-check")
    command.add_argument("--targets", metavar="A,B", help="only these, such as sm_90,gfx942 (default: all)")
    command.add_argument("--kernels", metavar="A,B", help="only these, such as conv3d (default: all)")
    command.add_argument(
        "--only", metavar="TEXT", default="", help="only variants with this in their name, such as bf16"
    )
    command.add_argument("--jobs", type=_positive, help="compilers at work at once (default: one a core)")

    command = add("convert")
    command.add_argument("source", metavar="SOURCE", help="a .ckpt, .pth or .safetensors file, or a diffusers folder")
    command.add_argument("--out", metavar="PATH", help="the component folder to write; with --to official the file")
    command.add_argument("--into", metavar="DIR", help="the model folder to put it in, made if there is none")
    command.add_argument("--to", choices=("ours", "official"), default="ours", help="(default: ours)")
    command.add_argument(
        "--component", choices=("vae", "transformer", "content_encoder"), help="(default: by its names)"
    )
    command.add_argument("--preset", help="such as reducio-ft2, reducio-1024, sdxl (default: by its shapes)")
    command.add_argument("--config", metavar="JSON", help="a file with fields to put over the preset's")
    command.add_argument("--dtype", choices=DTYPES, help="(default: as stored)")

    command = add("parity")
    add_model(command)
    command.add_argument(
        "--full-size",
        action=argparse.BooleanOptionalAction,
        help="full-width random weights as well (default: on a GPU)",
    )

    workloads = ("default", "256", "512", "1024", "narrow")
    which = "a clip of the default model, or full-size random weights at so many pixels (default: default)"

    command = add("bench")
    command.add_argument("workload", nargs="?", choices=workloads, default="default", help=which)
    add_model(command)
    command.add_argument("--contenders", metavar="A,B", help=f"of {','.join(CONTENDERS)} (default: all but the last)")
    command.add_argument(
        "--peer", metavar="A,B", help="svd, ltx, wan beside ours: random weights of the published size, or svd:DIR"
    )
    command.add_argument("--ladder", action="store_true", help="every optimisation that can be switched, one by one")
    command.add_argument("--pairs", type=_positive, default=5, help="turns that are timed (default: 5)")
    command.add_argument(
        "--cold", action=argparse.BooleanOptionalAction, default=True, help="first clips of fresh processes too"
    )
    command.add_argument("--note", help="a line that stays with the row")
    command.add_argument("--out", metavar="FILE", help="JSON row to write; with --tune the table")
    command.add_argument("--tune", action="store_true", help="instead: find launch settings for the GPU that is here")
    command.add_argument("--limit", type=_positive, default=120, metavar="SECONDS", help="for --tune (default: 120)")
    add_progress(command)

    command = add("profile")
    command.add_argument("workload", nargs="?", choices=workloads, default="default", help=which)
    add_model(command)
    command.add_argument("--contender", choices=CONTENDERS, default="fast")
    command.add_argument("--out", metavar="FILE", default="trace.json.gz", help="(default: trace.json.gz)")
    command.add_argument("--shapes", action="store_true", help="record the shapes of inputs too")
    command.add_argument(
        "--ranges", action="store_true", help="no trace: NVTX or roctx ranges, for nsys, ncu or rocprofv3"
    )
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("reducio-fast")
    except PackageNotFoundError:
        return "(not installed)"
