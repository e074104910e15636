"""Ray, started or joined quietly: without its dashboard, its reports of use, its token file."""

from __future__ import annotations

import logging
import os
from typing import Any

from .errors import ReducioError, first_line


def connect(address: str, log_level: int = logging.ERROR) -> Any:
    """The module `ray`, connected. `address` "local" starts a cluster on this machine, whose end is `ray.shutdown()`.

    Raises ReducioError where Ray is not installed or no cluster answers.
    """
    # Before the import: else it writes a token into the home folder and reports its use.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ReducioError('--ray needs Ray; pip install "reducio-fast[ray]"') from error
    try:
        ray.init(
            address=None if address == "local" else address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level=log_level,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ReducioError(f"--ray {address}: no cluster there: {first_line(error)}") from error
    return ray
