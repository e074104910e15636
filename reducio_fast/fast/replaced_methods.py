"""Finds the methods that were replaced on an object: a twin, built from its class and values, does not call them."""

from __future__ import annotations

from typing import Any

# The methods by which others call an object. A class's own may be replaced too, for all of its objects.
ENTRIES = ("forward", "step")


def is_set_on(thing: Any, name: str) -> bool:
    """Whether another method than its class's was set on this object. Hooks of accelerate that are removed leave the
    class's own behind as an attribute."""
    value, own = vars(thing).get(name), getattr(type(thing), name, None)
    is_own = getattr(value, "__func__", None) is own and getattr(value, "__self__", None) is thing
    return callable(value) and callable(own) and not is_own


def replaced_methods(thing: Any) -> list[str]:
    """Names of the methods that were set on this object or, for those of `ENTRIES`, on its class."""
    names = [name for name in vars(thing) if is_set_on(thing, name)]
    for name in ENTRIES:
        owner = next((cls for cls in type(thing).__mro__ if name in vars(cls)), None)
        if owner is None or name in names:
            continue
        method = vars(owner)[name]
        if getattr(method, "__module__", None) != owner.__module__ or hasattr(method, "__wrapped__"):
            names.append(name)
    return names
