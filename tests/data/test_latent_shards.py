"""Latents on disk: their shards, their order in an epoch, and files that are replaced."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from reducio_fast.data import latent_shards
from reducio_fast.data.epoch_order import EpochOrder
from reducio_fast.data.latent_settings import ABOUT, About, write_about
from reducio_fast.data.latent_shards import Clip, LatentDataset, plan
from reducio_fast.system.errors import ReducioError


def test_clips_go_to_buckets_and_files_by_their_ids() -> None:
    def clip(number: int, bucket: tuple[int, int]) -> Clip:
        return Clip(f"{number:03d}", "v", 0, 1, 16.0, bucket, 0)

    made = [clip(i, (256, 256) if i % 3 else (192, 320)) for i in range(10)]
    shards = plan(made[::-1], 3)
    assert shards == plan(made, 3)
    assert [(s.bucket, s.number, [c.id for c in s.clips]) for s in shards] == [
        ((192, 320), 0, ["000", "003", "006"]),
        ((192, 320), 1, ["009"]),
        ((256, 256), 0, ["001", "002", "004"]),
        ((256, 256), 1, ["005", "007", "008"]),
    ]


def test_an_epoch_visits_every_clip_in_batches_of_one_bucket() -> None:
    order = EpochOrder({"a": 5, "b": 4, "c": 1}, batch=2, seed=3)
    assert order.length == 3 + 2 + 1
    for epoch in range(2):
        seen: dict[str, list[int]] = {}
        for step in range(epoch * 6, epoch * 6 + 6):
            bucket, rows = order.rows(step)
            assert len(rows) == 2
            seen.setdefault(bucket, []).extend(rows)
        assert {k: sorted(set(v)) for k, v in seen.items()} == {"a": [0, 1, 2, 3, 4], "b": [0, 1, 2, 3], "c": [0]}
    first = [order.rows(step) for step in range(6)]
    assert first != [order.rows(step) for step in range(6, 12)]
    assert first == [EpochOrder({"c": 1, "b": 4, "a": 5}, 2, 3).rows(step) for step in range(6)]


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    clip = Clip("a", "v", 0, 1, 16.0, (32, 32), 0)
    shards = plan([clip], 1)
    write_about(tmp_path, About({}, "", 1, 1, 2, 1, 0))
    for value in (1.0, 2.0):
        latent_shards.write_text(tmp_path, 0, [torch.full((3, 2), value)])
        latent_shards.write_shard(tmp_path, shards[0], {"a": {"latent": torch.full((1, 1, 1, 1), value)}})
        latent_shards.join_index(tmp_path, shards)
        sample = LatentDataset(tmp_path).sample("32x32", 0)
        assert sample["latent"].item() == value and (sample["text"] == value).all()


CLIPS = [Clip(name, "v", 0, 1, 16.0, (32, 32), i) for i, name in enumerate("ab")]


def written(folder: Path) -> list[Path]:
    """Two clips, each with its caption; the files of latents and of texts."""
    write_about(folder, About({}, "", 2, 2, 2, 2, 0))
    latent_shards.write_text(folder, 0, [torch.full((3, 2), float(i)).half() for i in range(2)])
    (shard,) = plan(CLIPS, 2)
    latent_shards.write_shard(folder, shard, {c.id: {"latent": torch.full((4,), 1.0).half()} for c in CLIPS})
    latent_shards.join_index(folder, [shard])
    return [folder / name / "shard-00000.safetensors" for name in ("32x32", "text")]


def read(folder: Path) -> list[tuple[float, list[float]]]:
    dataset = LatentDataset(folder)
    samples = [dataset.sample("32x32", i) for i in (0, 1, 0, -1)]
    return [(sample["latent"].sum().item(), sample["text"].flatten().tolist()) for sample in samples]


def test_every_clip_and_caption_is_compared_with_its_checksum(tmp_path: Path) -> None:
    """A changed byte is an error, wherever it is in the data of either file, or it changes nothing that is read."""
    for number in range(2):
        path = written(tmp_path)[number]
        whole, right, refused = path.read_bytes(), read(tmp_path), 0
        places = range(8 + int.from_bytes(whole[:8], "little"), len(whole), 3)
        for place in places:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            try:
                assert read(tmp_path) == right
            except ReducioError as error:
                assert re.match(f"{re.escape(str(path))}.* damaged.*; remove it.*, extract again", str(error))
                refused += 1
        assert refused >= len(places) - 3  # the bytes of the last offset: a slice ends where the tensor ends
        path.write_bytes(whole)
        assert read(tmp_path) == right


def test_texts_without_checksums_load_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, path = written(tmp_path)
    save_file({name: value for name, value in load_file(path).items() if name != "sha256"}, path)
    dataset = LatentDataset(tmp_path)
    assert [dataset.sample("32x32", i)["text"].unique().item() for i in (0, 1)] == [0, 1]
    assert [r.message.split(": ")[1] for r in caplog.records] == [
        "texts without checksums, of an older version; damage to them stays unseen"
    ]


def test_a_damaged_list_of_settings_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / ABOUT
    for text in ("[1]", "[" * 200_000, path.read_text().replace('"encoders": {}', '"encoders": 5')):
        path.write_text(text)
        with pytest.raises(ReducioError, match=r"latents.json is damaged: .*; run reducio-fast extract again"):
            LatentDataset(tmp_path, encoders={"vae": "0"})


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    """Also where the checksums of clips do not reach: the frame rate of a clip."""
    written(tmp_path)
    path = tmp_path / "index.parquet"
    whole, rate = path.read_bytes(), torch.tensor(16.0, dtype=torch.float64).numpy().tobytes()
    assert rate in whole
    path.write_bytes(whole.replace(rate, torch.tensor(17.0, dtype=torch.float64).numpy().tobytes(), 1))
    with pytest.raises(ReducioError, match=r"index.parquet is damaged: .*; remove it, run reducio-fast extract again"):
        LatentDataset(tmp_path)


WRONG_FIELDS: dict[str, tuple[object, ...]] = {
    "encoders": (None, [], {"vae": 1}),
    "clips": (None, 1),
    "count": (None, "2", 2.0, True, -1, 10**30),
    "captions": ("x", -1, 10**30, None),
    "caption_channels": ("x", 0),
    "shard_size": (0, "a", -1, 2.5),
    "seed": ("0", -1, None, 2**32),
    "dtype": (None, 1, "int8"),
    "clean_caption": (None, 0, "no"),
    "content_scaling_factor": (None, "1", 0, float("nan"), True),
    "encoder_dtype": (5, ["float32"]),
    "caption_length": ("x", 0, 1.5, False),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_FIELDS.items() for value in values]
)
def test_a_wrong_setting_is_named(name: str, value: object, tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / ABOUT
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ReducioError) as caught:
        LatentDataset(tmp_path)
    line = str(caught.value)
    assert line.startswith(f"{path} is damaged: {name} is {value!r}, it must be ")
    assert line.endswith("; run reducio-fast extract again, into another folder") and "\n" not in line


@pytest.mark.parametrize("version", [True, 1.0, "1", None, 2])
def test_another_version_is_refused(version: object, tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / ABOUT
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))
    with pytest.raises(ReducioError, match=re.escape(f"latents.json has version {version!r}, this reads 1; run ")):
        LatentDataset(tmp_path)


WRONG_ROWS: dict[str, tuple[object, ...]] = {
    "id": (None,),
    "shard": (None, -1, 10**12),
    "row": (None, -1, 2),
    "bucket": (None, "", "../32x32"),
    "caption": (None, -1, 2),
    "fps": (None, float("nan"), float("inf"), 0.0, -1.0),
    "motion": (float("nan"), float("inf")),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_ROWS.items() for value in values])
def test_a_wrong_value_of_the_index_is_named_with_its_row(name: str, value: object, tmp_path: Path) -> None:
    """Whether the index has it, or a shard's part from which the index is joined. A row with an error may have it."""
    shard = written(tmp_path)[0]
    for path, read in (
        (tmp_path / latent_shards.INDEX, lambda: LatentDataset(tmp_path)),
        (shard.with_suffix(".parquet"), lambda: latent_shards.join_index(tmp_path, plan(CLIPS, 2))),
    ):
        table = parquet.read_table(path)
        rows = table.to_pylist()
        rows[1] |= {name: value}
        parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), path)
        with pytest.raises(ReducioError) as caught:
            read()
        line = str(caught.value)
        assert line.startswith(f"{path}: row 1: {name} is {value!r}, it must be ") and "\n" not in line
        assert line.endswith("; remove it, run reducio-fast extract again")
        rows[1] |= {"error": "broken"}
        parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), path)
        read()


def test_a_column_of_the_index_of_another_type_is_named(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / latent_shards.INDEX
    table = parquet.read_table(path)
    texts = pyarrow.array(["0", "1"])
    parquet.write_table(table.set_column(table.schema.get_field_index("shard"), "shard", texts), path)
    with pytest.raises(ReducioError, match="index.parquet: shard is of type string, it must be of type int64; remove"):
        LatentDataset(tmp_path)
