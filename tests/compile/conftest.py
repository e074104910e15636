"""Graphs that are recorded instead of captured, so that every rule of `Graphs` is tested without a GPU."""

from __future__ import annotations

import pytest

from recorded_graphs import Recorder
from reducio_fast.compile.graphs import Graphs


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def graphs(recorder: Recorder) -> Graphs:
    return Graphs(recorder)
