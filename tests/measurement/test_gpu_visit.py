"""benchmarks/gpu_visit.sh on a CPU: every part on narrow shapes, as on a bare machine without the package installed."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from reducio_fast.cli import profile as profile_command
from reducio_fast.measurement.svd_clip import KERNELS

pytestmark = pytest.mark.slow

HERE = ("tests", "parity", "first_measurements", "bench-1024", "profile")  # what a CPU can do
ON_A_GPU = (
    "precompile",
    "tune",
    "bench-1024-fp8",
    "bench-1024-reference",
    "compiled-tile",
    "precompile-svd",
    "ladder-svd",
    "bench-svd",
)

# Run by Python at its start: nothing but torch, triton, numpy, safetensors and pytest, and no installed reducio_fast.
BARE = """
import sys

for name in ("diffusers", "transformers", "open_clip", "imageio", "PIL", "tqdm", "scipy", "pynvml",
             "matplotlib", "huggingface_hub"):
    sys.modules[name] = None
sys.meta_path[:] = [f for f in sys.meta_path if "reducio_fast" not in getattr(f, "__module__", "")]
"""


def bare_environment(folder: Path) -> dict[str, str]:
    (folder / "bare").mkdir()
    (folder / "bare" / "sitecustomize.py").write_text(BARE)
    drop = ("PYTHONPATH", "PYTEST_CURRENT_TEST")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    return kept | {"PYTHONPATH": str(folder / "bare"), "PYTHON": sys.executable}


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    return bare_environment(tmp_path)


def visit(root: Path, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    script = root / "benchmarks" / "gpu_visit.sh"
    return subprocess.run(["bash", str(script), *arguments], capture_output=True, text=True, env=env, cwd="/")


@pytest.fixture(scope="module")
def dry_run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("visit") / "out"
    done = visit(root, bare_environment(out.parent), str(out), "--dry-run")
    logs = "".join(f"--- {f.name}\n{f.read_text()}" for f in sorted(out.glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return out


def read(out: Path, part: str) -> dict:
    return json.loads((out / f"{part}.json").read_text())


def test_every_part_leaves_its_file(dry_run: Path) -> None:
    rows = {part: read(dry_run, part) for part in (*HERE, *ON_A_GPU)}
    assert rows["tests"]["tests"] > 0 and rows["tests"]["failed"] == []
    assert "test_guidance_dpm_step.py" in rows["tests"]["pytest"]  # needs diffusers, which is not there
    assert rows["parity"]["wrong"] == 0 and rows["parity"]["rows"]
    assert all(rows[part] == {"skipped": f"{part} needs a GPU"} for part in ON_A_GPU)
    assert rows["tests"]["whole"] and rows["tests"]["PASSED"] > 0 and rows["bench-1024"]["whole"]
    with tarfile.open(dry_run / "visit.tar.gz") as packed:
        assert {f"./{part}.json" for part in (*HERE, *ON_A_GPU)} <= set(packed.getnames())
    ways = {(r["what"].split()[0], r["way"]) for r in rows["first_measurements"]["rows"]}
    assert {("conv3d", "vendor, channels first"), ("conv3d", "vendor, channels last"), ("conv3d", "ours")} <= ways
    assert {("GroupNorm", "aten, channels last"), ("up-sampling", "vendor, folded"), ("one", "fast")} <= ways
    assert not [r for r in rows["first_measurements"]["rows"] if "skipped" in r]


def test_a_bare_machine_benchmarks_given_conditions(dry_run: Path) -> None:
    """The row of `bench narrow --ladder` with torch, Triton, numpy and safetensors alone."""
    row, printed = read(dry_run, "bench-1024"), (dry_run / "bench-1024.log").read_text()
    assert list(row["contenders"]) == ["reference", "fast"]
    # On a CPU no kernel can be switched: the rungs that remain are each network's algebra and everything together.
    assert list(row["ladder"]) == ["reference", "transformer", "decoder", "engine", "compile"]
    assert all(r["right"] for r in row["parity"]) and len(row["parity"]) == 3
    for entry in (*row["contenders"].values(), *row["ladder"].values()):
        assert set(entry["stages_s"]) == set(entry["tflops"]) == {"dit.step", "vae.decode"}
        inner = sum(stage["median"] for stage in entry["stages_s"].values())
        assert 0.9 * inner < entry["clip_s"]["median"] < 1.2 * inner + 0.05
        assert entry["peak_gb"] > 0.1 and entry["joules"] is None
    fast = row["contenders"]["fast"]
    assert fast["psnr_db"] is None or fast["psnr_db"] > 50  # None: the very same bytes
    assert fast["tflops"]["vae.decode"] == pytest.approx(
        row["flops"]["folded"]["vae.decode"] / fast["stages_s"]["vae.decode"]["median"] / 1e12, abs=1e-4
    )
    assert row["machine"]["packages"]["torch"] and row["machine"]["device"]["cpu_cores"] >= 1
    assert row["note"] == "dry run" and row["roof"]["matmul_tflops"] > 0 and row["roof"]["copy_gbs"] > 0
    for name in ("narrow", "reference", "fast", "transformer", "of roof", "parity: 3 of 3 right", "dry run"):
        assert name in printed


def test_a_profile_is_a_trace_and_a_table(dry_run: Path) -> None:
    row = read(dry_run, "profile")
    with gzip.open(dry_run / "profile.trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"dit.step", "vae.decode"} <= names and list(row["stages"]) == ["dit.step", "vae.decode"]
    decode = row["stages"]["vae.decode"]
    assert any("conv" in op["name"] for op in decode["ops"])
    assert 0.5 * decode["wall_ms"] < sum(op["ms"] for op in decode["ops"]) < 2 * decode["wall_ms"]
    text = "\n".join(profile_command.lines(row))
    assert "vae.decode:" in text and f"wrote {dry_run / 'profile.trace.json.gz'}" in text


def test_what_is_done_is_not_done_again(root: Path, dry_run: Path, bare: dict[str, str]) -> None:
    again = visit(root, bare, str(dry_run), "--dry-run")
    assert again.returncode == 0 and again.stdout.count("done before") == len(HERE), again.stdout


def test_a_visit_that_is_over_says_so(root: Path, tmp_path: Path, bare: dict[str, str]) -> None:
    late = visit(root, bare | {"TOTAL": "0"}, str(tmp_path / "late"), "--dry-run")
    assert late.returncode == 1 and late.stdout.count("no time left; call again") == len(HERE)


def test_the_parts_fit_into_one_visit(root: Path) -> None:
    """All parts except those of the second call, which has its own time window."""
    script = (root / "benchmarks" / "gpu_visit.sh").read_text().split("else\n    needs_gpu precompile")[0]
    seconds = {name: int(n) for name, n in re.findall(r"^    part (\S+) (\d+) ", script, re.M)}
    assert set(seconds) == {*HERE, *ON_A_GPU}
    assert sum(n for name, n in seconds.items() if not name.endswith("svd")) <= 570


def test_a_gpu_that_cannot_be_asked_about_fp8_fails_the_part(root: Path, tmp_path: Path) -> None:
    function = re.search(r"^in_fp8\(\) {.*?^}$", (root / "benchmarks" / "gpu_visit.sh").read_text(), re.M | re.S)[0]
    for python, failed, left in (("false", True, []), ("echo False #", False, ["bench-1024-fp8.json"])):
        shell = f'python() {{ {python}\n}}; python=python; out="{tmp_path}"; {function}\nin_fp8'
        assert bool(subprocess.run(["bash", "-c", shell]).returncode) == failed
        assert [path.name for path in tmp_path.iterdir()] == left


def test_the_parts_of_svd_fit_into_the_second_visit(root: Path) -> None:
    """With the seconds that SVD.md predicts for an H100: 18.2 eager, 14.4 compiled and 9.2 for a clip of 25 steps; a
    clip of the ladder's two steps takes 2.8 at most. A contender makes three clips before the timed ones."""
    script = (root / "benchmarks" / "gpu_visit.sh").read_text()
    parts = dict(re.findall(r"^    part (\S+-svd) (\d+ .*)$", script, re.M))
    seconds = {name: int(part.split()[0]) for name, part in parts.items()}
    assert list(parts) == ["precompile-svd", "ladder-svd", "bench-svd"] and sum(seconds.values()) <= 590
    clips = {name: 3 + int(re.search(r"--pairs (\d+)", parts[name])[1]) for name in ("ladder-svd", "bench-svd")}
    contenders = {name: re.search(r"--contenders (\S+)", parts[name])[1].split(",") for name in clips}
    assert "bench svd-short --ladder" in parts["ladder-svd"] and "--ladder" not in parts["bench-svd"]
    rungs = 3 + len(KERNELS)
    slower_than_the_last = 0.5  # a rung lies between the reference and the last one
    ladder = clips["ladder-svd"] * 2.8 * slower_than_the_last * (rungs + len(contenders["ladder-svd"]))
    assert ladder + 30 < seconds["ladder-svd"], "and 30 to start and to pack the weights"
    assert sorted(contenders["bench-svd"]) == ["compiled", "fast", "reference"]
    assert clips["bench-svd"] * (18.2 + 14.4 + 9.2) + 180 < seconds["bench-svd"], "and 180 to start and to compile"


def test_results_of_tests_survive_a_visit_that_ends(root: Path, bare: dict[str, str], tmp_path: Path) -> None:
    """The log of one process or of several is read as far as it was written."""
    script = (root / "benchmarks" / "gpu_visit.sh").read_text()
    code = script.split("""rm -f "$out/tests.lines"\n""")[1].split("\nEND\n")[0]
    (tmp_path / "tests.lines").write_text(
        "tests/a.py::test_one PASSED   [ 10%]\n"
        "[gw3] [ 12%] FAILED tests/a.py::test_two[x-1] \n"
        "[gw1] [ 13%] SKIPPED tests/b.py::test_three \n"
        "tests/b.py::test_under_way "
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), "-v tests", "124"], check=True)
    row = read(tmp_path, "tests")
    assert row["tests"] == 3 and not row["whole"] and row["failed"] == ["tests/a.py::test_two[x-1]"]
    assert (row["PASSED"], row["FAILED"], row["SKIPPED"]) == (1, 1, 1)


def test_kernels_without_a_dtype_are_tested_in_a_visit(root: Path) -> None:
    """The visit selects `gpu or not slow`. With a GPU, tests in bfloat16 and tests without a dtype are gpu tests."""
    path = root / "tests" / "triton_kernels" / "conftest.py"
    spec = importlib.util.spec_from_file_location("conftest_of_kernels", path)
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    conftest.GPU = True
    marked: list[str] = []
    items = [
        SimpleNamespace(path=folder / "test.py", fixturenames=names, add_marker=lambda mark, n=names: marked.append(n))
        for folder, names in (
            (path.parent, ["device", "eight_bit"]),
            (path.parent, ["device", "dtype"]),
            (path.parent, ["monkeypatch"]),
            (root / "tests" / "fast", ["device", "elsewhere"]),
        )
    ]
    conftest.pytest_collection_modifyitems(items)
    assert marked == [["device", "eight_bit"]]


def test_usage(root: Path, tmp_path: Path, bare: dict[str, str]) -> None:
    for arguments in ([], ["--dry-run"], [str(tmp_path / "x"), "--fast"]):
        refused = visit(root, bare, *arguments)
        assert refused.returncode == 2 and refused.stderr.startswith("usage:"), arguments
    assert not (tmp_path / "x").exists()
