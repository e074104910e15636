"""The same kernel tests run in Triton's interpreter (where there is no GPU), on an NVIDIA GPU and on an AMD GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reducio_fast.measurement.accuracy_rule import judge

GPU = torch.cuda.is_available()
# The interpreter's tl.dot is wrong for bfloat16, so that precision needs a GPU.
PRECISIONS = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With a GPU, tests that launch kernels in no `dtype` are gpu tests too, so that `-m "gpu or not slow"` runs them;
    of those with a `dtype` it runs bfloat16."""
    for item in items if GPU else []:
        fixtures = getattr(item, "fixturenames", ())
        if item.path.parent == Path(__file__).parent and "device" in fixtures and "dtype" not in fixtures:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(params=PRECISIONS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN (255 in bytes), so that an element that was not written cannot pass for a zero."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: object, **kwargs: object) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else 255 if x.dtype == torch.uint8 else -1)

        return poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
    yield


@pytest.fixture
def assert_right() -> Callable[[Tensor, Tensor, Tensor], None]:
    """Asserts the rule of `accuracy_rule` for (result of the kernel, eager at its precision, oracle)."""

    def check(fast: Tensor, eager: Tensor, oracle: Tensor) -> None:
        verdict = judge(fast, eager, oracle)
        assert verdict.right, str(verdict)

    return check


@pytest.fixture
def check_kernel(assert_right: Callable[..., None], dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """`check_kernel(launch, twin, *args)`: the oracle is the twin in float64, eager is the twin in `dtype`.

    Inputs are made in float64; floating tensors are cast, other arguments are passed unchanged. Returns what `launch`
    returns, a tensor or a tuple of them."""

    def cast(value: object, to: torch.dtype) -> object:
        if isinstance(value, Tensor):
            return value.to(device, to if value.is_floating_point() else value.dtype)
        return value

    def check(launch: Callable[..., Tensor], twin: Callable[..., Tensor], *args: object) -> Tensor:
        low = [cast(a, dtype) for a in args]
        oracle = twin(*[a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in low])
        fast, eager = launch(*low), twin(*low)
        for one, two, three in zip(*(r if isinstance(r, tuple) else (r,) for r in (fast, eager, oracle)), strict=True):
            assert one.dtype == two.dtype
            assert_right(one, two, three)
        return fast

    return check
