"""The cache folder and its archive: where things go, what may be unpacked, and that Triton finds what was unpacked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from triton.runtime.cache import FileCacheManager

from reducio_fast.compile import cache
from reducio_fast.compile.cache import CacheError, ForeignCache, Origin
from reducio_fast.fast.engine import Engine
from reducio_fast.reference import DiTConfig, ReducioDiT
from reducio_fast.system import cache_folder, environment_variables
from reducio_fast.triton_kernels import tables
from tiny_networks import DIT

VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REDUCIO_CACHE_DIR", str(tmp_path / "cache"))
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it after `use` has set it
        monkeypatch.delenv(name)
    return tmp_path / "cache"


@pytest.fixture
def origin() -> Origin:
    return Origin.here("sm_90")


def filled(origin: Origin) -> dict[str, bytes]:
    """One Triton kernel written by Triton itself, one Inductor file, one table, and what unfinished writers leave."""
    cache.use(origin, cache_folder.root())
    manager = FileCacheManager("KERNEL")
    paths = {name: manager.put(content, name) for name, content in (("k.json", b"{}"), ("k.cubin", b"\x7fELF"))}
    manager.put_group("k.json", paths)
    home = cache_folder.root() / origin.key
    for name in ("inductor/ab/code.py", "tables/sm_90.json", "inductor/tmp.x/half", "inductor/locks/a.lock"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(name)
    (home / "inductor" / "link").symlink_to("/etc/hostname")
    return {"k.json": b"{}", "k.cubin": b"\x7fELF"}


def move_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this process has an empty cache folder, as another machine has."""
    monkeypatch.setenv("REDUCIO_CACHE_DIR", str(folder))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_folder_is_the_users_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder.root() == tmp_path / "cache"
    monkeypatch.setenv("REDUCIO_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder.root() == tmp_path / "xdg" / "reducio-fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder.root() == tmp_path / "home" / ".cache" / "reducio-fast"
    with pytest.raises(KeyError):
        environment_variables.read("REDUCIO_UNLISTED")


def test_folders_that_are_set_already_stay(origin: Origin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    cache.use(origin, cache_folder.root())
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "mine")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache_folder.root() / origin.key / "inductor")
    assert cache.folder("triton", origin, cache_folder.root()) == tmp_path / "mine"


def test_what_another_version_left_is_not_looked_at(origin: Origin, caplog: pytest.LogCaptureFixture) -> None:
    cache.use(dataclasses.replace(origin, torch="1.0"), cache_folder.root())
    for name in VARIABLES:
        del os.environ[name]
    cache.use(origin, cache_folder.root())
    cache.use(origin, cache_folder.root())
    assert caplog.messages == [f"cache: ignored one of torch 1.0 (here {origin.torch})"]
    assert origin.key in os.environ["TRITON_CACHE_DIR"]


def test_a_folder_that_cannot_be_written_changes_nothing(
    origin: Origin, own_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_folder.write_text("a file")
    cache.use(origin, cache_folder.root())
    assert not any(name in os.environ for name in VARIABLES)
    assert len(caplog.messages) == 1 and "cannot be written" in caplog.messages[0]


def test_origin_tells_machines_apart() -> None:
    gpu, cpu = Origin.here("gfx942"), Origin.here("interpreter")
    assert gpu.arch == "gfx942" and gpu.key != cpu.key != Origin.here("sm_90").key
    assert cpu.toolkit == "cpu" and cpu == Origin.here("interpreter")


def test_archive_serves_on_another_machine(origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = filled(origin)
    archive = tmp_path / "cache.zip"
    assert cache.export_archive(archive, origin, cache_folder.root()) == 5
    assert list(tmp_path.glob(".cache.zip*")) == []
    move_to(tmp_path / "other", monkeypatch)
    assert cache.import_archive(archive, origin, cache_folder.root()) == 5
    cache.use(origin, cache_folder.root())
    home = tmp_path / "other" / origin.key
    files = {p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file()}
    assert {"inductor/ab/code.py", "tables/sm_90.json", "triton/KERNEL/k.cubin"} < files
    assert not any(word in name for name in files for word in ("tmp.", "lock", "link"))
    # Triton names a kernel's files by absolute path: it must find them in the folder they are in now.
    group = FileCacheManager("KERNEL").get_group("k.json")
    assert group is not None and {name: Path(path).read_bytes() for name, path in group.items()} == expected
    assert all(Path(path).is_relative_to(home) for path in group.values())


def test_entries_that_are_there_stay(origin: Origin, tmp_path: Path) -> None:
    filled(origin)
    cache.export_archive(tmp_path / "cache.zip", origin, cache_folder.root())
    table = cache.folder("tables", origin, cache_folder.root()) / "sm_90.json"
    table.write_text("newer")
    cache.import_archive(tmp_path / "cache.zip", origin, cache_folder.root())
    assert table.read_text() == "newer"


def test_table_tuned_here_goes_over_the_shipped_one(
    origin: Origin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tables, "_tuned_here", [])
    shipped = tables.table("sm_90")
    folder = cache.folder("tables", origin, cache_folder.root())
    folder.mkdir(parents=True)
    file = folder / "sm_90.json"
    try:
        file.write_text(json.dumps({"conv3d": {"K<=16": {"BLOCK_M": 7}}}))
        tables.add_tables(folder)
        assert tables.settings("conv3d", "K<=16", "sm_90") == {"BLOCK_M": 7}
        assert tables.settings("conv3d", "*", "sm_90") == shipped["conv3d"]["*"]
        for damaged in (
            file.read_text()[:-3],
            "[" * 100_000,
            '{"attention": {"64": 5}}',
            '{"attention": {"64": {"BLOCK_L": -64}}}',
            '{"attention": {"64": {"BLOCK_L": "x"}}}',
            '{"plan": {"conv3d": "nonsense"}}',
            '{"plan": {"conv3d": [1]}}',
        ):
            file.write_text(damaged)
            tables.table.cache_clear()
            caplog.clear()
            assert tables.table("sm_90") == shipped
            assert any(m.startswith(f"launch table {file} is ignored") for m in caplog.messages)
    finally:
        tables.table.cache_clear()


def test_an_engine_uses_the_table_and_the_code_of_the_device_it_plans_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_tuned_here", [])
    folder = cache.folder("tables", Origin.here(tables.INTERPRETER), cache_folder.root())
    folder.mkdir(parents=True)
    (folder / f"{tables.INTERPRETER}.json").write_text(json.dumps({"conv3d": {"K<=16": {"BLOCK_M": 7}}}))
    engine = Engine(compile=True, store=cache_folder.root() / "elsewhere")
    try:
        engine.twin(ReducioDiT(DiTConfig(**DIT)).eval())
        assert tables.settings("conv3d", "K<=16", tables.INTERPRETER) == {"BLOCK_M": 7}
    finally:
        tables.table.cache_clear()
    with tables.pretend("sm_90"):
        engine.forget(device=torch.device("cuda"))
    assert engine.regions is not None and not engine.packed()
    assert engine.regions.store == cache.folder("regions", Origin.here("sm_90"), cache_folder.root())


def test_nothing_to_export(origin: Origin, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="nothing to export"):
        cache.export_archive(tmp_path / "cache.zip", origin, cache_folder.root())
    assert not (tmp_path / "cache.zip").exists()


@pytest.mark.parametrize("change", ["torch", "triton", "package", "arch", "format", "python", "toolkit"])
def test_foreign_archive_is_never_unpacked(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    filled(origin)
    cache.export_archive(tmp_path / "cache.zip", origin, cache_folder.root())
    move_to(tmp_path / "other", monkeypatch)
    here = dataclasses.replace(origin, **{change: 2 if change == "format" else "other"})
    with pytest.raises(ForeignCache, match=rf"ignored, it is of {change} .* \(here (other|2)\)"):
        cache.import_archive(tmp_path / "cache.zip", here, cache_folder.root())
    assert not (tmp_path / "other").exists()


def rewritten(archive: Path, change: Callable[[dict, dict[str, bytes]], None], link: str = "") -> None:
    """The archive with its manifest and its contents changed, as someone with a zip tool could."""
    with zipfile.ZipFile(archive) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    manifest = json.loads(contents.pop(cache.MANIFEST))
    change(manifest, contents)
    with zipfile.ZipFile(archive, "w") as new:
        new.writestr(cache.MANIFEST, json.dumps(manifest))
        for name, content in contents.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = ((stat.S_IFLNK if name == link else stat.S_IFREG) | 0o777) << 16
            new.writestr(info, content)


def added(name: str) -> Callable[[dict, dict[str, bytes]], None]:
    def change(manifest: dict, contents: dict[str, bytes]) -> None:
        contents[name] = b"evil"
        manifest["entries"][name] = {"size": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}

    return change


def flipped(manifest: dict, contents: dict[str, bytes]) -> None:
    contents["inductor/ab/code.py"] = contents["inductor/ab/code.py"][::-1]


def longer(manifest: dict, contents: dict[str, bytes]) -> None:
    contents["inductor/ab/code.py"] += bytes(1 << 20)


@pytest.mark.parametrize(
    ("change", "link", "reason"),
    [
        pytest.param(flipped, "", "code.py is damaged", id="changed"),
        pytest.param(longer, "", "code.py is damaged", id="longer than listed"),
        pytest.param(added("../../evil"), "", "no plain file below", id="parent folder"),
        pytest.param(added("inductor/../../evil"), "", "no plain file below", id="parent folder inside"),
        pytest.param(added("/tmp/evil"), "", "no plain file below", id="absolute"),
        pytest.param(added("inductor\\..\\evil"), "", "no plain file below", id="backslash"),
        pytest.param(added("inductor/link"), "inductor/link", "no plain file below", id="link"),
        pytest.param(added("bin/evil"), "", "belongs to none of", id="another folder"),
        pytest.param(lambda m, c: c.update(extra=b"x"), "", "it holds", id="unlisted"),
        pytest.param(lambda m, c: c.pop("inductor/ab/code.py"), "", "it holds", id="missing"),
        pytest.param(lambda m, c: m["entries"]["inductor/ab/code.py"].update(size=1 << 50), "", "at most", id="huge"),
        pytest.param(lambda m, c: m["entries"]["inductor/ab/code.py"].update(size=-1), "", "at most", id="negative"),
        *(
            pytest.param(
                lambda m, c, size=size: m["entries"]["inductor/ab/code.py"].update(size=size),
                "",
                "no readable manifest",
                id=f"size {size!r}",
            )
            for size in ("12000", 12000.5, float("inf"), True)
        ),
        pytest.param(lambda m, c: m.pop("origin"), "", "no readable manifest", id="no origin"),
        pytest.param(lambda m, c: m.update(entries=[1]), "", "no readable manifest", id="no entries"),
    ],
)
def test_tampered_archive_is_refused_and_nothing_unpacked(
    origin: Origin,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict, dict[str, bytes]], None],
    link: str,
    reason: str,
) -> None:
    filled(origin)
    archive = tmp_path / "cache.zip"
    cache.export_archive(archive, origin, cache_folder.root())
    rewritten(archive, change, link)
    move_to(tmp_path / "deep" / "other", monkeypatch)
    with pytest.raises(CacheError, match=reason) as caught:
        cache.import_archive(archive, origin, cache_folder.root())
    assert not isinstance(caught.value, ForeignCache) and "\n" not in str(caught.value)
    assert [p for p in (tmp_path / "deep").rglob("*") if p.is_file()] == []


def test_flipped_bits_are_refused_or_change_nothing(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single bits of the file itself: its compressed streams, headers and directory."""
    filled(origin)
    archive = tmp_path / "cache.zip"
    cache.export_archive(archive, origin, cache_folder.root())
    whole = archive.read_bytes()
    with zipfile.ZipFile(archive) as good:
        first = good.getinfo("tables/sm_90.json")
        directory = good.start_dir
    move_to(tmp_path / "other", monkeypatch)
    stream = first.header_offset + 30 + len(first.filename)
    # A compressed stream's first bits, its compression in both headers, the needed version of zip, and many others.
    chosen = [(stream, 1), (stream, 2), (first.header_offset + 8, 2), (directory + 10, 0), (directory + 6, 6)]
    chosen += [(place, place % 8) for place in range(0, len(whole), max(len(whole) // 60, 1))]
    refused = 0
    for place, bit in chosen:
        changed = bytearray(whole)
        changed[place] ^= 1 << bit
        archive.write_bytes(changed)
        try:
            cache.import_archive(archive, origin, cache_folder.root())
        except CacheError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > len(chosen) // 2


def test_what_is_no_archive_is_refused(origin: Origin, tmp_path: Path) -> None:
    filled(origin)
    archive = tmp_path / "cache.zip"
    cache.export_archive(archive, origin, cache_folder.root())
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(CacheError, match="is no archive of a cache"):
        cache.import_archive(archive, origin, cache_folder.root())
    with pytest.raises(CacheError, match="no such file"):
        cache.import_archive(tmp_path / "none.zip", origin, cache_folder.root())
    with pytest.raises(CacheError, match="cannot be written"):
        cache.export_archive(tmp_path / "none" / "cache.zip", origin, cache_folder.root())


def test_torchs_own_default_is_nobodys_choice(origin: Origin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch writes its default folder into the environment on the first query, which importing diffusers causes."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert cache_dir() == os.environ["TORCHINDUCTOR_CACHE_DIR"]
    cache.use(origin, cache_folder.root())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache.folder("inductor", origin, cache_folder.root()))
    assert cache.folder("inductor", origin, cache_folder.root()) == cache_folder.root() / origin.key / "inductor"
