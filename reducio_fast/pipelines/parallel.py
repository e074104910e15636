"""All processes that torchrun has started make one clip together, each on its own GPU: see `fast.parallel`."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..system.checksum import checksums
from ..system.errors import ReducioError
from .call.request import Request

T = TypeVar("T")
TIMEOUT = 600.0  # seconds; the first clip's slowest process may compile for minutes
# Fields of a request that must be equal in all processes.
SAME = ("height", "width", "num_inference_steps", "schedule", "shortcuts", "guidance_scale", "output_type", "is_list",
        "chain", "clip_condition", "motion_strength", "keep_content", "loop", "previews", "preview_every")  # fmt: skip


def count_processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() and int(text) > 0 else 1


def parallelize(pipe: Any, timeout: float = TIMEOUT) -> Any:
    """Let all processes of the run make each clip of a loaded pipeline together; returns the pipeline.

    Start the program with `torchrun --nproc-per-node N`. Each process loads the model on its own GPU
    (`device=f"cuda:{os.environ['LOCAL_RANK']}"`), passes it here at the same time, and makes the same calls; each gets
    the clip. Callbacks, the progress bar, interrupts and randomly drawn seeds are those of rank 0. Tiles of the decode
    are divided between the processes, then halves of guidance, then attention heads. Without torchrun the pipeline is
    returned as it is.

    timeout: a process that is gone is noticed after this many seconds at the latest.
    Raises ReducioError for a pipeline that is not of the Reducio family, runs on the reference, or is compiled or
    offloaded.
    """
    count = count_processes()
    if count == 1:
        return pipe
    if getattr(getattr(pipe, "layout", None), "pipeline", "") != "ReducioPipeline":
        raise ReducioError(f"parallelize: takes a ReducioPipeline, not a {type(pipe).__name__}")
    if pipe.backend != "fast":
        why = "; ".join(f"{name}: {line}" for name, line in pipe.report.items() if not line.startswith("fast"))
        raise ReducioError(f"parallelize: needs the fast path for every network; {why}")
    if pipe.executor.engine.compiles:
        raise ReducioError("parallelize: compile=True was chosen, but compiled blocks hold no exchange; leave it out")
    if pipe.offloading:
        raise ReducioError("parallelize: weights are offloaded; each process needs its own on its GPU")
    from ..fast.parallel import Ranks

    limit = timedelta(seconds=timeout)
    if not dist.is_initialized():
        _join(pipe.device, limit)
    ranks = Ranks(pipe.device, pipe.transformer.config.num_heads, limit)
    pipe.executor.ranks = ranks
    pipe.executor.engine.divide(ranks)
    return pipe


def _join(device: torch.device, timeout: timedelta) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ReducioError(f"parallelize: cannot join the {count_processes()} processes: {reason}") from error
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def together(ranks: Any) -> AbstractContextManager[None]:
    """A context for work that each process does by itself: all processes leave it, or all raise. ranks None: one
    process."""
    return nullcontext() if ranks is None else ranks.together()


def shared(ranks: Any, work: Callable[..., T], *args: Any) -> T:
    """The result of `work(*args)`. Of several processes each does the work, and all get the result of rank 0."""
    with together(ranks):
        result = work(*args)
    return result if ranks is None else ranks.broadcast_value(result)


def agree(ranks: Any, request: Request) -> None:
    """Give each clip of the request rank 0's random numbers. Raises ReducioError where the calls differ."""
    prompts = [(clip.prompt, clip.negative_prompt) for clip in request.clips]
    given = [[None if z is None else checksums([z]) for z in (clip.latents, clip.motion)] for clip in request.clips]
    own = [prompts, given, *(str(getattr(request, name)) for name in SAME)]
    states = [(clip.generator.initial_seed(), clip.generator.get_state()) for clip in request.clips]
    leading, states = ranks.broadcast_value((own, states))
    with ranks.together():
        if leading != own:
            raise ReducioError("parallelize: the processes were given different calls")
    for clip, (seed, state) in zip(request.clips, states, strict=True):
        clip.generator.manual_seed(seed).set_state(state)
