"""The command as a process: signals, streams, users without a home. Errors are one line and a status, no traceback."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reducio_fast.cli import main
from reducio_fast.media import ffmpeg
from reducio_fast.media.video_files import read_video, write_video

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "reducio_fast"]
CLIP = ["generate", "a red circle", "--num-inference-steps", "1", "--no-progress"]
ROOT_ONLY = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to run as another user")
UNKNOWN_USER = 12345  # in no user database


def run(*arguments: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    kwargs = {"capture_output": True, "text": True, "timeout": 120, "cwd": "/"} | kwargs
    return subprocess.run([*COMMAND, *map(str, arguments)], **kwargs)


def test_a_terminal_that_cannot_show_the_prompt(tmp_path: Path) -> None:
    arguments = [CLIP[0], "红 circle", *CLIP[2:], "--out", str(tmp_path / "c.gif")]
    done = run(*arguments, env=os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}, encoding="latin-1")
    assert done.returncode == 0 and "? circle" in done.stdout and (tmp_path / "c.gif").is_file()


@pytest.mark.parametrize("arguments", [["env"], ["env", "--json"]])
def test_a_reader_that_has_gone(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run(*arguments, stdout=writing, stderr=subprocess.PIPE, capture_output=False)
    os.close(writing)
    assert done.returncode == 128 + signal.SIGPIPE and done.stderr == ""


def test_an_output_that_is_full() -> None:
    with open("/dev/full", "w") as full:
        done = run("env", stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert done.returncode == 2 and done.stderr == "reducio-fast env: error: No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "redirections", "status"),
    [("env", ">&- 2>&-", 0), ("reconstruct nope.mp4 --out c.gif", "2>/dev/full", 2), ("nope", "2>/dev/full", 2)],
)
def test_streams_that_cannot_be_written_change_no_status(arguments: str, redirections: str, status: int) -> None:
    command = f"exec {shlex.join(COMMAND)} {arguments} {redirections}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == status, done.stderr


@pytest.mark.parametrize("full", [False, True])
def test_a_clip_is_made_where_its_progress_cannot_be_shown(
    tmp_path: Path, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream if full else None)
        monkeypatch.setattr(sys, "stdout", None)
        assert main.main([*CLIP[:-1], "--height", "64", "--width", "64", "--out", str(tmp_path / "c.gif")]) == 0
    assert (tmp_path / "c.gif").is_file()


def test_sigterm_leaves_no_file_and_no_ffmpeg(tmp_path: Path) -> None:
    slow, log = tmp_path / "ffmpeg", tmp_path / "pid"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *trial*) exec {ffmpeg.program()} "$@";; esac\n'
        f'for last; do :; done\necho half > "${{last#file:}}"\necho $$ > {log}\nexec sleep 60\n'
    )
    slow.chmod(0o755)
    (tmp_path / "out").mkdir()
    command = [*COMMAND, *CLIP, "--out", str(tmp_path / "out" / "clip.mp4")]
    process = subprocess.Popen(
        command, env=os.environ | {"IMAGEIO_FFMPEG_EXE": str(slow)}, stdout=subprocess.DEVNULL, cwd="/"
    )
    deadline = time.monotonic() + 100
    while not (log.is_file() and log.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(os.listdir(tmp_path / "out")) == 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path / "out") == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def run_as_unknown_user(
    folder: Path, commands: list[list[str]], environment: dict[str, str]
) -> tuple[list[int], list[str]]:
    """Run commands in `folder` as a user without name or home; return their statuses and the lines on stderr.

    The interpreter may be in root's home, so root imports all modules first: by making a clip, and by commands that
    refuse missing files.
    """
    folder.chmod(0o777)
    for parent in folder.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o755)
    script = f"""
import contextlib, io, os, shutil, sys
from reducio_fast.cli.main import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    os.environ["REDUCIO_CACHE_DIR"] = {str(folder / "roots")!r}
    main({[*CLIP, "--out", str(folder / "warm.gif")]!r})
    main(["reconstruct", {str(folder / "warm.gif")!r}, "--out", {str(folder / "warm2.gif")!r}])
    for command in (["decode", "none", "--out", "none.gif"], ["convert", "none.ckpt", "--into", "none"]):
        main(command)
    from reducio_fast.pipelines.generate import forget
    forget()
for name in ("HOME", "REDUCIO_CACHE_DIR", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
    os.environ.pop(name, None)
os.environ |= {environment!r}
os.setgroups([]); os.setgid({UNKNOWN_USER}); os.setuid({UNKNOWN_USER})
statuses = []
for arguments in {commands!r}:
    with contextlib.redirect_stdout(io.StringIO()):
        statuses.append(main(arguments))
print(*statuses)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [int(status) for status in done.stdout.split()], done.stderr.strip().splitlines()


@ROOT_ONLY
@pytest.mark.parametrize("cache", [None, "~no-such-user/x"])
def test_a_user_without_a_home(tmp_path: Path, cache: str | None) -> None:
    environment = {"TMPDIR": str(tmp_path)} | ({} if cache is None else {"REDUCIO_CACHE_DIR": cache})
    statuses, lines = run_as_unknown_user(tmp_path, [[*CLIP, "--out", "c.gif"]], environment)
    assert statuses == [0] and (tmp_path / "c.gif").is_file()
    assert len([line for line in lines if "cache: " in line and "reducio-fast-12345" in line]) == 1


@ROOT_ONLY
def test_a_folder_that_may_not_be_entered(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir(mode=0o700)
    commands = [
        ["reconstruct", "private/x.mp4", "--out", "c.gif"],
        ["generate", "x", "--out", "c.gif", "--image", "private/x.png"],
        ["generate", "x", "--out", "private/c.gif"],
        ["generate", "x", "--out", "c.gif", "--model", "private/model"],
        ["decode", "private/x.safetensors", "--out", "c.gif"],
        ["convert", "private/x.ckpt", "--into", "model"],
        ["convert", "private/x.ckpt", "--out", "private/y/z"],
    ]
    statuses, lines = run_as_unknown_user(tmp_path, commands, {})
    assert statuses == [2] * len(commands)
    errors = [line for line in lines if "error: " in line]
    assert [line.split()[1].removesuffix(":") for line in errors] == [command[0] for command in commands]
    assert len(lines) == len(commands) and all("private" in line for line in errors), lines


def test_an_mp4_that_cannot_be_encoded_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    broken = tmp_path / "ffmpeg"
    broken.write_text("#!/bin/sh\ncat >/dev/null; echo 'Unknown encoder libx264' >&2; exit 8\n")
    broken.chmod(0o755)
    model = tmp_path / "model"  # not a model: reading it first would give another error
    model.mkdir()
    (model / "model_index.json").write_text('{"_class_name": "ReducioPipeline"}')
    done = run(
        *CLIP, "--out", tmp_path / "c.mp4", "--model", model, env=os.environ | {"IMAGEIO_FFMPEG_EXE": str(broken)}
    )
    assert done.returncode == 2 and "Unknown encoder libx264" in done.stderr


def test_a_rate_that_the_format_cannot_hold_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text('{"_class_name": "ReducioPipeline", "fps": 60}')
    done = run(*CLIP, "--out", tmp_path / "c.gif", "--model", model)
    assert done.returncode == 2 and "at most 50 frames a second" in done.stderr


def test_a_warm_up_ends_in_order_after_its_deadline() -> None:
    """While its thread still computes: Python would end under it, and the process abort."""
    done = run("warmup", "--sizes", "256", "--deadline", "0.01", "--device", "cpu", "--no-progress", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["left"] == ["256x256"], done.stderr
    assert "not done after 0.01 s" in done.stderr


def test_names_with_colons_go_in_and_out(tmp_path: Path) -> None:
    clip = np.stack([np.full((64, 64, 3), 12 * i, np.uint8) for i in range(16)])
    write_video(clip, tmp_path / "2026-01-02T10:30:00.mp4", 16)
    done = run(
        "reconstruct",
        "2026-01-02T10:30:00.mp4",
        "--out",
        "out:put.mp4",
        "--height",
        "64",
        "--width",
        "64",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert read_video(tmp_path / "out:put.mp4")[0].shape == (16, 64, 128, 3)
