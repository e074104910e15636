"""One user folder for all that a machine compiles or tunes, and one archive that takes it to the next machine.

    ROOT/KEY/inductor   torch.compile (TORCHINDUCTOR_CACHE_DIR)
    ROOT/KEY/triton     our kernels and Inductor's (TRITON_CACHE_DIR)
    ROOT/KEY/regions    compiled blocks, found by what they depend on (see `artifacts`)
    ROOT/KEY/tables     launch settings tuned here
    ROOT/KEY/origin.json

ROOT is the user's cache folder, which callers pass.

KEY is a digest of `Origin`: the properties that must be equal for an entry to be usable. An upgrade or another GPU
changes the key, so stale entries are never read.

Both libraries read their variable when they look up an entry, and compile workers inherit it, so `use` must run before
the first compilation. A folder that the user has chosen stays. torch writes its default folder into the environment on
the first query, and `import diffusers` makes one, so that default does not count as the user's choice.

Why not `torch.compiler.save_cache_artifacts`: it holds what torch.compile made in this process, without the kernels
that we launch ourselves, and its contents cannot be checked before they are unpickled. An archive here is checked
first: origin, names, sizes and digests. That guards against accidents, not against malice: entries are machine code
and pickles, so import only archives of people you trust.
"""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import os
import platform
import shutil
import stat
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from .whole_files import written_whole

LOG = logging.getLogger("reducio_fast")
FORMAT = 1
MANIFEST = "manifest.json"
ORIGIN = "origin.json"
VARIABLE = {"inductor": "TORCHINDUCTOR_CACHE_DIR", "triton": "TRITON_CACHE_DIR"}
PARTS = (*VARIABLE, "regions", "tables")
# Far above what a warm-up of all buckets leaves (some 100 MB), far below what would fill a disk.
MAX_BYTES = 4 << 30
MAX_ENTRIES = 200_000
# What zipfile raises for an archive with wrong bytes. RuntimeError includes NotImplementedError (an unknown
# compression), ValueError a name that is not text.
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OverflowError, RuntimeError, ValueError)
GROUP = "__grp__"  # Triton's list of the files of one kernel: it names them by absolute path


class CacheError(ValueError):
    """An archive that cannot be read or written; the message is one line."""


class ForeignCache(CacheError):
    """A sound archive of another machine, version or GPU: to be ignored, never loaded."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What an entry depends on. `here` fills it in for this process."""

    format: int
    package: str
    torch: str
    triton: str
    toolkit: str  # "cuda 12.8", "hip 7.0" or "cpu"
    python: str  # Triton's and Inductor's launchers are extension modules
    arch: str  # "sm_90", "gfx942", or a CPU's with a digest of its features

    @classmethod
    def here(cls, arch: str) -> Origin:
        """`arch`: a GPU's name in the launch tables. Any other value is replaced by an identification of the CPU."""
        gpu = arch.startswith(("sm_", "gfx"))
        toolkit = f"hip {torch.version.hip}" if torch.version.hip else f"cuda {torch.version.cuda}"
        return cls(
            FORMAT,
            _version("reducio-fast"),
            torch.__version__,
            _triton_version(),
            toolkit if gpu else "cpu",
            f"{sys.implementation.cache_tag}-{platform.system()}-{platform.machine()}",
            arch if gpu else _cpu(),
        )

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, other: Origin) -> str:
        """Text that names the fields in which `other` differs; "" where they are equal."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(f"{name} {theirs[name]} (here {mine[name]})" for name in mine if mine[name] != theirs[name])


def folder(part: str, origin: Origin, root: Path) -> Path:
    """The folder with the entries of one of PARTS: the one that the user has chosen for its library, else ours."""
    chosen = _chosen(VARIABLE[part]) if part in VARIABLE else None
    return Path(chosen) if chosen else root / origin.key / part


def use(origin: Origin, root: Path) -> None:
    """Point Inductor and Triton at our folder, before they compile anything. Folders that are already set stay.

    Writes nothing but `origin.json`. If our folder cannot be written, nothing changes, and one line is logged.
    """
    if all(_chosen(name) for name in VARIABLE.values()):
        return
    home = root / origin.key
    try:
        if not (home / ORIGIN).is_file():
            if others := [_read_origin(path) for path in sorted(root.glob(f"*/{ORIGIN}"))]:
                LOG.warning("cache: ignored one of %s", origin.difference(others[-1]))
            home.mkdir(parents=True, exist_ok=True)
            _write(home / ORIGIN, json.dumps(asdict(origin), indent=2).encode())
    except OSError as error:
        LOG.warning("cache: %s cannot be written (%s), compiled kernels are kept elsewhere", home, error.strerror)
        return
    for part, name in VARIABLE.items():
        if not _chosen(name):
            os.environ[name] = str(home / part)


def export_archive(target: Path, origin: Origin, root: Path) -> int:
    """Pack all parts into one file, written under another name and renamed; returns the number of entries.

    Raises CacheError if there is nothing to pack or the file cannot be written.
    """
    entries = {name: content for name, content in _collect(origin, root)}
    if not entries:
        raise CacheError("there is nothing to export: no kernel or graph has been compiled on this machine yet")
    listed = {n: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in entries.items()}
    manifest = {"origin": asdict(origin), "entries": listed}
    try:
        with written_whole(target) as temporary, zipfile.ZipFile(temporary, "x", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(MANIFEST, json.dumps(manifest, indent=1))
            for name, content in entries.items():
                archive.writestr(name, content)
    except OSError as error:
        raise CacheError(f"{target} cannot be written ({error.strerror})") from error
    return len(entries)


def import_archive(source: Path, origin: Origin, root: Path) -> int:
    """Unpack an archive of the same origin into our folders; returns the number of entries it holds.

    All entries are checked and unpacked into a temporary folder before any of them moves to its place. Existing entries
    stay. Raises ForeignCache for an archive of another origin, CacheError for one that is damaged or unsafe.
    """
    try:
        archive = zipfile.ZipFile(source)
    except FileNotFoundError:
        raise CacheError(f"{source}: no such file") from None
    except (OSError, *DAMAGED) as error:
        raise CacheError(f"{source}: is no archive of a cache ({error})") from error
    with archive:
        try:
            entries = _check_manifest(archive, source, origin)
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, prefix=".import-") as work:
                for name, entry in entries.items():
                    content = _read_entry(archive, name, entry, source)
                    part, *rest = PurePosixPath(name).parts
                    final = folder(part, origin, root).joinpath(*rest)
                    if final.name.startswith(GROUP):
                        content = _group_paths(content, lambda child, home=final.parent: str(home / child))
                    _write(Path(work, name), content)
                for name in entries:
                    part, *rest = PurePosixPath(name).parts
                    final = folder(part, origin, root).joinpath(*rest)
                    if not final.exists():
                        final.parent.mkdir(parents=True, exist_ok=True)
                        shutil.move(Path(work, name), final)
        except CacheError:
            raise
        except OSError as error:  # bz2's, for wrong bytes, has no strerror
            raise CacheError(f"{source}: cannot be unpacked to {root} ({error.strerror or error})") from error
        except DAMAGED as error:
            raise CacheError(f"{source}: is damaged ({error})") from error
    return len(entries)


def _check_manifest(archive: zipfile.ZipFile, source: Path, origin: Origin) -> dict[str, dict[str, Any]]:
    """The entries to unpack, after all checks that need no unpacking."""
    infos = {info.filename: info for info in archive.infolist()}
    try:
        if infos[MANIFEST].file_size > 100 * MAX_ENTRIES * 2:
            raise CacheError(f"{source}: its manifest has {infos[MANIFEST].file_size} bytes")
        manifest = json.loads(archive.read(MANIFEST))
        origin_there, entries = Origin(**manifest["origin"]), dict(manifest["entries"])
        if any(type(e["size"]) is not int or not isinstance(e["sha256"], str) for e in entries.values()):
            raise TypeError("a size is no integer or a sha256 no text")
        sizes = [entry["size"] for entry in entries.values()]
        total, negative = sum(sizes), min(sizes, default=0) < 0
    except CacheError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CacheError(f"{source}: has no readable manifest ({type(error).__name__}: {error})") from error
    if difference := origin.difference(origin_there):
        raise ForeignCache(f"{source}: ignored, it is of {difference}")
    if negative or len(entries) > MAX_ENTRIES or total > MAX_BYTES:
        raise CacheError(
            f"{source}: lists {len(entries)} entries of {total} bytes, at most {MAX_ENTRIES} of {MAX_BYTES} are taken"
        )
    if len(infos) != len(archive.infolist()) or set(infos) != {MANIFEST, *entries}:
        raise CacheError(f"{source}: its manifest lists {len(entries)} entries, it holds {len(archive.infolist()) - 1}")
    for name in entries:
        path, mode = PurePosixPath(name), infos[name].external_attr >> 16
        plain = not stat.S_IFMT(mode) or stat.S_ISREG(mode)
        parts = name.split("/")
        if not plain or "\\" in name or "\0" in name or any(p in ("", ".", "..") for p in parts) or path.is_absolute():
            raise CacheError(f"{source}: {name!r} is no plain file below the cache folder")
        if parts[0] not in PARTS or len(parts) < 2 or ":" in parts[0]:
            raise CacheError(f"{source}: {name!r} belongs to none of {', '.join(PARTS)}")
    return entries


def _read_entry(archive: zipfile.ZipFile, name: str, entry: dict[str, Any], source: Path) -> bytes:
    with archive.open(name) as file:
        content = file.read(entry["size"] + 1)  # at most, so that an archive with false sizes cannot fill memory
    if len(content) != entry["size"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise CacheError(f"{source}: {name} is damaged: its sha256 is not the manifest's")
    return content


def _collect(origin: Origin, root: Path) -> Iterator[tuple[str, bytes]]:
    """(name in the archive, content) of every finished entry."""
    for part in PARTS:
        home = folder(part, origin, root)
        for path in sorted(home.rglob("*")):
            inside = path.relative_to(home)
            # Locks and files under a temporary name belong to a process that is running or was killed.
            unfinished = any(p.startswith("tmp.") or p in ("lock", "locks") for p in inside.parts)
            if path.is_symlink() or not path.is_file() or unfinished or path.suffix in (".lock", ".tmp"):
                continue
            content = path.read_bytes()
            if path.name.startswith(GROUP):
                content = _group_paths(content, lambda child: Path(child).name)
            yield f"{part}/{inside.as_posix()}", content


def _group_paths(content: bytes, rename: Any) -> bytes:
    """Triton's group file with every path renamed, because absolute paths do not exist on the next machine."""
    try:
        group = json.loads(content)
        group["child_paths"] = {name: rename(path) for name, path in group["child_paths"].items()}
        return json.dumps(group).encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        return content  # not the format of Triton 3.6 to 3.9: Triton then compiles the kernel again


def _chosen(name: str) -> str | None:
    """The value of a library's variable; None if it is unset, or is the default that torch wrote there."""
    value = os.environ.get(name)
    if not value or name != VARIABLE["inductor"]:
        return value or None
    # torch's default is TMP/torchinductor_USER. Asking torch for it imports torch._inductor and torch._dynamo, which
    # takes 2 s.
    place = Path(value)
    is_default = place.parent == Path(tempfile.gettempdir()) and place.name.startswith("torchinductor_")
    return None if is_default else value


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def _read_origin(path: Path) -> Origin:
    try:
        return Origin(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Origin(0, "", "", "", "", "", "unknown")


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"


def _triton_version() -> str:
    # Read from the module, because the wheel's name differs between vendors. Some machines have no Triton.
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def _cpu() -> str:
    """Identifies the CPU. Inductor compiles for the CPU it runs on (-march=native); another may lack an instruction."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else [platform.processor()]
    features = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), lines[0])
    digest = hashlib.sha256(" ".join(sorted(features.split())).encode()).hexdigest()[:8]
    return f"{torch.backends.cpu.get_cpu_capability()} {digest}"
