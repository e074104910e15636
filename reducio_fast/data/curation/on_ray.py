"""Maps a function over many tasks on a Ray cluster; Ray Data schedules them.

The function writes its output as files on a file system that all machines share; its return values arrive in any order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ...system import ray_cluster

_Task = TypeVar("_Task")


def map_on_ray(tasks: Sequence[_Task], function: Callable[[_Task], Any], address: str) -> Iterator[Any]:
    """Yield `function(task)` of each task, in any order; a task uses one CPU.

    `address` "local" starts a cluster on this machine. Raises `ReducioError` without Ray, or if there is no cluster.
    """
    if not tasks:
        return
    ray = ray_cluster.connect(address)
    try:
        from ray import data as ray_data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray_data.DataContext.get_current().enable_progress_bars = False
        tasks_by_number = ray.put(list(tasks))

        def run(row: dict[str, Any]) -> dict[str, Any]:
            return {"result": function(ray.get(tasks_by_number)[row["id"]])}

        numbers = ray_data.range(len(tasks), override_num_blocks=len(tasks))
        for row in numbers.map(run, num_cpus=1).iter_rows():
            yield row["result"]
    finally:
        ray.shutdown()
