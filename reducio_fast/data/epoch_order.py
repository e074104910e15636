"""The order in which a training visits the clips of its buckets."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np


class EpochOrder:
    """Maps the number of a step to its rows. An epoch visits every clip; all clips of a batch are of one bucket.

    The last batch of a bucket is filled up with rows from the start of the bucket's permutation, so no clip is left
    out and all batches have the same size.
    """

    def __init__(self, counts: Mapping[str, int], batch: int, seed: int) -> None:
        self.counts, self.batch, self.seed = dict(sorted(counts.items())), batch, seed
        self.length = sum(-(-count // batch) for count in self.counts.values())  # steps per epoch

    def rows(self, step: int) -> tuple[str, list[int]]:
        """The bucket of a step, and the step's rows in the order of the global batch."""
        epoch, place = divmod(step, self.length)
        bucket, rows = _epoch(tuple(self.counts.items()), self.batch, self.seed, epoch)[place]
        return bucket, rows.tolist()


@functools.lru_cache(maxsize=2)
def _epoch(counts: tuple[tuple[str, int], ...], batch: int, seed: int, epoch: int) -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng((seed, 1 << 20, epoch))
    batches = []
    for bucket, count in counts:
        order = rng.permutation(count)
        order = np.resize(order, -(-count // batch) * batch)  # np.resize repeats the array from its start
        batches += [(bucket, rows) for rows in order.reshape(-1, batch)]
    return [batches[i] for i in rng.permutation(len(batches))]
