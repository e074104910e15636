"""`bench --tune`: the search on made-up clocks, the table it writes, and what the compiler refuses."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from reducio_fast.cli import main
from reducio_fast.measurement import hot_shapes, svd_shapes, tune_kernels
from reducio_fast.measurement.accuracy_rule import judge
from reducio_fast.measurement.hot_shapes import Problem
from reducio_fast.measurement.tune_kernels import Settings

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
START = {"BLOCK": 64, "num_warps": 4, "num_stages": 2}
AXES = [
    [{"BLOCK": b, "num_warps": w} for b, w in ((32, 4), (64, 4), (128, 4), (128, 8), (256, 8))],
    [{"num_stages": s} for s in (1, 2, 3, 4, 5)],
]


def everything(candidates: list[Settings]) -> list[bool]:
    return [True] * len(candidates)


def never() -> bool:
    return False


def valley(entry: Settings) -> float:
    """Fastest at block 128 with 8 warps and 4 stages; more stages help large blocks only."""
    stages = abs(entry["num_stages"] - (4 if entry["BLOCK"] >= 128 else 2))
    return 1.0 + abs(math.log2(entry["BLOCK"] / 128)) + (entry["num_warps"] != 8) + 0.3 * stages


def test_search_finds_the_valley() -> None:
    calls: list[Settings] = []

    def cost(entry: Settings) -> float:
        calls.append(entry)
        return valley(entry)

    found = tune_kernels.search(START, AXES, cost, everything, never)
    assert found.settings == {"BLOCK": 128, "num_warps": 8, "num_stages": 4}
    assert (found.before, found.after) == (valley(START), 1.0)
    assert found.tried == len(calls) < 5 * 5 and len({tuple(sorted(c.items())) for c in calls}) == len(calls)


def test_search_launches_nothing_the_compiler_refuses() -> None:
    def allowed(candidates: list[Settings]) -> list[bool]:
        return [c["BLOCK"] * c["num_stages"] <= 256 for c in candidates]

    def cost(entry: Settings) -> float:
        assert entry["BLOCK"] * entry["num_stages"] <= 256, f"launched {entry}"
        return valley(entry)

    found = tune_kernels.search(START, AXES, cost, allowed, never)
    assert found.settings == {"BLOCK": 128, "num_warps": 8, "num_stages": 2} and found.pruned > 0


def test_search_keeps_what_noise_does_not_beat() -> None:
    found = tune_kernels.search(
        START, AXES, lambda entry: 1.0 if entry == START else 1.0 - tune_kernels.NOISE / 2, everything, never
    )
    assert found.settings == START
    failing = tune_kernels.search(START, AXES, lambda entry: 1.0 if entry == START else math.inf, everything, never)
    assert failing.settings == START and failing.after == 1.0


def test_search_stops_in_time() -> None:
    left = iter([False] * 3)
    found = tune_kernels.search(START, AXES, valley, everything, lambda: next(left, True))
    assert found.tried <= 4 and found.after <= found.before


# ---- a whole run -----------------------------------------------------------------------------------------------------


def problem(op: str, key: str, plan: str, calls: float) -> Problem:
    return Problem(op, key, plan, f"{op} bf16", f"{plan} for a test", calls, dict)


def test_tune_writes_settings_and_a_plan(root: Path, tmp_path: Path) -> None:
    """One clock for every launch; it reads the settings in force, as a kernel does."""
    problems = [
        problem("conv3d", "K<=128", "128->128", 100),
        problem("conv3d", "K<=128", "256->128", 10),
        problem("conv3d", "*", "512->512", 1),
        problem("attention", "72", "cross 72", 50),
    ]
    vendor = {"128->128": 2.0, "256->128": 0.5, "512->512": 0.98, "cross 72": 5.0}  # 0.98: within the threshold
    checked: list[tuple[str, str, tuple[str, ...]]] = []

    def clock(p: Problem, way: str) -> float:
        if way == "vendor":
            return vendor[p.plan]
        entry = tune_kernels.in_force(p.op, p.key, "sm_90")
        if p.op == "conv3d":
            return 1.0 + abs(entry["num_stages"] - 3) + (entry["BLOCK_M"] != 64) * (p.key == "K<=128")
        return 1.0 + (entry["num_warps"] != 4)

    def allowed(op: str, key: str, variants: tuple[str, ...], candidates: list[Settings]) -> list[bool]:
        checked.append((op, key, variants))
        return everything(candidates)

    before = tune_kernels.in_force("conv3d", "K<=128", "sm_90")
    table, rows = tune_kernels.tune(problems, "sm_90", clock, allowed, lambda p: True, limit_s=60)
    assert table["conv3d"]["K<=128"]["num_stages"] == 3 and table["conv3d"]["K<=128"]["BLOCK_M"] == 64
    assert table["attention"]["72"]["num_warps"] == 4
    assert table["plan"] == {
        "conv3d 128->128": "kernel",
        "conv3d 256->128": "vendor",
        "conv3d 512->512": "kernel",
        "attention cross 72": "kernel",
    }
    # The group that costs most comes first, and the compiler checks that group's own builds.
    assert checked[0] == ("conv3d", "K<=128", ("conv3d bf16",))
    assert [r["key"] for r in rows if "settings" in r] == ["K<=128", "72", "*"]
    assert tune_kernels.in_force("conv3d", "K<=128", "sm_90") == before  # the settings in force are restored

    path = tmp_path / "tables" / "sm_90.json"
    tune_kernels.write(table, "sm_90", path)
    written = json.loads(path.read_text())
    shipped = json.loads((root / "triton_kernels" / "tables" / "sm_90.json").read_text())
    assert written["conv3d"]["K<=128"] == table["conv3d"]["K<=128"] and written["plan"] == table["plan"]
    kept = [(op, key) for op, entries in shipped.items() for key in entries if key not in table.get(op, {})]
    assert kept and all(written[op][key] == shipped[op][key] for op, key in kept)  # what was not measured stays
    assert max(map(len, path.read_text().splitlines())) > 60  # one entry per line, as in the shipped tables


def test_families_share_a_table(tmp_path: Path) -> None:
    """Each family's run keeps what the other one found; of classes that both have, the later run tunes for both."""
    path, problems = tmp_path / "sm_90.json", {}
    for family, others in (("reducio", []), ("svd", ["reducio"]), ("reducio", ["svd"])):
        kept = tune_kernels.kept(path)
        problems[family], shared = tune_kernels.problems_of(family, "sm_90", kept.get("plan", ()))
        assert shared == others
        table, _ = tune_kernels.tune(
            problems[family], "sm_90", lambda p, way: 1.0, lambda op, key, variants, some: everything(some),
            lambda p: True, limit_s=60,
        )  # fmt: skip
        tune_kernels.write(table, "sm_90", path)
        written = tune_kernels.kept(path)
        assert all(kept[op].keys() <= written[op].keys() for op in kept)
        assert all(written[p.op][p.key] and written["plan"][p.plan_entry] == "kernel" for p in problems[family])
    own = {family: {(p.op, p.key) for p in make("sm_90")} for family, make in tune_kernels.FAMILIES.items()}
    both = own["reducio"] & own["svd"]
    assert {("conv3d", "*"), ("conv3d", "K<=128"), ("attention", "64"), ("group_norm_silu", "apply")} <= both
    for family, other in (("reducio", "svd"), ("svd", "reducio")):
        assert {(p.op, p.key) for p in problems[family]} == own[family]
        others = [p for p in tune_kernels.FAMILIES[other]("sm_90") if (p.op, p.key) in both]
        assert [p for p in problems[family] if p in others] == others


def test_a_damaged_table_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    for text in ("", '{"conv3d": {"K<=1', "[]", '{"conv3d": 3}'):
        path.write_text(text)
        assert tune_kernels.kept(path) == {}
    tune_kernels.write({"conv3d": {"*": {"num_stages": 3}}}, "sm_90", path)
    assert json.loads(path.read_text())["conv3d"]["*"] == {"num_stages": 3}


@pytest.mark.parametrize(("argv", "family"), [("bench --tune", "reducio"), ("bench svd --tune", "svd")])
def test_the_workload_names_the_family(
    argv: str, family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr(tune_kernels, "run", lambda *given: seen.append(given) or {"rows": [], "table": "t.json"})
    assert main.main([*argv.split(), "--limit", "5"]) == 0
    assert seen[0][2] == 5 and seen[0][-1] == family and "wrote t.json" in capsys.readouterr().out


def test_a_wrong_result_is_never_the_fastest() -> None:
    """A miscompiled candidate is the fastest of one class, and another one is already in force for another class."""
    problems = [problem("conv3d", "K<=128", "128->128", 1), problem("conv3d", "*", "512->512", 1)]

    def stages(p: Problem) -> int:
        return tune_kernels.in_force(p.op, p.key, "gfx942")["num_stages"]

    def clock(p: Problem, way: str) -> float:
        return 10.0 if way == "vendor" else 1.0 / stages(p)

    def agrees(p: Problem) -> bool:
        return stages(p) != 3 and p.plan != "512->512"

    table, rows = tune_kernels.tune(
        problems, "gfx942", clock, lambda op, key, variants, some: everything(some), agrees, limit_s=60, hip=True
    )
    assert table["conv3d"]["K<=128"]["num_stages"] == 2
    assert table["plan"] == {"conv3d 128->128": "kernel", "conv3d 512->512": "vendor"}
    assert (
        next(r for r in rows if r.get("what") == problems[1].what and r["plan"].endswith("512->512"))["seconds"][
            "kernel"
        ]
        == math.inf
    )


@pytest.mark.parametrize("broken", ["nothing", "an element", "a NaN", "the third run", "the second result"])
def test_results_are_compared_element_by_element(broken: str) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    runs = iter(range(100))

    def kernel() -> tuple[torch.Tensor, ...]:
        y, run = (x.float() * 1.004).bfloat16(), next(runs)
        if broken == "an element" or (broken == "the third run" and run == 2):
            y[3, 5] += 0.5
        if broken == "a NaN":
            y[0, 0] = math.nan
        return y, x - 1 if broken == "the second result" else x, torch.empty(0)  # the third one is not compared

    assert tune_kernels.agree({"kernel": kernel, "expected": lambda: (x, x)}) == (broken == "nothing")


def test_settings_come_back_after_a_failure() -> None:
    before = tune_kernels.in_force("conv3d", "K<=128", "sm_90")
    with pytest.raises(RuntimeError), tune_kernels.trial("sm_90", "conv3d", "K<=128", {"BLOCK_M": 1}):
        assert tune_kernels.in_force("conv3d", "K<=128", "sm_90") == {"BLOCK_M": 1}
        raise RuntimeError
    assert tune_kernels.in_force("conv3d", "K<=128", "sm_90") == before
    with tune_kernels.trial(
        "sm_90", "ada_layer_norm", "1152", {"num_warps": 8}
    ):  # a class that the table does not list
        assert tune_kernels.in_force("ada_layer_norm", "1152", "sm_90") == {"num_warps": 8}
    assert tune_kernels.in_force("ada_layer_norm", "1152", "sm_90") == {"num_warps": 4}


@pytest.mark.parametrize("family", tune_kernels.FAMILIES)
def test_every_hot_problem_is_a_launch_class_and_a_build(family: str) -> None:
    """The names of tune's problems are compared with those in the kernels' own files."""
    from reducio_fast.triton_kernels import quantised_conv3d
    from reducio_fast.triton_kernels.conv3d import blocks_for
    from reducio_fast.triton_kernels.registry import OPS

    assert not any(p.op == "quantised_conv3d" for p in tune_kernels.FAMILIES[family]("sm_89"))  # has no 8-bit kernels
    problems = tune_kernels.FAMILIES[family]("sm_90")
    quantised_keys = {"reducio": {"K<=128", "*"}, "svd": set()}[family]
    assert {p.key for p in problems if p.op == "quantised_conv3d"} == quantised_keys
    assert len(set(problems)) == len(problems)
    for p in problems:
        builds = [v.name for v in OPS[p.op].variants("sm_90") if v.name.startswith(p.variant)]
        assert builds, p
        assert (
            p.calls > 0 and tune_kernels.axes_of(p.op, p.key, hip=False) and tune_kernels.axes_of(p.op, p.key, hip=True)
        )
        if p.op.endswith("conv3d"):
            C, K = map(int, p.plan.removesuffix(" frames").split("->"))
            with tune_kernels.trial(
                "sm_90", p.op, p.key, tune_kernels.in_force(p.op, p.key, "sm_90") | {"num_stages": 77}
            ):
                quantised = p.op == "quantised_conv3d"
                found = (
                    quantised_conv3d.blocks_for(C, K, "sm_90")
                    if quantised
                    else blocks_for(p.op, torch.bfloat16, C, K, "sm_90")
                )
                assert found["num_stages"] == 77


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(hot_shapes.conv_ways, 16, 32, 3, 5),
        functools.partial(hot_shapes.quantised_ways, 16, 32, 3, 5, torch.float8_e4m3fn),
        functools.partial(hot_shapes.quantised_ways, 16, 16, 3, 5, torch.int8),
        functools.partial(hot_shapes.upsample_ways, 16, True, 2, 4),
        functools.partial(hot_shapes.upsample_ways, 16, False, 3, 4),
        functools.partial(hot_shapes.attention_ways, 24, 2, 9, 85, 2, True),
        functools.partial(hot_shapes.attention_ways, 16, 1, 9, 7, 2, False),
        functools.partial(hot_shapes.norm_ways, True, (1, 16, 5, 5, 32), (1, 1, True)),
        functools.partial(hot_shapes.norm_ways, False, (1, 16, 5, 5, 32), (1, 1, True)),
        functools.partial(hot_shapes.token_norm_ways, "ada_layer_norm"),
        functools.partial(hot_shapes.token_norm_ways, "gated_residual_ada_layer_norm"),
        functools.partial(svd_shapes.geglu_ways, 16, 9),
        functools.partial(svd_shapes.frame_attention_ways, 2, 5, 6),
        *(functools.partial(svd_shapes.stream_norm_ways, kind, 16, 4, 6) for kind in ("plain", "branch", "blend")),
        functools.partial(svd_shapes.temporal_ways, 16, 2, 3, 5, False),
        functools.partial(svd_shapes.temporal_ways, 16, 1, 3, 5, True),
        functools.partial(svd_shapes.frame_conv_ways, 16, 2, 4, 5),
        functools.partial(svd_shapes.frame_upsample_ways, 16, 8, 2, 4, 5),
        functools.partial(svd_shapes.step_ways, (3, 4, 2, 2)),
    ],
    ids=lambda make: " ".join(map(str, (make.func.__name__, *make.args))),
)
def test_both_ways_compute_the_same(make: functools.partial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our op compared with the vendor's on small inputs in float32; for a convolution the statistics are compared."""
    from reducio_fast.triton_kernels import conv3d, group_norm_silu

    def random(device: torch.device, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape).mul_(scale)

    for module in (hot_shapes, svd_shapes):
        monkeypatch.setattr(module, "random_input", random)
    # The statistics kernel itself needs a GPU or the interpreter: its twin stands in.
    monkeypatch.setattr(group_norm_silu, "statistics", lambda x, per_frame: conv3d.statistics(x))
    ways = make(CPU)
    kernel, vendor = ways["kernel"](), ways["vendor"]()
    if make.func in (hot_shapes.conv_ways, hot_shapes.quantised_ways, hot_shapes.upsample_ways):
        kernel = kernel[1]
    for one, two in zip(*((x if isinstance(x, tuple) else (x,)) for x in (kernel, vendor)), strict=True):
        verdict = judge(one, two, two)
        assert verdict.right, str(verdict)


def test_the_compiler_prunes() -> None:
    """For a GPU that is not here: settings in force pass, settings that need too much shared memory do not."""
    code = textwrap.dedent("""
        from reducio_fast.measurement.tune_kernels import compile_problems, in_force

        names = ("conv3d bf16 256->128 k3",)
        base = in_force("conv3d", "K<=128", "sm_90")
        full = base | {"BLOCK_M": 256, "BLOCK_K": 128, "BLOCK_C": 128, "num_stages": 4, "num_warps": 8}
        for entry in (base, full):
            print("; ".join(compile_problems("sm_90", "conv3d", "K<=128", entry, names)) or "fine")
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=compiled(), cwd="/")
    assert done.returncode == 0, done.stderr
    good, full = done.stdout.splitlines()
    assert good == "fine" and "bytes of shared memory, the limit is 232448" in full


def compiled() -> dict[str, str]:
    """The environment without Triton's interpreter, which the tests turn on where there is no GPU."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
