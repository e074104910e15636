"""ReducioDiT against diffusers' PixArt transformer, and the properties of what Reducio adds to it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding as PeerEmbedding
from diffusers.models.embeddings import Timesteps
from torch.nn import functional as F

from reducio_fast.reference import DIT_PRESETS, DiTConfig, ReducioDiT

TINY = DiTConfig(
    hidden_size=48,
    depth=3,
    num_heads=4,
    caption_channels=20,
    caption_length=7,
    semantic_channels=24,
    position_base_size=4,
    learn_sigma=False,
)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights with no zero branch, so that every path shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, x in sorted(model.named_parameters()):
            fan_in = x[0].numel() if x.ndim > 1 else 25
            x.copy_(torch.randn(x.shape, generator=generator) / fan_in**0.5)
    return model.eval()


def make(config: DiTConfig = TINY, seed: int = 0, **changes) -> ReducioDiT:
    return randomize(ReducioDiT(dataclasses.replace(config, **changes)), seed)


def inputs(config: DiTConfig, batch: int = 2, grid: tuple[int, int, int] = (4, 4, 4), seed: int = 1) -> dict:
    """All arguments; the second item has two padded text tokens, the content has four cells per latent cell."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    mask = torch.ones(batch, config.caption_length, dtype=torch.int64)
    mask[1:, -2:] = 0
    return {
        "latent": randn(batch, config.latent_channels, *grid),
        "timestep": torch.tensor([999.0, 20.5, 400.0, 0.0])[:batch],
        "text": randn(batch, config.caption_length, config.caption_channels),
        "text_mask": mask,
        "semantic": randn(batch, 6, config.semantic_channels),
        "content": randn(batch, config.content_channels, 4 * grid[1], 4 * grid[2]),
    }


def pixart_for(config: DiTConfig, channels: int = 16, patch: int = 1, **changes) -> PixArtTransformer2DModel:
    """diffusers' model of the same sizes; `channels` and `patch` are its own split of the 16 input values per token."""
    return PixArtTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=channels,
        out_channels=2 * channels if config.learn_sigma else channels,
        num_layers=config.depth,
        cross_attention_dim=config.hidden_size,
        caption_channels=config.caption_channels,
        sample_size=config.position_base_size * patch,
        patch_size=patch,
        interpolation_scale=config.position_scale,
        use_additional_conditions=config.size_conditioning,
        **changes,
    )


# --- against diffusers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (8, 5)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all-text", "padded-text"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"learn_sigma": True, "position_scale": 2.0}, {"size_conditioning": True, "position_base_size": 8}],
    ids=["plain", "sigma+scale2", "size-conditioning"],
)
@torch.no_grad()
@pytest.mark.slow
def test_one_frame_without_image_is_pixart(grid, masked, changes):
    config = dataclasses.replace(TINY, **changes)
    peer = randomize(pixart_for(config), seed=3)
    model = ReducioDiT(config).eval()
    missing, unexpected = model.load_state_dict(peer.state_dict(), strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == {"null_text", "semantic_projection", "content_embedding"}

    x = inputs(config, grid=(1, *grid))
    mask = x["text_mask"] if masked else None
    pixels = torch.tensor([[32.0 * grid[0], 32.0 * grid[1]]]).repeat(2, 1)
    expected = peer(
        x["latent"][:, :, 0],
        encoder_hidden_states=x["text"],
        encoder_attention_mask=mask,
        timestep=x["timestep"],
        added_cond_kwargs={"resolution": pixels, "aspect_ratio": pixels[:, :1] / pixels[:, 1:]},
    ).sample
    actual = model(x["latent"], x["timestep"], x["text"], mask)[:, :, 0]
    assert actual.shape == expected.shape == (2, config.out_channels, *grid)
    assert relative_error(actual, expected) < 1e-5

    if config.size_conditioning:  # the embedding matters: another size changes the prediction
        other = model(x["latent"], x["timestep"], x["text"], mask, size=2 * pixels)[:, :, 0]
        assert relative_error(other, expected) > 1e-2


@pytest.mark.slow
def test_full_size_is_pixart_xl_plus_the_image_condition():
    with torch.device("meta"):
        peer = PixArtTransformer2DModel(sample_size=32, caption_channels=4096)  # 610.9M
        models = {name: ReducioDiT(config) for name, config in DIT_PRESETS.items()}
        ablation = ReducioDiT(DiTConfig(attention="2d+1d"))
    count = {name: sum(x.numel() for x in m.parameters()) for name, m in models.items()}
    pixart = sum(x.numel() for x in peer.parameters())
    semantic = (1280 * 1152 + 1152) + (1152 * 1152 + 1152)
    content = 4 * 2 * 2 * 1152 + 1152
    assert count["reducio-256"] == count["reducio-512"] == pixart + semantic + content
    assert pixart == pytest.approx(610.9e6, rel=1e-3)
    size_embedding = 2 * ((256 * 384 + 384) + (384 * 384 + 384))
    assert count["reducio-1024"] == count["reducio-256"] + size_embedding
    temporal = 28 * 4 * (1152 * 1152 + 1152)
    assert sum(x.numel() for x in ablation.parameters()) == count["reducio-256"] + temporal

    shapes = {name: tuple(x.shape) for name, x in models["reducio-256"].state_dict().items()}
    for name, x in peer.state_dict().items():
        assert shapes[name] == (tuple(x.shape) if name != "pos_embed.proj.weight" else (1152, 16, 1, 1))
    assert shapes["null_text"] == (120, 4096)


@torch.no_grad()
def test_presets_predict_the_whole_latent():
    """Shapes at each preset's native size, with the condition lengths of the paper's stages (120 + 256 + content)."""
    for (name, config), pixels, content_tokens in zip(
        DIT_PRESETS.items(), (256, 512, 1024), (256, 1024, 1024), strict=True
    ):
        with torch.device("meta"):
            model = ReducioDiT(dataclasses.replace(config, depth=2))
            latent, text = torch.empty(1, 16, 4, pixels // 32, pixels // 32), torch.empty(1, 120, 4096)
            semantic, content = torch.empty(1, 256, 1280), torch.empty(1, 4, pixels // 8, pixels // 8)
            out = model(latent, torch.empty(1), text, torch.ones(1, 120), semantic, content)
            condition = model.embed_condition(text, None, semantic, content)
        assert out.shape == (1, 32, 4, pixels // 32, pixels // 32), name
        assert [x.shape[1] for x in condition.tokens] == [120 + 256 + content_tokens] * config.content_groups, name


# --- the joint condition -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_padded_text_has_no_influence_at_all():
    model, x = make(), inputs(TINY)
    expected = model(**x)
    hidden = x["text_mask"] == 0
    noisy = {**x, "text": torch.where(hidden[..., None], 1e3 * torch.ones_like(x["text"]), x["text"])}
    assert torch.equal(model(**noisy), expected)
    # The same as cutting the padding off, and nothing like attending to it.
    cut = {name: value[1:] for name, value in x.items()}
    cut["text"], cut["text_mask"] = cut["text"][:, :-2], cut["text_mask"][:, :-2]
    assert relative_error(model(**cut), expected[1:]) < 1e-5
    assert relative_error(model(**{**x, "text_mask": None})[1:], expected[1:]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("changed", ["text", "semantic", "content"])
def test_every_condition_reaches_every_frame(changed):
    model, x = make(), inputs(TINY)
    delta = model(**{**x, changed: x[changed].flip(0)}) - model(**x)
    assert (delta.abs().amax(dim=(1, 3, 4)) > 1e-4).all()
    if changed != "text":
        assert relative_error(model(**{**x, changed: None}), model(**x)) > 1e-3


@torch.no_grad()
def test_semantic_projection_kinds():
    model, x = make(semantic_projection="linear"), inputs(TINY)
    tokens = model.embed_condition(x["text"], x["text_mask"], x["semantic"]).tokens[0]
    layer = model.semantic_projection.linear_1
    assert torch.allclose(tokens[:, :6], F.linear(x["semantic"], layer.weight, layer.bias), atol=1e-6)
    added = {name for name in make().state_dict() if name not in model.state_dict()}
    assert added == {"semantic_projection.linear_2.weight", "semantic_projection.linear_2.bias"}


@torch.no_grad()
def test_content_position_matches_the_latents():
    """Content cell (2i, 2j) lies where latent token (i, j) does, and carries the same position."""
    model = make(temporal_position=False)
    embedding = model.content_embedding
    still = model.pos_embed.position(1, 4, 4, torch.device("cpu")).unflatten(1, (4, 4))[0]
    (tokens,) = embedding(torch.zeros(1, 4, 16, 16))
    assert torch.allclose(tokens.unflatten(1, (8, 8))[0, ::2, ::2] - embedding.proj.bias, still, atol=1e-5)


@torch.no_grad()
def test_blocks_take_turns_at_the_content_groups():
    model = make(content_groups=4, depth=6)
    x = inputs(model.config)
    plain = make(depth=6).embed_condition(x["text"], None, None, x["content"]).tokens[0]
    groups = model.embed_condition(x["text"], None, None, x["content"]).tokens
    grid = plain[:, :64].unflatten(1, (8, 8))
    for index, group in enumerate(groups):
        i, j = divmod(index, 2)
        assert torch.equal(group[:, :16], grid[:, i::2, j::2].flatten(1, 2))
        assert torch.equal(group[:, 16:], plain[:, 64:])

    seen: list[torch.Tensor] = []
    hooks = [
        block.attn2.to_k.register_forward_hook(lambda _, args, __: seen.append(args[0]))
        for block in model.transformer_blocks
    ]
    model(**{**x, "semantic": None, "text_mask": None})
    for hook in hooks:
        hook.remove()
    assert [next(i for i, g in enumerate(groups) if torch.equal(g, s)) for s in seen] == [0, 1, 2, 3, 0, 1]


# --- time ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("temporal_position", [False, True], ids=["no-position", "position"])
def test_frames_are_equivariant_only_without_a_time_position(temporal_position):
    model, x = make(temporal_position=temporal_position), inputs(TINY)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = model(**{**x, "latent": x["latent"][:, :, order]})
    error = relative_error(shuffled, model(**x)[:, :, order])
    assert error > 1e-2 if temporal_position else error < 1e-5


@torch.no_grad()
def test_3d_attention_joins_the_frames():
    model, x = make(), inputs(TINY)
    other = x["latent"].clone()
    other[:, :, 3] += 1
    delta = model(**{**x, "latent": other}) - model(**x)
    assert (delta.abs().amax(dim=(1, 3, 4)) > 1e-4).all()


@torch.no_grad()
def test_factorised_attention_starts_as_per_frame_attention():
    model = make(attention="2d+1d", temporal_position=False)
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.attn_temporal.to_out[0].weight)
        torch.nn.init.zeros_(block.attn_temporal.to_out[0].bias)
    per_frame = ReducioDiT(TINY).eval()
    per_frame.load_state_dict({n: v for n, v in model.state_dict().items() if "temporal" not in n})
    x = inputs(TINY)
    frames = [per_frame(**{**x, "latent": x["latent"][:, :, t : t + 1]}) for t in range(4)]
    assert relative_error(model(**x), torch.cat(frames, dim=2)) < 1e-5

    # With live weights it mixes time and nothing but time: a changed cell shows in every frame, at its own place.
    model = make(attention="2d+1d", temporal_position=False, depth=1)
    x = {**inputs(TINY), "semantic": None, "content": None}
    torch.nn.init.zeros_(model.transformer_blocks[0].attn1.to_out[0].weight)
    other = x["latent"].clone()
    other[:, :, 3, 1, 2] += 1
    changed = (model(**{**x, "latent": other}) - model(**x)).abs().amax(dim=(0, 1)) > 1e-6
    assert changed[:, 1, 2].all() and changed.sum() == 4


@pytest.mark.parametrize("attention", ["3d", "2d+1d"])
@torch.no_grad()
def test_a_fresh_model_predicts_zero_and_ignores_its_condition(attention):
    model, x = ReducioDiT(dataclasses.replace(TINY, attention=attention)), inputs(TINY)
    assert torch.count_nonzero(model(**x)) == 0
    torch.nn.init.ones_(model.proj_out.weight[:1])
    out = model(**x)
    assert torch.count_nonzero(out) > 0
    assert torch.equal(out, model(**{**x, "text": -x["text"], "semantic": None, "content": None}))


# --- batches, patches, dtypes, gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"attention": "2d+1d", "content_groups": 4}], ids=["3d", "2d+1d-groups"])
@torch.no_grad()
def test_an_item_does_not_depend_on_its_batch(changes):
    model = make(**changes)
    x = inputs(model.config, batch=4)
    together = model(**x)
    for i in range(4):
        alone = model(**{name: value[i : i + 1] for name, value in x.items()})
        assert relative_error(alone, together[i : i + 1]) < 1e-5


@torch.no_grad()
def test_patches_of_any_size_cover_the_latent():
    """With a linear model in place of the blocks, patchify and unpatchify must invert each other, for every axis."""
    config = dataclasses.replace(TINY, patch_size=(2, 1, 3), latent_channels=8, position_scale=1.5)
    model, x = make(config), inputs(config, grid=(4, 3, 6))
    assert model(**x).shape == x["latent"].shape
    weight = torch.zeros(48, 16, 1, 3)
    # Token channel i carries input value i. The convolution orders them (channel, frame, row, column), the output
    # (frame, row, column, channel).
    flat = torch.eye(48).view(48, 8, 2, 1, 3).permute(0, 2, 3, 4, 1).reshape(48, 48)
    weight.view(48, -1).copy_(torch.eye(48))
    model.pos_embed.proj.weight.copy_(weight)
    model.pos_embed.proj.bias.zero_()
    position = model.pos_embed.position(2, 3, 2, torch.device("cpu")).flatten(0, 1)
    tokens = model.pos_embed(x["latent"]) - position
    assert torch.allclose(model.unpatchify(tokens @ flat, (2, 3, 2)), x["latent"], atol=1e-5)


@torch.no_grad()
def test_bfloat16_weights_take_float32_inputs():
    model, x = make(), inputs(TINY)
    expected, low = model(**x), model.bfloat16()(**x)
    assert low.dtype == torch.bfloat16
    assert relative_error(low.float(), expected) < 0.05


def test_gradients_reach_every_parameter():
    model, x = make(attention="2d+1d", size_conditioning=True), inputs(TINY)
    model(**x).square().mean().backward()
    # A key bias shifts all logits of a query alike, so softmax cancels it.
    dead = [n for n, p in model.named_parameters() if "to_k.bias" not in n and not p.grad.abs().amax() > 0]
    assert dead == []


# --- frame rate and motion -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_frame_rate_and_motion_join_the_time_embedding():
    """Each has its own MLP, checked against diffusers' embedding layers; an unknown value (NaN) adds nothing."""
    model, given = make(clip_conditioning=True), inputs(TINY)
    emb, timestep = model.adaln_single.emb, given["timestep"]
    size, clip = torch.tensor([[32.0, 32.0]]).repeat(2, 1), torch.tensor([[24.0, 3.5], [math.nan, 0.0]])
    waves = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    expected = emb.timestep_embedder(timestep)
    for i, embedder in enumerate((emb.fps_embedder, emb.motion_embedder)):
        peer = PeerEmbedding(256, TINY.hidden_size)
        peer.load_state_dict(embedder.state_dict())
        added = peer(waves(clip[:, i].nan_to_num()))
        expected = expected + torch.where(clip[:, i : i + 1].isnan(), torch.zeros(()), added)
    torch.testing.assert_close(emb(timestep, size, clip), expected, atol=1e-5, rtol=1e-5)

    unknown = model(**given, clip=torch.full((2, 2), math.nan))
    assert torch.equal(unknown, model(**given))
    assert relative_error(model(**given, clip=clip), unknown) > 1e-2
    with pytest.raises(ValueError, match=r"clip has shape \(2,\), the configuration needs \(2, 2\)"):
        model(**given, clip=torch.zeros(2))


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": torch.zeros(2, 4, 4, 4, 4)}, r"latent has shape \(2, 4, 4, 4, 4\), .*\(any, 16, any, any, any\)"),
        ({"text": torch.zeros(2, 7, 21)}, r"text has shape \(2, 7, 21\), .*\(2, any, 20\)"),
        ({"text_mask": torch.ones(2, 6)}, r"text_mask has shape \(2, 6\), .*\(2, 7\)"),
        ({"semantic": torch.zeros(1, 6, 24)}, r"semantic has shape \(1, 6, 24\), .*\(2, any, 24\)"),
        ({"content": torch.zeros(2, 4, 15, 16)}, r"content has size \(15, 16\), not a multiple of 2"),
        ({"timestep": torch.zeros(3)}, r"timestep has shape \(3,\), latent has a batch of 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_forward_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        make()(**{**inputs(TINY), **changes})
