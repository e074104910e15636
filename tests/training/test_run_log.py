"""The log of a run: rows of a later phase, a resumed run, and runs of many steps."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

from reducio_fast.training.run_log import RunLog


def test_a_later_column_is_empty_in_earlier_rows_and_a_resumed_run_drops_later_rows(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    for step in (10, 20):
        log.write({"step": step, "loss": 0.5})
    log.write({"step": 30, "loss": 0.25, "hinge": 1})
    log.write({"step": 40, "loss": 0.125})
    assert log.path.read_bytes() == b"step,loss,hinge\r\n10,0.5,\r\n20,0.5,\r\n30,0.25,1\r\n40,0.125,\r\n"
    with log.path.open("a") as file:
        file.write("5")  # of a row that was cut off
    RunLog(tmp_path, 30).write({"step": 35, "loss": 2})
    lines = log.path.read_text().splitlines()
    assert lines == ["step,loss,hinge", "10,0.5,", "20,0.5,", "30,0.25,1", "5,,", "35,2,"]
    RunLog(tmp_path, 0)
    assert log.path.read_bytes() == b""


def test_the_rows_of_a_long_run_are_not_in_memory(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write({"step": 0, "loss": 1.0})
    tracemalloc.start()
    for step in range(1, 1001):
        log.write({"step": step, "loss": 1.0 / step})
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 50_000 and len(log.path.read_text().splitlines()) == 1002
