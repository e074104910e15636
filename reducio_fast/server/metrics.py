"""Counters for Prometheus."""

from __future__ import annotations

from typing import Any


class Metrics:
    """One registry per server, so that several servers of one process do not share numbers."""

    def __init__(self) -> None:
        import prometheus_client as prometheus

        self.registry = prometheus.CollectorRegistry()
        kwargs: dict[str, Any] = {"registry": self.registry}
        self.jobs = prometheus.Counter("reducio_jobs", "Jobs by what became of them.", ["status"], **kwargs)
        self.depth = prometheus.Gauge("reducio_queue_depth", "Jobs that are not begun.", **kwargs)
        self.running = prometheus.Gauge("reducio_jobs_running", "Jobs in work.", **kwargs)
        self.ready = prometheus.Gauge("reducio_workers_ready", "1 where clips can be made.", **kwargs)
        self.wait = prometheus.Histogram(
            "reducio_wait_seconds", "From the request to the begin of the clip.", buckets=_BUCKETS, **kwargs
        )
        self.stage = prometheus.Histogram(
            "reducio_stage_seconds", "Of a clip, by stage.", ["stage"], buckets=_BUCKETS, **kwargs
        )
        self.peak = prometheus.Gauge("reducio_peak_bytes", "Most memory that a worker has had.", **kwargs)

    def text(self) -> tuple[bytes, str]:
        import prometheus_client as prometheus

        return prometheus.generate_latest(self.registry), prometheus.CONTENT_TYPE_LATEST


_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
