"""Arguments and results as a flat list of leaves and the form that fills them in again; what makes two calls alike."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from torch import Tensor


def flatten(value: Any, leaves: list[Any]) -> Hashable:
    """Appends what is neither list nor tuple to `leaves`; returns the form that `rebuild` fills again."""
    if isinstance(value, list | tuple):
        return (type(value), *(flatten(item, leaves) for item in value))
    leaves.append(value)
    return None


def kinds(leaves: Iterable[Any]) -> Hashable:
    """What a graph or a compiled function is made for: a tensor's shape, strides, dtype and device, other values."""
    return tuple((x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x) for x in leaves)


def rebuild(form: Any, leaves: Iterator[Any]) -> Any:
    if form is None:
        return next(leaves)
    form_class, *items = form
    filled = [rebuild(item, leaves) for item in items]
    return form_class(*filled) if hasattr(form_class, "_fields") else form_class(filled)
