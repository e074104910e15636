"""Logs of a training run: always `log.csv`, and TensorBoard's event files on request."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..system.atomic_files import written_whole
from ..system.errors import ReducioError

LOG, TENSORBOARD = "log.csv", "tensorboard"


class RunLog:
    """Rows of figures by step. Rows after the step `keep_until` of the resumed checkpoint are removed.

    The rows are in the file alone: those of a run of four million steps would take 160 MB.
    """

    def __init__(self, folder: Path, keep_until: int, tensorboard: bool = False) -> None:
        self.path = folder / LOG
        self.columns: list[str] = []
        if keep_until and self.path.is_file():
            self._rewrite((), keep_until)
        else:
            with written_whole(self.path) as path:
                path.touch()
        self.events = _events(folder / TENSORBOARD, keep_until) if tensorboard else None

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row. A column that earlier rows lack, e.g. of a later phase, is empty in them."""
        if not set(row) <= set(self.columns):
            self._rewrite(row)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        if self.events is not None:
            for name, value in row.items():
                if name != "step":
                    self.events.add_scalar(name, value, int(row["step"]))
            self.events.flush()

    def _rewrite(self, more: Iterable[str], keep_until: float = math.inf) -> None:
        """Write the file anew with its rows up to a step, and with these columns too."""
        with (
            self.path.open(newline="", encoding="utf-8") as old,
            written_whole(self.path) as path,
            path.open("w", newline="", encoding="utf-8") as new,
        ):
            read = csv.DictReader(old)
            self.columns = list(dict.fromkeys((*(read.fieldnames or ()), *more)))
            if self.columns:
                writer = csv.DictWriter(new, self.columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(row for row in read if row["step"].isdigit() and int(row["step"]) <= keep_until)


def _events(folder: Path, keep_until: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ReducioError('TensorBoard is not installed; pip install "reducio-fast[train]"') from error
    return SummaryWriter(str(folder), purge_step=keep_until + 1 if keep_until else None)
