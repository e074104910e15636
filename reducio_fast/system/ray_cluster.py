"""Starts or joins Ray without its dashboard, its usage reports and its token file."""

from __future__ import annotations

import logging
import os
from typing import Any

from .errors import ReducioError, first_line


def connect(address: str, log_level: int = logging.ERROR) -> Any:
    """Connect to a Ray cluster; returns the module `ray`. `address` "local" starts a cluster on this machine, which
    `ray.shutdown()` ends.

    Raises ReducioError if Ray is not installed or no cluster answers.
    """
    # Set before the import; otherwise Ray writes a token into the home folder and reports its usage.
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
