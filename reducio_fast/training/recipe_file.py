"""Recipes as TOML files whose keys are the fields of a dataclass; an unknown key is an error.

A recipe is named by the path of its file; a recipe that ships with the package also by its name, e.g. "dit-256".
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from ..system.errors import ReducioError, first_line, shown
from ..system.paths import is_folder, printable
from ..system.real_numbers import to_float

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_Recipe = TypeVar("_Recipe")
MOST_THREADS = 1024


def shipped() -> dict[str, Path]:
    """The recipes inside the package, by name."""
    folder = Path(str(resources.files("reducio_fast"))) / "training" / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load(recipe_class: type[_Recipe], name: str, changes: list[str] | None = None) -> _Recipe:
    """Load a recipe by file or shipped name. `changes` are "key=value" or "table.key=value" in TOML's notation.

    Raises `ReducioError` if the file does not exist or is not TOML, for an unknown key or a value of the wrong type.
    """
    known = shipped()
    path = known.get(name, Path(name))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReducioError(f"recipe {name!r}: no such file, and none of {', '.join(known)}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no TOML, no UTF-8, a number of 4300 digits
        raise ReducioError(f"recipe {path}: {first_line(error)}") from error
    for change in changes or ():
        try:
            _merge(values, tomllib.loads(change))
        except (ValueError, RecursionError) as error:
            raise ReducioError(
                f"--set {shown(change)}: must be KEY=VALUE in TOML's notation: {first_line(error)}"
            ) from error
    return _build(recipe_class, values, f"recipe {name}")


def configured(config: _Recipe, changes: dict[str, Any]) -> _Recipe:
    """A network's configuration with the fields of a recipe's `config` table replaced.

    Raises `ReducioError` for an unknown field or an invalid value.
    """
    hints = typing.get_type_hints(type(config))
    for name, value in changes.items():
        if hints.get(name) is bool and not isinstance(value, bool):
            raise ReducioError(f"recipe: config: {name}={shown(value)} must be true or false")
    try:
        return dataclasses.replace(config, **{k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()})  # type: ignore[type-var]
    except (TypeError, ValueError) as error:
        raise ReducioError(f"recipe: config: {error}") from error


def start_folder(start: str, component: str) -> Path:
    """The folder of a network that a recipe's `start` names: itself, or its `component` if it is a model folder.

    Raises `ReducioError` if there is no such folder.
    """
    if not start or not is_folder(start, "start"):
        raise ReducioError(f"start={printable(start)!r}: no such folder")
    inside = Path(start) / component
    return inside if is_folder(inside, "start") else Path(start)


def check_least(settings: Any, least: float, *names: str) -> None:
    """Raise `ReducioError` for a named field that is below `least` or not finite; None is not checked."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not least <= value < math.inf:
            raise ReducioError(f"{type(settings).__name__}: {name} must be finite and at least {least}, got {value}")


def check_threads(threads: int | None) -> None:
    """Raise `ReducioError` for a number of CPU threads that no machine has; None is torch's own."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ReducioError(f"threads={shown(threads)}: must be from 1 to {MOST_THREADS}")


def check_positive(settings: Any, *names: str) -> None:
    """Raise `ReducioError` for a named field that is not above 0 or not finite."""
    for name in names:
        if not 0 < (value := getattr(settings, name)) < math.inf:
            raise ReducioError(f"{type(settings).__name__}: {name} must be finite and above 0, got {value}")


def check_share(settings: Any, *names: str) -> None:
    """Raise `ReducioError` for a named field that is outside 0..1."""
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            raise ReducioError(f"{name}={getattr(settings, name)} must lie in 0..1")


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _build(recipe_class: type[_Recipe], values: dict[str, Any], where: str) -> _Recipe:
    hints = typing.get_type_hints(recipe_class)
    fields = [f.name for f in dataclasses.fields(recipe_class)]  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ReducioError(f"{where}: unknown key {key!r}; known are {', '.join(fields)}")
    built = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return recipe_class(**built)
    except TypeError as error:
        raise ReducioError(f"{where}: {first_line(error)}") from error


def _convert(field_type: Any, value: Any, where: str) -> Any:
    """Convert a TOML value to a field's type: tables to dataclasses, arrays to tuples, integers to floats."""
    if dataclasses.is_dataclass(field_type):
        if not isinstance(value, dict):
            raise ReducioError(f"{where}={value!r} must be a table")
        return _build(field_type, value, where)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(field_type), typing.get_args(field_type)
    if origin in (typing.Union, types.UnionType):
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, list):
        inner = arguments[0] if arguments[-1] is Ellipsis else None
        kinds = [inner] * len(value) if inner is not None else list(arguments)
        if len(kinds) != len(value):
            raise ReducioError(f"{where}={value!r} must have {len(kinds)} entries")
        return tuple(_convert(kind, entry, where) for kind, entry in zip(kinds, value, strict=True))
    if field_type is float and isinstance(value, int) and not isinstance(value, bool):
        if math.isinf(to_float(value)):
            raise ReducioError(f"{where}={shown(value)} is larger than float32 can hold")
        return float(value)
    plain = origin or field_type
    if plain is Any or (isinstance(value, plain) and (plain is bool or not isinstance(value, bool))):
        return value
    raise ReducioError(f"{where}={value!r} must be of type {getattr(plain, '__name__', plain)}")
