"""A fresh user without a network: a new process, an empty home, and sockets that do not connect."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from reducio_fast.media.video_files import read_video

pytestmark = pytest.mark.slow

NO_NETWORK = """\
import socket

def refuse(*_, **__):
    print("a connection was tried")
    raise socket.gaierror(-3, "Temporary failure in name resolution")

socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
"""


def run(code: str, home: Path) -> subprocess.CompletedProcess:
    env = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "HUGGINGFACE_", "XDG_", "REDUCIO_"))}
    return subprocess.run(
        [sys.executable, "-c", NO_NETWORK + code],
        capture_output=True,
        text=True,
        cwd=home,
        timeout=200,
        env=env | {"HOME": str(home)},
    )


def test_three_lines_and_a_folder_make_a_clip(folder: Path, tmp_path: Path):
    done = run(
        "import reducio_fast\n"
        f"pipe = reducio_fast.ReducioPipeline.from_pretrained({str(folder)!r})\n"
        'pipe("a red circle moving right", num_inference_steps=2).save("clip.webp")\n',
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "a connection was tried" not in done.stdout
    frames, fps = read_video(tmp_path / "clip.webp")
    assert frames.shape == (16, 64, 64, 3) and fps == pytest.approx(12, rel=0.02) and np.ptp(frames) > 10


def test_a_hub_id_says_in_one_line_what_to_download(tmp_path: Path):
    done = run(
        "import reducio_fast\n"
        "try:\n"
        '    reducio_fast.generate("a star", model="some-owner/some-model")\n'
        "except ValueError as error:\n"
        "    print(type(error).__name__, error, sep=': ')\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    *tried, line = done.stdout.splitlines()
    assert set(tried) == {"a connection was tried"}
    assert line.startswith("ReducioError: model: 'some-owner/some-model' is no local folder and could not be fetched")
    assert line.endswith("run `hf download some-owner/some-model --local-dir DIR`, then pass DIR")
