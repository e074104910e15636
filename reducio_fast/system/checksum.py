"""Checksums of tensors, which detect changes of weights, and of files.

A tensor's address and `_version` do not detect all changes: a write through `.data`, a NumPy view, a fused optimizer or
`torch._foreach_*` on `.data` changes values but neither of the two.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

# Columns of the folded bytes on a GPU. It is prime, so the length of a weight matrix's row is no multiple of it, and an
# exchange of two rows changes the checksum.
COLUMNS = 1021


def checksums(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """One number per tensor, equal for equal bytes; different bytes of the same shape collide with probability 2^-32.

    The cost is one read of the tensors: 3 GB/s on one core of an EPYC (CRC-32), memory bandwidth on a GPU, from which
    one copy brings all numbers to the host. Tensors on the meta device have the checksum 0.
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
    """A weighted sum modulo 2^64 with a distinct odd factor for each column of 8-byte words. Every change of a single
    word changes it, and so does nearly every exchange of two words."""
    if data.storage_offset() % 8:  # a view into a flat buffer; words must be aligned
        data = data.clone()
    words = data[: data.numel() // 8 * 8].view(torch.int64)
    last_bytes = data[words.numel() * 8 :].to(torch.int64)
    rows = words.numel() // COLUMNS
    whole, tail = words[: rows * COLUMNS].view(rows, COLUMNS).sum(0), torch.cat([words[rows * COLUMNS :], last_bytes])
    return (whole * _factors(COLUMNS, data.device)).sum() + (tail * _factors(tail.numel(), data.device)).sum() * 3


def _factors(count: int, device: torch.device) -> Tensor:
    """Odd numbers spread over 64 bits: multiples of 2^64 divided by the golden ratio."""
    return torch.arange(1, count + 1, device=device) * -7046029254386353131 | 1


def folder_sample(folder: Path) -> str:
    """SHA-256 of the names and sizes of a folder's files, and of the first and last 64 KiB of each: it changes with the
    weights of a model, is the same for a copy, and is quick whatever their sizes."""
    digest, end = hashlib.sha256(), 1 << 16
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)} {size} ".encode("utf-8", "surrogateescape") + file.read(end))
            file.seek(max(0, size - end))
            digest.update(file.read(end))
    return digest.hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
