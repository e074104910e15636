"""Checks of paths whose errors are one-line `ReducioError`s."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

from .errors import ReducioError, shown


def status(path: str | os.PathLike[str], argument: str | None = None) -> os.stat_result | None:
    """`os.stat` with links followed; None if the path does not exist.

    Raises ReducioError if the path cannot be accessed: a parent folder without permission, a name that is too long or
    contains a zero byte, a circle of links, a broken disk.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        before = f"{argument}: " if argument else ""
        raise ReducioError(f"{before}{printable(path)} cannot be accessed ({reason})") from error


def is_file(path: str | os.PathLike[str], argument: str | None = None) -> bool:
    """Whether the path is a regular file. Raises ReducioError as `status` does."""
    info = status(path, argument)
    return info is not None and stat.S_ISREG(info.st_mode)


def is_folder(path: str | os.PathLike[str], argument: str | None = None) -> bool:
    """Whether the path is a folder. Raises ReducioError as `status` does."""
    info = status(path, argument)
    return info is not None and stat.S_ISDIR(info.st_mode)


def expanded(path: str | os.PathLike[str], argument: str | None = None) -> Path:
    """The path with `~` and `~NAME` expanded. Raises ReducioError if that user has no home folder, and for what is no
    path."""
    before = f"{argument}: " if argument else ""
    try:
        return Path(path).expanduser()
    except TypeError:
        raise ReducioError(f"{before}must be a path, is {shown(path)}") from None
    except RuntimeError as error:
        raise ReducioError(f"{before}{printable(path)} cannot be expanded ({error})") from error


def named(path: str | os.PathLike[str]) -> Path:
    """The path, made absolute if it ends with no name of its own, such as `.`: names beside it begin with its name."""
    path = Path(path)
    return path if path.name not in ("", "..") else Path(os.path.realpath(path))


def entries(folder: Path) -> list[Path]:
    """The entries of a folder, sorted by name. Raises ReducioError if the folder cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ReducioError(f"{printable(folder)} cannot be listed ({error.strerror})") from error


def check_output_folder(path: Path) -> None:
    """Raise ReducioError if the folder that will hold `path` does not exist or is not writable.

    For a link the folder is that of its target; for a folder it is `path` itself.
    """
    folder = path
    if not is_folder(path):
        folder = Path(os.path.realpath(path)).parent if path.is_symlink() or not path.name else path.parent
    if not is_folder(folder):
        raise ReducioError(f"the output folder {printable(folder)} does not exist")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ReducioError(f"the output folder {printable(folder)} cannot be written: {error.strerror}") from error


def check_output_file(path: str | os.PathLike[str], argument: str) -> None:
    """Raise ReducioError if a file `path`, given as `argument`, is a folder or could not be written."""
    if is_folder(path, argument):
        raise ReducioError(f"{argument}: {printable(path)} is a folder; name a file")
    check_output_folder(Path(path))


def check_not_input(path: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Raise ReducioError if writing `path` would replace one of the files that are read."""
    for each in inputs:
        if each is not None and is_file(path) and is_file(each) and os.path.samefile(path, each):
            raise ReducioError(f"{printable(path)} is the input; name another file for the output")


def missing_room(folder: Path, needed: int) -> str | None:
    """Why `needed` bytes do not fit on the disk of `folder`, for a message; None if they fit."""
    free = shutil.disk_usage(folder).free
    return f"{needed:,} bytes are needed, {free:,} are free" if free < needed else None


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8. Bytes of a file name that are not UTF-8 become lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_line(text: str) -> str:
    """A message as one line, in which characters that a terminal would obey are escaped."""
    return _escaped(" ".join(text.split()))


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable(path: str | os.PathLike[str]) -> str:
    """A path for a message: shortened to one line, without bytes that a terminal cannot print or that command it."""
    text = os.fspath(path).encode("utf-8", "replace").decode().replace("\0", "\\0")
    text = _escaped(text)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"
