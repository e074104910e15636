"""Configurations as frozen dataclasses, and as the plain dictionaries of a config.json."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

_Config = TypeVar("_Config", bound="DictMixin")


class DictMixin:
    """`to_dict` and `from_dict` of a configuration; tuples become JSON lists and back."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        return {f.name: _as_json(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls: type[_Config], values: dict[str, Any]) -> _Config:
        """Build from a dictionary. Keys that start with an underscore are file metadata and are skipped.

        Raises ValueError for an unknown key and lists the known ones.
        """
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**{key: _as_tuple(value) for key, value in values.items()})


def _as_json(value: Any) -> Any:
    return [_as_json(v) for v in value] if isinstance(value, tuple) else value


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, list | tuple) else value
