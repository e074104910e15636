"""Several processes: torchrun's variables, DDP and FSDP2 on gloo; results equal those of one process to the byte.

Each run is started in new processes, with torchrun's variables, because a process can form its group only once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from forked import Run

pytestmark = pytest.mark.slow

# Trains a small transformer on latents drawn from the loop's generator. argv: folder, parallel, micro-batches, steps,
# and further options.
SCRIPT = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from reducio_fast.reference import DiTConfig, ReducioDiT
    from reducio_fast.training.loop import LoopConfig, run
    from reducio_fast.training.processes import joined

    folder, parallel, micro, steps, extra = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]
    torch.manual_seed(0)
    model = ReducioDiT(DiTConfig(hidden_size=48, depth=2, num_heads=2, caption_channels=16, caption_length=8,
                                 semantic_channels=16, learn_sigma=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))

    def loss_fn(step, number, rng):
        if f"die={step}" in extra and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), 9)
        z = torch.from_numpy(rng.normal(size=(2, 16, 4, 2, 2))).float()
        text = torch.from_numpy(rng.normal(size=(2, 8, 16))).float()
        out = model(z + torch.randn_like(z), torch.tensor([100.0, 700.0]), text)
        loss = (out - z).square().mean()
        return loss, {"mean": z.mean()}

    with joined("cpu") as processes:
        if "world" in extra:
            assert processes.world_size == 2
        config = LoopConfig(steps=steps, learning_rate=1e-3, warmup_steps=2, ema_decay=0.9, log_every=3,
                            checkpoint_every=5, micro_batches=micro, parallel=parallel, autocast=False,
                            background_checkpoints="background" in extra)
        outcome = run("test", model, loss_fn, config, folder, processes, progress=False,
                      accept_changes="accept" in extra, blocks=model.transformer_blocks)
        if parallel == "fsdp":
            from torch.distributed.tensor import DTensor
            assert all(isinstance(p, DTensor) for p in model.parameters())
        if processes.first:
            torch.save({k: v.clone() for k, v in outcome.averaged.items()}, Path(folder) / "averaged.pt")
            import json
            (Path(folder) / "last.json").write_text(json.dumps(outcome.last))
    """
)


def start(
    folder: Path, parallel: str, count: int, *, micro: int = 2, steps: int = 12, extra: tuple[str, ...] = ()
) -> Run:
    script = folder.parent / "script.py"
    script.write_text(SCRIPT)
    return Run(script, [str(folder), parallel, str(micro), str(steps), *extra], count)


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "averaged.pt").read_bytes()).hexdigest()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_one_with_accumulation_and_a_killed_run_give_the_same_bytes(
    tmp_path: Path, parallel: str
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    running = [start(two, parallel, 2, extra=("world",)), start(one, parallel, 1)]
    for each in running:
        each.finish()
    assert weights(two) == weights(one)
    log = [[line.rsplit(",", 1)[0] for line in (f / "log.csv").read_text().splitlines()] for f in (two, one)]
    assert log[0][0].startswith("step,loss,mean,gradient") and len(log[0]) == len(log[1]) == 5
    for a, b in zip(log[0][1:], log[1][1:], strict=True):
        assert [float(x) for x in a.split(",")] == pytest.approx([float(x) for x in b.split(",")], rel=1e-6)
    # A run that was killed at step 8 resumes from step 5 on two processes, and on one process that accumulates.
    killed = tmp_path / "killed"
    start(killed, parallel, 2, extra=("die=8",)).finish(fails=True)
    assert (killed / "checkpoints" / "latest").read_text().strip() == "step-00000005"
    shutil.copytree(killed, tmp_path / "killed, then alone")
    running = [start(killed, parallel, 2), start(tmp_path / "killed, then alone", parallel, 1)]
    for each in running:
        each.finish()
    assert weights(killed) == weights(two) == weights(tmp_path / "killed, then alone")


def test_background_checkpoints_equal_synchronous_ones(tmp_path: Path) -> None:
    running = [
        start(tmp_path / name, "fsdp", 2, extra=extra) for name, extra in (("now", ()), ("later", ("background",)))
    ]
    for each in running:
        each.finish()
    assert weights(tmp_path / "now") == weights(tmp_path / "later")
    names = [sorted(p.name for p in (tmp_path / n / "checkpoints").iterdir()) for n in ("now", "later")]
    assert names[0] == names[1] == ["latest", "step-00000010", "step-00000012"]
    shutil.rmtree(tmp_path / "later" / "checkpoints" / "step-00000012")
    (tmp_path / "later" / "checkpoints" / "latest").write_text("step-00000010")
    (tmp_path / "later" / "averaged.pt").unlink()
    start(tmp_path / "later", "fsdp", 2).finish()
    assert weights(tmp_path / "later") == weights(tmp_path / "now")


def test_a_changed_number_of_processes_is_refused_unless_accepted(tmp_path: Path) -> None:
    start(tmp_path / "run", "ddp", 1, micro=4, steps=6).finish()
    output = start(tmp_path / "run", "ddp", 2, micro=4, steps=6).finish(fails=True)
    assert "was made with world_size=1, this run has world_size=2" in output and "--accept-changes" in output
    start(tmp_path / "run", "ddp", 2, micro=4, steps=6, extra=("accept",)).finish()
    output = start(tmp_path / "other", "ddp", 2, micro=3, steps=6).finish(fails=True)
    assert "2 processes cannot share micro_batches=3 evenly" in output


def test_a_file_size_limit_leaves_the_last_checkpoint_loading(tmp_path: Path) -> None:
    """Like a full disk: the write fails midway and leaves no partial checkpoint; the run resumes without the limit."""
    folder = tmp_path / "run"
    start(folder, "ddp", 1, steps=5).finish()
    before = {p.name: p.read_bytes() for p in (folder / "checkpoints" / "step-00000005").iterdir()}
    limited = subprocess.run(
        ["bash", "-c", f'ulimit -f 100; exec "{sys.executable}" "{tmp_path}/script.py" "{folder}" ddp 2 12 accept'],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert limited.returncode != 0
    assert "no space left in" in limited.stderr and "(the last one is step-00000005)" in limited.stderr
    assert {p.name: p.read_bytes() for p in (folder / "checkpoints" / "step-00000005").iterdir()} == before
    assert not list((folder / "checkpoints").glob("*.tmp"))
    start(folder, "ddp", 1, extra=("accept",)).finish()


def test_a_process_that_is_killed_ends_its_group(tmp_path: Path) -> None:
    """torchrun ends the other processes, so none waits in a collective until its timeout."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "script.py"), str(tmp_path / "run"), "ddp", "2", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "run" / "log.csv"
    deadline = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) > 2):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    began = time.monotonic()
    output = process.communicate(timeout=240)[0]
    assert process.returncode != 0, output[-30_000:]
    assert time.monotonic() - began < 60
