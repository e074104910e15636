"""A function over many tasks on a Ray cluster: Ray Data hands them out.

Results are files that the function writes where every machine sees them; rows come back in any order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ...system import ray_cluster

_Task = TypeVar("_Task")


def map_on_ray(tasks: Sequence[_Task], function: Callable[[_Task], Any], address: str) -> Iterator[Any]:
    """`function` of each task, one CPU each, in any order. `address` "local" starts a cluster on this machine."""
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
