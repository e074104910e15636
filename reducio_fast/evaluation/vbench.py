"""Runs VBench on generated clips, in an environment of its own: its wheel needs versions of transformers and numpy that
conflict with this project's.

Facts about vbench 0.1.5, the newest wheel. The package has no `__main__`, and its console script takes one dimension
and starts `python` from PATH; the module `vbench.launch.evaluate` takes several and runs in the interpreter that is
named. It computes on CUDA alone. Mode `vbench_standard` looks only for clips of VBench's own prompts; `custom_input`
scores every clip in the folder. The suffix of all clips is that of the folder's first entry, so nothing else may lie
there.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..media.video_files import check_format, check_output_path, write_video
from ..pipelines.call import validation
from ..system.errors import ReducioError, first_line
from ..system.paths import entries, printable

# Dimensions that need VBench's annotations of a prompt, so that `custom_input` refuses them.
ANNOTATED = ("appearance_style", "color", "multiple_objects", "object_class", "scene", "spatial_relationship")
_CHECK = "import torch, vbench.launch.evaluate; print(vbench.__path__[0]); print(torch.cuda.is_available())"


def run_vbench(
    pipe: Any,
    prompts: Sequence[str],
    out: str | os.PathLike[str],
    python: str,
    dimensions: Sequence[str],
    count: int = 5,
) -> dict[str, Any]:
    """Generate `count` clips per prompt under VBench's names, `OUT/clips/{prompt}-{index}.mp4`, and score them.

    `python` is the interpreter of another environment in which vbench is installed. The seed of a clip is its index; a
    clip that exists is kept. Returns what VBench writes. Raises `ReducioError` before a clip is generated if `python`
    cannot import vbench or finds no GPU, for a dimension that VBench does not have or cannot score on these prompts,
    and for a prompt that cannot be a file name; afterwards if VBench fails.
    """
    prompts = validation.check_prompts(list(prompts), None)[0]
    mode = _mode(python, prompts, dimensions)
    folder = Path(out).absolute()
    clips, results = folder / "clips", folder / "results"
    clips.mkdir(parents=True, exist_ok=True)
    for prompt in prompts:
        if os.sep in prompt:
            raise ReducioError(f"prompt {prompt!r}: holds {os.sep}, and VBench reads prompts from the names of files")
        check_output_path(clips / f"{prompt}-{count}.mp4", trial=False)
    check_format("clip.mp4")
    wanted = {clips / f"{prompt}-{index}.mp4": (prompt, index) for prompt in prompts for index in range(count)}
    if others := [path for path in entries(clips) if path not in wanted]:
        raise ReducioError(f"{printable(others[0])} is no clip of these prompts and would be scored too; remove it")
    for path, (prompt, index) in wanted.items():
        if not path.is_file():
            clip = pipe(prompt, seed=index, progress=False)
            write_video(clip.frames, path, clip.fps)
    command = ["-m", "vbench.launch.evaluate", "--videos_path", str(clips), "--output_path", str(results)]
    _run(python, [*command, "--mode", mode, "--dimension", *dimensions], "vbench failed")
    files = sorted(results.glob("*eval_results.json"))
    if not files:
        raise ReducioError(f"vbench wrote no *eval_results.json in {results}")
    return json.loads(files[-1].read_text(encoding="utf-8"))


def _mode(python: str, prompts: Sequence[str], dimensions: Sequence[str]) -> str:
    """The mode in which VBench finds the clips of these prompts for each dimension."""
    package, gpu = _run(python, ["-c", _CHECK], "it cannot import vbench").splitlines()[-2:]
    if gpu != "True":
        raise ReducioError(f"{python}: VBench needs a CUDA GPU, and torch finds none there")
    listed = json.loads((Path(package) / "VBench_full_info.json").read_text(encoding="utf-8"))
    known = sorted({name for entry in listed for name in entry["dimension"]})
    for name in dimensions:
        if name not in known:
            raise ReducioError(f"dimension: must be one of {', '.join(known)}, is {name!r}")
    own = [{entry["prompt_en"] for entry in listed if name in entry["dimension"]} for name in dimensions]
    if set(prompts) <= set().union(*own) and all(names.intersection(prompts) for names in own):
        return "vbench_standard"
    if refused := [name for name in dimensions if name in ANNOTATED]:
        raise ReducioError(f"dimension {refused[0]}: VBench scores it on its own prompts for the dimensions alone")
    return "custom_input"


def _run(python: str, arguments: Sequence[str], failure: str) -> str:
    """The output of `python`. Raises `ReducioError` with the last line of its errors."""
    try:
        done = subprocess.run([python, *arguments], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ReducioError(f"{python} cannot be run: {error.strerror}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise ReducioError(f"{python}: {failure}: {first_line(lines[-1])}")
    return done.stdout
