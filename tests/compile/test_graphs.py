"""The bookkeeping rules of `Graphs`, with a recorder as the capture function; test_graphs_of_twins.py has real ones."""

from __future__ import annotations

import gc
import json
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recorded_graphs import Recorder
from reducio_fast.compile.graphs import REMEMBERED, Graphs


def affine(x: Tensor, pair: tuple[Tensor, Tensor | None], factor: float = 1.0) -> tuple[Tensor, list[Any]]:
    """Nested arguments and results, an absent tensor, a plain value."""
    scale, shift = pair
    y = factor * x * scale
    return y if shift is None else y + shift, [y.sum(), "plain"]


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape)


def test_replays_equal_eager(graphs: Graphs, recorder: Recorder) -> None:
    for _ in range(5):
        x, scale, shift = numbers(3, 4), numbers(4), numbers(4)
        y, (total, plain) = graphs("affine", affine, x, (scale, shift), 2.0)
        expected, (expected_total, _) = affine(x, (scale, shift), 2.0)
        assert torch.equal(y, expected) and torch.equal(total, expected_total) and plain == "plain"
    assert (recorder.captures, recorder.replays) == (1, 4)
    description = graphs.describe()
    assert description["hits"] == 4 and description["misses"] == {"first sight": 1}
    (graph,) = description["graphs"]
    assert graph["name"] == "affine" and graph["hits"] == 4
    assert graph["inputs"] == {"float32 3x4": 1, "float32 4": 2}
    assert graph["buffer_bytes"] == 4 * (12 + 4 + 4 + 12 + 1)
    json.dumps(description)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, s: (x[:2], (s, None)),
        lambda x, s: (x.double(), (s.double(), None)),
        lambda x, s: (x.T.contiguous().T, (s, None)),
        lambda x, s: (x, (s, s)),
        lambda x, s: (x, [s, None]),
        lambda x, s: (x, (s, None), 2.0),
        lambda x, s: (x, (s, None), 1),
        lambda x, s: (x, (s, None), True),
    ],
    ids=["shape", "dtype", "strides", "presence", "form", "value", "int, not float", "bool, not int"],
)
def test_each_part_of_the_key_counts(graphs: Graphs, recorder: Recorder, change: Callable[..., Any]) -> None:
    x, scale = numbers(3, 4), numbers(4)
    for _ in range(2):
        graphs("affine", affine, x, (scale, None), 1.0)
    other = change(x, scale)
    for _ in range(2):
        assert torch.equal(graphs("affine", affine, *other)[0], affine(*other)[0])
    assert recorder.captures == 2 and graphs.describe()["misses"] == {"first sight": 2}
    graphs("another function", affine, x, (scale, None), 1.0)
    assert graphs.describe()["misses"] == {"first sight": 3}


def test_results_are_safe_to_keep(graphs: Graphs) -> None:
    kept = [graphs("double", lambda x: 2 * x, torch.full((2,), float(i))) for i in range(4)]
    assert [y.tolist() for y in kept] == [[0.0, 0.0], [2.0, 2.0], [4.0, 4.0], [6.0, 6.0]]


def test_unchanged_inputs_are_not_copied_again(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip's keys and values stay the same over its steps; a write to them, or a replacement, is noticed."""
    x, held = numbers(2), numbers(2)
    run = lambda: graphs("add", torch.add, x, held)  # noqa: E731
    run(), run()
    copies, copy = [], Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda self, source: copies.append(source) or copy(self, source))
    run()
    assert not any(source is held or source is x for source in copies)
    held += 1
    assert torch.equal(run(), x + held) and any(source is held for source in copies)
    gone = weakref.ref(held)
    held = None
    copies.clear()
    gc.collect()
    assert gone() is None  # no graph holds on to a caller's tensors
    held = numbers(2)
    assert torch.equal(run(), x + held)


def test_inference_tensors_are_always_copied(graphs: Graphs) -> None:
    with torch.inference_mode():
        x = numbers(2)
        for _ in range(4):
            x.add_(1)  # an inference tensor has no version that shows it
            assert torch.equal(graphs("double", lambda x: 2 * x, x), 2 * x)
    assert graphs.describe()["hits"] == 3


class Owner:
    """An owner of lent buffers, which hold its tensors."""


def test_what_is_lent_is_there_once(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys and values of successive clips use one buffer, which neither a replay nor a capture copies."""
    copies, copy = [], Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda self, source: copies.append(source) or copy(self, source))
    first, values = Owner(), numbers(3)
    (lent,) = graphs.lend("add", [values], first)
    assert lent is values
    for _ in range(3):
        x = numbers(3)
        assert torch.equal(graphs("add", torch.add, x, lent), x + lent)
    assert not any(source is lent for source in copies)
    description = graphs.describe()
    assert (
        description["hits"] == 2 and description["lent_bytes"] == 12 and description["graphs"][0]["buffer_bytes"] == 36
    )  # x, the sum, and the lent tensor
    del first
    second, others = Owner(), numbers(3) + 5
    (again,) = graphs.lend("add", [others], second)
    assert again is lent and torch.equal(again, others)
    x = numbers(3)
    assert torch.equal(graphs("add", torch.add, x, again), x + others)
    assert graphs.describe()["hits"] == 3
    graphs.reset(["add"])
    assert graphs.describe()["lent_bytes"] == 0


def test_what_is_lent_and_read_by_no_graph_goes(graphs: Graphs) -> None:
    """Each clip has another size: its keys and values are not kept, since no graph that reads them was captured."""
    for size in range(1, 9):
        owner = Owner()
        graphs.lend("add", [numbers(size)], owner)
        assert graphs.describe()["lent_bytes"] == 4 * size
        del owner


def test_what_is_lent_is_never_overwritten(graphs: Graphs) -> None:
    """Two clips at once: the second keeps its own tensors, and its calls do not use the graph of the first."""
    first, second, values, others = Owner(), Owner(), numbers(3), numbers(3) + 5
    (lent,) = graphs.lend("add", [values], first)
    (own,) = graphs.lend("add", [others], second)
    assert own is others
    before, x = values.clone(), numbers(3)
    graphs("add", torch.add, x, lent), graphs("add", torch.add, x, lent)  # captured
    for _ in range(3):
        assert torch.equal(graphs("add", torch.add, x, lent), x + before)
        assert torch.equal(graphs("add", torch.add, x, own), x + others)
    assert torch.equal(lent, before) and graphs.describe()["misses"]["lent to another"] == 3
    with torch.inference_mode():  # no copy into such a tensor is allowed outside of this mode
        inside = numbers(3)
        assert graphs.lend("inference", [inside], Owner())[0] is inside
    assert graphs.describe()["lent_bytes"] == 12


def test_bytes_are_bounded(recorder: Recorder) -> None:
    """Three keys of 80 bytes (inputs and outputs) where two fit: the least recently used one is dropped."""
    graphs = Graphs(recorder, limit_bytes=170)
    keys = [numbers(10), numbers(2, 5), numbers(5, 2)]

    def call(i: int, times: int) -> None:
        for _ in range(times):
            assert torch.equal(graphs("double", lambda x: 2 * x, keys[i]), 2 * keys[i])

    call(0, 5)
    call(1, 2)
    call(0, 1)
    call(2, 2)
    assert sorted(graph["inputs"].popitem()[0] for graph in graphs.describe()["graphs"]) == [
        "float32 10",
        "float32 5x2",
    ]
    huge = Graphs(recorder, limit_bytes=1)
    for _ in range(3):
        huge("double", lambda x: 2 * x, keys[0])
    assert len(huge.describe()["graphs"]) == 1  # one that does not fit alone is kept: it replaced all others


def test_past_the_limit_calls_run_eagerly(recorder: Recorder) -> None:
    graphs = Graphs(recorder, limit=2)
    for size in (1, 2, 3):
        for _ in range(3):
            x = numbers(size)
            assert torch.equal(graphs("double", lambda x: 2 * x, x), 2 * x)
    description = graphs.describe()
    assert recorder.captures == 2 and len(description["graphs"]) == 2
    assert description["hits"] == 4 and description["misses"] == {"first sight": 3, "limit": 2}


def test_what_comes_often_takes_the_place_of_the_rarest(recorder: Recorder) -> None:
    graphs = Graphs(recorder, limit=2)

    def call(size: int, times: int) -> None:
        for _ in range(times):
            x = numbers(size)
            assert torch.equal(graphs("double", lambda x: 2 * x, x), 2 * x)

    call(1, 20)
    call(2, 3)  # an odd size that came early: 2 hits
    call(3, 10)
    sizes = sorted(graph["inputs"].popitem()[0] for graph in graphs.describe()["graphs"])
    assert sizes == ["float32 1", "float32 3"] and recorder.captures == 3
    for _ in range(20):  # equally often: nothing is captured again and again
        call(2, 1)
        call(3, 1)
    assert recorder.captures == 3


def test_one_pool_serves_all(graphs: Graphs, recorder: Recorder) -> None:
    for size in (1, 2, 3):
        for _ in range(2):
            graphs("double", lambda x: 2 * x, numbers(size))
    assert len(recorder.pools) == 3 and len({id(pool) for pool in recorder.pools}) == 1


def test_warming_up_captures_at_once(graphs: Graphs, recorder: Recorder) -> None:
    graphs.sightings = 0
    assert graphs("double", lambda x: 2 * x, torch.ones(2)).tolist() == [2.0, 2.0]
    assert recorder.captures == 1 and graphs.describe()["misses"] == {}


def test_reset_forgets(graphs: Graphs, recorder: Recorder) -> None:
    weight = torch.ones(2)
    scale = lambda x: weight * x  # noqa: E731
    for _ in range(3):
        graphs("scale", scale, numbers(2))
    graphs.reset()
    assert graphs.describe()["graphs"] == [] and graphs.describe()["resets"] == 1
    weight = torch.full((2,), 3.0)
    for _ in range(2):
        assert graphs("scale", scale, torch.ones(2)).tolist() == [3.0, 3.0]
    assert recorder.captures == 2 and graphs.describe()["misses"] == {"first sight": 2}
    assert recorder.pools[0] is not recorder.pools[1]


def test_reset_by_name_leaves_other_graphs(graphs: Graphs, recorder: Recorder) -> None:
    def double(x: Tensor) -> Tensor:
        return 2 * x

    for _ in range(3):
        for name in ("dit.step", "vae.decode"):
            graphs(name, double, numbers(2))
    assert recorder.captures == 2
    graphs.reset(("dit.step", "vae.encode_content"))
    assert [graph["name"] for graph in graphs.describe()["graphs"]] == ["vae.decode"]
    graphs("vae.decode", double, numbers(2))
    assert recorder.captures == 2 and graphs.describe()["resets"] == 1
    for _ in range(2):
        graphs("dit.step", double, numbers(2))
    assert recorder.captures == 3 and recorder.pools[2] is recorder.pools[1]  # the pool lives as long as one graph
    graphs.reset(["absent"])
    graphs.reset(())  # no names: nothing is dropped
    assert graphs.describe()["resets"] == 1 and len(graphs.describe()["graphs"]) == 2
    graphs.reset({"dit.step", "vae.decode"})
    for _ in range(2):
        graphs("dit.step", double, numbers(2))
    assert recorder.pools[3] is not recorder.pools[2]


def test_a_failed_capture_runs_eagerly_and_is_not_tried_again(
    graphs: Graphs, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    graphs("good", torch.neg, numbers(2)), graphs("good", torch.neg, numbers(2))
    recorder.error = RuntimeError("operation not permitted when stream is capturing\nand a long story")
    for _ in range(4):
        assert graphs("double", lambda x: 2 * x, torch.ones(2)).tolist() == [2.0, 2.0]
    recorder.error = None
    assert graphs("double", lambda x: 2 * x, torch.ones(2)).tolist() == [2.0, 2.0]
    description = graphs.describe()
    assert recorder.captures == 1 and description["misses"] == {"first sight": 2, "capture failed": 4}
    assert description["failures"] == ["double: RuntimeError: operation not permitted when stream is capturing"]
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and "no graph of double" in caplog.text
    assert len(description["graphs"]) == 1 and graphs("good", torch.neg, torch.ones(2)).tolist() == [-1.0, -1.0]


def test_a_failed_capture_ends_its_pool(graphs: Graphs, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch may refuse a second capture into a pool whose first one failed. Graphs captured before stay counted."""
    monkeypatch.setattr("reducio_fast.compile.graphs.pool_bytes", lambda pool: 5)

    def call_twice(name: str) -> None:
        for _ in range(2):
            assert graphs(name, torch.neg, torch.ones(2)).tolist() == [-1.0, -1.0]

    call_twice("before")
    recorder.error = RuntimeError("capture invalidated")
    call_twice("failed")
    recorder.error = None
    call_twice("after"), call_twice("later")
    assert recorder.pools[1] is not recorder.pools[0] and recorder.pools[2] is recorder.pools[1]
    assert graphs.describe()["pool_bytes"] == 10
    graphs.reset(["after", "later"])
    assert graphs.describe()["pool_bytes"] == 5 and graphs("before", torch.neg, torch.ones(1)).tolist() == [-1.0]


def test_errors_of_the_function_reach_the_caller(graphs: Graphs) -> None:
    def broken(x: Tensor) -> Tensor:
        raise ValueError("broken")

    for _ in range(3):
        with pytest.raises(ValueError, match="broken"):
            graphs("broken", broken, numbers(2))


def test_a_capture_without_memory_gives_back_what_graphs_hold(graphs: Graphs, recorder: Recorder) -> None:
    for _ in range(2):
        graphs("negative", torch.neg, numbers(2))
    recorder.error = torch.OutOfMemoryError("tried to allocate 1 GiB")
    for _ in range(3):
        graphs("double", lambda x: 2 * x, numbers(2))
    assert graphs.describe()["graphs"] == []
    recorder.error = None
    graphs("negative", torch.neg, numbers(2))  # seen before, so captured again; the other one gets no graph
    graphs("double", lambda x: 2 * x, numbers(2))
    assert [graph["name"] for graph in graphs.describe()["graphs"]] == ["negative"]


def test_an_eager_call_without_memory_is_made_again_without_graphs(graphs: Graphs) -> None:
    alive: list[int] = []

    def hungry(x: Tensor) -> Tensor:
        alive.append(len(graphs.describe()["graphs"]))
        if alive[-1]:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return 2 * x

    for _ in range(2):
        graphs("negative", torch.neg, numbers(2))
    assert graphs("hungry", hungry, torch.ones(2)).tolist() == [2.0, 2.0]
    assert alive == [1, 0] and graphs.describe()["misses"] == {"first sight": 2, "out of memory": 1}
    graphs.reset()
    with pytest.raises(torch.OutOfMemoryError):
        graphs("never", lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError("1 GiB")), numbers(2))


def test_what_no_graph_can_serve(graphs: Graphs, recorder: Recorder) -> None:
    weight = torch.ones(2, requires_grad=True)
    for _ in range(3):
        assert graphs("none", lambda n: torch.full((2,), n), 3.0).tolist() == [3.0, 3.0]
        assert graphs("double", lambda x: 2 * x, weight).requires_grad
        graphs("meta", lambda x, y: x, numbers(2), torch.empty(2, device="meta"))
    with torch.no_grad():
        for _ in range(2):
            graphs("double", lambda x: 2 * x, weight)
    assert recorder.captures == 1
    assert graphs.describe()["misses"] == {"no tensor": 3, "gradient": 3, "several devices": 3, "first sight": 1}


def test_a_graph_within_a_graph_is_part_of_it() -> None:
    graphs = Graphs(lambda fn, inputs, pool: (lambda: None, fn(*inputs)), sightings=0)
    outer = lambda x: graphs("inner", lambda x: 2 * x, x) + 1  # noqa: E731
    assert graphs("outer", outer, torch.ones(2)).tolist() == [3.0, 3.0]
    assert [g["name"] for g in graphs.describe()["graphs"]] == ["outer"] and graphs.describe()["misses"] == {}


def test_new_shapes_for_ever_do_not_grow_it(recorder: Recorder) -> None:
    graphs = Graphs(recorder, sightings=2)
    x = torch.zeros(1)
    for n in range(REMEMBERED + 10):
        graphs("shape", lambda x, n: x, x, n)
    assert graphs.describe()["remembered"] == REMEMBERED


def test_threads_share_it(graphs: Graphs, recorder: Recorder) -> None:
    """Each thread gets the results of its own inputs, though all write to one graph's buffers."""
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(100):
            x = torch.randn(64, generator=generator)
            if not torch.equal(graphs("double", lambda x: 2 * x, x), 2 * x):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    description = graphs.describe()
    assert not wrong and recorder.captures == 1 and description["hits"] + sum(description["misses"].values()) == 400
