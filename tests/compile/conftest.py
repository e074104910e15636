"""Graphs that are recorded instead of captured: every rule of `Graphs` is tested with no GPU."""

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
