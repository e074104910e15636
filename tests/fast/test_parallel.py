"""One clip by several processes, on gloo: tiles bit-equal, halves and heads within rounding, and all end together.

Each case runs in processes of its own; the model is small and random, its frames larger than a tile reads.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from reducio_fast.fast.parallel import shares
from reducio_fast.media.video_files import read_video

pytestmark = pytest.mark.slow

# argv: folder of results, case. Every process makes the same calls.
SCRIPT = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    import numpy as np, torch
    torch.set_num_threads(1)
    from reducio_fast import ReducioPipeline, parallelize
    from reducio_fast.reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
    from diffusers import DPMSolverMultistepScheduler

    out, case = Path(sys.argv[1]), sys.argv[2]
    rank = int(os.environ.get("RANK", 0))

    def randomise(network):
        with torch.no_grad():
            for tensor in network.state_dict().values():
                tensor.normal_(0, 0.08)
        return network.requires_grad_(False).eval()

    torch.manual_seed(0)
    vae = VAEConfig(base_channels=8, channel_multipliers=(1, 1, 1, 1, 2, 2), norm_groups=4, num_res_blocks=1,
                    content_base_channels=8, content_channel_multipliers=(1, 1, 1, 2), num_heads=2, fusion_head_dim=8,
                    tile_size=64, tile_overlap=0.5)
    dit = DiTConfig(hidden_size=48, depth=2, num_heads=6, caption_channels=16, caption_length=8, learn_sigma=False,
                    semantic_channels=16)
    parts = dict(vae=randomise(ReducioVAE(vae)), transformer=randomise(ReducioDiT(dit)))
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float64 if case == "truth" else torch.float32
    backend = "reference" if case == "truth" else "fast"
    for part in parts.values():
        part.to(dtype)
    pipe = ReducioPipeline(**parts, scheduler=DPMSolverMultistepScheduler(), backend=backend)
    pipe.enable_vae_tiling()
    if case != "truth":
        parallelize(pipe, timeout=60)
    text = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    image = np.random.default_rng(0).integers(0, 255, (128, 192, 3), np.uint8)
    words = dict(image=image, prompt_embeds=text, prompt_attention_mask=torch.ones(8), height=128, width=192, seed=5,
                 num_inference_steps=3, progress=False, output_type="pt")

    def save(name, value):
        torch.save(value, out / f"{name}-{rank}.pt")

    if case in ("clip", "bfloat16", "truth"):
        latent = pipe(**words | {"output_type": "latent"}).frames
        save("latent", latent)
        # The same latent everywhere, so that only the decode is compared.
        fixed = torch.randn(16, 4, 4, 6, generator=torch.Generator().manual_seed(2))
        save("decoded", pipe.decode(fixed, image, output_type="np"))
        save("unguided", pipe(**words | {"output_type": "latent", "guidance_scale": 1.0}).frames)
        if case == "clip":
            drawn = pipe(**words | {"seed": None, "output_type": "latent"})
            save("drawn", (drawn.seed, drawn.frames))
            long = pipe(**words | {"num_frames": 24, "output_type": "np"})
            save("long", long.frames)
    elif case == "stop":
        def stop(own, step, timestep, tensors):
            assert rank == 0, "callbacks are those of rank 0"
            own._interrupt = step == 1
            return {"latents": tensors["latents"] * 0.5}
        stopped = pipe(**words | {"num_inference_steps": 50, "output_type": "latent"}, callback_on_step_end=stop)
        assert stopped.interrupted
        save("stopped", stopped.frames)
        save("after", pipe(**words | {"output_type": "latent"}).frames)
    elif case in ("callback", "attention", "decode", "killed", "different"):
        if case == "callback":
            def fail(*_):
                raise RuntimeError("the caller's own")
            words["callback_on_step_end"] = fail
        if case == "attention" and rank == 1:
            def fail(*_):
                raise MemoryError("no room")
            pipe.executor.network("transformer").first_norm = fail
        if case == "decode" and rank == 1:
            def fail(*_):
                raise MemoryError("no room")
            pipe.executor.network("vae")._decode = fail
        if case == "killed" and rank == 1:
            pipe.executor.network("transformer").first_norm = lambda *_: os.kill(os.getpid(), 9)
        if case == "different" and rank == 1:
            words["num_inference_steps"] = 4
        try:
            pipe(**words)
            print("NO ERROR")
        except BaseException as error:
            print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
    """
)


def run(folder: Path, case: str, processes: int) -> list[str]:
    """The output of each process, started without torchrun, which would end the others when one has ended."""
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}  # fmt: skip
    command = [sys.executable, str(folder / "script.py"), str(folder), case]
    running = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(processes)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    if case != "killed":
        assert all(process.returncode == 0 for process in running), "\n".join(outputs)
    return outputs


def load(folder: Path, name: str, rank: int = 0):
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parallel")
    folders = {"truth": ("truth", 1), "one": ("clip", 1), "two": ("clip", 2), "three": ("clip", 3)}
    for name, (case, processes) in folders.items():
        run(root / name, case, processes)
    return {name: root / name for name in folders}


@pytest.mark.parametrize("name", ["two", "three"])
def test_tiles_are_bit_equal(results: dict[str, Path], name: str) -> None:
    alone = load(results["one"], "decoded")
    assert alone.shape == (16, 128, 192, 3)
    for rank in range({"two": 2, "three": 3}[name]):
        assert np.array_equal(load(results[name], "decoded", rank), alone)


@pytest.mark.parametrize("name", ["two", "three"])
@pytest.mark.parametrize("what", ["latent", "unguided"])
def test_halves_and_heads_are_equal_up_to_rounding(results: dict[str, Path], name: str, what: str) -> None:
    """Two processes: a half each; without guidance three heads each. Three: two halves and one idle; two heads each."""
    truth, alone = load(results["truth"], what).double(), load(results["one"], what).double()
    error = (alone - truth).abs().max().item()
    ranks = [load(results[name], what, rank) for rank in range({"two": 2, "three": 3}[name])]
    assert all(torch.equal(latent, ranks[0]) for latent in ranks)
    assert (ranks[0].double() - truth).abs().max().item() <= 2 * error + 1e-6 * truth.abs().max().item()


def test_a_drawn_seed_and_a_long_clip_are_the_same_everywhere(results: dict[str, Path]) -> None:
    seeds = [load(results["three"], "drawn", rank) for rank in range(3)]
    assert len({seed for seed, _ in seeds}) == 1 and all(torch.equal(latent, seeds[0][1]) for _, latent in seeds)
    clips = [load(results["two"], "long", rank) for rank in range(2)]
    assert clips[0].shape == (24, 128, 192, 3) and np.array_equal(*clips)


def test_rank_0_replaces_latents_and_stops_for_all(results: dict[str, Path], tmp_path: Path) -> None:
    run(tmp_path / "stop", "stop", 2)
    assert torch.equal(load(tmp_path / "stop", "stopped", 0), load(tmp_path / "stop", "stopped", 1))
    assert torch.equal(load(tmp_path / "stop", "after", 1), load(results["two"], "latent"))


@pytest.mark.parametrize(
    ("case", "own", "others"),
    [
        ("callback", "rank 0: RuntimeError: the caller's own", "rank 1: RankFailed: parallel: another process"),
        ("attention", "rank 1: MemoryError: no room", "rank 0: RankFailed: parallel: another process"),
        ("decode", "rank 1: ReducioError: vae.decode: out of memory", "rank 0: RankFailed: parallel: another process"),
        ("killed", None, "rank 0: RankFailed: parallel: another process of this clip is gone"),
        ("different", "rank 1: ReducioError: parallel: the processes were given different calls", "rank 0: RankFailed"),
    ],
)  # fmt: skip
def test_all_processes_end_together(tmp_path: Path, case: str, own: str | None, others: str) -> None:
    began = time.monotonic()
    text = "\n".join(run(tmp_path / case, case, 2))
    assert others in text and (own is None or own in text) and "NO ERROR" not in text, text
    assert time.monotonic() - began < 50, "before the exchange's own timeout of 60 s"


def test_the_longest_tiles_first() -> None:
    assert shares([4, 4, 4, 4], 3) == [0, 1, 2, 0]
    costs = [100] * 9 + [80] * 6 + [64]  # the tiles of 1024x1024, in latent cells
    for size, gain in ((2, 1.99), (4, 3.97), (8, 7.22)):
        owners = shares(costs, size)
        longest = max(sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(size))
        assert sum(costs) / longest == pytest.approx(gain, abs=0.01)


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    """Two processes, one file and one report."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words = ["reducio_fast", "generate", "a red circle moving right on a black background", "--out", "clip.mp4",
             "--num-inference-steps", "2", "--seed", "3", "--backend", "fast", "--json", "--no-progress"]  # fmt: skip
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"path": "clip.mp4"') == 1
    assert read_video(tmp_path / "clip.mp4")[0].shape == (16, 128, 128, 3)
    refused = subprocess.run(
        [*command, *words, "--compile"], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ)
    )
    assert refused.returncode != 0 and "parallelize: compile=True was chosen" in refused.stderr
