"""Atomic writes of files and folders, for all rooms but `compile/`, which has `whole_files`."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ReducioError, write_failure

NAME_KEPT = 20  # characters of a name that its temporary name repeats; the full name could become too long


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside `path` under which the block writes a file or a folder.

    After the block the result is renamed to `path`; if the block fails, it is deleted. So a crash, a full disk or
    Ctrl-C leaves either the complete result or nothing. The temporary name keeps the suffix, by which encoders choose a
    format; missing parent folders are created. If `path` is a link, its target is written. If it is an empty folder
    (perhaps a mount point or the current folder), the contents of the new folder are moved into it. A file gets the
    permissions of the user's umask (safetensors 0.8 writes 0600). Raises OSError if the write fails.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    is_folder = path.is_dir()
    temporary = _temporary(path, inside=is_folder)
    temporary.touch()
    mode = temporary.stat().st_mode
    temporary.unlink()
    try:
        yield temporary
        share(temporary, mode)
        if is_folder:
            _move_children(temporary, path)
        else:
            os.replace(temporary, path)
    except Exception as error:
        if isinstance(error, OSError) or (failure := write_failure(error)) is None:
            raise
        raise failure from error
    finally:
        _remove(temporary)


def check_replaceable(target: Path, mark: str, kind: str) -> None:
    """Raise ReducioError if `target` is neither free, an empty folder nor a folder of this kind, see `new_folder`."""
    if target.exists() and not (target.is_dir() and ((target / mark).is_file() or not any(target.iterdir()))):
        raise ReducioError(f"save_directory: {target} exists and is no {kind} folder (it has no {mark})")


@contextmanager
def new_folder(target: Path, mark: str, kind: str) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `target` after the block, or deleted if the block fails.

    An existing folder `target` is replaced if it holds the file `mark`, which all folders of this `kind` have. For a
    folder that cannot be renamed (a mount point, the current folder, or a child of a read-only folder) the contents are
    exchanged instead. Raises ReducioError if `target` is anything else that is not empty, or cannot be written.
    """
    target = Path(os.path.realpath(target))
    try:
        check_replaceable(target, mark, kind)
        target.parent.mkdir(parents=True, exist_ok=True)
        in_place = target.is_dir() and _is_fixed(target)
        work = _temporary(target, inside=in_place)
        fresh, old = work / "new", work / "old"
        work.mkdir(mode=0o700)
        fresh.mkdir()  # inside the private folder `work`, with the permissions of the user's umask
    except OSError as error:
        raise ReducioError(f"save_directory: cannot write {target} ({error.strerror})") from error
    try:
        yield fresh
        share(fresh, fresh.stat().st_mode)
        if in_place:
            old.mkdir()
            _move_children(target, old, but=work)
        elif target.exists():
            target.rename(old)
        try:
            if in_place:
                _move_children(fresh, target)
            else:
                fresh.rename(target)
        except OSError:
            if old.exists():
                _move_children(old, target) if in_place else old.rename(target)
            raise
    except Exception as error:
        if (failure := write_failure(error)) is None:
            raise
        raise ReducioError(f"save_directory: cannot write {target} ({failure.strerror or failure})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _temporary(path: Path, inside: bool) -> Path:
    name = f".{path.stem[:NAME_KEPT]}.{secrets.token_hex(4)}{path.suffix}"
    return path / name if inside else path.with_name(name)


def _is_fixed(folder: Path) -> bool:
    """Whether another folder cannot be renamed to this folder's name."""
    is_current = folder == Path(os.path.realpath(os.curdir))
    return is_current or os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK)


def _move_children(source: Path, target: Path, but: Path | None = None) -> None:
    """Move the contents of `source` into `target`; on OSError move everything back and raise."""
    moved: list[Path] = []
    try:
        for child in sorted(source.iterdir()):
            if child != but:
                os.replace(child, target / child.name)
                moved.append(child)
    except OSError:
        for child in moved:
            os.replace(target / child.name, child)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def share(path: Path, mode: int) -> None:
    """Give a file, or each file of a folder, the read and write permissions of `mode`."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            file.chmod(mode & 0o666)
