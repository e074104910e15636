"""Latents on disk: their shards, their order in an epoch, and files that are replaced."""

from __future__ import annotations

from pathlib import Path

import torch

from reducio_fast.data import latent_shards
from reducio_fast.data.latent_shards import About, Clip, EpochOrder, LatentDataset, plan


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
    latent_shards.write_about(tmp_path, About({}, "", 1, 1, 2, 1, 0))
    for value in (1.0, 2.0):
        latent_shards.write_text(tmp_path, 0, [torch.full((3, 2), value)])
        latent_shards.write_shard(tmp_path, shards[0], {"a": {"latent": torch.full((1, 1, 1, 1), value)}})
        latent_shards.join_index(tmp_path, shards)
        sample = LatentDataset(tmp_path).sample("32x32", 0, check=True)
        assert sample["latent"].item() == value and (sample["text"] == value).all()
