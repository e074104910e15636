"""Files and folders that appear whole or not at all: every file of this package is written through here."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ReducioError


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a name beside `path` under which the block writes a file or a folder.

    It takes the name `path` when the block ends well and vanishes when it fails, so a crash, a full disk or Ctrl-C
    leaves the whole of it or none. The name keeps the suffix, by which encoders choose a format; missing parent folders
    are made. A file gets the permissions of the user's umask (safetensors 0.8 writes 0600). Raises OSError where it
    cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    temporary.touch()
    mode = temporary.stat().st_mode
    temporary.unlink()
    try:
        yield temporary
        share(temporary, mode)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path, mark: str, kind: str) -> Iterator[Path]:
    """Yield an empty folder that takes the name `target` when the block ends well and vanishes when it fails.

    An earlier folder of that name is replaced if it holds the file `mark`, as folders of this `kind` do; anything else
    that is not empty is left alone (ReducioError).
    """
    if target.exists() and not (target.is_dir() and ((target / mark).is_file() or not any(target.iterdir()))):
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


def share(path: Path, mode: int) -> None:
    """Make a file, or each file of a folder, as readable and writable as `mode` is."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            file.chmod(mode & 0o666)
