"""Splits arguments and results into a flat list of leaves and a form that rebuilds them; compares calls by `kinds`."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from torch import Tensor


def flatten(value: Any, leaves: list[Any]) -> Hashable:
    """Append every value that is neither list nor tuple to `leaves`; returns the form for `rebuild`."""
    if isinstance(value, list | tuple):
        return (type(value), *(flatten(item, leaves) for item in value))
    leaves.append(value)
    return None


def kinds(leaves: Iterable[Any]) -> Hashable:
    """What a graph or compiled function is specific to: tensors' shape, strides, dtype and device, and other values."""
    return tuple((x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x) for x in leaves)


def rebuild(form: Any, leaves: Iterator[Any]) -> Any:
    if form is None:
        return next(leaves)
    form_class, *items = form
    filled = [rebuild(item, leaves) for item in items]
    return form_class(*filled) if hasattr(form_class, "_fields") else form_class(filled)
