"""Curation on Ray: the rows of a local run, errors in one line, and GPUs. `test_extract` has a run that starts its own
cluster and makes latents."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reducio_fast.cli.main import main
from reducio_fast.data import photos
from reducio_fast.data.curation import curate, manifest
from reducio_fast.data.curation.on_ray import map_on_ray
from reducio_fast.media.video_files import write_video
from reducio_fast.system import ray_cluster
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def refusal() -> Iterator[str]:
    """One cluster for all runs, which end none, so its processes keep what they have imported. Before it, another one
    without a GPU, and the line that refuses it. Ray is told how many GPUs there are."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 2, "GPU": 0}')
        with pytest.raises(ReducioError) as refused:
            list(map_on_ray([0], lambda task: task, "local", gpu=True))
        patched.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 2, "GPU": 1}')
        ray = ray_cluster.connect("local")
        end = ray.shutdown
        patched.setattr(ray, "shutdown", lambda: None)
        patched.setattr(ray_cluster, "connect", lambda address: ray)
        yield str(refused.value)
        end()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shots, a still, and two unreadable files."""
    folder, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(3)
    first, second = (photos.render(rng, 96, 40, name=name) for name in ("astronaut", "flower"))
    write_video(np.concatenate([first, second]), folder / "cut.mp4", 24)
    write_video(np.repeat(first[:1], 40, axis=0), folder / "still.mp4", 24)
    (folder / "broken.mp4").write_bytes((folder / "still.mp4").read_bytes()[:300])
    (folder / "words.mp4").write_text("no video")
    return folder


def test_a_cluster_without_a_gpu_is_refused_where_each_task_needs_one(refusal: str) -> None:
    assert refusal == "--ray local: the cluster has no GPU, and each task needs one"


def test_the_rows_are_those_of_the_local_run(videos: Path, tmp_path: Path, refusal: str) -> None:
    for name, where in (("here", None), ("ray", "local")):
        settings = curate.Settings(str(tmp_path / name), text=False)
        done = curate.curate([videos], settings, workers=0, ray=where, progress=False)
        assert (done.made, done.broken) == (4, 2)
    rows = manifest.read(tmp_path / "here")
    assert rows == manifest.read(tmp_path / "ray") and sum(row["error"] is None for row in rows) == 3


def test_an_error_of_a_task_is_one_line(
    videos: Path, tmp_path: Path, refusal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder lies where the task writes its file."""
    part = manifest.part_path(tmp_path, str(videos / "still.mp4"))
    part.mkdir(parents=True)
    command = ["curate", str(videos / "still.mp4"), "-o", str(tmp_path), "--no-text", "--no-progress"]
    for where in ([], ["--ray", "local"]):
        assert main([*command, *where]) == 2
        line = capsys.readouterr().err
        assert str(part) in line and line.count("\n") == 1


def test_each_task_has_a_gpu_and_keeps_what_it_loaded(refusal: str) -> None:
    """The tasks do not use it."""
    seen = list(
        map_on_ray([0, 1, 2], lambda task: f"{os.environ['CUDA_VISIBLE_DEVICES']} {os.getpid()}", "local", gpu=True)
    )
    assert len(seen) == 3 and len(set(seen)) == 1 and seen[0].startswith("0 ")


class Noticed:
    """A task of which each copy that is unpickled makes an entry in `folder`; the copy is the path of that entry."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return tempfile.mkdtemp, (None, None, self.folder)


def test_a_task_gets_no_other_tasks(tmp_path: Path, refusal: str) -> None:
    """With all of them in each task, 400 shards of 256 clips took more than 230 s instead of 27."""
    seen = list(map_on_ray([Noticed(tmp_path) for _ in range(3)], str, "local"))
    assert sorted(seen) == sorted(str(path) for path in tmp_path.iterdir()) and len(seen) == 3
