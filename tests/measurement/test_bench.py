"""`bench`: its instruments, its comparisons and what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reducio_fast.cli import bench as cli_bench
from reducio_fast.cli import main
from reducio_fast.measurement import bench, contenders, instruments, svd_clip
from reducio_fast.measurement.contenders import Contender, GivenConditions, count, ladder, workload
from reducio_fast.reference import DIT_PRESETS, Condition, ReducioDiT, ReducioVAE, VAEConfig
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def test_operations_are_those_of_the_published_decoder() -> None:
    """A full 320-pixel tile: 41.3 TFLOP as written, 36.2 with the up-sampling folded, counted by hand beforehand."""
    config, vae = contenders.NARROW[0], VAEConfig()
    with torch.device("meta"):
        cond = Condition(
            torch.empty(1, 12, 32),
            torch.ones(1, 12, dtype=torch.long),
            torch.empty(1, 256, 32),
            torch.empty(1, 4, 40, 40),
        )
        image, noise = torch.empty(1, 3, 320, 320), torch.empty(1, 16, 4, 10, 10)
        given = GivenConditions("tile", ReducioDiT(config), ReducioVAE(vae), cond, image, noise, None)
    assert not given.tiled
    flops = count(given)
    content = 0.413  # encoding the content frame
    assert flops["direct"]["vae.decode"] / 1e12 == pytest.approx(41.3 + content, abs=0.05)
    assert flops["folded"]["vae.decode"] / 1e12 == pytest.approx(36.2 + content, abs=0.05)
    assert flops["folded"]["dit.step"] < flops["direct"]["dit.step"]


def test_a_convolution_counts_two_operations_a_product() -> None:
    """The counter against the formula: M x K x N products of an implicit GEMM."""
    with torch.device("meta"):
        conv, x = torch.nn.Conv3d(8, 4, 3, padding=1, bias=False), torch.empty(1, 8, 5, 6, 7)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        conv(x)
    assert counter.get_total_flops() == 2 * (5 * 6 * 7) * (27 * 8) * 4


# ---- the comparison --------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that only the contenders advance."""
    now = SimpleNamespace(value=0.0)
    monkeypatch.setattr(bench, "clock", lambda device: now.value)
    return now


def contender(clock: SimpleNamespace, name: str, decode: list[float], shade: int = 100) -> Contender:
    """Two warm-up clips of 9 s, then clips whose decoder takes the seconds in the list."""
    seconds = iter([9.0, 9.0, *decode])

    def run() -> tuple[np.ndarray, dict[str, float]]:
        taken = next(seconds)
        clock.value += 1.0 + taken
        return np.full((2, 4, 4, 3), shade, np.uint8), {"dit.step": 1.0, "vae.decode": taken}

    return Contender(name, f"{name} for a test", torch.float32, run, "direct" if name == "reference" else "folded")


WORKLOAD = SimpleNamespace(
    device=CPU,
    flops={"direct": {"dit.step": 2e12, "vae.decode": 8e12}, "folded": {"dit.step": 1e12, "vae.decode": 4e12}},
)


ROOF = {"matmul_tflops": 1.0, "dtype": "float32"}


def test_speed_up_is_the_median_of_ratios_within_a_turn(clock: SimpleNamespace) -> None:
    """In the second turn the machine is slow for both, so the ratio of that turn is still valid."""
    makers = [
        lambda: contender(clock, "reference", [5.0, 50.0, 4.0]),
        lambda: contender(clock, "fast", [1.0, 16.0, 1.0], shade=101),
    ]
    rows = bench.compare(
        makers, ["reference", "fast"], WORKLOAD, 3, {"matmul_tflops": 20.0, "dtype": "float32"}, lambda line: None
    )
    fast = rows["fast"]
    assert fast["speed_up"] == {"median": 3.0, "min": 2.5, "max": 3.0}  # 6/2, 51/17, 5/2
    assert fast["stages_speed_up"]["vae.decode"] == {"median": 4.0, "min": 3.125, "max": 5.0}
    assert fast["clip_s"] == {"median": 2.0, "min": 2.0, "max": 17.0} and fast["first_s"] == 10.0
    assert fast["tflops"] == {"dit.step": 1.0, "vae.decode": 4.0}  # the folded count over the median of each stage
    assert fast["share_of_roof"] == {"dit.step": 0.05, "vae.decode": 0.2}
    assert rows["reference"]["tflops"]["vae.decode"] == pytest.approx(8 / 5)
    assert fast["psnr_db"] == 48.13  # one grey level off


def test_a_contender_that_cannot_be_built_is_left_out(clock: SimpleNamespace) -> None:
    def broken() -> Contender:
        raise RuntimeError("no C++ compiler\nwas found")

    makers = [lambda: contender(clock, "reference", [2.0]), broken, lambda: contender(clock, "fast", [1.0])]
    lines: list[str] = []
    rows = bench.compare(makers, ["reference", "compiled", "fast"], WORKLOAD, 1, ROOF, lines.append)
    assert rows["compiled"] == {"skipped": "RuntimeError: no C++ compiler"}
    assert rows["fast"]["speed_up"]["median"] == 1.5
    assert any("compiled: skipped" in line for line in lines)
    with pytest.raises(ReducioError, match=r"no contender can be measured \(fast: RuntimeError: no C\+\+ compiler\)"):
        bench.compare([broken], ["fast"], WORKLOAD, 1, ROOF, lines.append)
    with pytest.raises(RuntimeError, match="compiler"):  # nothing is left to compare with
        bench.compare([broken], ["reference"], WORKLOAD, 1, ROOF, lines.append)


def test_the_share_of_a_roof_of_another_dtype_is_left_out(clock: SimpleNamespace) -> None:
    """As of `fast-default` on a CPU, which may compute in bfloat16 where the roof is of float32."""
    half = dataclasses.replace(contender(clock, "fast-default", [1.0]), dtype=torch.bfloat16)
    makers = [lambda: contender(clock, "reference", [2.0]), lambda: half]
    rows = bench.compare(makers, ["reference", "fast-default"], WORKLOAD, 1, ROOF, lambda line: None)
    assert rows["fast-default"]["share_of_roof"] == {} and set(rows["fast-default"]["tflops"]) == {
        "dit.step",
        "vae.decode",
    }
    assert set(rows["reference"]["share_of_roof"]) == {"dit.step", "vae.decode"}
    assert not any("%" in line for line in cli_bench._table("", rows) if "fast-default" in line)


def test_on_red_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str) -> None:
        raise AssertionError("timed")

    rows = [{"what": "vae.encode", "right": True}, {"what": "vae.decode", "right": False}]
    stand_in = SimpleNamespace(what="a test", device=CPU, dtype=torch.float32, parity=lambda: rows, contender=run)
    monkeypatch.setattr(bench, "workload", lambda *args: stand_in)
    with pytest.raises(ReducioError, match="nothing is timed, for 1 of 2 comparisons fail, the first: vae.decode"):
        bench.bench(device="cpu", cold=False)


def test_the_ladder_adds_one_thing_a_rung() -> None:
    rungs = ladder()
    assert len({rung.name for rung in rungs}) == len(rungs)
    for below, above in zip(rungs, rungs[1:], strict=False):
        assert below.kernels <= above.kernels
        changed = [
            below.transformer != above.transformer,
            below.vae != above.vae,
            below.kernels != above.kernels,
            below.contender != above.contender,
        ]
        assert sum(changed) == 1, above.name
    from reducio_fast.triton_kernels.registry import OPS

    of_svd = {name for name, _ in svd_clip.KERNELS}
    optional = {"quantised_conv3d"}  # only with `quantise=`: it changes the result, which a rung must not do
    assert rungs[-1].kernels | of_svd | optional == set(OPS), "every other kernel is a rung of one ladder"


def test_a_plan_without_a_kernel_takes_the_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan for a GPU needs only its architecture. Statistics are taken where both kernels run."""
    from reducio_fast.fast import plan
    from reducio_fast.triton_kernels import registry

    monkeypatch.setattr(plan, "arch_of", lambda device: "sm_90")
    chosen = plan.Plan(torch.device("cuda"), torch.bfloat16, {"conv3d"})
    assert chosen.pick("a", "conv3d", "128->128") is torch.ops.reducio_fast.conv3d
    assert chosen.pick("b", "group_norm_silu") is registry.OPS["group_norm_silu"].twin
    assert [c.implementation for c in chosen.choices] == ["kernel", "vendor"]
    assert not chosen.takes_statistics("conv3d", "128->128")
    assert plan.Plan(torch.device("cuda"), torch.bfloat16).takes_statistics("conv3d", "128->128")
    assert not plan.Plan(CPU, torch.float32).takes_statistics("conv3d", "128->128")


# ---- the instruments -------------------------------------------------------------------------------------------------


class FakeNVML:
    """A card that draws 250 W; with `counter` it also counts millijoules, by the clock."""

    def __init__(self, counter: bool) -> None:
        self.counter = counter

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> int:
        if not self.counter:
            raise RuntimeError("not supported")
        return int(time.perf_counter() * 250 * 1e3)

    def nvmlDeviceGetPowerUsage(self, handle: object) -> int:
        return 250_000


@pytest.mark.parametrize(("counter", "source"), [(True, "counter"), (False, "sampled power")])
def test_energy(counter: bool, source: str) -> None:
    start = time.perf_counter()
    with instruments.Energy(FakeNVML(counter), None) as energy:
        time.sleep(0.05)
    outside = time.perf_counter() - start
    assert energy.source == source
    assert 250 * 0.05 * 0.8 <= energy.joules <= 250 * outside


def test_energy_of_a_card_that_says_nothing() -> None:
    with instruments.Energy(SimpleNamespace(), None) as energy:
        pass
    assert energy.joules is None and energy.source is None


def test_peak_sees_memory_that_is_gone_again() -> None:
    with instruments.Peak(CPU) as peak:
        block = torch.ones(24 << 20)  # 96 MiB, written, for longer than a sample
        time.sleep(8 * instruments.SAMPLE_S)
        del block
    assert 90 << 20 <= peak.above <= 200 << 20
    assert peak.bytes > peak.above


def test_the_peak_on_a_gpu_includes_the_pools_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay allocates nothing: of the clip below the allocator sees 10 bytes, the graph's pool has 60 more."""
    segments = [
        {"device": 0, "total_size": 1000, "allocated_size": 10, "segment_pool_id": (0, 0)},
        {"device": 0, "total_size": 70, "allocated_size": 10, "segment_pool_id": (0, 1)},
        {"device": 0, "total_size": 5, "allocated_size": 0, "segment_pool_id": (0, 2)},  # of an earlier contender
        {"device": 1, "total_size": 900, "allocated_size": 0, "segment_pool_id": (0, 3)},
    ]
    for name, value in {
        "synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 100, "max_memory_allocated": 110,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    with instruments.Peak(torch.device("cuda:0"), idle_before=5) as peak:
        pass
    assert (peak.bytes, peak.above) == (175, 70)
    assert instruments.idle_pool_bytes(CPU) == 0


def test_a_kernel_is_timed_on_the_device_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs and events take the current device, so the named one must be current while they are made."""
    current, seen = ["cuda:0"], []

    @contextlib.contextmanager
    def device(which: torch.device):
        current.append(str(which))
        yield
        current.pop()

    class Recorder:
        def __init__(self, **kwargs: object) -> None:
            seen.append(current[-1])

        def replay(self) -> None:
            seen.append(current[-1])

        def record(self) -> None:
            seen.append(current[-1])

        def elapsed_time(self, end: object) -> float:
            return 2.0

    for name, value in {
        "device": device, "CUDAGraph": Recorder, "Event": Recorder, "graph": lambda graph: contextlib.nullcontext(),
        "synchronize": lambda device: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: torch.zeros(1))
    assert instruments.kernel_seconds(lambda: seen.append(current[-1]), torch.device("cuda:1"), repeats=3) == 2e-3
    assert set(seen) == {"cuda:1"} and current == ["cuda:0"]


@pytest.mark.parametrize(
    ("torch_version", "cudnn", "broken"),
    [
        ("2.9.0+cu128", 91002, True),
        ("2.9.0", 90800, True),
        ("2.9.0+cu128", 91499, True),
        ("2.9.0+cu128", 91500, False),
        ("2.9.0+cu128", 90701, False),
        ("2.9.1+cu128", 91002, False),
        ("2.10.0+cu128", 91002, False),
        ("2.9.0+cpu", None, False),
    ],
)
def test_broken_library_pairs(torch_version: str, cudnn: int | None, broken: bool) -> None:
    assert (instruments.broken_libraries(torch_version, cudnn) is not None) == broken


def test_a_broken_pair_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.0+cu128")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    with pytest.raises(ReducioError, match="cuDNN 9.10: 3-D convolutions bypass cuDNN"):
        bench.bench("narrow")


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("bench 1024 --device cpu", "workload: 1024 is full-size"),
        ("bench huge", "invalid choice: 'huge'"),
        ("bench narrow --contenders fast,fastest", "contender 'fastest' is unknown; known: reference, compiled, fast"),
        ("bench narrow --contenders reference,fast,fast", "contender 'fast' is named twice"),
        ("bench narrow --contenders=", "contender '' is unknown"),
        ("bench narrow --device cpu --out absent/row.json", "the output folder absent does not exist"),
        ("bench narrow --device cpu --out .", "out: . is a folder; name a file"),
        ("bench --tune --device cpu --out absent/sm_90.json", "the output folder absent does not exist"),
        ("parity --device cpu --out absent/rows.json", "the output folder absent does not exist"),
        ("bench narrow --model somewhere --device cpu", "has random weights"),
        ("bench --pairs 0", "--pairs: must be at least 1, is 0"),
        *((f"bench {family} --tune --device cpu", "tune: there is no GPU here") for family in ("", "svd")),
        ("bench narrow --tune", "workload: narrow given, --tune takes svd, or none for Reducio's kernels"),
        *(
            (f"bench --tune {option}", f"{option.split()[0]}: has no effect with --tune")
            for option in (
                "--model x",
                "--dtype float16",
                "--contenders fast",
                "--peer svd",
                "--ladder",
                "--pairs 5",
                "--cold",
                "--note x",
            )
        ),
        ("bench --limit 5", "--limit: is of --tune"),
        ("profile --ranges --shapes", "--shapes: is of the trace, and --ranges writes none"),
        ("profile --ranges --out trace.json.gz", "--out: is of the trace, and --ranges writes none"),
        ("profile narrow --out trace.json", "must end in .json.gz"),
        ("profile narrow --out absent/trace.json.gz", "the output folder absent does not exist"),
        pytest.param(
            "profile narrow --ranges", "no", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
        ),
    ],
)
def test_mistakes(
    argv: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main.main(argv.split())
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert message in captured.err and not list(tmp_path.iterdir())


def test_the_schedule_of_a_bare_machine_is_diffusers_own() -> None:
    """The stand-in takes diffusers' steps, both through `step` and as the fast sampler's table."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from reducio_fast.fast.solver_tables import coefficients
    from reducio_fast.measurement.bare_scheduler import EulerScheduler as StandIn

    original, ours = FlowMatchEulerDiscreteScheduler(), StandIn()
    original.set_timesteps(sigmas=torch.linspace(1, 0, 6)[:-1].tolist())
    ours.set_timesteps(5)
    torch.testing.assert_close(ours.sigmas, original.sigmas)
    torch.testing.assert_close(ours.timesteps, original.timesteps)
    latent = torch.randn(2, 3)
    expected = actual = latent
    for i, t in enumerate(original.timesteps):
        velocity = torch.randn(2, 3, generator=torch.Generator().manual_seed(i))
        expected = original.step(velocity, t, expected, return_dict=False)[0]
        actual = ours.step(velocity, t, actual)[0]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(coefficients(StandIn(), 5)[:, 3], ours.sigmas.diff().double(), rtol=1e-6, atol=1e-6)


def test_full_size_is_what_the_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(GivenConditions, "random", lambda *args: seen.append(args))
    workload("512", None, "bfloat16", SimpleNamespace(type="cuda"))
    assert seen[0][:5] == ("full size 512", DIT_PRESETS["reducio-512"], VAEConfig(), 512, torch.bfloat16)


def test_cold_clips_run_in_another_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not from the checkout's root, without `python -P` of Python 3.11; a relative model folder is still found."""
    calls = []

    def fake(command: list[str], **options: object) -> SimpleNamespace:
        calls.append((command, options))
        return SimpleNamespace(returncode=0, stdout='{"load_s": 1.0, "first_clip_s": 2.0}\n', stderr="")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(bench.subprocess, "run", fake)
    assert bench.first_clips("default", "model", None, CPU, "fast")["warm_caches"]["load_s"] == 1
    for command, options in calls:
        assert "-P" not in command and options["cwd"] not in (None, str(tmp_path))
        assert repr(str(tmp_path / "model")) in command[-1]
