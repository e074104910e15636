"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoints.strict_files import INDEX
from .errors import ReducioError


def replace_file(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `target`, then give it that name: whole or not at all."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
            fresh = Path(work) / target.name
            fresh.touch()
            mode = fresh.stat().st_mode
            write(fresh)
            share(fresh, mode)
            os.replace(fresh, target)
    except OSError as error:
        raise ReducioError(f"{target}: cannot be written ({error.strerror})") from error


def share(path: Path, mode: int) -> None:
    """Make a file, or each file of a folder, as readable and writable as `mode` is: safetensors 0.8 writes 0600."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            file.chmod(mode & 0o666)


@contextmanager
def new_folder(target: Path, mark: str = INDEX) -> Iterator[Path]:
    """Yield an empty folder that takes the name `target` when the block ends well and vanishes when it fails.

    An earlier folder of that name is replaced if it holds the file `mark`, as a model folder does its index; anything
    else that is not empty is left alone (ReducioError).
    """
    if target.exists() and not (target.is_dir() and ((target / mark).is_file() or not any(target.iterdir()))):
        kind = "model" if mark == INDEX else "component"
        raise ReducioError(f"save_directory: {target} exists and is no {kind} folder (it has no {mark})")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ReducioError(f"save_directory: cannot write {target} ({error.strerror})") from error
    try:
        fresh, old = work / "new", work / "old"
        fresh.mkdir()  # within the private one that mkdtemp makes: this one has the permissions of the user's umask
        yield fresh
        share(fresh, fresh.stat().st_mode)
        if target.exists():
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def atomic_write(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Calls `write(temporary)` beside `path`, then renames: a reader sees the old file or the new, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
