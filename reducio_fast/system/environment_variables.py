"""All environment variables of this package, in one table; only this module reads them.

None of them changes the numbers that a model computes. A variable with an empty value counts as not set.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    default: str  # a description
    choices: str
    effect: str


VARIABLES: dict[str, Variable] = {
    variable.name: variable
    for variable in (
        Variable(
            "REDUCIO_CACHE_DIR",
            "$XDG_CACHE_HOME/reducio-fast, else ~/.cache/reducio-fast",
            "a folder",
            "compiled blocks, launch tables of this machine, latents and frames saved from a failure; where it is set, "
            "and on the command line, files of Inductor and Triton too",
        ),
    )
}


def read(name: str) -> str | None:
    """The value of a variable of `VARIABLES`, None if it is not set. Raises KeyError for another name."""
    return os.environ.get(VARIABLES[name].name) or None
