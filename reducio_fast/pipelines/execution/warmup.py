"""`pipe.warmup`: which clips are made so that kernels, compiled code, tables and graphs exist before the first call."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ...system import cores, deadline, torch_state
from ...system.deadline import Job, Outcome, run
from ...system.errors import ReducioError, shown
from ...system.real_numbers import to_float
from ..call import validation

LOG = logging.getLogger("reducio_fast")
PROMPT = "a red circle moving right on a black background"
# The first step compiles or captures, the second replays, and is the first that uses a multistep scheduler's history.
STEPS = 2
GREY = 128

Size = tuple[int, int]


def warm_up(
    pipe: Any,
    sizes: Sequence[int | Size] | None = None,
    deadline: float | None = None,
    progress: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """See `VideoPipeline.warmup`. `pipe` is one."""
    wanted = _check_sizes(pipe, sizes)
    check_deadline(deadline)
    if deadline is not None and pipe.offloading:
        raise ReducioError(
            f"deadline: {deadline} given while weights are offloaded, they cannot be in two calls at once; leave it out"
        )
    worker = pipe if deadline is None else pipe.for_thread()
    for each in (pipe, worker):
        each.executor.warned_sizes.update(wanted)  # no warning for sizes that the user asked to warm up
    engine = pipe.executor.engine
    jobs = [Job(f"{h}x{w}", _clip(worker, h, w)) for h, w in wanted]
    jobs[0] = Job(jobs[0].name, _after_kernels(worker, jobs[0].run))
    with tqdm(total=len(jobs), desc="warm-up", unit="size", disable=not progress) as bar:
        with engine.warming():
            outcome = run(jobs, deadline, on_done=lambda name: bar.update(), clock=clock)
    if not outcome.complete:
        # The thread may still be compiling for the old engine, and ends with it.
        pipe.executor.engine = engine.uncompiled()
        LOG.warning(
            "warm-up: not done after %g s, %s left; the pipeline runs uncompiled", deadline, ", ".join(outcome.left)
        )
    return outcome


def check_deadline(deadline: Any) -> None:
    """Raise ReducioError for a deadline that is neither None nor a finite number of seconds above 0."""
    if deadline is not None and not 0 < to_float(deadline) < math.inf:
        raise ReducioError(f"deadline: must be a finite number of seconds above 0, is {shown(deadline)}")


def _check_sizes(pipe: Any, sizes: Sequence[int | Size] | None) -> list[Size]:
    asked: Any = [(pipe.sample_height, pipe.sample_width)] if sizes is None else sizes
    if isinstance(asked, str) or not isinstance(asked, Sequence) or not asked:
        raise ReducioError(f"sizes: must be a list of (height, width) or of whole numbers, is {shown(sizes)}")
    pairs = [(size, size) if isinstance(size, int) else size for size in asked]
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ReducioError(f"sizes: must be a list of (height, width) or of whole numbers, has {shown(pair)}")
        height, width = pair
        validation.check_size(pipe.vae.config, height, width)
    return list(dict.fromkeys((int(height), int(width)) for height, width in pairs))


def _after_kernels(pipe: Any, make: Callable[[deadline.Check], object]) -> Callable[[deadline.Check], None]:
    """`make`, after the kernels of the fast path are compiled on all cores: one by one, when the clip needs them, they
    take a second and more each."""

    def run(check: deadline.Check) -> None:
        executor = pipe.executor
        if executor.device.type == "cuda" and executor.backend == "fast":
            from ...fast import launches
            from ...fast.engine import add_tuned_tables
            from ...triton_kernels.tables import arch_of

            denoiser, decoder = pipe.parts[pipe.layout.denoiser], pipe.parts[pipe.layout.decoder]
            engine, arch = executor.engine, arch_of(executor.device)
            add_tuned_tables(executor.device)
            with torch_state.inference():
                wanted = launches.launches_of(arch, denoiser, decoder, engine.attention, engine.quantisation)
            count, failures = launches.precompile_launches(executor.device, wanted, cores.usable(), check)
            LOG.info("warm-up: compiled %d kernels", count - len(failures))
            for failure in failures:  # the clip that needs the kernel will report more
                LOG.warning("%s", failure)
            check()
        make(check)

    return run


def _clip(pipe: Any, height: int, width: int) -> Callable[[deadline.Check], None]:
    """One clip in the fewest steps that run everything, its content frame from the first stage if there is one."""

    def make(check: deadline.Check) -> None:
        frame = np.full((height, width, 3), GREY, np.uint8)
        if pipe.text_to_image is not None:
            generator, kwargs = torch.Generator().manual_seed(0), {"num_inference_steps": STEPS}
            with torch_state.inference(), pipe.executor.lock, pipe.executor.placed("content.generate"):
                frame = pipe.content.draw(PROMPT, "", height, width, generator, False, kwargs)
            check()
        arguments: dict[str, Any] = {}
        if "text_encoder" in pipe.layout.names and pipe.text_encoder is not None and pipe.tokenizer is not None:
            arguments["prompt"] = PROMPT
        elif "text_encoder" in pipe.layout.names:
            text = pipe.transformer.null_text.detach()
            arguments |= {"prompt_embeds": text, "prompt_attention_mask": torch.ones(len(text), dtype=torch.bool)}
        if (num_frames := getattr(pipe.vae.config, "num_frames", None)) is not None:
            arguments["num_frames"] = num_frames
        pipe(
            **arguments,
            image=frame,
            height=height,
            width=width,
            num_inference_steps=STEPS,
            progress=False,
            callback_on_step_end=lambda *_: check(),
        )

    return make
