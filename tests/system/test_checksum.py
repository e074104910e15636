"""Checksums of tensors, by the code for a GPU on the CPU."""

from __future__ import annotations

import torch

from reducio_fast.system import checksum


def test_a_view_into_a_flat_buffer_has_the_checksum_of_its_copy() -> None:
    """As `torch.nn.utils.vector_to_parameters` makes them: words of 8 bytes begin anywhere in the buffer."""
    buffer = torch.randn(101, generator=torch.Generator().manual_seed(0)).bfloat16()
    sums = set()
    for start in range(8):
        view = checksum._bytes(buffer[start : start + 45])
        copy = checksum._bytes(buffer[start : start + 45].clone())
        assert torch.equal(checksum._folded(view), checksum._folded(copy))
        sums.add(int(checksum._folded(view)))
    assert len(sums) == 8
