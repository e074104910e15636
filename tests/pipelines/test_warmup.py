"""Warm-up: jobs under a deadline, a pipeline that is compiled or usable at once, and the command with its archives."""

from __future__ import annotations

import json
import shutil
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reducio_fast import ReducioPipeline
from reducio_fast.cli import main
from reducio_fast.compile import artifacts, cache
from reducio_fast.compile.graphs import Graphs, Pool
from reducio_fast.fast import launches
from reducio_fast.fast.engine import Engine
from reducio_fast.pipelines.execution import warmup
from reducio_fast.pipelines.execution.executor import Executor
from reducio_fast.system import cores
from reducio_fast.system.deadline import Check, DeadlinePassed, Job, Outcome
from reducio_fast.system.deadline import run as run_jobs
from reducio_fast.system.errors import ReducioError
from reducio_fast.triton_kernels import tables

pytestmark = pytest.mark.slow

GREY = np.full((64, 64, 3), 128, np.uint8)
CALL = {"prompt": "a red circle", "image": GREY, "height": 64, "width": 64, "num_inference_steps": 2, "progress": False}


@pytest.fixture
def pipe(bundle: Path) -> ReducioPipeline:
    return ReducioPipeline.from_pretrained(bundle, device="cpu", backend="fast")


@pytest.fixture(scope="module")
def unchanged(bundle: Path) -> ReducioPipeline:
    """For tests that change nothing of it."""
    return ReducioPipeline.from_pretrained(bundle, device="cpu", backend="fast")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# ---- jobs ------------------------------------------------------------------------------------------------------------


def test_jobs_run_in_order_and_are_timed() -> None:
    clock, order, done = Clock(), [], []

    def job(name: str, seconds: float) -> Job:
        def run(check: Check) -> None:
            check()
            order.append(name)
            clock.now += seconds

        return Job(name, run)

    outcome = run_jobs([job("a", 2), job("b", 3)], on_done=done.append, clock=clock)
    assert (order, done, outcome.seconds, outcome.left) == (["a", "b"], ["a", "b"], {"a": 2, "b": 3}, ())
    assert outcome.complete and run_jobs([job("a", 2)], 60, clock=clock).complete


def test_deadline_ends_a_job_at_its_next_check() -> None:
    clock, ended = Clock(), threading.Event()

    def slow(check: Check) -> None:
        clock.now += 10
        try:
            check()
        except DeadlinePassed:
            ended.set()
            raise

    outcome = run_jobs([Job("quick", lambda check: None), Job("slow", slow), Job("later", print)], 5, clock=clock)
    assert ended.wait(5)
    assert list(outcome.seconds) == ["quick"] and outcome.left == ("slow", "later") and not outcome.complete


def test_deadline_does_not_wait_for_a_compiler_that_hangs() -> None:
    release = threading.Event()
    started = time.monotonic()
    outcome = run_jobs([Job("hangs", lambda check: release.wait(60))], 0.1)
    assert time.monotonic() - started < 20 and outcome.left == ("hangs",)
    release.set()


@pytest.mark.parametrize("deadline", [None, 60])
def test_error_of_a_job_reaches_the_caller(deadline: float | None) -> None:
    def fail(check: Check) -> None:
        raise ValueError("no compiler")

    with pytest.raises(ValueError, match="no compiler"):
        run_jobs([Job("fails", fail)], deadline)


# ---- the pipeline ----------------------------------------------------------------------------------------------------


def recorded(fn: Any, inputs: list[Tensor], pool: Pool) -> tuple[Any, Any]:
    """Stands in for the capture of a graph, without a GPU: a replay computes the function again."""
    outputs = fn(*inputs)

    def leaves(value: Any) -> list[Tensor]:
        if isinstance(value, list | tuple):
            return [x for item in value for x in leaves(item)]
        return [value] if isinstance(value, Tensor) else []

    def replay() -> None:
        for old, new in zip(leaves(outputs), leaves(fn(*inputs)), strict=True):
            old.copy_(new)

    return replay, outputs


def test_after_a_warm_up_a_call_captures_nothing(pipe: ReducioPipeline) -> None:
    graphs = Graphs(recorded)
    pipe.executor.engine = Engine(graphs=graphs)
    outcome = pipe.warmup([64], progress=False)
    assert list(outcome.seconds) == ["64x64"] and outcome.complete
    before = graphs.describe()
    assert before["graphs"] and graphs.sightings == 1
    pipe(**CALL)
    after = graphs.describe()
    assert after["misses"] == before["misses"] and len(after["graphs"]) == len(before["graphs"])
    assert after["hits"] > before["hits"]


def test_a_model_without_a_text_encoder_is_warmed_up(pipe: ReducioPipeline) -> None:
    graphs = Graphs(recorded)
    pipe.executor.engine = Engine(graphs=graphs)
    embeds, mask, _, _ = pipe.encode_prompt("a red circle")
    pipe.unload("text_encoder", "text_to_image")
    assert pipe.warmup([64], progress=False).complete
    captured = len(graphs.describe()["graphs"])
    pipe(**(CALL | {"prompt": None}), prompt_embeds=embeds, prompt_attention_mask=mask)
    assert captured and len(graphs.describe()["graphs"]) == captured


def test_default_is_the_models_own_size_and_other_threads_work_is_equal(
    unchanged: ReducioPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    pipe = unchanged
    monkeypatch.setattr(warmup, "_clip", lambda p, h, w: lambda check: made.append((p is pipe, h, w)))
    assert pipe.warmup().complete
    assert pipe.warmup([(64, 96), 64, (64, 96)], deadline=60, progress=False).complete
    assert made == [(True, pipe.sample_height, pipe.sample_width), (False, 64, 96), (False, 64, 64)]
    assert "warm-up" in capsys.readouterr().err


def test_deadline_that_passes_leaves_a_usable_uncompiled_pipeline(
    pipe: ReducioPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    expected = pipe(**CALL).frames
    engine, entered, release = pipe.executor.engine, threading.Event(), threading.Event()
    transformer = pipe.executor.network("transformer")
    run = transformer.denoise

    def hanging(*args: Any) -> Tensor:
        entered.set()
        release.wait(60)
        return run(*args)

    transformer.denoise = hanging
    clock = Clock()  # stands still until the compiler hangs
    threading.Thread(target=lambda: entered.wait(60) and setattr(clock, "now", 100.0), daemon=True).start()
    outcome = warmup.warm_up(pipe, [64, 96], 50, False, clock)
    assert outcome.left == ("64x64", "96x96") and not outcome.seconds
    assert caplog.messages == ["warm-up: not done after 50 s, 64x64, 96x96 left; the pipeline runs uncompiled"]
    assert pipe.executor.engine is not engine and pipe.executor.engine.compile is False
    assert (pipe(**CALL).frames == expected).all()  # while the other thread still hangs in a compiler
    release.set()


def test_on_a_gpu_kernels_are_compiled_before_the_first_clip(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the model is loaded: in its dtype, with its quantisation, and once for all sizes."""
    pipe = ReducioPipeline.from_pretrained(bundle, device="cpu", dtype="bfloat16", quantise="fp8")
    order: list[Any] = []

    def compiled(device: torch.device, wanted: Any, jobs: int, check: Check) -> tuple[int, list[str]]:
        check()
        order.append((device, wanted, jobs))
        return 3, ["conv3d_kernel: too large"]

    monkeypatch.setattr(launches, "clip_launches", lambda *arguments: arguments)
    monkeypatch.setattr(launches, "precompile_launches", compiled)
    monkeypatch.setattr(warmup, "_clip", lambda p, h, w: lambda check: order.append(h))
    monkeypatch.setattr(cores, "usable", lambda: 5)
    assert pipe.warmup([64, 96], progress=False).complete and order == [64, 96], "a CPU compiles no kernels"
    order.clear()
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(Executor, "device", property(lambda self: gpu))
    with tables.pretend("sm_90"):
        assert list(pipe.warmup([64, 96], progress=False).seconds) == ["64x64", "96x96"]
    networks = pipe.transformer.config, pipe.vae.config
    expected = ("sm_90", *networks, torch.bfloat16, "auto", pipe.executor.engine.quantisation)
    assert order == [(gpu, expected, 5), 64, 96] and expected[-1].word == "fp8"
    assert "conv3d_kernel: too large" in caplog.messages


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        pytest.param({"sizes": [60]}, "60 is not a multiple of 32", id="size"),
        pytest.param({"sizes": [(64,)]}, r"sizes: must be a list .*, has \(64,\)", id="pair"),
        pytest.param({"sizes": []}, "sizes: must be a list", id="none"),
        pytest.param({"sizes": "64"}, "sizes: must be a list", id="text"),
        pytest.param({"deadline": 0}, "deadline: must be a finite number of seconds above 0, is 0", id="deadline"),
        pytest.param({"deadline": float("nan")}, "deadline: must be a finite number of .*, is nan", id="nan"),
        pytest.param({"deadline": float("inf")}, "deadline: must be a finite number of .*, is inf", id="inf"),
        pytest.param({"deadline": True}, "deadline: must be a finite number of .*, is True", id="true"),
    ],
)
def test_words_that_do_not_fit_are_refused(unchanged: ReducioPipeline, words: dict, reason: str) -> None:
    with pytest.raises(ReducioError, match=reason):
        unchanged.warmup(**words)


def test_deadline_and_offload_exclude_each_other(pipe: ReducioPipeline) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ReducioError, match="while weights are offloaded"):
        pipe.warmup(deadline=5)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `reducio-fast warmup` with a cache folder of its own; returns status, result and stderr."""
    for name in cache.VARIABLE.values():
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run(folder: str, *argv: str) -> tuple[int, Any, str]:
        monkeypatch.setenv("REDUCIO_CACHE_DIR", str(tmp_path / folder))
        for name in cache.VARIABLE.values():
            monkeypatch.delenv(name, raising=False)
        status = main.main(["warmup", "--sizes", "64", "--device", "cpu", "--no-progress", "--json", *argv])
        out, err = capsys.readouterr()
        return status, json.loads(out) if out else None, err

    return run


def test_command_takes_a_cache_to_another_folder(
    command: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive = tmp_path / "cache.zip"
    # A CPU without a compiler has nothing to compile: this table stands in for the files that a GPU writes.
    origin = cache.Origin.here("cpu")
    table = tmp_path / "a" / origin.key / "tables" / "cpu.json"
    table.parent.mkdir(parents=True)
    table.write_text("{}")
    status, result, _ = command("a", "--export", str(archive))
    assert status == 0 and list(result["seconds"]) == ["64x64"] and result["left"] == [] and result["exported"] >= 1
    status, result, _ = command("b", "--import", str(archive))
    assert status == 0 and result["imported"] >= 1 and result["cache"] == str(tmp_path / "b" / origin.key)
    assert (tmp_path / "b" / origin.key / "tables" / "cpu.json").read_text() == "{}"

    with zipfile.ZipFile(archive) as old:
        manifest = json.loads(old.read(cache.MANIFEST))
    manifest["origin"]["torch"] = "1.0"
    with zipfile.ZipFile(tmp_path / "foreign.zip", "w") as foreign:
        foreign.writestr(cache.MANIFEST, json.dumps(manifest))
    caplog.clear()
    status, result, _ = command("c", "--import", str(tmp_path / "foreign.zip"))
    assert status == 0 and result["imported"] is None and "it is of torch 1.0" in result["ignored"]
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith(f"it is of torch 1.0 (here {torch.__version__})")


class Code:
    """Stands in for compiled code: a block as it is, which the text of its file leads to."""

    made: list[Code] = []

    def __init__(self, fn: Any, tensors: Any, free: Any) -> None:
        self.fn = fn
        self.made.append(self)

    def __call__(self, *tensors: Tensor) -> Any:
        return self.fn(*tensors)

    def save(self, path: str, format: str) -> None:
        Path(path).write_text(str(self.made.index(self)))


@pytest.mark.parametrize(
    "real",
    [pytest.param(True, marks=pytest.mark.skipif(artifacts.obstacle() is not None, reason="no C++ compiler")), False],
)
def test_command_takes_compiled_blocks_along(
    command: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    real: bool,
) -> None:  # fmt: skip
    """Really compiled blocks of the transformer at two sizes, since all blocks of both stages take a minute to compile;
    these have a stand-in for the compiler."""
    archive, kinds = str(tmp_path / "cache.zip"), 2 if real else 4
    model = shutil.copytree(bundle, tmp_path / "model")
    if real:
        index = json.loads((model / "model_index.json").read_text())
        (model / "model_index.json").write_text(json.dumps(index | {"text_to_image": [None, None]}))
    else:
        monkeypatch.setattr(artifacts, "obstacle", lambda: None)
        monkeypatch.setattr(artifacts, "compile_function", Code)
        monkeypatch.setattr(artifacts, "load", lambda path, tensors: Code.made[int(path.read_text())])
    argv = ("--compile", "--model", str(model), "--sizes", "64", "96")
    status, result, _ = command("a", *argv, "--export", archive)
    made = list((tmp_path / "a").glob("*/regions/*.bin"))
    assert status == 0 and len(made) >= kinds and result["exported"] >= len(made) + real

    def refuse(*args: Any) -> None:
        raise AssertionError("compiled what the archive holds")

    monkeypatch.setattr(artifacts, "compile_function", refuse)
    status, result, _ = command("b", *argv, "--import", archive)
    assert status == 0 and result["imported"] >= len(made) + real
    assert {path.name for path in (tmp_path / "b").glob("*/regions/*.bin")} == {path.name for path in made}
    assert not [r for r in caplog.records if r.name == "reducio_fast"]  # neither compiled anew nor failed


def test_no_archive_of_an_unfinished_warm_up(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "run", lambda jobs, *_, **__: Outcome(left=tuple(job.name for job in jobs)))
    status, result, err = command("a", "--deadline", "5", "--export", str(tmp_path / "cache.zip"))
    assert status == 2 and result is None and "--export: 64x64 not done in 5 s; no archive is written" in err
    assert not (tmp_path / "cache.zip").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        pytest.param(["--import", "none.zip"], "no such file", id="missing"),
        pytest.param(["--import", "broken.zip"], "is no archive of a cache", id="broken"),
        pytest.param(["--export", "none/cache.zip"], "the output folder none does not exist", id="export"),
        pytest.param(["--export", "."], "--export: . is a folder; name a file", id="export to a folder"),
        pytest.param(
            ["--model", "svd-tiny", "--quantise", "int8"], "--quantise: only the decoder of a Reducio", id="svd"
        ),
        pytest.param(["--sizes", "6x4x4"], "must be a number or HEIGHTxWIDTH", id="size"),
        pytest.param(["--deadline", "-1"], "deadline: must be a finite number of seconds above 0", id="deadline"),
        pytest.param(["--deadline", "nan", "--model", "none"], "deadline: must be a finite number", id="nan"),
    ],
)
def test_command_answers_mistakes_in_one_line(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.zip").write_bytes(b"broken")
    status, result, err = command("cache", *words)
    assert status == 2 and result is None and reason in err and err.count("\n") == 1
