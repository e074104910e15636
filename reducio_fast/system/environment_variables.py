"""Every environment variable of ours, in one table, read here and nowhere else.

None of them changes a number that a model computes. A variable that is set to nothing counts as not set.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    default: str  # in words
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
    """The value of one of our variables, None where it is not set. KeyError for a name the table does not list."""
    return os.environ.get(VARIABLES[name].name) or None
