"""Extraction on Ray and on a disk that is too small; `test_dit` has what the shards hold."""

from __future__ import annotations

import errno
import importlib.util
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reducio_fast.cli.main import main
from reducio_fast.data import latent_shards, photos
from reducio_fast.data.curation import manifest
from reducio_fast.data.latent_shards import Clip
from reducio_fast.media.video_files import write_video
from reducio_fast.training.reducio import extract

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of a video that gives two clips, and of one that cannot be read."""
    folder = tmp_path_factory.mktemp("clips")
    write_video(photos.render(np.random.default_rng(1), 64, 32, name="chelsea"), folder / "cat.mp4", 16)
    row = dict.fromkeys(manifest.COLUMNS) | {"start": 0, "end": 32, "fps": 16.0, "height": 64, "width": 64}
    rows = [row | {"id": name, "video": str(folder / f"{name}.mp4"), "caption": name} for name in ("cat", "gone")]
    manifest.write(rows, folder / "clips.parquet")
    return folder / "clips.parquet"


@pytest.fixture(scope="module")
def latents(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, threads = tmp_path_factory.mktemp("latents") / "latents", torch.get_num_threads()
    torch.set_num_threads(1)  # as a task on Ray has: the order of sums depends on it
    done = extract.extract(clips, out, size=64, shard_size=2, progress=False)
    torch.set_num_threads(threads)
    assert done == {"clips": 4, "errors": 2, "shards": 2}
    return out


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_on_ray_the_files_are_those_of_the_local_run(
    clips: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    extract.extract(clips, "out", size=64, shard_size=2, ray="local", progress=False)
    files = {path.relative_to(latents) for path in latents.rglob("*") if path.is_file()}
    assert files == {path.relative_to("out") for path in Path("out").rglob("*") if path.is_file()}
    assert all((latents / name).read_bytes() == Path("out", name).read_bytes() for name in files)


def test_a_disk_without_space_for_the_latents_is_refused_first(
    clips: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (shard,) = (latents / "64x64").glob("*.safetensors")  # of the two clips that can be read
    needed = 2 * sum(tensor.nbytes for tensor in load_file(shard).values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    out = tmp_path / "out"
    assert main(["extract", str(clips), "-o", str(out), "--size", "64", "--shard-size", "2", "--no-progress"]) == 2
    reason = f"at least {needed:,} bytes are needed, {needed - 1:,} are free"
    assert capsys.readouterr().err == f"reducio-fast extract: error: no space left in {out} for the latents: {reason}\n"
    assert [path.name for path in out.rglob("*")] == ["latents.json"]


def test_a_disk_that_fills_while_a_video_is_read_is_no_error_of_its_clips(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, start: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(extract.ffmpeg, "frames", fails)
    with pytest.raises(OSError, match="No space left"):
        extract.extract(clips, tmp_path, size=64, progress=False)
    assert not list(tmp_path.glob("64x64/*"))


def test_clips_of_many_videos_are_decoded_ahead_but_not_all_at_once(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames of at most a few clips wait for the encoders, and an error in the middle ends the readers."""
    cat, decoded, encoded = clips.parent / "cat.mp4", list[str](), list[str]()
    for i in range(12):
        shutil.copy(cat, tmp_path / f"{i}.mp4")
    row = dict.fromkeys(manifest.COLUMNS) | {"start": 0, "end": 32, "fps": 16.0, "height": 64, "width": 64}
    rows = [row | {"id": f"{i}", "video": str(tmp_path / f"{i}.mp4"), "caption": ""} for i in range(12)]
    crop = extract.cover_crop
    monkeypatch.setattr(extract, "cover_crop", lambda *args: (decoded.append(""), crop(*args))[1])
    monkeypatch.setattr(extract.cores, "usable", lambda: 2)

    def encode(self: extract.Encoders, frames: np.ndarray, clip_id: str) -> dict[str, torch.Tensor]:
        encoded.append(clip_id)
        time.sleep(0.05)
        assert len(decoded) - len(encoded) <= 2 + 2  # 2 in the queue, 1 in the hands of each reader
        if len(encoded) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return {"latent": torch.zeros(1), "content": torch.zeros(1), "semantic": torch.zeros(1)}

    monkeypatch.setattr(extract.Encoders, "encode", encode)
    manifest.write(rows, tmp_path / "clips.parquet")
    with pytest.raises(OSError, match="No space left"):
        extract.extract(tmp_path / "clips.parquet", tmp_path / "out", size=64, progress=False)
    assert len(set(encoded)) == 20 and not [t for t in threading.enumerate() if t.name.startswith("extract")]


def test_a_shard_decodes_a_film_from_its_own_first_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this the shards of a film read all of it that lies before them: the square of its length."""
    read = []

    def frames(path: Path, start: int = 0) -> Iterator[tuple[np.ndarray, float]]:
        for number in range(start, 4 * 40):
            read.append(number)
            yield np.full((8, 8, 3), number, np.uint8), 16.0

    class Encoders:
        config = SimpleNamespace(num_frames=4)

        def encode(self, chunk: np.ndarray, clip_id: str) -> dict[str, torch.Tensor]:
            return {"latent": torch.from_numpy(chunk[:, 0, 0, 0].astype(np.float16))}

    monkeypatch.setattr(extract.ffmpeg, "frames", frames)
    film = [Clip(f"{i:03d}", "film.mp4", 4 * i, 1, 16.0, (8, 8), 0) for i in range(40)]
    for shard in latent_shards.plan(film, 8):
        extract.write_clips(cast(Any, Encoders()), shard, tmp_path)
        latents = load_file(shard.path(tmp_path).with_suffix(".safetensors"))["latent"]
        assert latents.flatten().tolist() == list(range(32 * shard.number, 32 * shard.number + 32))
    assert read == list(range(160))
