"""Compiled blocks as files: the next process finds them again; a block that they were not made for never does."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reducio_fast.compile import artifacts, gc_pause
from reducio_fast.compile.compiled_blocks import Regions, adopt
from reducio_fast.fast.engine import Engine
from reducio_fast.measurement.accuracy_rule import judge
from reducio_fast.triton_kernels import tables

pytestmark = pytest.mark.slow

needs_compiler = pytest.mark.skipif(artifacts.obstacle() is not None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Block(nn.Module):
    """Normed residual feed-forward with a gate from outside: (gate [C], x [B, L, C]) -> x, mean of x."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.norm, self.ff = scale, nn.LayerNorm(16), nn.Linear(16, 16)
        self.requires_grad_(False)

    def forward(self, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + gate * self.scale * F.gelu(self.ff(self.norm(x)), approximate="tanh")
        return x, x.mean(1)


def run(regions: Regions, block: nn.Module, length: int = 8, free: bool = False) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(length)
    gate, x = torch.randn(16, generator=g), torch.randn(2, length, 16, generator=g)
    actual = regions.run("block", block, (gate, x), {}, [x] if free else [])
    expected = type(block).forward(block, gate, x)
    oracle = copy.deepcopy(block).double()(gate.double(), x.double())
    for fast, eager, exact in zip(actual, expected, oracle, strict=True):
        assert fast.dtype == eager.dtype and judge(fast, eager, exact).right
    return actual


def counts(regions: Regions) -> dict[str, int]:
    description = regions.describe()
    assert description["misses"] == {} and description["failures"] == []
    return {name: description["regions"]["block"][name] for name in ("compiled", "loaded", "calls")}


@needs_compiler
def test_code_is_kept_for_the_next_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    first = Regions(store=tmp_path)
    a, b = run(first, Block()), run(first, Block())  # other weights, the same code
    assert not torch.equal(a[0], b[0]) and counts(first) == {"compiled": 1, "loaded": 0, "calls": 2}
    (file,) = tmp_path.iterdir()
    second = Regions(store=tmp_path)
    block = Block()
    again = run(second, block)
    assert counts(second) == {"compiled": 0, "loaded": 1, "calls": 1}
    assert torch.equal(run(second, block)[0], again[0])
    assert torch.equal(first("block", block, *_arguments(8))[0], again[0])  # loaded or just compiled: the same bytes

    file.write_bytes(file.read_bytes()[: 1 << 10])  # as after a full disk
    third = Regions(store=tmp_path)
    with caplog.at_level(logging.WARNING, "reducio_fast"):
        run(third, block)
    assert counts(third)["compiled"] == 1
    assert [r.getMessage().split(":")[0] for r in caplog.records if r.name == "reducio_fast"] == ["cache"]
    fourth = Regions(store=tmp_path)  # the newly compiled code has replaced the damaged file
    run(fourth, block)
    assert counts(fourth)["loaded"] == 1


@needs_compiler
def test_code_of_another_block_is_found_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As after a change that no digest detects: the file with a block's name holds another block's code."""
    torch.manual_seed(0)
    one, other = tmp_path / "one", tmp_path / "other"
    run(Regions(store=one), Block())
    run(Regions(store=other), Block(scale=3.0))
    (right,), (wrong,) = one.iterdir(), other.iterdir()
    assert right.name != wrong.name
    shutil.copyfile(wrong, right)
    regions = Regions(store=one)
    with caplog.at_level(logging.WARNING, "reducio_fast"):
        run(regions, Block())
    assert counts(regions)["compiled"] == 1 and "away from the block's" in caplog.text


@needs_compiler
def test_a_free_length_has_one_code(tmp_path: Path) -> None:
    block, regions = Block(), Regions(store=tmp_path)
    for length in (8, 5, 120, 8):
        run(regions, block, length, free=True)
    assert counts(regions) == {"compiled": 1, "loaded": 0, "calls": 4}
    again = Regions(store=tmp_path)
    run(again, block, 33, free=True)
    assert counts(again) == {"compiled": 0, "loaded": 1, "calls": 1}
    run(again, block, 1, free=True)  # length 1 has its own code, since it could be broadcast
    assert counts(again) == {"compiled": 1, "loaded": 1, "calls": 2}
    # A strided slice is not dense: the length of its contiguous copy is free too.
    gate, x = _arguments(9)
    part = x[:, ::2]
    result = again.run("block", block, (gate, part), {}, [part])
    torch.testing.assert_close(result, block(gate, part))
    assert counts(again) == {"compiled": 1, "loaded": 1, "calls": 3}


@needs_compiler
def test_a_store_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("no folder")
    regions = Regions(store=occupied)
    run(regions, Block())
    assert counts(regions)["compiled"] == 1


def test_digest_is_the_same_in_every_process() -> None:
    key = ("block", nn.Linear, F.gelu, torch.float32, torch.Size([2, 3]), 0.5, None, torch.ops.aten.add)
    code = (
        "import torch, sys; from torch import nn; import torch.nn.functional as F\n"
        "from reducio_fast.compile import artifacts\n"
        "torch.set_num_threads(int(sys.argv[1]))\n"
        "print(artifacts.digest(('block', nn.Linear, F.gelu, torch.float32, torch.Size([2, 3]), 0.5, None, "
        "torch.ops.aten.add)))"
    )
    command = [sys.executable, "-c", code]
    threads = torch.get_num_threads()
    same, other = (
        subprocess.run([*command, str(n)], cwd="/", check=True, capture_output=True, text=True).stdout.strip()
        for n in (threads, threads + 1)
    )
    assert same == artifacts.digest(key) != other
    assert artifacts.digest(("other", *key[1:])) != same and artifacts.digest((key[0], nn.Conv2d, *key[2:])) != same


def test_a_change_of_source_finds_nothing_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "blocks_of_a_test.py").write_text("class Block: pass\n")
    import blocks_of_a_test  # type: ignore[import-not-found]

    before = artifacts.digest((blocks_of_a_test.Block,))
    (tmp_path / "helper_beside_it.py").write_text("x = 1\n")  # the block's functions may call it
    artifacts.source_digest.cache_clear()
    assert artifacts.digest((blocks_of_a_test.Block,)) != before


def test_a_change_of_kernels_or_of_their_settings_finds_nothing_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a block holds ops, which lead to no source file, and its code has launch settings compiled in."""

    class Convolves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.run = torch.ops.reducio_fast.conv3d  # not called: it needs a GPU

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    class Code:
        def __call__(self, x: Tensor) -> list[Tensor]:
            return [2 * x]

        def save(self, path: str, format: str) -> None:
            Path(path).touch()

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer_blocks = nn.ModuleList([Convolves()])

    monkeypatch.setattr(artifacts, "obstacle", lambda: None)
    monkeypatch.setattr(artifacts, "compile_function", lambda fn, tensors, free: Code())
    monkeypatch.setattr(artifacts, "load", lambda file, tensors: Code())
    monkeypatch.setattr(tables, "_tuned_here", [])
    store = tmp_path / "store"

    def files_after_a_call() -> int:
        network = Network()
        Engine(True, store=store).adopt("block", network)
        assert network.transformer_blocks[0](torch.ones(1)).item() == 2
        return len(list(store.iterdir()))

    assert files_after_a_call() == files_after_a_call() == 1
    tuned = tmp_path / "tables" / "interpreter.json"
    tuned.parent.mkdir()
    tuned.write_text('{"conv3d": {"*": {"num_warps": 3}}}')
    try:
        tables.add_tables(tuned.parent)
        assert files_after_a_call() == 2
        digest = artifacts.source_digest
        monkeypatch.setattr(artifacts, "source_digest", lambda module: "new" * ("triton" in module) or digest(module))
        assert files_after_a_call() == 3
    finally:
        tables.table.cache_clear()


def test_tensors_from_elsewhere_are_not_compiled_in() -> None:
    class Reads(Block):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [torch.ones(16)]  # neither weight nor buffer: a sibling may hold another tensor

        def forward(self, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(gate, x * self.hidden[0])

    regions = Regions(lambda fn, tensors, free: artifacts.trace(fn, tensors, free))
    gate, x = _arguments(8)
    block = Reads()
    assert torch.equal(regions("block", block, gate, x)[0], block(gate, x)[0])
    assert regions.describe()["failures"] == [
        "block: ValueError: reads tensors that are neither arguments nor weights: lifted_tensor_0"
    ]


def test_what_a_block_holds_besides_weights_is_in_its_key() -> None:
    """A change of settings, processors, hooks or adapters makes new code when the block is adopted again."""

    class Processor:
        def __init__(self, factor: float) -> None:
            self.factor = factor

    class Network(nn.Module):
        _repeated_blocks = ("Set",)

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Set() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    class Set(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.processor, self.scaling, self.active = Processor(2.0), {"default": 1.0}, {"a"}

        def forward(self, x: Tensor) -> Tensor:
            return x * self.processor.factor * self.scaling["default"]

    made = []

    def compile(fn, tensors, free):  # type: ignore[no-untyped-def]
        made.append(fn)
        return artifacts.trace(fn, tensors, free)

    regions, network, x = Regions(compile), Network(), torch.ones(3)

    def draw() -> float:
        adopt(regions, "block", network)
        return float(network(x)[0])

    assert draw() == draw() == 4.0 and len(made) == 1
    for block in network.blocks:
        block.processor = Processor(3.0)
    assert draw() == 9.0 and len(made) == 2
    network.blocks[0].scaling["default"] = 0.5
    assert draw() == 4.5 and len(made) == 3
    network.blocks[0].active.add("b")
    assert draw() == 4.5 and len(made) == 4
    network.blocks[0].register_forward_pre_hook(lambda module, args: None)
    assert draw() == 4.5 and len(made) == 5
    assert regions.describe()["failures"] == []


def test_with_gradients_blocks_run_as_they_are() -> None:
    regions, block = Regions(lambda fn, tensors, free: fn), Block()
    gate, x = _arguments(8)
    with torch.enable_grad():
        y, _ = regions("block", block, gate.requires_grad_(), x)
        y.sum().backward()
    assert gate.grad is not None and regions.describe()["misses"] == {"gradients": 1}


def test_the_collector_is_as_before() -> None:
    """Pauses that overlap in two threads end with the last one; objects made during a pause are collected as usual."""
    assert gc.isenabled()
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with gc_pause.paused():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    with gc_pause.paused():
        thread.start()
        assert entered.wait(10) and not gc.isenabled()
        cycle: list = []
        cycle.append(cycle)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled() and gc.get_freeze_count() == 0
    del cycle
    assert gc.collect() >= 1
    gc.disable()
    try:
        with gc_pause.paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@functools.cache
def _arguments(length: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(length)
    return torch.randn(16, generator=g), torch.randn(2, length, 16, generator=g)
