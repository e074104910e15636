"""What is installed: one import name, every source file, the embedded model, and nothing called `triton_kernels`."""

from __future__ import annotations

import ast
import email
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import reducio_fast.cli

MAPPED = ("reference", "triton_kernels", "compile")  # root folders that are installed inside reducio_fast
SENTINEL = "models/tiny/deeply/nested/sentinel.safetensors"


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy, so that neither a stale build folder nor a stray file at the root plays a part."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    for name in ("reducio_fast", "tests", *MAPPED):
        shutil.copytree(root / name, source / name, ignore=ignore)
    sentinel = source / "reducio_fast" / SENTINEL
    sentinel.parent.mkdir(parents=True)
    sentinel.write_bytes(b"package data at any depth")
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        yield archive


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(next(n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))).decode()


def test_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"reducio_fast"}


def test_every_source_file_is_in_the_wheel(root: Path, wheel: zipfile.ZipFile) -> None:
    """A new sub-package that setup.py does not list would be missing here."""
    expected = {f"reducio_fast/{f.relative_to(root / 'reducio_fast')}" for f in (root / "reducio_fast").rglob("*.py")}
    for folder in MAPPED:
        expected |= {f"reducio_fast/{f.relative_to(root)}" for f in (root / folder).rglob("*.py")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == expected


def test_embedded_model_is_package_data(root: Path, wheel: zipfile.ZipFile) -> None:
    models = root / "reducio_fast" / "models"
    expected = {f"reducio_fast/models/{f.relative_to(models)}" for f in models.rglob("*") if f.is_file()}
    found = {name for name in wheel.namelist() if name.startswith("reducio_fast/models/")}
    assert found == expected | {f"reducio_fast/{SENTINEL}"}


def test_embedded_model_is_at_most_25_megabytes_of_safetensors_and_text(bundle: Path) -> None:
    files = [f for f in bundle.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 25_000_000
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".txt", ".md"}


def test_requirements_are_floors_and_leave_triton_to_torch(wheel: zipfile.ZipFile) -> None:
    lines = email.message_from_string(metadata(wheel, "METADATA")).get_all("Requires-Dist")
    requirements = [Requirement(line) for line in lines]
    assert {"torch", "safetensors", "diffusers"} <= {r.name for r in requirements}
    assert not [r for r in requirements if "triton" in r.name]
    assert {s.operator for r in requirements for s in r.specifier} == {">="}


def test_console_script(wheel: zipfile.ZipFile) -> None:
    assert "reducio-fast = reducio_fast.cli:main" in metadata(wheel, "entry_points.txt")
    (script,) = entry_points(group="console_scripts", name="reducio-fast")
    assert script.load() is reducio_fast.cli.main


def python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )


def test_wheel_contents_import(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    code = "import reducio_fast.compile, reducio_fast.triton_kernels as k, reducio_fast.reference; print(k.__file__)"
    done = python(code, tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "site" / "reducio_fast" / "triton_kernels" / "__init__.py"


def test_top_level_triton_kernels_is_refused(root: Path) -> None:
    """From the checkout's root, as `python -c` and `python -m` run; other libraries probe for this name."""
    probe = "try:\n    import triton_kernels\nexcept ImportError as error:\n    print(error)"
    code = f"import sys\n{probe}\nprint(sorted(sys.modules))"
    done = python(code, root)
    assert done.returncode == 0, done.stderr
    message, modules = done.stdout.splitlines()
    assert "reducio_fast.triton_kernels" in message and "install" in message
    assert "'triton_kernels'" not in modules


def test_tests_do_not_see_the_root_folders(root: Path) -> None:
    assert str(root) not in sys.path


def test_import_is_quiet_and_light(tmp_path: Path) -> None:
    heavy = {"torch", "numpy", "diffusers", "triton"}
    done = python(f"import sys, reducio_fast, reducio_fast.cli; print({heavy} & set(sys.modules))", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")


@pytest.mark.parametrize("folder", MAPPED)
def test_root_folders_import_ours_relatively(root: Path, folder: str) -> None:
    """An absolute import would work from the checkout and load a second copy, or fail, once installed."""
    ours = {"reducio_fast", *MAPPED}
    files = list((root / folder).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert not ours & {name.split(".")[0] for name in names}, f"{file}:{node.lineno}"
            if folder == "reference" and isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{file}:{node.lineno}: the oracle imports nothing of ours outside its folder"
