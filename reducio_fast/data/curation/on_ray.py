"""Maps a function over many tasks on a Ray cluster; Ray Data schedules them.

The function writes its output as files on a file system that all machines share; its return values arrive in any order.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ...system import ray_cluster
from ...system.errors import ReducioError, first_line, is_out_of_memory

_Task = TypeVar("_Task")


def map_on_ray(
    tasks: Sequence[_Task], function: Callable[[_Task], Any], address: str, gpu: bool = False
) -> Iterator[Any]:
    """Yield `function(task)` of each task, in any order; a task uses one CPU and, with `gpu`, one GPU as its `cuda:0`.

    `address` "local" starts a cluster on this machine. Raises `ReducioError` without Ray, or if there is no cluster or
    it has no GPU. A task's `ReducioError`, `OSError` or lack of memory ends the run as a `ReducioError`. JSON must be
    able to hold what `function` returns.
    """
    if not tasks:
        return
    ray = ray_cluster.connect(address)
    try:
        if gpu and not ray.cluster_resources().get("GPU"):
            raise ReducioError(f"--ray {address}: the cluster has no GPU, and each task needs one")
        from ray import data as ray_data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray_data.DataContext.get_current().enable_progress_bars = False

        def run(row: dict[str, Any]) -> dict[str, Any]:
            try:
                outcome = {"result": function(row["task"])}
            except Exception as error:
                if not (isinstance(error, ReducioError | OSError) or is_out_of_memory(error)):
                    raise
                outcome = {"failure": first_line(error)}  # returned, because Ray raises every error as a RayTaskError
            return {"outcome": json.dumps(outcome)}

        # Ray ends a process after each task that uses a GPU unless `max_calls` is 0; what it has loaded would be lost.
        options = {"num_gpus": 1, "max_calls": 0} if gpu else {}
        # Each row holds its own task alone: with one list of all of them every task would unpickle the whole list.
        rows = ray_data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
        for row in rows.map(run, num_cpus=1, **options).iter_rows():
            outcome = json.loads(row["outcome"])
            if "failure" in outcome:
                raise ReducioError(outcome["failure"])
            yield outcome["result"]
    finally:
        ray.shutdown()
