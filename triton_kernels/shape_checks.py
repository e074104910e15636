"""Checks that launch wrappers make: ValueError with the argument's name and both values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .launch import FLOATING


def check_same(op: str, what: str, **values: Any) -> None:
    """The values, e.g. a dimension as each argument has it, are all equal."""
    (first, reference), *others = values.items()
    for name, value in others:
        if value != reference:
            raise ValueError(f"{op}: {name} has {what}={value}, {first} has {what}={reference}")


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """All on one device, all of one floating dtype; absent ones are skipped."""
    present = {name: x for name, x in tensors.items() if x is not None}
    check_same(op, "device", **{name: x.device for name, x in present.items()})
    check_same(op, "dtype", **{name: x.dtype for name, x in present.items()})
    name, x = next(iter(present.items()))
    if x.dtype not in FLOATING:
        raise ValueError(f"{op}: {name} has dtype={x.dtype}, kernels take {', '.join(map(str, FLOATING))}")


def check_contiguous(op: str, **tensors: Tensor | None) -> None:
    """Every tensor is dense in row-major order; absent ones are skipped."""
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {x.stride()} for shape {tuple(x.shape)}, it must be contiguous")


def check_shape(op: str, name: str, x: Tensor, *shape: int | None) -> None:
    """`x` has this shape; None stands for any size."""
    if x.ndim != len(shape) or any(want not in (None, has) for want, has in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, it must be ({wanted})")


def check_multiple(op: str, name: str, value: int, of: int) -> None:
    if value % of:
        raise ValueError(f"{op}: {name}={value} is not a multiple of {of}")
