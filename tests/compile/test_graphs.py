"""Graphs: the rules of the bookkeeping, with a capture function of the test's own; on a GPU real ones against eager."""

from __future__ import annotations

import gc
import json
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from reducio_fast.compile.graphs import REMEMBERED, Graphs, Pool
from reducio_fast.fast import sampler
from reducio_fast.fast.engine import Engine
from reducio_fast.reference import Condition, DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from reducio_fast.reference.sampler import StopSampling


class Recorder:
    """Stands in for a GPU: a replay computes the captured function again, from the static inputs into the outputs."""

    def __init__(self) -> None:
        self.captures, self.replays, self.pools = 0, 0, []
        self.error: Exception | None = None

    def __call__(self, fn: Callable[..., Any], inputs: list[Tensor], pool: Pool) -> tuple[Callable[[], None], Any]:
        if self.error is not None:
            raise self.error
        self.captures += 1
        self.pools.append(pool)
        outputs = fn(*inputs)

        def replay() -> None:
            self.replays += 1
            for old, new in zip(flat(outputs), flat(fn(*inputs)), strict=True):
                old.copy_(new)

        return replay, outputs


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [x for item in value for x in flat(item)]
    return [value] if isinstance(value, Tensor) else []


def affine(x: Tensor, pair: tuple[Tensor, Tensor | None], factor: float = 1.0) -> tuple[Tensor, list[Any]]:
    """Nested arguments and results, an absent tensor, a plain value."""
    scale, shift = pair
    y = factor * x * scale
    return y if shift is None else y + shift, [y.sum(), "plain"]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def graphs(recorder: Recorder) -> Graphs:
    return Graphs(recorder)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape)


def test_replays_equal_eager(graphs: Graphs, recorder: Recorder) -> None:
    for _ in range(5):
        x, scale, shift = numbers(3, 4), numbers(4), numbers(4)
        y, (total, plain) = graphs("affine", affine, x, (scale, shift), 2.0)
        expected, (expected_total, _) = affine(x, (scale, shift), 2.0)
        assert torch.equal(y, expected) and torch.equal(total, expected_total) and plain == "plain"
    assert (recorder.captures, recorder.replays) == (1, 4)
    told = graphs.describe()
    assert told["hits"] == 4 and told["misses"] == {"first sight": 1}
    (graph,) = told["graphs"]
    assert graph["name"] == "affine" and graph["hits"] == 4
    assert graph["inputs"] == {"float32 3x4": 1, "float32 4": 2}
    assert graph["buffer_bytes"] == 4 * (12 + 4 + 4 + 12 + 1)
    json.dumps(told)


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


def test_consumed_results_are_the_buffers_themselves(graphs: Graphs) -> None:
    results = [graphs("double", lambda x: 2 * x, torch.full((2,), float(i)), keep=False) for i in range(4)]
    assert results[1].data_ptr() == results[2].data_ptr() == results[3].data_ptr()
    assert results[1].tolist() == [6.0, 6.0]


def test_unchanged_inputs_are_not_copied_again(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip's keys and values stay over its steps; a write to them, or others in their place, are noticed."""
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
            x.add_(1)  # no version tells of it
            assert torch.equal(graphs("double", lambda x: 2 * x, x), 2 * x)
    assert graphs.describe()["hits"] == 3


def test_past_the_limit_calls_run_eagerly(recorder: Recorder) -> None:
    graphs = Graphs(recorder, limit=2)
    for size in (1, 2, 3):
        for _ in range(3):
            x = numbers(size)
            assert torch.equal(graphs("double", lambda x: 2 * x, x), 2 * x)
    told = graphs.describe()
    assert recorder.captures == 2 and len(told["graphs"]) == 2
    assert told["hits"] == 4 and told["misses"] == {"first sight": 2, "limit": 3}


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


def test_a_failed_capture_runs_eagerly_and_is_not_tried_again(
    graphs: Graphs, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    graphs("good", torch.neg, numbers(2)), graphs("good", torch.neg, numbers(2))
    recorder.error = RuntimeError("operation not permitted when stream is capturing\nand a long story")
    for _ in range(4):
        assert graphs("double", lambda x: 2 * x, torch.ones(2)).tolist() == [2.0, 2.0]
    recorder.error = None
    assert graphs("double", lambda x: 2 * x, torch.ones(2)).tolist() == [2.0, 2.0]
    told = graphs.describe()
    assert recorder.captures == 1 and told["misses"] == {"first sight": 2, "capture failed": 4}
    assert told["failures"] == ["double: RuntimeError: operation not permitted when stream is capturing"]
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and "no graph of double" in caplog.text
    assert len(told["graphs"]) == 1 and graphs("good", torch.neg, torch.ones(2)).tolist() == [-1.0, -1.0]


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
    graphs("negative", torch.neg, numbers(2))  # seen before: captured again, while the other stays without
    graphs("double", lambda x: 2 * x, numbers(2))
    assert [graph["name"] for graph in graphs.describe()["graphs"]] == ["negative"]


def test_an_eager_call_without_memory_is_made_again_without_graphs(graphs: Graphs) -> None:
    alive: list[int] = []

    def hungry(x: Tensor) -> Tensor:
        alive.append(len(graphs._graphs))
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
    assert len(graphs._seen) == REMEMBERED


def test_threads_share_it(graphs: Graphs, recorder: Recorder) -> None:
    """Each gets the results of its own inputs, though all write to one graph's buffers."""
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
    told = graphs.describe()
    assert not wrong and recorder.captures == 1 and told["hits"] + sum(told["misses"].values()) == 400


# ---- around the fast twins -------------------------------------------------------------------------------------------


def networks(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[ReducioDiT, ReducioVAE]:
    """Narrow, with every branch alive, and of the head sizes that kernels know."""
    dit = ReducioDiT(
        DiTConfig(
            hidden_size=128,
            depth=3,
            num_heads=2,
            caption_channels=20,
            caption_length=7,
            semantic_channels=24,
            position_base_size=4,
        )
    )
    vae = ReducioVAE(
        VAEConfig(
            base_channels=16, channel_multipliers=(1, 1, 1, 1, 2, 2), content_base_channels=16,
            content_channel_multipliers=(1, 1, 1, 2), norm_groups=4, num_heads=1, fusion_head_dim=16, num_res_blocks=1,
            tile_size=64, tile_overlap=0.5,
        )
    )  # fmt: skip
    for network in (dit, vae):
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.data.normal_().div_(fan_in**0.5).add_(1.0 if parameter.ndim == 1 else 0.0)
        network.requires_grad_(False).eval().to(device, dtype)
    return dit, vae


def condition(device: str = "cpu", dtype: torch.dtype = torch.float32, cells: int = 4) -> tuple[Tensor, Condition]:
    """Noise of one clip, and what the network is told."""
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]], device=device)
    text, semantic, content = draw(1, 7, 20), draw(1, 6, 24), draw(1, 4, 4 * cells, 4 * cells)
    return draw(1, 16, 4, cells, cells), Condition(text.to(dtype), mask, semantic.to(dtype), content.to(dtype))


class Twins(NamedTuple):
    transformer: Any
    vae: Any


def twins_of(engine: Engine, dit: ReducioDiT, vae: ReducioVAE) -> Twins:
    return Twins(engine.twin(dit), engine.twin(vae))


def sample(model, scheduler, noise, cond, uncond=None, guidance_scale=4.5, num_inference_steps=20, callback=None):
    denoise = model.denoiser(cond, uncond, guidance_scale)
    return sampler.sample(denoise, scheduler, noise, num_inference_steps, callback)


def pairs(device: str, dtype: torch.dtype, graphs: Graphs | None) -> tuple[Twins, Twins]:
    """The same twins twice: eager, and through graphs."""
    parts = networks(device, dtype)
    eager, graphed = twins_of(Engine(), *parts), twins_of(Engine(graphs=graphs), *parts)
    eager.transformer.graphs = eager.vae.graphs = None
    return eager, graphed


def walk(eager: Twins, graphed: Twins, device: str, dtype: torch.dtype) -> None:
    """Whatever may change from clip to clip and from step to step, with and without graphs, bit for bit."""

    def stop(step: int, timestep: Tensor, latent: Tensor) -> None:
        if step == 2:
            raise StopSampling

    def replace(step: int, timestep: Tensor, latent: Tensor) -> Tensor | None:
        return latent.flip(-1) if step == 1 else None

    seen: list[Tensor] = []
    for callback, guidance, cells in (
        (None, 4.5, 4),
        (None, 4.5, 2),
        (stop, 7.0, 4),
        (None, 1.0, 2),
        (replace, 1.5, 4),
        (lambda step, timestep, latent: seen.append(latent), 4.5, 4),
    ):
        noise, told = condition(device, dtype, cells)
        expected, actual = (
            sample(twins.transformer, DPMSolverMultistepScheduler(), noise, told, None, guidance, 4, callback)
            for twins in (eager, graphed)
        )
        assert torch.equal(actual, expected)
    # Every latent that a callback was shown is still what it was.
    assert all(torch.equal(one, other) for one, other in zip(seen[:4], seen[4:], strict=True))
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        image = torch.rand(1, 3, 64, 96, generator=g).to(device, dtype)
        latent = torch.randn(1, 16, 4, 2, 3, generator=g).to(device, dtype)
        expected, actual = (
            twins.vae.decode(latent, twins.vae.encode_content(image, tiled=True), tiled=True)
            for twins in (eager, graphed)
        )
        assert torch.equal(actual, expected)


def test_sampler_and_decoder_through_graphs(graphs: Graphs, recorder: Recorder) -> None:
    eager, graphed = pairs("cpu", torch.float32, graphs)
    walk(eager, graphed, "cpu", torch.float32)
    told = graphs.describe()
    names = [graph["name"] for graph in told["graphs"]]
    assert names.count("dit.step") == 3  # guided in two sizes and not guided in one; the scale is no part of the key
    assert names.count("vae.decode") == 2 and names.count("vae.encode_content") == 2  # tiles of 64x96 and 64x32
    assert told["misses"] == {"first sight": 7}
    # Of the steps 4 + 4 + 3 + 4 + 4 + 4, less three first sights; of the tiles two of three clips.
    assert {name: sum(g["hits"] for g in told["graphs"] if g["name"] == name) for name in names} == {
        "dit.step": 20,
        "vae.encode_content": 4,
        "vae.decode": 4,
    }


def test_bytes_may_read_the_graphs_own_buffer(graphs: Graphs) -> None:
    eager, graphed = pairs("cpu", torch.float32, graphs)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        image, latent = torch.rand(1, 3, 64, 64, generator=g), torch.randn(1, 16, 4, 2, 2, generator=g)
        expected, actual = (
            twins.vae.decode(latent, twins.vae.encode_content(image), as_uint8=True) for twins in (eager, graphed)
        )
        assert torch.equal(actual, expected)
    assert graphs.describe()["hits"] == 4


def test_changed_weights_end_their_graphs(graphs: Graphs) -> None:
    dit, vae = networks()
    engine = Engine(graphs=graphs)
    noise, told = condition()
    words = (DPMSolverMultistepScheduler(), noise, told, None, 4.5, 3)
    first = sample(twins_of(engine, dit, vae).transformer, *words)
    assert len(graphs.describe()["graphs"]) == 1
    with torch.no_grad():
        dit.transformer_blocks[0].ff.net[2].weight.mul_(2)
    second = sample(twins_of(engine, dit, vae).transformer, *words)
    assert not torch.equal(first, second)
    assert torch.equal(second, sample(twins_of(Engine(), dit, vae).transformer, *words))
    assert engine.describe()["graphs"]["resets"] == 1
    json.dumps(engine.describe())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_real_graphs_equal_eager(dtype: torch.dtype) -> None:
    """A denoising step and tiles, captured and replayed on a GPU: the same kernels, hence the same bytes."""
    graphs = Graphs()
    eager, graphed = pairs("cuda", dtype, graphs)
    walk(eager, graphed, "cuda", dtype)
    told = graphs.describe()
    assert told["failures"] == [] and set(told["misses"]) == {"first sight"}
    names = [graph["name"] for graph in told["graphs"]]
    assert names.count("dit.step") == 3 and "vae.decode" in names and "vae.encode_content" in names
    assert told["pool_bytes"] > 0
    held = torch.cuda.memory_allocated()
    graphs.reset()
    assert torch.cuda.memory_allocated() < held and graphs.describe()["pool_bytes"] == 0


@pytest.mark.gpu
def test_a_capture_that_the_device_forbids_leaves_it_usable() -> None:
    graphs, x = Graphs(), torch.ones(4, device="cuda")

    def reads_back(x: Tensor) -> Tensor:
        return x * float(x.sum())

    stream = torch.cuda.current_stream()
    for _ in range(3):
        assert graphs("reads back", reads_back, x).tolist() == [4.0] * 4
    assert torch.cuda.current_stream() == stream
    assert graphs.describe()["misses"] == {"first sight": 1, "capture failed": 2}
    for _ in range(3):
        assert graphs("double", lambda x: 2 * x, x).tolist() == [2.0] * 4
    assert graphs.describe()["hits"] == 2


@pytest.mark.gpu
def test_streams_do_not_share_buffers() -> None:
    graphs = Graphs()
    other = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), other):
        with torch.cuda.stream(stream):
            for i in range(3):
                x = torch.full((1 << 20,), float(i), device="cuda")
                assert torch.equal(graphs("double", lambda x: 2 * x, x), 2 * x)
    assert len(graphs.describe()["graphs"]) == 2
