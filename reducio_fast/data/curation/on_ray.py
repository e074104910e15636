"""Maps a function over many tasks on a Ray cluster; Ray Data schedules them.

The function writes its output as files on a file system that all machines share; its return values arrive in any order.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ...system.errors import ReducioError

_Task = TypeVar("_Task")


def map_on_ray(tasks: Sequence[_Task], function: Callable[[_Task], Any], address: str) -> Iterator[Any]:
    """Yield `function(task)` of each task, in any order; a task uses one CPU.

    `address` "local" starts a cluster on this machine. Raises `ReducioError` without Ray, or if there is no cluster.
    """
    try:
        # Must be set before the import; otherwise Ray writes a token into the home folder and sends usage statistics.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        import ray.data
    except ImportError as error:
        raise ReducioError('--ray needs Ray; pip install "reducio-fast[ray]"') from error
    if not tasks:
        return
    try:
        ray.init(
            address=None if address == "local" else address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ReducioError(f"--ray {address}: no cluster there: {str(error).splitlines()[0]}") from error
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        tasks_by_number = ray.put(list(tasks))

        def run(row: dict[str, Any]) -> dict[str, Any]:
            return {"result": function(ray.get(tasks_by_number)[row["id"]])}

        numbers = ray.data.range(len(tasks), override_num_blocks=len(tasks))
        for row in numbers.map(run, num_cpus=1).iter_rows():
            yield row["result"]
    finally:
        ray.shutdown()
