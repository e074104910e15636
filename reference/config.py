"""Configurations as frozen dataclasses, and as the plain dictionaries of a config.json."""

from __future__ import annotations

import dataclasses
import math
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

    def check_numbers(self, *may_be_zero: str) -> None:
        """Raise ValueError unless every integer is at least 1, or 0 in the fields `may_be_zero`, and every float is
        finite. Numbers in tuples are checked too; None is accepted where the field's type has it."""
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            kind, value = str(f.type), getattr(self, f.name)
            if ("int" not in kind and "float" not in kind) or (value is None and kind.endswith("| None")):
                continue
            several = isinstance(value, tuple)
            if value == () or (several and "tuple" not in kind) or (not several and kind.startswith("tuple")):
                wanted = "a list of numbers" if "tuple" in kind else "one number"
                raise ValueError(f"{f.name}={value!r}: must be {wanted}")
            for number in value if several else (value,):
                if number is None and "None" in kind:
                    continue
                if "float" in kind:
                    right, wanted = isinstance(number, int | float) and abs(number) < math.inf, "a finite number"
                else:
                    least = 0 if f.name in may_be_zero else 1
                    right, wanted = isinstance(number, int) and number >= least, f"an integer of at least {least}"
                if isinstance(number, bool) or not right:
                    raise ValueError(f"{f.name}={number!r}: must be {wanted}")


def _as_json(value: Any) -> Any:
    return [_as_json(v) for v in value] if isinstance(value, tuple) else value


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, list | tuple) else value
