"""The command as a process: signals, streams, users without a home. Errors are one line and a status, no traceback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reducio_fast.cli import main
from reducio_fast.cli.printing import Failed
from reducio_fast.media import ffmpeg
from reducio_fast.media.video_files import read_video, write_video
from reducio_fast.system import deadline

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "reducio_fast"]
CLIP = ["generate", "a red circle", "--num-inference-steps", "1", "--no-progress"]
ROOT_ONLY = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to run as another user")
UNKNOWN_USER = 12345  # in no user database


def run(*arguments: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    kwargs = {"capture_output": True, "text": True, "timeout": 120, "cwd": "/"} | kwargs
    return subprocess.run([*COMMAND, *map(str, arguments)], **kwargs)


def test_no_message_commands_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["reconstruct", "a\033[31m\nb.mp4", "--out", "c.mp4"], ["env", "--x\033[31m\ny"]):
        with contextlib.suppress(SystemExit):
            assert main.main(command) == 2
        err = capsys.readouterr().err
        assert "\\x1b[31m" in err and "\033" not in err and err.count("\n") == 1


def test_a_terminal_that_cannot_show_the_prompt(tmp_path: Path) -> None:
    arguments = [CLIP[0], "红 circle", *CLIP[2:], "--out", str(tmp_path / "c.gif")]
    done = run(*arguments, env=os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}, encoding="latin-1")
    assert done.returncode == 0 and "? circle" in done.stdout and (tmp_path / "c.gif").is_file()


@pytest.mark.parametrize("arguments", [["env"], ["env", "--json"], ["--help"], ["generate", "--help"], ["--version"]])
def test_a_reader_that_has_gone(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run(*arguments, stdout=writing, stderr=subprocess.PIPE, capture_output=False)
    os.close(writing)
    assert done.returncode == 128 + signal.SIGPIPE and done.stderr == ""


@pytest.mark.parametrize(("argument", "name"), [("env", "reducio-fast env"), ("--help", "reducio-fast")])
def test_an_output_that_is_full(argument: str, name: str) -> None:
    with open("/dev/full", "w") as full:
        done = run(argument, stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert done.returncode == 2 and done.stderr == f"{name}: error: No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "redirections", "status"),
    [("env", ">&- 2>&-", 0), ("reconstruct nope.mp4 --out c.gif", "2>/dev/full", 2), ("nope", "2>/dev/full", 2)],
)
def test_streams_that_cannot_be_written_change_no_status(arguments: str, redirections: str, status: int) -> None:
    command = f"exec {shlex.join(COMMAND)} {arguments} {redirections}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == status, done.stderr


def test_no_file_gets_the_descriptor_of_a_closed_stream() -> None:
    code = "import os\nfrom reducio_fast.cli.printing import writable_streams as w\nwith w(): os._exit(os.open('/', 0))"
    done = subprocess.run(["sh", "-c", f"exec {shlex.join([sys.executable, '-c', code])} <&- >&- 2>&-"], cwd="/")
    assert done.returncode > 2


def test_a_result_with_errors_that_cannot_be_printed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: Any) -> Any:
        raise Failed("two of three", ({}, ["one is right"]))

    monkeypatch.setattr(main.env, "run", run)
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            assert main.main(["env"]) == 2
    assert err.getvalue() == "reducio-fast env: error: No space left on device\n"


@pytest.mark.parametrize(("signal_number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_process_in_order_while_a_warm_up_still_computes(
    signal_number: signal.Signals, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread would abort the process where Python ends under it, so the command ends the process itself."""
    computed, ended = threading.Event(), []

    def run(arguments: Any) -> Any:
        threading.Thread(target=computed.wait, args=(60,), name=deadline.THREAD, daemon=True).start()
        signal.raise_signal(signal_number)

    monkeypatch.setattr(main.env, "run", run)
    monkeypatch.setattr(os, "_exit", ended.append)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    try:
        assert main.main(["env"]) == status and ended == [status]
    finally:
        signal.signal(signal.SIGINT, before)
        computed.set()


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


PRIVATE = [
    ["reconstruct", "private/x.mp4", "--out", "c.gif"],
    ["generate", "x", "--out", "c.gif", "--image", "private/x.png"],
    ["generate", "x", "--out", "private/c.gif"],
    ["generate", "x", "--out", "c.gif", "--model", "private/model"],
    ["decode", "private/x.safetensors", "--out", "c.gif"],
    ["convert", "private/x.ckpt", "--into", "model"],
    ["convert", "private/x.ckpt", "--out", "private/y/z"],
]
NO_HOME = {"no cache": None, "no cache of that user": "~no-such-user/x"}


@pytest.fixture(scope="module")
def unknown_user(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[int], list[str]]]:
    """By case, what commands leave of a user without name or home: the folder they ran in, their statuses, and the
    lines on stderr.

    The interpreter may be in root's home, so root imports all modules first: by making a clip, and by commands that
    refuse missing files. Each case is a child of that process.
    """
    folder = tmp_path_factory.mktemp("unknown")
    for parent in folder.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o755)
    cases: dict[str, tuple[list[list[str]], dict[str, str]]] = {"private": (PRIVATE, {})}
    for name, cache in NO_HOME.items():
        environment = {} if cache is None else {"REDUCIO_CACHE_DIR": cache}
        cases[name] = [[*CLIP, "--out", "c.gif"]], {"TMPDIR": str(folder / name)} | environment
    for path in (folder, *(folder / name for name in cases)):
        path.mkdir(exist_ok=True)
        path.chmod(0o777)
    (folder / "private" / "private").mkdir(mode=0o700)
    script = f"""
import contextlib, io, os, sys
from pathlib import Path
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
for name, (commands, environment) in {cases!r}.items():
    child = os.fork()
    if child == 0:
        os.chdir({str(folder)!r} + "/" + name)
        os.dup2(os.open("stderr", os.O_CREAT | os.O_WRONLY), 2)
        os.dup2(os.open("statuses", os.O_CREAT | os.O_WRONLY), 1)
        os.environ |= environment
        os.setgroups([]); os.setgid({UNKNOWN_USER}); os.setuid({UNKNOWN_USER})
        statuses = []
        for arguments in commands:
            with contextlib.redirect_stdout(io.StringIO()):
                statuses.append(main(arguments))
        print(*statuses, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    # One thread, since OpenMP's threads do not survive a fork.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    found = {}
    for name in cases:
        statuses, lines = ((folder / name / file).read_text() for file in ("statuses", "stderr"))
        found[name] = folder / name, [int(status) for status in statuses.split()], lines.strip().splitlines()
    return found


@ROOT_ONLY
@pytest.mark.parametrize("case", NO_HOME)
def test_a_user_without_a_home(unknown_user: dict[str, tuple[Path, list[int], list[str]]], case: str) -> None:
    folder, statuses, lines = unknown_user[case]
    assert statuses == [0] and (folder / "c.gif").is_file(), lines
    assert len([line for line in lines if "cache: " in line and "reducio-fast-12345" in line]) == 1


@ROOT_ONLY
def test_a_folder_that_may_not_be_entered(unknown_user: dict[str, tuple[Path, list[int], list[str]]]) -> None:
    _, statuses, lines = unknown_user["private"]
    assert statuses == [2] * len(PRIVATE), lines
    errors = [line for line in lines if "error: " in line]
    assert [line.split()[1].removesuffix(":") for line in errors] == [command[0] for command in PRIVATE]
    assert len(lines) == len(PRIVATE) and all("private" in line for line in errors), lines


def test_an_mp4_that_cannot_be_encoded_is_refused_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "ffmpeg"
    broken.write_text("#!/bin/sh\ncat >/dev/null; echo 'Unknown encoder libx264' >&2; exit 8\n")
    broken.chmod(0o755)
    model = tmp_path / "model"  # not a model: reading it first would give another error
    model.mkdir()
    (model / "model_index.json").write_text('{"_class_name": "ReducioPipeline"}')
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(broken))
    assert main.main([*CLIP, "--out", str(tmp_path / "c.mp4"), "--model", str(model)]) == 2
    assert "Unknown encoder libx264" in capsys.readouterr().err


def test_the_encoder_that_is_asked_for_is_tried_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ffmpeg, "hardware_encoder", lambda: ffmpeg.Encoder("h264_of_no_machine", ""))
    (tmp_path / "model_index.json").write_text('{"_class_name": "ReducioPipeline"}')
    command = [*CLIP, "--out", str(tmp_path / "c.mp4"), "--model", str(tmp_path)]
    assert main.main([*command, "--encoding", "hardware"]) == 2
    assert "Unknown encoder 'h264_of_no_machine'" in capsys.readouterr().err


def test_a_rate_that_the_format_cannot_hold_is_refused_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text('{"_class_name": "ReducioPipeline", "fps": 60}')
    assert main.main([*CLIP, "--out", str(tmp_path / "c.gif"), "--model", str(model)]) == 2
    assert "at most 50 frames a second" in capsys.readouterr().err


def test_a_warm_up_ends_in_order_after_its_deadline() -> None:
    """While its thread still computes: Python would end under it, and the process abort."""
    done = run("warmup", "--sizes", "256", "--deadline", "0.01", "--device", "cpu", "--no-progress", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["left"] == ["256x256"], done.stderr
    assert "not done after 0.01 s" in done.stderr


def test_names_with_colons_go_in_and_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    clip = np.stack([np.full((64, 64, 3), 12 * i, np.uint8) for i in range(16)])
    write_video(clip, tmp_path / "2026-01-02T10:30:00.mp4", 16)
    argv = ["reconstruct", "2026-01-02T10:30:00.mp4", "--out", "out:put.mp4", "--height", "64", "--width", "64"]
    assert main.main(argv) == 0
    assert read_video(tmp_path / "out:put.mp4")[0].shape == (16, 64, 128, 3)
