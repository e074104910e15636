"""One clip made by several processes, each with its own GPU: tiles of the decode, halves of guidance, attention heads.

Every process runs the same call on the same weights. Where work is divided, its results are exchanged at once, so that
all processes go on with the same tensors:

- tiles: each process decodes some of them. Bit-equal to one process, where tiles do not share a batch.
- halves of guidance: each process predicts one half. Equal to one process up to rounding, since a library multiplies a
  batch of one in another order than a batch of two.
- heads (Ulysses, arXiv 2309.14509): each process has some of the tokens, and for self-attention all tokens of some of
  the heads; two all-to-all exchanges per block.

The first stage, the encoders and the keys and values of cross-attention are computed by every process. Only rank 0 has
callbacks; it sends its decision to the others after each step, because a process that stops by itself leaves the others
waiting in an exchange.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..reference.sampler import StopSampling
from ..system.errors import ReducioError

T = TypeVar("T")
_GO, _REPLACED, _STOPPED, _FAILED = range(4)  # outcome of a rank's work; the largest of all ranks counts


class RankFailed(ReducioError):
    """Another process of this clip has failed or is gone."""


class Lanes:
    """Processes that share the tokens of one prediction. `index`: this process among the `count`."""

    def __init__(self, group: Any, index: int, count: int) -> None:
        self.group, self.index, self.count = group, index, count

    def own(self, x_BLD: Tensor) -> Tensor:
        """This process's tokens, [B, L / count, D]."""
        return x_BLD.chunk(self.count, dim=1)[self.index].contiguous()

    def to_heads(self, x_BLND: Tensor) -> Tensor:
        """[B, L / count, N, K] of all heads -> [B, L, N / count, K] of this process's heads."""
        return torch.cat(self._exchange(x_BLND.chunk(self.count, dim=2)), dim=1)

    def to_tokens(self, x_BLND: Tensor) -> Tensor:
        """The way back: [B, L, N / count, K] -> [B, L / count, N, K]."""
        return torch.cat(self._exchange(x_BLND.chunk(self.count, dim=1)), dim=2)

    def all_tokens(self, x_BLD: Tensor) -> Tensor:
        """[B, L / count, D] -> [B, L, D], in every process."""
        parts = [torch.empty_like(x_BLD) for _ in range(self.count)]
        dist.all_gather(parts, x_BLD.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)

    def _exchange(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Part i goes to process i; returns what each process sent here."""
        sent = torch.stack(list(parts))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received.unbind()


class Ranks:
    """All processes of the run, which make each clip together. Every process must make this object at the same time.

    device: of this process. heads: of the denoiser's self-attention; the number of lanes must divide it.
    timeout: of an exchange; a process that is gone is noticed by then at the latest.
    """

    def __init__(self, device: torch.device, heads: int, timeout: timedelta) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        self.control = dist.new_group(backend="gloo", timeout=timeout)  # for plain values on the CPU
        self._lanes: dict[tuple[int, int], Lanes | None] = {}
        for halves in (1, 2):
            for count in range(2, self.size // halves + 1):
                if heads % count == 0:
                    self._lanes[halves, count] = self._make_lanes(halves, count, timeout)

    def _make_lanes(self, halves: int, count: int, timeout: timedelta) -> Lanes | None:
        mine = None
        for half in range(halves):
            members = list(range(half * count, (half + 1) * count))
            group = dist.new_group(members, timeout=timeout)
            if self.rank in members:
                mine = Lanes(group, members.index(self.rank), count)
        return mine

    def lanes(self, halves: int, tokens: int) -> int:
        """How many processes share a prediction of `tokens` tokens: as many as heads and tokens allow."""
        return max((c for h, c in self._lanes if h == halves and tokens % c == 0), default=1)

    # ---- exchanges -----------------------------------------------------------------------------------------------

    def predict(self, predict: Callable[[int, Lanes | None], Tensor], halves: int, tokens: int, like: Tensor) -> Tensor:
        """`predict(half, lanes)` of each half, [halves * B, ...]. like: a tensor of one half's shape and dtype."""
        count = self.lanes(halves, tokens)
        half = self.rank // count
        with self._leaving():
            own = like
            if half < halves:  # the processes that are left over wait
                own = predict(half, self._lanes.get((halves, count))).contiguous()
            parts = [own if half == i else torch.empty_like(own) for i in range(halves)]
            for i, part in enumerate(parts):
                dist.broadcast(part, i * count)
            return parts[0] if halves == 1 else torch.cat(parts)

    def pieces(
        self, costs: Sequence[int], make: Callable[[list[int]], dict[int, Tensor]], empty: Callable[[int], Tensor]
    ) -> list[Tensor]:
        """All pieces of divided work. `make(numbers)` returns this process's pieces, `empty(number)` an empty tensor to
        receive another's."""
        owners = shares(costs, self.size)
        mine = [i for i, owner in enumerate(owners) if owner == self.rank]
        with self.together():
            made = make(mine)
        with self._leaving():
            pieces = [made[i].contiguous() if i in made else empty(i) for i in range(len(costs))]
            for piece, owner in zip(pieces, owners, strict=True):
                dist.broadcast(piece, owner)
        return pieces

    def broadcast_tensor(self, value: Tensor) -> Tensor:
        """Rank 0's tensor, in every process."""
        with self._leaving():
            value = value.contiguous()
            dist.broadcast(value, 0)
        return value

    def broadcast_value(self, value: T) -> T:
        """Rank 0's value, in every process; plain data."""
        box = [value]
        with self._leaving():
            dist.broadcast_object_list(box, 0, group=self.control)
        return box[0]

    # ---- agreement -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Wraps work that each process does by itself: all of them complete it, or all raise."""
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
        worst = torch.tensor(_GO if error is None else _STOPPED if isinstance(error, StopSampling) else _FAILED)
        with self._leaving():
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=self.control)
        if error is not None:
            raise error
        self._follow(int(worst))

    def on_rank_0(self, work: Callable[[], Tensor | None], latent: Tensor) -> Tensor | None:
        """Runs `work` in rank 0 alone; it may replace the latent or end the clip. Returns the new latent, or None."""
        answer, error, outcome = None, None, _GO
        if self.rank == 0:
            try:
                answer = work()
                outcome = _GO if answer is None else _REPLACED
            except BaseException as raised:
                error, outcome = raised, _STOPPED if isinstance(raised, StopSampling) else _FAILED
        outcome = self.broadcast_value(outcome)
        if error is not None:
            raise error
        if outcome == _REPLACED:
            return self.broadcast_tensor(latent.clone() if answer is None else answer)
        self._follow(outcome)
        return None

    @staticmethod
    def _follow(outcome: int) -> None:
        if outcome == _STOPPED:
            raise StopSampling
        if outcome == _FAILED:
            raise RankFailed("parallel: another process of this clip has failed; its own line says why")

    @contextlib.contextmanager
    def _leaving(self) -> Iterator[None]:
        """Wraps an exchange. A process that fails in it leaves the group, so that the others do not wait for it."""
        try:
            yield
        except RuntimeError as error:
            self.leave()
            if isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "onnection" in str(error):
                raise RankFailed("parallel: another process of this clip is gone") from error
            raise
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """End this process's part in the run; the others then fail in their next exchange."""
        if dist.is_initialized():
            dist.destroy_process_group()


def shares(costs: Sequence[int], size: int) -> list[int]:
    """The rank of each piece of work: the longest first, each to the least loaded rank. At 1024x1024 the 16 tiles of
    a clip then take 1/1.99, 1/3.97 and 1/7.22 of their time on 2, 4 and 8 ranks (counted)."""
    loads, owners = [0] * size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners
