"""What is at a path, told in one line where the system does not say."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from .errors import ReducioError


def status(path: str | os.PathLike[str], argument: str | None = None) -> os.stat_result | None:
    """`os.stat`, links followed; None where there is nothing. Raises ReducioError where that cannot be told: a folder
    on the way that may not be entered, a name that is too long or holds a zero, links in a circle, a broken disk."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        before = f"{argument}: " if argument else ""
        raise ReducioError(f"{before}{printable(path)} cannot be looked at ({reason})") from error


def is_file(path: str | os.PathLike[str], argument: str | None = None) -> bool:
    """Raises ReducioError as `status` does."""
    found = status(path, argument)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(path: str | os.PathLike[str], argument: str | None = None) -> bool:
    """Raises ReducioError as `status` does."""
    found = status(path, argument)
    return found is not None and stat.S_ISDIR(found.st_mode)


def expanded(path: str | os.PathLike[str], argument: str | None = None) -> Path:
    """With `~` and `~NAME` replaced. Raises ReducioError where that user has no home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        before = f"{argument}: " if argument else ""
        raise ReducioError(f"{before}{printable(path)} cannot be looked at ({error})") from error


def entries(folder: Path) -> list[Path]:
    """What a folder holds, in order of names. Raises ReducioError where it may not be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ReducioError(f"{printable(folder)} cannot be listed ({error.strerror})") from error


def check_output_folder(path: Path) -> None:
    """Raise ReducioError where the folder that `path` will be written to does not exist or takes no file.

    Of a link it is the folder of what it points to; of a folder, itself.
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


def printable(path: str | os.PathLike[str]) -> str:
    """A path for a message: short, on one line, and with no bytes that a terminal cannot show."""
    text = os.fspath(path).encode("utf-8", "replace").decode().replace("\0", "\\0")
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"
