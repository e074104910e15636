"""What is installed: one import name, every source file, the embedded model, and nothing called `triton_kernels`.

The wheel is built from the sdist, as an installer without wheels would, and tried in an environment of its own.
"""

from __future__ import annotations

import ast
import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import reducio_fast.cli.main

pytestmark = pytest.mark.slow

MAPPED = ("reference", "triton_kernels", "compile")  # root folders that are installed inside reducio_fast
SENTINEL = "models/tiny/deeply/nested/sentinel.safetensors"


@pytest.fixture(scope="module")
def dist(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an sdist and the wheel built from it. The source is a copy without stale builds and stray files."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "golden", ".*_cache")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    for name in ("reducio_fast", "tests", "docs", "benchmarks", *MAPPED):
        shutil.copytree(root / name, source / name, ignore=ignore)
    sentinel = source / "reducio_fast" / SENTINEL
    sentinel.parent.mkdir(parents=True)
    sentinel.write_bytes(b"package data at any depth")
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        yield archive


@pytest.fixture(scope="module")
def clean(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment with the wheel in it. It shares the requirements of this one, which are gigabytes."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    # Folders listed in a .pth are searched, but their own .pth files are not read, so no editable install is visible.
    (site / "shared.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    done = subprocess.run([*install, str(next(dist.glob("*.whl")))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin"


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


def test_installed_files_are_those_of_the_checkout(root: Path, wheel: zipfile.ZipFile) -> None:
    """Byte for byte, though they went through the sdist; launch tables, the type marker and the licence among them."""
    data = 0
    for name in wheel.namelist():
        if name.endswith("/") or ".dist-info/" in name or SENTINEL in name:
            continue
        inner = name.removeprefix("reducio_fast/")
        source = root / inner if inner.split("/")[0] in MAPPED else root / name
        assert wheel.read(name) == source.read_bytes(), name
        data += not name.endswith(".py")
    assert data > 10
    tables = {f.name for f in (root / "triton_kernels" / "tables").glob("*.json")}
    assert {f"reducio_fast/triton_kernels/tables/{name}" for name in tables} <= set(wheel.namelist())
    assert "reducio_fast/py.typed" in wheel.namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_sdist_holds_what_a_reader_and_a_tester_need(root: Path, dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "tests/conftest.py", "benchmarks/demo_check.py"}
    expected |= {str(f.relative_to(root)) for f in (root / "docs").iterdir()}
    expected |= {str(f.relative_to(root)) for f in (root / "tests").rglob("test_*.py")}
    assert expected <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(("build/", "."))]


def test_embedded_model_is_package_data(root: Path, wheel: zipfile.ZipFile) -> None:
    models = root / "reducio_fast" / "models"
    expected = {f"reducio_fast/models/{f.relative_to(models)}" for f in models.rglob("*") if f.is_file()}
    found = {name for name in wheel.namelist() if name.startswith("reducio_fast/models/")}
    assert found == expected | {f"reducio_fast/{SENTINEL}"}


def test_embedded_model_is_at_most_25_megabytes_of_safetensors_and_text(bundle: Path) -> None:
    files = [f for f in bundle.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 25_000_000
    assert {f.suffix for f in files if f.name != "pipeline.py"} <= {".safetensors", ".json", ".txt", ".md"}


def test_requirements_are_floors_and_leave_triton_to_torch(wheel: zipfile.ZipFile) -> None:
    lines = email.message_from_string(metadata(wheel, "METADATA")).get_all("Requires-Dist")
    requirements = [Requirement(line) for line in lines]
    assert {"torch", "safetensors", "diffusers"} <= {r.name for r in requirements}
    assert not [r for r in requirements if "triton" in r.name]
    # Only the openai client, which tests use, is capped: its next major version may drop the videos API.
    assert {s.operator for r in requirements for s in r.specifier if r.name != "openai"} == {">="}
    assert all('extra == "test"' in str(r.marker) for r in requirements if r.name == "openai")


def test_console_script(wheel: zipfile.ZipFile) -> None:
    assert "reducio-fast = reducio_fast.cli.main:main" in metadata(wheel, "entry_points.txt")
    (script,) = entry_points(group="console_scripts", name="reducio-fast")
    assert script.load() is reducio_fast.cli.main.main


def run_clean(command: list[str | Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_wheel_in_a_clean_environment(clean: Path, tmp_path: Path) -> None:
    """The console script makes a clip with the model from the wheel; every package comes from there."""
    version = run_clean([clean / "reducio-fast", "--version"], tmp_path)
    assert version.stdout.startswith("reducio-fast ") and version.returncode == 0, version.stderr
    code = (
        "import json, reducio_fast, reducio_fast.cli.main, reducio_fast.compile, reducio_fast.reference as r\n"
        "from reducio_fast.triton_kernels import tables\n"
        "from reducio_fast.checkpoints.strict_files import embedded_model\n"
        "assert tables.table('sm_90') and tables.table('gfx942')\n"
        "print(json.dumps([reducio_fast.__file__, r.__file__, tables.__file__, str(embedded_model())]))"
    )
    places = run_clean([clean / "python", "-c", code], tmp_path)
    assert places.returncode == 0, places.stderr
    assert all(Path(place).is_relative_to(clean.parent) for place in json.loads(places.stdout))
    arguments = "generate x --out clip.gif --num-inference-steps 1 --no-progress --device cpu --json".split()
    made = run_clean([clean / "reducio-fast", *arguments], tmp_path)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["config"]["num_frames"] == 16 and (tmp_path / "clip.gif").stat().st_size > 0


def test_every_extra_is_written_down(wheel: zipfile.ZipFile) -> None:
    fields = email.message_from_string(metadata(wheel, "METADATA"))
    assert {"demo", "train", "test", "dev"} <= set(fields.get_all("Provides-Extra"))
    demo = [Requirement(line) for line in fields.get_all("Requires-Dist") if "extra == " in line and "demo" in line]
    assert [r.name for r in demo] == ["gradio"]


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


def test_python_in_the_checkout_finds_every_room(root: Path) -> None:
    """After `pip install .` Python still finds the checkout's folder first, which holds only some of the rooms."""
    code = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"  # as if not installed with -e
        "import reducio_fast.compile, reducio_fast.reference, reducio_fast.triton_kernels as kernels\n"
        "print(kernels.__file__)"
    )
    done = python(code, root)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == root / "triton_kernels" / "__init__.py"


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
    done = python(f"import sys, reducio_fast, reducio_fast.cli.main; print({heavy} & set(sys.modules))", tmp_path)
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
                depth = len(file.relative_to(root / folder).parts)  # this many dots lead to the folder itself
                assert node.level <= depth, f"{file}:{node.lineno}: an import from outside the oracle's folder"
