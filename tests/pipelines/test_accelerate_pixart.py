"""`accelerate` on PixArt's transformer alone: what its condition is made from may change from call to call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from reducio_fast import ReducioError, accelerate
from reducio_fast.pipelines.peers.models import PEERS, build_random
from tiny_pixart import randomise

pytestmark = pytest.mark.slow


def network() -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "cross_attention_dim": 24}
    return randomise(
        PixArtTransformer2DModel(
            sample_size=128,
            in_channels=4,
            out_channels=8,
            patch_size=2,
            norm_eps=1e-6,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=12,
            use_additional_conditions=True,
            **sizes,
        )  # fmt: skip
    )


def arguments(side: int = 8, items: int = 2) -> dict[str, Any]:
    size = torch.tensor([[64.0, 64.0]]).repeat(items, 1)
    return {
        "hidden_states": torch.randn(items, 4, side, side),
        "encoder_hidden_states": torch.randn(items, 5, 12),
        "timestep": torch.full((items,), 500),
        "added_cond_kwargs": {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]},
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]]).repeat(items, 1),
    }


def one_more_size(given: dict[str, Any]) -> None:
    given["added_cond_kwargs"] = {"resolution": torch.full((2, 2), 512.0), "aspect_ratio": torch.ones(2, 1)}


@pytest.mark.parametrize(
    "change",
    [
        one_more_size,
        lambda given: given["added_cond_kwargs"]["resolution"].mul_(8),
        lambda given: given["encoder_hidden_states"].mul_(-3),
        lambda given: given["encoder_attention_mask"][:, 3:].zero_(),
        lambda given: given["encoder_attention_mask"].zero_(),
        lambda given: given.update(hidden_states=torch.randn(2, 4, 7, 9)),
    ],
    ids=["another size", "size in place", "text in place", "mask in place", "no token", "sides that fill no patch"],
)
@torch.no_grad()
def test_a_second_call_has_its_own_condition(change: Callable[[dict[str, Any]], None]) -> None:
    theirs, given = network(), arguments()
    with accelerate(SimpleNamespace(components={"transformer": theirs})) as acceleration:
        first = theirs(**given).sample
        assert acceleration.report == {"transformer": "fast"}
        change(given)
        fast = theirs(**given).sample
    torch.testing.assert_close(fast, theirs(**given).sample, rtol=1e-3, atol=1e-3)
    assert fast.shape != first.shape or (fast - first).abs().max() > 1e-2


@torch.no_grad()
def test_more_latents_than_texts_are_refused_as_before() -> None:
    theirs, given = network(), arguments()
    with accelerate(SimpleNamespace(components={"transformer": theirs})):
        theirs(**given)
        with pytest.raises(RuntimeError):
            theirs(**given | {"hidden_states": torch.randn(3, 4, 8, 8)})


def test_threads_keep_their_own_texts() -> None:
    theirs, calls = network(), [arguments() for _ in range(2)]
    with torch.no_grad():
        want = [theirs(**given).sample for given in calls]
    wrong: list[float] = []

    def draw(given: dict[str, Any], expected: Tensor) -> None:
        with torch.no_grad():
            for _ in range(60):
                wrong.append(float((theirs(**given).sample - expected).abs().max()))

    with accelerate(SimpleNamespace(components={"transformer": theirs})):
        threads = [threading.Thread(target=draw, args=each) for each in zip(calls, want, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(wrong) == 120 and max(wrong) < 1e-3 < (want[0] - want[1]).abs().max()


def test_a_network_that_was_replaced_is_not_reported_as_fast() -> None:
    pipe = build_random(PEERS["svd"], True, torch.float32, torch.device("cpu"))
    other = build_random(PEERS["svd"], True, torch.float32, torch.device("cpu"))
    with accelerate(pipe) as acceleration:
        pipe.vae = other.vae
        assert acceleration.report == {"unet": "fast", "vae": "as before: another network is there now"}


@pytest.mark.parametrize("pipeline", [PixArtTransformer2DModel, SimpleNamespace(components=3), None])
def test_what_is_no_pipeline(pipeline: Any) -> None:
    with pytest.raises(ReducioError, match="^accelerate: a .* has no "):
        accelerate(pipeline)
