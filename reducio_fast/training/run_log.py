"""Logs of a training run: always `log.csv`, and TensorBoard's event files on request."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..system.atomic_files import written_whole
from ..system.errors import ReducioError

LOG, TENSORBOARD = "log.csv", "tensorboard"


class RunLog:
    """Rows of figures by step. Rows after the step `keep_until` of the resumed checkpoint are removed."""

    def __init__(self, folder: Path, keep_until: int, tensorboard: bool = False) -> None:
        self.path = folder / LOG
        self.rows: list[dict[str, Any]] = []
        if keep_until and self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                read = csv.DictReader(file)
                self.rows = [row for row in read if row["step"].isdigit() and int(row["step"]) <= keep_until]
        self.columns = list(self.rows[0]) if self.rows else []
        self._rewrite()
        self.events = _events(folder / TENSORBOARD, keep_until) if tensorboard else None

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row. A column that earlier rows lack, e.g. of a later phase, is empty in them."""
        self.rows.append(dict(row))
        if set(row) <= set(self.columns):
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        else:
            self._rewrite()
        if self.events is not None:
            for name, value in row.items():
                if name != "step":
                    self.events.add_scalar(name, value, int(row["step"]))
            self.events.flush()

    def _rewrite(self) -> None:
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with written_whole(self.path) as path, path.open("w", newline="", encoding="utf-8") as file:
            if self.columns:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(self.rows)


def _events(folder: Path, keep_until: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ReducioError('TensorBoard is not installed; pip install "reducio-fast[train]"') from error
    return SummaryWriter(str(folder), purge_step=keep_until + 1 if keep_until else None)
