"""What every launch shares: the device it runs on, memory for descriptors, the record of launches, the tables."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.runtime import _allocation

from reducio_fast.triton_kernels import group_norm_silu, launch, tables
from reducio_fast.triton_kernels.registry import OPS

SECOND = torch.device("cuda", 1)


class Stub:
    """Stands for a tensor on the second GPU. It is not a tensor, so its first use ends the launch with an error."""

    device = SECOND


@pytest.mark.parametrize(
    "function", [*(op.launch for op in OPS.values()), group_norm_silu.statistics], ids=lambda f: f.__module__
)
def test_kernels_run_on_the_device_of_their_tensors(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on cuda:1 while cuda:0 is current; a stand-in for torch.cuda.device records the current device."""
    current: list[torch.device] = [torch.device("cuda", 0)]
    seen: list[torch.device] = []

    @contextmanager
    def device(asked: torch.device) -> Iterator[None]:
        current.append(asked)
        try:
            yield
        except (AttributeError, TypeError):
            seen.append(current[-1])
            raise
        finally:
            current.pop()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", device)
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    arguments: list[Any] = [Stub() for _ in needed]
    if needed[0].name == "tiles":
        arguments[0] = [Stub()]
    with pytest.raises((AttributeError, TypeError)):
        function(*arguments)
    assert seen == [SECOND] and len(current) == 1


def in_a_thread(work: Any) -> Any:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    thread.join()
    return result[0]


def allocator() -> Any:
    return _allocation._allocator.get()


def test_each_thread_has_memory_for_descriptors() -> None:
    def run() -> tuple[Any, Any]:
        before = allocator()
        with tables.pretend("sm_90"):
            assert launch.use_descriptors(torch.device("cuda"))
        return before, allocator()

    for before, after in (in_a_thread(run), in_a_thread(run)):
        assert isinstance(before, _allocation.NullAllocator) and after is launch._workspace


def test_a_thread_that_asks_for_a_twin_has_memory_for_descriptors() -> None:
    """Inductor's code launches compiled blocks, and it sets an allocator only in the first thread."""
    from reducio_fast.fast.engine import Engine

    def run() -> Any:
        with pytest.raises(KeyError):  # the class has no twin; the thread is ready by then
            Engine(compile=False).twin(torch.nn.Linear(1, 1), torch.device("cuda"))
        return allocator()

    assert in_a_thread(run) is launch._workspace


def test_an_allocator_of_the_caller_stays() -> None:
    def own(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8)

    def run() -> Any:
        triton.set_allocator(own)
        with tables.pretend("sm_90"):
            launch.use_descriptors(torch.device("cuda"))
        return allocator()

    assert in_a_thread(run) is own


def test_descriptors_from_sm_90_on() -> None:
    for arch, pays in (("sm_80", False), ("sm_90", True), ("sm_100", True), ("sm_120", True), ("gfx942", False)):
        with tables.pretend(arch):
            assert launch.use_descriptors(torch.device("cuda")) == pays, arch
    assert not launch.use_descriptors(torch.device("cpu"))


def test_the_current_device_is_asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two kinds of GPU: "cuda" without a number is the current device."""
    tables._arch_of.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(8, 0), (9, 0)][device])
    current = SimpleNamespace(index=0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.index)
    assert tables.arch_of(torch.device("cuda")) == "sm_80"
    current.index = 1
    assert tables.arch_of(torch.device("cuda")) == "sm_90" and tables.arch_of(torch.device("cuda", 0)) == "sm_80"
    tables._arch_of.cache_clear()


def test_relatives_share_a_table() -> None:
    assert tables.table("sm_103") == tables.table("sm_100") != tables.table("default")
    assert tables.table("sm_89") == tables.table("sm_86") == tables.table("sm_80")


def test_recordings_do_not_nest() -> None:
    with launch.recording("sm_90"), pytest.raises(RuntimeError, match="already"), launch.recording("sm_80"):
        pass
    assert launch._record.get() is None


def test_a_recording_leaves_other_threads_alone() -> None:
    """A warm-up records the launches of one pipeline while another thread may be making a clip with another one."""
    kernel = SimpleNamespace(arg_names=())
    with launch.recording("sm_90") as launches:
        assert in_a_thread(lambda: launch.launcher(kernel)) is kernel
        assert in_a_thread(lambda: tables.arch_of(torch.device("cpu"))) == tables.INTERPRETER
        launch.launcher(kernel)[(1,)]()
    assert len(launches) == 1
