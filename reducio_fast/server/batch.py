"""`reducio-fast batch`: a file of prompts becomes a folder of clips and a manifest, here or on a Ray cluster.

DIR/prompts.jsonl    the arguments of each clip, by number, and the model, dtype and quantisation that were given: a
                     second run must have the same
DIR/00000.mp4 ...    each appears whole or not at all; an existing clip is not made again
DIR/manifest.jsonl   one line per prompt, in order: its file, or why there is none
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..media.video_files import check_format
from ..pipelines.call.validation import check_names
from ..system import ray_cluster
from ..system.atomic_files import written_whole
from ..system.errors import ReducioError, first_line
from ..system.paths import check_output_folder, entries, expanded, is_file, printable

if TYPE_CHECKING:
    from .clips import Clips

FORMATS = (".txt", ".jsonl", ".csv", ".parquet")
SUFFIXES = (".mp4", ".gif", ".webp")
PROMPTS, MANIFEST = "prompts.jsonl", "manifest.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """worker: arguments of `clips.Clips`. call: arguments of every clip; those of a row override them. seed: the seed
    of the first clip; the next ones count up. ray: address of a cluster; replicas: smallest and largest number of
    actors on it; gpus: GPUs per actor."""

    out: str
    worker: dict[str, Any]
    call: dict[str, Any]
    seed: int = 0
    suffix: str = ".mp4"
    ray: str | None = None
    replicas: tuple[int, int] = (1, 1)
    gpus: float | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """made, kept, failed: numbers of clips. errors: (number, line) of those that failed."""

    made: int
    kept: int
    errors: list[tuple[int, str]]


def read_prompts(path: str | Path) -> list[Row]:
    """The arguments of the calls, one dict per clip: from each line of a .txt that is not empty, each object of a
    .jsonl, each row of a .csv or .parquet with a column `prompt` (or `image`); further names are further arguments. A
    value that is null, or empty and not the prompt, was not given.

    Raises ReducioError for a file that cannot be read, a row without prompt and image, a .csv row of more cells than
    the header and a value that JSON does not have; the manifest reports a prompt for which no clip can be made.
    """
    path = expanded(path, "prompts")
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ReducioError(f"prompts: {path} is of no type that is known; known are {', '.join(FORMATS)}")
    if not is_file(path, "prompts"):
        raise ReducioError(f"prompts: no such file: {path}")
    try:
        rows = _READERS[suffix](path)
    except ReducioError:
        raise
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # pyarrow's errors are ValueErrors
        raise ReducioError(f"prompts: {path} cannot be read: {first_line(error)}") from error
    if not rows:
        raise ReducioError(f"prompts: {path} holds none")
    return [_check_row(row, f"row {number} of {path}") for number, row in enumerate(rows)]


def _lines_of(path: Path) -> list[str]:
    # Not splitlines(): a text of JSON may hold U+2028, which it takes for the end of a line.
    return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]


def _read_lines(path: Path) -> list[Any]:
    return [{"prompt": line.strip()} for line in _lines_of(path)]


def _read_jsonl(path: Path) -> list[Any]:
    rows = (json.loads(line, object_pairs_hook=_named_once) for line in _lines_of(path))
    return [{"prompt": row} if isinstance(row, str) else row for row in rows]


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose second value of a name would else replace the first."""
    _refuse_twice([name for name, _ in pairs])
    return dict(pairs)


def _refuse_twice(names: Sequence[str]) -> None:
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise ValueError(f"{twice[0]} is named twice")


def _read_csv(path: Path) -> list[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)  # strict: a quote that is not closed would take all further rows
        _refuse_twice(reader.fieldnames or ())
        return list(reader)


def _read_parquet(path: Path) -> list[Any]:
    from ..data.parquet import pyarrow_modules

    return pyarrow_modules()[1].read_table(path).to_pylist()


def _check_row(row: Any, where: str) -> Row:
    """The row without its empty values, except an empty prompt."""
    if not isinstance(row, dict):
        raise ReducioError(f"prompts: {where} has neither prompt nor image")
    if None in row:  # where csv.DictReader puts the cells that have no name
        raise ReducioError(f"prompts: {where} has more cells than the header; quote the prompt")
    row = {name: value for name, value in row.items() if value is not None and (name == "prompt" or value != "")}
    if not {"prompt", "image"} & set(row):
        raise ReducioError(f"prompts: {where} has neither prompt nor image")
    for name, value in row.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ReducioError(f"prompts: {where}: {name} is {value!r:.60}, which JSON does not have") from error
    return row


_READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".txt": _read_lines,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def make_clips(rows: Sequence[Row], settings: Settings, on_clip: Callable[[], None] = lambda: None) -> Done:
    """Make the clips of `rows`, which `read_prompts` returns. `on_clip` is called after each.

    Raises ReducioError if clips cannot be encoded, if the folder holds clips of other prompts or if the model cannot be
    loaded; the error of a single prompt goes into its line of the manifest.
    """
    check_format(f"clip{settings.suffix}", encoding=settings.worker.get("encoding", "quality"))
    folder = expanded(settings.out, "out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReducioError(f"out: {printable(folder)} cannot be created ({error.strerror})") from error
    check_output_folder(folder / MANIFEST)
    rows = [{"seed": settings.seed + number} | settings.call | row for number, row in enumerate(rows)]
    lines = _check_same(folder, rows, settings.worker)
    for leftover in folder.glob(".*"):  # temporary files of a run that was killed
        if leftover.is_file() and leftover.suffix in SUFFIXES:
            leftover.unlink()
    earlier = {row["number"]: row for row in _lines(folder / MANIFEST)}
    results: dict[int, Row] = {}
    tasks = []
    for number, row in enumerate(rows):
        path = folder / f"{number:05d}{settings.suffix}"
        if path.is_file():
            default = {"number": number, "file": path.name, "seed": row["seed"], "call": row}
            results[number] = earlier.get(number, default)
        else:
            tasks.append({"number": number, "path": str(path), "call": row})
    kept, errors = len(results), list[tuple[int, str]]()
    source = _here(tasks, settings) if settings.ray is None else _on_ray(tasks, settings)
    if lines:  # after the model is loaded here: a refused run leaves nothing
        with written_whole(folder / PROMPTS) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    try:
        with contextlib.closing(source):  # waits for the file that is being written, also after Ctrl-C
            for result in source:
                number = result["number"]
                row = {n: v for n, v in result.items() if v is not None}
                results[number] = row | {"call": rows[number]}
                # In case the run is killed before its end.
                with (folder / MANIFEST).open("a", encoding="utf-8") as file:
                    file.write(f"{json.dumps(results[number])}\n")
                if "error" in row:
                    errors.append((number, row["error"]))
                on_clip()
    finally:
        with written_whole(folder / MANIFEST) as temporary:
            lines = [json.dumps(results[number]) for number in sorted(results)]
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return Done(len(tasks) - len(errors), kept, sorted(errors))


def _check_same(folder: Path, rows: list[Row], worker: dict[str, Any]) -> list[str]:
    """The lines of prompts.jsonl, [] if it has them; refuse a folder whose clips have other arguments, or are of
    another model, dtype or quantisation. A longer list continues it. A run that made no clip, such as one that Ray
    refused, can be repeated with other arguments."""
    given = {name: str(worker[name]) for name in ("model", "dtype", "quantise") if worker.get(name) is not None}
    lines = [json.dumps(row | given, sort_keys=True, default=str) for row in rows]
    path = folder / PROMPTS
    known = path.read_text(encoding="utf-8", errors="replace").splitlines() if is_file(path) else []
    has_clips = any(file.suffix in SUFFIXES and file.stem.isdigit() for file in entries(folder))
    for number, (old, new) in enumerate(zip(known, lines, strict=False)):
        if old != new and has_clips:
            raise ReducioError(
                f"out: {folder} holds clips of other prompts or settings, or of another model (number {number} differs)"
            )
    return lines if known[: len(lines)] != lines else []


def _lines(path: Path) -> list[Row]:
    """The rows of a manifest; lines that are none, such as a last line that was cut off, are left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if is_file(path) else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("number"), int)]


def _make(clips: Clips, task: Row) -> Any:
    """The output of one task; raises the errors of the call."""
    from .clips import give_back_memory
    from .requests import FIELDS

    call = dict(task["call"])
    known = (*FIELDS, "image", "height", "width")
    if unknown := sorted(set(call) - set(known)):
        raise ReducioError(f"{unknown[0]}: no argument of a prompt; known are {', '.join(known)}")
    if "image" not in call and "prompt" not in call:
        raise ReducioError("prompt: None given; describe the clip")
    check_names(clips.pipe.__call__, call)  # those of the other families are among FIELDS
    call = {n: FIELDS[n](n, v) if n in FIELDS else v for n, v in call.items()}
    for name in ("height", "width"):
        if isinstance(call.get(name), str):
            call[name] = FIELDS["num_frames"](name, call[name])
    if call.get("prompt") == "" and "image" in call:
        del call["prompt"]
    if call.get("fps", 0) > 0:  # the call refuses others
        check_format(task["path"], call["fps"], encoding=clips.encoding)
    # Latents whose decode runs out of memory: a server hands them to its client, here they stay beside the clips.
    clips.pipe.rescue_folder = Path(task["path"]).parent
    try:
        return clips.pipe(**call, progress=False)
    finally:
        give_back_memory()


def _save(output: Any, task: Row, encoding: str) -> Row:
    if output.is_list:  # several seeds: one clip that shows them side by side
        output = output.as_grid()
    output.save(task["path"], encoding=encoding)
    timings = {name: round(seconds, 4) for name, seconds in output.timings.items()}
    count, height, width = output.frames.shape[:3]
    return {
        "number": task["number"],
        "file": Path(task["path"]).name,
        "seed": output.seed,
        "size": f"{width}x{height}",
        "frames": int(count),
        "fps": output.fps,
        "encoder": output.encoder,
        "timings": timings,
    }


def _failed(task: Row, error: Exception) -> Row:
    return {"number": task["number"], "error": first_line(error)}


def _here(tasks: list[Row], settings: Settings) -> Generator[Row, None, None]:
    """Load the model now, then make one clip after the other; the file of one is written while the next is made."""
    from .clips import Clips

    return _one_by_one(Clips(**settings.worker, warm=False), tasks) if tasks else (row for row in tasks)


def _one_by_one(clips: Clips, tasks: list[Row]) -> Generator[Row, None, None]:
    with ThreadPoolExecutor(1, "encode") as writer:
        waiting: list[tuple[Row, Future[Row]]] = []
        for task in [*tasks, None]:
            if task is not None:
                try:
                    waiting.append((task, writer.submit(_save, _make(clips, task), task, clips.encoding)))
                except ReducioError as error:
                    yield _failed(task, error)
            while waiting and (len(waiting) > 1 or task is None):  # at most two clips are held in memory
                written, future = waiting.pop(0)
                try:
                    yield future.result()
                except ReducioError as error:
                    yield _failed(written, error)


class _Actor:
    """A worker of Ray Data. It returns JSON text, because a column of a table has one type.

    An error that ends the run is returned as `refused`, because Ray would raise it here with its own traceback.
    """

    def __init__(self, worker: dict[str, Any]) -> None:
        from .clips import Clips

        self.refused: str | None = None
        try:
            self.clips = Clips(**worker, warm=False)
        except (ReducioError, OSError) as error:
            self.refused = first_line(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        if self.refused is not None:
            return {"result": json.dumps({"refused": self.refused})}
        task = json.loads(row["task"])
        if Path(task["path"]).is_file():  # written by an actor that died afterwards
            return {"result": json.dumps({"number": task["number"], "file": Path(task["path"]).name})}
        try:
            result = _save(_make(self.clips, task), task, self.clips.encoding)
        except ReducioError as error:
            result = _failed(task, error)
        except OSError as error:  # such as a full disk
            result = {"refused": first_line(error)}
        return {"result": json.dumps(result)}


def _on_ray(tasks: list[Row], settings: Settings) -> Generator[Row, None, None]:
    """Make the clips on a Ray cluster, every machine of which must have access to the folder."""
    if not tasks:
        return
    assert settings.ray is not None
    tasks = [task | {"path": str(Path(task["path"]).absolute())} for task in tasks]
    ray = ray_cluster.connect(settings.ray)
    try:
        import logging

        import ray.data as ray_data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray_data.DataContext.get_current()
        context.enable_progress_bars = False
        gpus = settings.gpus
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
        least, most = settings.replicas
        items = ray_data.from_items([{"task": json.dumps(task)} for task in tasks], override_num_blocks=len(tasks))
        worker = settings.worker

        class Actor(_Actor):  # the class carries the arguments, so that a restarted actor has them
            def __init__(self) -> None:
                super().__init__(worker)

        made = items.map(
            Actor,  # restarted with its task as often as it dies, which is Ray Data's default
            compute=ray_data.ActorPoolStrategy(min_size=least, max_size=most),
            num_cpus=1,
            num_gpus=gpus,
        )
        for row in made.iter_rows():
            result = json.loads(row["result"])
            if "refused" in result:
                raise ReducioError(result["refused"])
            yield result
    finally:
        ray.shutdown()
