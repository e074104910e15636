"""`reducio-fast batch`: its prompts, its folder, and runs that stop. Only the slow tests load a model."""

from __future__ import annotations

import datetime
import errno
import functools
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reducio_fast import ReducioError
from reducio_fast.cli.main import main
from reducio_fast.pipelines.call.output import ReducioOutput
from reducio_fast.server import batch, clips


def test_prompts_of_every_format(tmp_path: Path) -> None:
    rows = [{"prompt": "a red circle", "seed": 3}, {"prompt": 'a "blue", star'}]
    (tmp_path / "p.txt").write_text("\ufeffa red circle\n\n  a blue star\n", encoding="utf-8")  # a BOM, of Windows
    lines = [*(json.dumps(row) for row in rows), '"a\u2028line"', '{"prompt": null, "image": "i.png", "seed": null}']
    (tmp_path / "p.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    (tmp_path / "p.csv").write_text('prompt,seed\na red circle,3\n"a ""blue"", star",\n')
    pq.write_table(pa.table({"prompt": [r["prompt"] for r in rows], "seed": [3, None]}), tmp_path / "p.parquet")
    assert batch.read_prompts(tmp_path / "p.txt") == [{"prompt": "a red circle"}, {"prompt": "a blue star"}]
    assert batch.read_prompts(tmp_path / "p.jsonl") == [*rows, {"prompt": "a\u2028line"}, {"image": "i.png"}]
    assert batch.read_prompts(tmp_path / "p.csv") == [rows[0] | {"seed": "3"}, rows[1]]
    assert batch.read_prompts(tmp_path / "p.parquet") == rows
    for name, text, line in (
        ("p.doc", "x", "no type that is known"),
        ("none.txt", None, "no such file"),
        ("empty.txt", "\n", "holds none"),
        ("bad.jsonl", "{", "cannot be read"),
        ("bad.parquet", "x", "cannot be read"),
        ("bad.csv", "text\nx\n", "row 0 of .* has neither prompt nor image"),
        ("number.jsonl", "1\n", "row 0 of .* has neither prompt nor image"),
        ("null.jsonl", '{"prompt": null}\n', "row 0 of .* has neither prompt nor image"),
        ("deep.jsonl", "[" * 100_000, "cannot be read"),
        ("nan.jsonl", '{"prompt": "x", "fps": NaN}\n', "row 0 of .*: fps is nan, which JSON does not have"),
        ("comma.csv", "prompt\na star\na circle, moving right\n", "row 1 of .* has more cells than the header; quote"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ReducioError, match=line):
            batch.read_prompts(tmp_path / name)
    path = tmp_path / "picture.parquet"
    pq.write_table(pa.table({"prompt": pa.array([None], pa.string()), "image": ["i.png"]}), path)
    assert batch.read_prompts(path) == [{"image": "i.png"}]
    for value in (datetime.date(2024, 5, 1), Decimal("1.5"), b"x"):
        pq.write_table(pa.table({"prompt": ["a"], "more": [value]}), path)
        with pytest.raises(ReducioError, match="row 0 of .*: more is .*, which JSON does not have"):
            batch.read_prompts(path)


def test_a_batch_of_several_seeds_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several seeds of a prompt make one file, which a second run keeps; another model or dtype is refused."""

    class StandIn:
        encoding = "fast"

        def __init__(self, **_: Any) -> None:
            self.pipe = self

        def __call__(self, seed: int, num_videos_per_prompt: int = 1, **_: Any) -> ReducioOutput:
            many = num_videos_per_prompt > 1
            frames = np.zeros((num_videos_per_prompt, 2, 32, 32, 3), np.uint8)
            seeds = [seed + i for i in range(num_videos_per_prompt)]
            return ReducioOutput(frames if many else frames[0], None, seeds, 8, {}, is_list=many)

    monkeypatch.setattr(clips, "Clips", StandIn)
    rows = [{"prompt": "a", "num_videos_per_prompt": 2}, {"prompt": "b"}]

    def run(**worker: Any) -> batch.Done:
        return batch.make_clips(rows, batch.Settings(out=str(tmp_path / "out"), worker=worker, call={}))

    manifest = tmp_path / "out" / "manifest.jsonl"
    assert run(model="m").made == 2
    made = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [(row["file"], row["frames"], row["size"]) for row in made] == [
        ("00000.mp4", 2, "64x32"),
        ("00001.mp4", 2, "32x32"),
    ]
    assert sorted(path.name for path in manifest.parent.glob("*.mp4")) == ["00000.mp4", "00001.mp4"]
    with manifest.open("ab") as file:
        file.write(b'7\n{"number": [1]}\n{"file": "x"}\n\xff\n')
    done = run(model="m")
    assert (done.made, done.kept) == (0, 2)
    assert [json.loads(line) for line in manifest.read_text().splitlines()] == made
    for worker in ({"model": "other"}, {"model": "m", "dtype": "float16"}, {"model": "m", "quantise": "fp8"}, {}):
        with pytest.raises(ReducioError, match="holds clips of other prompts or settings, or of another model"):
            run(**worker)


def test_a_long_batch_gives_memory_back_and_keeps_latents_beside_its_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty clips of thirty sizes left 0.38 GB of free memory with the process."""
    order: list[str] = []

    class StandIn:
        encoding = "fast"

        def __init__(self, **_: Any) -> None:
            self.pipe = self
            self.rescue_folder = tmp_path / "gone with the process"

        def __call__(self, prompt: str, seed: int, **_: Any) -> ReducioOutput:
            order.append(prompt)
            if prompt == "b":
                raise ReducioError(f"vae.decode: out of memory; the latents are kept in {self.rescue_folder}")
            return ReducioOutput(np.zeros((2, 32, 32, 3), np.uint8), None, [seed], 8, {})

    monkeypatch.setattr(clips, "Clips", StandIn)
    monkeypatch.setattr(clips, "give_back_memory", lambda: order.append("given back"))
    rows = [{"prompt": prompt} for prompt in "abc"]
    done = batch.make_clips(rows, batch.Settings(out=str(tmp_path / "out"), worker={}, call={}))
    assert order == ["a", "given back", "b", "given back", "c", "given back"]
    assert done.errors == [(1, f"vae.decode: out of memory; the latents are kept in {tmp_path / 'out'}")]


def test_a_batch_that_cannot_encode_makes_no_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    class StandIn:
        encoding = "quality"

        def __init__(self, **_: Any) -> None:
            self.pipe = self

        def __call__(self, **call: Any) -> ReducioOutput:
            made.append(call)
            return ReducioOutput(np.zeros((2, 32, 32, 3), np.uint8), None, [0], call.get("fps", 7), {})

    monkeypatch.setattr(clips, "Clips", StandIn)
    monkeypatch.setenv("REDUCIO_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "fps": 1000000000000}\n{"prompt": "b"}\n')
    command = ["batch", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out"), "--no-progress"]
    assert main(command) == 2 and [call["prompt"] for call in made] == ["b"]
    line = "1 of 2 prompts made no clip, the first is number 0: an .mp4 holds at most 1000000 "
    assert line in capsys.readouterr().err and not (tmp_path / "cache" / "frames").exists()
    made.clear()
    broken = tmp_path / "ffmpeg"
    broken.write_text("#!/bin/sh\ncat >/dev/null; echo 'Unknown encoder libx264' >&2; exit 8\n")
    broken.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(broken))
    assert main([*command[:3], str(tmp_path / "other"), "--no-progress"]) == 2 and not made
    err = capsys.readouterr().err
    assert err == "reducio-fast batch: error: cannot write clip.mp4: Unknown encoder libx264\n"
    assert not (tmp_path / "other").exists()


def test_a_run_that_made_no_clip_can_be_repeated_with_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Ray the model is loaded after the prompts are kept."""

    def refused(tasks: Any, settings: batch.Settings) -> Any:
        raise ReducioError(f"no model {settings.worker['model']}")
        yield

    monkeypatch.setattr(batch, "_on_ray", refused)
    for model in ("wrong", "other"):
        settings = batch.Settings(out=str(tmp_path), worker={"model": model}, call={}, ray="local")
        with pytest.raises(ReducioError, match=f"^no model {model}$"):
            batch.make_clips([{"prompt": "a"}], settings)


@pytest.mark.slow
def test_a_batch_goes_on_where_it_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"a red circle number {n}" for n in range(8)]
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in [*prompts[:3], "", *prompts[4:]])
    )
    command = ["batch", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out"), "--num-inference-steps", "1"]
    command += ["--height", "64", "--width", "64", "--no-progress", "--encoding", "fast", "--json"]
    made = 0

    def stop() -> None:
        nonlocal made
        made += 1
        if made == 4:
            raise KeyboardInterrupt  # as Ctrl-C between two clips

    rows = batch.read_prompts(tmp_path / "p.jsonl")
    worker = {"model": None, "dtype": None, "device": None, "backend": "auto", "compile": None, "encoding": "fast"}
    call = {"height": 64, "width": 64, "num_inference_steps": 1}
    monkeypatch.setattr(clips, "Clips", functools.cache(clips.Clips))  # both runs share it, so it is loaded once
    with pytest.raises(KeyboardInterrupt):
        batch.make_clips(rows, batch.Settings(out=str(tmp_path / "out"), worker=worker, call=call), stop)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.mp4")}
    assert 3 <= len(before) < 7
    (tmp_path / "out" / ".00006.12345678.mp4").touch()
    assert main(command) == 2
    captured = capsys.readouterr()
    counts = {"made": 7 - len(before), "kept": len(before), "failed": 1}
    assert json.loads(captured.out) == {"path": str(tmp_path / "out")} | counts
    assert "1 of 8 prompts made no clip, the first is number 3: prompt: is empty" in captured.err
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.mp4")}
    assert len(after) == 7 and before.items() <= after.items()
    manifest = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [row["number"] for row in manifest] == list(range(8))
    assert manifest[3]["error"].startswith("prompt: is empty")
    assert [row.get("seed") for row in manifest] == [0, 1, 2, None, 4, 5, 6, 7]
    assert all(row["encoder"] == "libx264" for row in manifest if "timings" in row)
    assert not list((tmp_path / "out").glob(".*"))
    (tmp_path / "p.jsonl").write_text('{"prompt": "another"}\n')
    assert main(command) == 2
    assert "holds clips of other prompts or settings, or of another model (number 0 differs)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_worker_on_ray_returns_what_ends_the_run(bundle: Path, tmp_path: Path) -> None:
    """Ray would raise it with its own traceback."""
    row = {"task": json.dumps({"number": 0, "path": str(tmp_path / "0.mp4"), "call": {"prompt": "a"}})}
    missing = batch._Actor({"model": str(tmp_path / "nothing")})
    assert str(tmp_path / "nothing") in json.loads(missing(row)["result"])["refused"]
    full = batch._Actor({"model": str(bundle)})

    def no_space(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    full.clips.pipe = no_space
    assert "No space left" in json.loads(full(row)["result"])["refused"]
