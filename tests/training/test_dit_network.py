"""The network that a transformer's recipe builds: recomputed activations, and the weights that it starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_dit import small_recipe

from reducio_fast.reference import DiTConfig, ReducioDiT
from reducio_fast.system.errors import ReducioError
from reducio_fast.training.reducio import dit

pytestmark = pytest.mark.slow


def test_recomputed_activations_give_the_same_gradients() -> None:
    torch.manual_seed(0)
    networks = [ReducioDiT(DiTConfig(**small_recipe().config)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    dit.recompute(networks[1].transformer_blocks)
    x, text = torch.randn(1, 16, 4, 2, 2), torch.randn(1, 5, 128)
    for network in networks:
        with torch.no_grad():
            network.proj_out.weight.normal_(generator=torch.Generator().manual_seed(1))
        network(x, torch.tensor([3.0]), text).square().mean().backward()
    for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))


def test_the_next_stage_starts_from_the_last(tmp_path: Path) -> None:
    """From 256 to 1024: all weights are loaded, new size embeddings start at 0, and another width is an error."""
    from reducio_fast.checkpoints.networks import save_model

    torch.manual_seed(0)
    first = ReducioDiT(DiTConfig(**small_recipe().config))
    save_model(first, tmp_path / "transformer")
    config = {**small_recipe().config, "size_conditioning": True, "content_groups": 4}
    network = dit.build_network(small_recipe(model="reducio-1024", config=config, start=str(tmp_path)))
    state = network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in first.state_dict().items())
    embedding = network.adaln_single.emb
    size = embedding(torch.tensor([5.0]), torch.tensor([[1024.0, 512.0]]))
    torch.testing.assert_close(size, embedding.timestep_embedder(torch.tensor([5.0])))
    with pytest.raises(ReducioError, match="has other weights than the recipe's"):
        dit.build_network(small_recipe(config={**small_recipe().config, "depth": 3}, start=str(tmp_path)))


@pytest.mark.parametrize("patch_size", [(1, 1, 1), (1, 2, 2)])
def test_rectified_flow_starts_from_the_mean_of_a_network_with_a_variance(
    tmp_path: Path, patch_size: tuple[int, int, int]
) -> None:
    from reducio_fast.checkpoints.networks import save_model

    torch.manual_seed(0)
    config = {**small_recipe().config, "learn_sigma": True, "patch_size": patch_size}
    first = ReducioDiT(DiTConfig(**config)).eval()
    with torch.no_grad():
        first.proj_out.weight.normal_()
        first.proj_out.bias.normal_()
    save_model(first, tmp_path / "transformer")
    recipe = small_recipe(objective="rectified-flow", config={"learn_sigma": False}, model=None, start=str(tmp_path))
    network = dit.build_network(recipe).eval()
    x, time, text = torch.randn(1, 16, 4, 4, 4), torch.tensor([300.0]), torch.randn(1, 5, 128)
    with torch.no_grad():
        mean, variance = first(x, time, text).chunk(2, dim=1)
        torch.testing.assert_close(network(x, time, text), mean)
    assert not torch.allclose(mean, variance, atol=0.1)
