"""Mixed precision in training: where it is used, and convolutions that stay in float32."""

from __future__ import annotations

import pytest
import torch

from reducio_fast.system.devices import multiplies_bfloat16
from reducio_fast.training.mixed_precision import autocast

pytestmark = pytest.mark.slow


def test_bfloat16_only_where_a_cpu_has_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, x = torch.device("cpu"), torch.randn(2, 3)
    for has, wanted, dtype in (
        (True, True, torch.bfloat16),
        (True, False, torch.float32),
        (False, True, torch.float32),
    ):
        flags = {"avx2": True, "avx512_bf16": has}
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda flags=flags: flags, raising=False)
        with autocast(cpu, wanted):
            assert (x @ x.T).dtype == dtype


@pytest.mark.parametrize("batch", [4, 12])
@pytest.mark.parametrize("frames", [1, 3])
def test_the_gradient_of_a_convolution_of_few_frames(frames: int, batch: int) -> None:
    """On a CPU with AMX the weight gradient of such a bfloat16 convolution has a relative error of up to 0.5."""
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(64, 64, (3, 1, 1), padding=(1, 0, 0))
    video = torch.randn(batch, 64, frames, 64, 64)
    expected = conv(video)
    direction = torch.randn_like(expected)
    (reference,) = torch.autograd.grad(expected, conv.weight, direction)
    with autocast(torch.device("cpu")):
        output = conv(video)
        wider = conv(torch.randn(1, 64, 16, 8, 8))
    (gradient,) = torch.autograd.grad(output, conv.weight, direction.to(output.dtype))
    assert (gradient - reference).norm() < 1e-2 * reference.norm()
    assert wider.dtype == (torch.bfloat16 if multiplies_bfloat16(torch.device("cpu")) else torch.float32)
