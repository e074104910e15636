"""Whether weights hold the same values as before: a checksum of their contents.

A tensor's address and `_version` do not tell: a write through `.data`, a NumPy view, a fused optimizer or
`torch._foreach_*` on `.data` changes values and leaves both as they were.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

# Columns of the folded bytes on a GPU. A prime, so that no row of a weight matrix is a whole number of columns long:
# two rows that change places then change the checksum.
COLUMNS = 1021


def checksums(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """One number a tensor, equal for equal bytes; other bytes of the same shape give another but for one in 2^32.

    It costs one read of the tensors: 3 GB/s for one core of an EPYC (CRC-32), the memory's bandwidth on a GPU, where
    all numbers come to the host in one copy. Tensors without contents (on the meta device) count as 0.
    """
    with torch.inference_mode(False):
        on_host = {i: zlib.crc32(_bytes(x).numpy().data) for i, x in enumerate(tensors) if x.device.type == "cpu"}
        elsewhere = [i for i, x in enumerate(tensors) if x.device.type not in ("cpu", "meta")]
        if elsewhere:
            sums = torch.stack([_folded(_bytes(tensors[i])).to(tensors[elsewhere[0]].device) for i in elsewhere])
            on_host |= dict(zip(elsewhere, sums.tolist(), strict=True))
    return tuple(on_host.get(i, 0) for i in range(len(tensors)))


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def _folded(data: Tensor) -> Tensor:
    """A sum modulo 2^64 in which each column of 8-byte words has an odd factor of its own: it changes with every change
    of one word, and with nearly every exchange of two."""
    words = data[: data.numel() // 8 * 8].view(torch.int64)
    rest = data[words.numel() * 8 :].to(torch.int64)
    rows = words.numel() // COLUMNS
    whole, tail = words[: rows * COLUMNS].view(rows, COLUMNS).sum(0), torch.cat([words[rows * COLUMNS :], rest])
    return (whole * _factors(COLUMNS, data.device)).sum() + (tail * _factors(tail.numel(), data.device)).sum() * 3


def _factors(count: int, device: torch.device) -> Tensor:
    """Odd numbers that are spread over 64 bits: multiples of 2^64 over the golden ratio."""
    return torch.arange(1, count + 1, device=device) * -7046029254386353131 | 1


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
