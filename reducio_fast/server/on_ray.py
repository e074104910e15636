"""Workers as replicas of Ray Serve on a cluster, one per GPU, as many as the queue needs."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ..system import ray_cluster
from .clips import Event
from .dispatcher import WorkerLost

LOG = logging.getLogger("reducio_fast.server")
APPLICATION = "reducio-fast"
# A replica that makes a clip may report its queue length late; Ray's default of 0.1 s fills the log with warnings.
os.environ.setdefault("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "5")
# Jobs per replica at once: one whose clip is made, and one whose file is written.
AT_ONCE = 2
SHUTDOWN_SECONDS = 20


class RayHome:
    """Deploys `clips.Clips` and waits until a replica is ready, which may take minutes.

    worker: arguments of `Clips`. replicas: smallest and largest number. gpus: per replica; None means one if the
    cluster has any. Raises ReducioError if Ray is not installed or no cluster answers.
    """

    def __init__(self, worker: dict[str, Any], address: str, replicas: tuple[int, int], gpus: float | None) -> None:
        self._ray = ray_cluster.connect(address)
        from ray import serve

        from .clips import Clips

        self._serve = serve
        if gpus is None:
            gpus = 1.0 if self._ray.cluster_resources().get("GPU", 0) else 0.0
        least, most = replicas
        deployment = serve.deployment(
            name="clips",
            ray_actor_options={"num_gpus": gpus, "num_cpus": 1},
            max_ongoing_requests=AT_ONCE,
            autoscaling_config={
                "min_replicas": least,
                "initial_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": 1,
            },
            graceful_shutdown_timeout_s=SHUTDOWN_SECONDS,
        )(Clips)
        # No proxy: the file of jobs has one writer, the server of this home.
        serve.start(proxy_location="Disabled")
        handle = serve.run(deployment.bind(**worker), name=APPLICATION, route_prefix=None)
        self._handle = handle.options(stream=True)
        self._described = handle.describe.remote().result(timeout_s=60)
        # One more than the replicas take: the autoscaler measures the demand by the requests that wait at its router.
        self.slots = AT_ONCE * most + 1

    async def make(self, request: dict[str, Any], given: Mapping[str, bytes]) -> AsyncIterator[Event]:
        """As `Clips.make`. Raises WorkerLost if the replica died. Closing the generator cancels the call, whose clip
        then ends at its next step."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException, RequestCancelledError

        response = self._handle.make.remote(request, dict(given))
        ended = False
        try:
            async for event in response:
                yield event
            ended = True
        except RequestCancelledError:
            raise asyncio.CancelledError from None
        except (RayError, RayServeException) as error:
            ended = True
            raise WorkerLost(f"{type(error).__name__}") from error
        finally:
            if not ended:
                response.cancel()

    def describe(self) -> dict[str, Any]:
        """`Clips.describe` of a replica."""
        return self._described

    def close(self) -> None:
        """Take the deployment down, and leave the cluster."""
        try:
            self._serve.delete(APPLICATION)
        finally:
            self._ray.shutdown()
