"""The processes of test_parallel.py: every process of a run makes the same calls on a small random model, whose frames
are larger than a tile reads.

Arguments: a folder, and for each run its name, case and number of processes. The runs follow each other, each in a
folder of its name. Their processes are forks of this one, which imports everything once, and so has one thread."""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import nn

from reducio_fast import ReducioPipeline, parallelize
from reducio_fast.reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig

VAE = VAEConfig(
    base_channels=8,
    channel_multipliers=(1, 1, 1, 1, 2, 2),
    norm_groups=4,
    num_res_blocks=1,
    content_base_channels=8,
    content_channel_multipliers=(1, 1, 1, 2),
    num_heads=2,
    fusion_head_dim=8,
    tile_size=64,
    tile_overlap=0.5,
)
DIT = DiTConfig(
    hidden_size=48,
    depth=2,
    num_heads=6,
    caption_channels=16,
    caption_length=8,
    learn_sigma=False,
    semantic_channels=16,
)
RANK = int(os.environ.get("RANK", 0))
TEXT = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
IMAGE = np.random.default_rng(0).integers(0, 255, (128, 192, 3), np.uint8)
CALL: dict[str, Any] = {
    "image": IMAGE,
    "prompt_embeds": TEXT,
    "prompt_attention_mask": torch.ones(8),
    "height": 128,
    "width": 192,
    "seed": 5,
    "num_inference_steps": 3,
    "progress": False,
    "output_type": "latent",
}


def random_network(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.normal_(0, 0.08)
    return network.requires_grad_(False).eval()


def load(dtype: torch.dtype, backend: str) -> ReducioPipeline:
    torch.manual_seed(0)
    vae, transformer = random_network(ReducioVAE(VAE)), random_network(ReducioDiT(DIT))
    scheduler = DPMSolverMultistepScheduler()
    pipe = ReducioPipeline(vae=vae.to(dtype), transformer=transformer.to(dtype), scheduler=scheduler, backend=backend)
    pipe.enable_vae_tiling()
    return pipe


def latents(pipe: ReducioPipeline, **kwargs: Any) -> dict[str, torch.Tensor]:
    guided, unguided = (pipe(**CALL | kwargs, guidance_scale=scale).frames for scale in (4.5, 1.0))
    return {"guided": guided, "unguided": unguided}


def stop(pipe: ReducioPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    assert RANK == 0, "callbacks are those of rank 0"
    pipe._interrupt = step == 1
    return {"latents": tensors["latents"] * 0.5}


def clips(pipe: ReducioPipeline) -> dict[str, Any]:
    """Everything that must be the same in every process, and close to what one process makes."""
    same_latent = torch.randn(16, 4, 4, 6, generator=torch.Generator().manual_seed(2))  # so that only decodes compare
    drawn = pipe(**CALL | {"seed": None})
    stopped = pipe(**CALL | {"num_inference_steps": 50}, callback_on_step_end=stop)
    assert stopped.interrupted
    return latents(pipe) | {
        "decoded": torch.from_numpy(pipe.decode(same_latent, IMAGE, output_type="np")),
        "drawn": (drawn.seed, drawn.frames),
        "long": torch.from_numpy(pipe(**CALL | {"num_frames": 24, "output_type": "np"}).frames),
        "stopped": stopped.frames,
        "after": pipe(**CALL).frames,
    }


def own_error(*_: Any) -> None:
    raise RuntimeError("the caller's own")


def no_memory(*_: Any) -> None:
    raise MemoryError("no room")


def kill(*_: Any) -> None:
    os.kill(os.getpid(), 9)


def fail(pipe: ReducioPipeline, case: str) -> None:
    """Make the step that `case` names fail, in rank 1 or in the callback, and print how the call ends."""
    call = dict(CALL)
    network, method, broken = {
        "decode": ("vae", "_decode", no_memory),
        "attention": ("transformer", "first_norm", no_memory),
        "killed": ("transformer", "first_norm", kill),
    }.get(case, (None, "", None))
    if case == "callback":
        call["callback_on_step_end"] = own_error
    if case == "different":
        call["num_inference_steps"] = 3 + RANK
    if case == "decode":
        call["output_type"] = "np"
    undo: Callable[[], None] = lambda: None  # noqa: E731
    if network is not None and RANK == 1:
        twin = pipe.executor.network(network)
        setattr(twin, method, broken)
        undo = lambda: delattr(twin, method)  # noqa: E731 - uncovers the class's method
    try:
        pipe(**call)
        print(f"{case}, rank {RANK}: NO ERROR", flush=True)  # noqa: T201 - what the test reads
    except BaseException as error:
        print(f"{case}, rank {RANK}: {type(error).__name__}: {error}", flush=True)  # noqa: T201
    undo()


def make(folder: Path, case: str) -> None:
    pipe = parallelize(load(torch.float32, "fast"), timeout=100)
    if case == "clips":
        torch.save(clips(pipe), folder / f"clips-{RANK}.pt")
        return
    if case == "truth":
        exact = load(torch.float64, "reference")
        torch.save(clips(pipe) | {"truth": latents(exact, prompt_embeds=TEXT.double())}, folder / "clips-0.pt")
        return
    *earlier, last = case.split("+")
    for each in earlier:
        fail(pipe, each)
    if earlier:  # the processes still work together
        torch.save({"after": pipe(**CALL).frames}, folder / f"after-{RANK}.pt")
    fail(pipe, last)


def run(folder: Path, case: str, processes: int) -> dict[str, Any]:
    """What each process prints, its status, and the seconds until the last one ends. The processes are started without
    torchrun, which would end the others when one has ended."""
    global RANK
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(processes)}
    began, children = time.monotonic(), []
    for rank in range(processes):
        children.append(os.fork())
        if children[-1] == 0:
            RANK, os.environ["RANK"] = rank, str(rank)
            for stream in (1, 2):
                os.dup2(os.open(folder / f"printed-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
            status = 0
            try:
                make(folder, case)
            except BaseException:
                traceback.print_exc()
                status = 1
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    printed = [(folder / f"printed-{rank}").read_text() for rank in range(processes)]
    return {"printed": printed, "statuses": statuses, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = [argument.split(",") for argument in sys.argv[2:]]
    results = {name: run(Path(sys.argv[1], name), case, int(processes)) for name, case, processes in runs}
    print(json.dumps(results))  # noqa: T201
