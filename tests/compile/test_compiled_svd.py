"""SVD's blocks compile: they are traced whole, siblings share their code, and the results equal the uncompiled ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from reducio_fast.compile.artifacts import trace
from reducio_fast.compile.compiled_blocks import Regions, connect
from reducio_fast.fast.plan import Plan
from reducio_fast.fast.svd.unet import FastVideoUNet
from tiny_svd import unet_inputs, unets


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "tokens"), [(False, 3), (True, 1)], ids=["as on a CPU", "as on a GPU"])
def test_blocks_have_no_breaks(kernels: bool, tokens: int, monkeypatch: pytest.MonkeyPatch):
    """With one image token, whose cross-attention is a constant, and with several, which need attention."""
    if kernels:  # the registered ops, which stand for our kernels in a GPU's graph
        monkeypatch.setattr(Plan, "_decide", lambda self, op, shape: ("kernel", "as on a GPU"))
    model, _ = unets(32, 64)
    fast = FastVideoUNet(model, Plan(torch.device("cpu"), torch.float32))
    inputs, traced = unet_inputs(model.config, 3, (4, 4), tokens=tokens), []
    expected = fast(**inputs)
    connect(fast, regions := Regions(lambda fn, tensors, free: traced.append(fn) or trace(fn, tensors, free)))
    for _ in range(2):
        torch.testing.assert_close(fast(**inputs), expected, rtol=1e-5, atol=1e-5)
    description = regions.describe()
    assert description["misses"] == {} and not description["failures"]
    by_name = description["regions"]
    # Two levels with one res block: 1 + 1 down, 2 in the middle, 2 + 2 up; transformers at 1, 1 and 2 of them.
    assert {name: region["calls"] for name, region in by_name.items()} == {"dit.res": 16, "dit.transformer": 8}
    compiled = {name: region["compiled"] for name, region in by_name.items()}
    assert sum(compiled.values()) == len(traced) and compiled["dit.transformer"] == 2, "the three of one level are one"
