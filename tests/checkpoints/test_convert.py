"""Conversion of published weights in both directions: true names and shapes, exact round trips, and refused files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from published_weights import (
    NARROW_DIT,
    NARROW_SD,
    NARROW_VAE,
    equal,
    json_file,
    manifest,
    pixart,
    randomized,
    shapes_of,
    weightless,
)
from reducio_fast.checkpoints import convert as conversion
from reducio_fast.checkpoints.convert import convert
from reducio_fast.checkpoints.networks import load_foreign, load_model
from reducio_fast.cli.main import main
from reducio_fast.reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from reducio_fast.system.errors import ReducioError


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Records the tensors instead of writing them: full-size files are gigabytes."""
    notes: list[dict[str, Tensor]] = []

    def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
        notes.append(tensors)

    monkeypatch.setattr(conversion, "save_tensors", save_tensors)
    return notes


# ---- the release of Reducio-VAE ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "factor"), [("ft4", 4), ("ft2", 2)])
def test_a_release_checkpoint_at_full_size(name: str, factor: int, root: Path, tmp_path: Path, written: list):
    shapes = manifest(root, name)
    losses = {"loss.logvar": (), "loss.discriminator.main.0.weight": (64, 3, 4, 4)}
    state = {f"module.{n}": t for n, t in weightless(shapes | losses).items()}
    file = tmp_path / f"reducio-{name}-fs32-attn23.ckpt"
    torch.save({"state_dict": state, "epoch": 3, "global_step": 7, "hyper_parameters": {"lr": 2e-5}}, file)
    result = convert(file, tmp_path / "vae")
    assert result["component"] == "vae" and result["left_out"] == list(losses)
    assert result["parameters"] == {"ft4": 437_095_763, "ft2": 432_379_219}[name]
    assert {n: list(t.shape) for n, t in written[0].items()} == shapes
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert VAEConfig.from_dict(config) == VAEConfig(temporal_factor=factor)


def test_every_disagreement_is_reported_and_nothing_written(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    state = weightless(manifest(root, "ft4"))
    del state["quant_conv.bias"]
    state |= weightless({"decoder.conv_out.bias": (4,), "ema.decay": ()})
    torch.save({"state_dict": state}, tmp_path / "broken.ckpt")
    assert main(["convert", str(tmp_path / "broken.ckpt"), "--into", str(tmp_path / "model")]) == 2
    assert capsys.readouterr().err == (
        f"reducio-fast convert: error: {tmp_path}/broken.ckpt: weights do not fit the configuration; "
        "1 missing: quant_conv.bias; 1 unexpected: ema.decay; "
        "1 of another shape: decoder.conv_out.bias [4] instead of [3]\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["broken.ckpt"]


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.slow
def test_official_to_ours_to_official_is_bit_exact(dtype: torch.dtype, ending: str, tmp_path: Path):
    official = randomized(ReducioVAE(VAEConfig(**NARROW_VAE, temporal_factor=2))).to(dtype).state_dict()
    official["quant_conv.bias"][:2] = torch.tensor([float("nan"), -0.0])  # bits that == does not see
    torch.save({"state_dict": official | {"loss.logvar": torch.zeros(())}}, tmp_path / "a.ckpt")
    config = json_file(tmp_path / "config.json", NARROW_VAE)
    ours, back = tmp_path / "vae", tmp_path / f"b.{ending}"
    assert main(["convert", str(tmp_path / "a.ckpt"), "--out", str(ours), "--config", config, "--json"]) == 0
    assert main(["convert", str(ours), "--to", "official", "--out", str(back)]) == 0
    assert back.stat().st_mode == (tmp_path / "a.ckpt").stat().st_mode
    again = load_file(back) if ending == "safetensors" else torch.load(back, weights_only=True)["state_dict"]
    assert again.keys() == official.keys()
    for name, tensor in official.items():
        assert again[name].dtype == dtype and again[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    vae = load_model(ReducioVAE, VAEConfig, ours)
    assert vae.config == VAEConfig(**NARROW_VAE, temporal_factor=2)
    first = (ours / "diffusion_pytorch_model.safetensors").read_bytes()
    convert(back, ours, config=NARROW_VAE)
    assert (ours / "diffusion_pytorch_model.safetensors").read_bytes() == first, "the same file, from either form"


def test_the_way_back_takes_a_file_name_alone(capsys: pytest.CaptureFixture[str]):
    for options, message in (
        (["--out", "a.ckpt", "--dtype", "float16", "--into", "m"], "nothing else; it does not take --into, --dtype\n"),
        ([], "nothing else; it needs --out\n"),
        (["--out", "a.ckpt"], "source: vae is no folder; --to official takes one of this computer\n"),
    ):
        assert main(["convert", "vae", "--to", "official", *options]) == 2
        assert message in capsys.readouterr().err


def test_what_is_converted_again_keeps_its_configuration(tmp_path: Path):
    vae = randomized(ReducioVAE(VAEConfig(**NARROW_VAE)))
    torch.save(vae.state_dict(), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "vae", config=NARROW_VAE)
    convert(tmp_path / "vae", tmp_path / "half", dtype=torch.bfloat16)
    half = load_model(ReducioVAE, VAEConfig, tmp_path / "half")
    assert half.config == vae.config
    assert equal(half.state_dict(), {n: t.bfloat16() for n, t in vae.state_dict().items()})


# ---- PixArt-alpha ------------------------------------------------------------------------------------------------


def original_names(state: dict[str, Tensor], depth: int, tokens: int, caption: tuple[int, int]) -> dict[str, Tensor]:
    """A diffusers PixArt state dict under the names of the .pth files, taken from PixArt-alpha's own modules."""
    places = [
        ("x_embedder.proj", "pos_embed.proj"),
        ("t_embedder.mlp.0", "adaln_single.emb.timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", "adaln_single.emb.timestep_embedder.linear_2"),
        ("t_block.1", "adaln_single.linear"),
        ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
        ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
        ("final_layer.linear", "proj_out"),
    ]
    if "adaln_single.emb.resolution_embedder.linear_1.weight" in state:
        for theirs, ours in (("csize_embedder", "resolution_embedder"), ("ar_embedder", "aspect_ratio_embedder")):
            places += [(f"{theirs}.mlp.{2 * i}", f"adaln_single.emb.{ours}.linear_{i + 1}") for i in (0, 1)]
    out = {f"{a}.{leaf}": state[f"{b}.{leaf}"] for a, b in places for leaf in ("weight", "bias")}
    out["final_layer.scale_shift_table"] = state["scale_shift_table"]
    out["pos_embed"] = torch.zeros(1).expand(1, tokens, state["pos_embed.proj.bias"].numel())
    generator = torch.Generator().manual_seed(9)
    full = caption[1] > 1000
    out["y_embedder.y_embedding"] = (
        torch.zeros(1).expand(caption) if full else torch.randn(caption, generator=generator)
    )
    for i in range(depth):
        ours, theirs = f"transformer_blocks.{i}", f"blocks.{i}"
        out[f"{theirs}.scale_shift_table"] = state[f"{ours}.scale_shift_table"]
        for leaf in ("weight", "bias"):
            for a, parts in (
                ("attn.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
                ("attn.proj", ("attn1.to_out.0",)),
                ("cross_attn.q_linear", ("attn2.to_q",)),
                ("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v")),
                ("cross_attn.proj", ("attn2.to_out.0",)),
                ("mlp.fc1", ("ff.net.0.proj",)),
                ("mlp.fc2", ("ff.net.2",)),
            ):
                rows = [state[f"{ours}.{p}.{leaf}"] for p in parts]
                if full:  # their shapes only
                    out[f"{theirs}.{a}.{leaf}"] = torch.zeros(1).expand(len(rows) * len(rows[0]), *rows[0].shape[1:])
                else:
                    out[f"{theirs}.{a}.{leaf}"] = torch.cat(rows)
    return out


@pytest.mark.parametrize("size", [256, 512, 1024])
@pytest.mark.slow
def test_pixart_at_full_size_by_both_spellings(size: int, tmp_path: Path, written: list):
    with torch.device("meta"):
        peer = PixArtTransformer2DModel(sample_size=size // 8, caption_channels=4096)
        whole = shapes_of(ReducioDiT(conversion.DIT_PRESETS[f"reducio-{size}"]))
    state = weightless(shapes_of(peer))
    folder = tmp_path / "transformer"
    folder.mkdir()
    json_file(folder / "config.json", dict(peer.config))
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    torch.save({"state_dict": original_names(state, 28, (size // 16) ** 2, (120, 4096))}, tmp_path / "PixArt.pth")
    results = [convert(tmp_path / "PixArt.pth", tmp_path / "a"), convert(folder, tmp_path / "b", null_text="fresh")]
    for result, tensors in zip(results, written, strict=True):
        assert result["component"] == "transformer" and {n: t.shape for n, t in tensors.items()} == whole
        assert json.loads(Path(result["path"], "config.json").read_text())["position_base_size"] == size // 32
    image = ["content_embedding.proj.bias", "content_embedding.proj.weight"]
    image += [f"semantic_projection.linear_{i}.{leaf}" for i in (1, 2) for leaf in ("bias", "weight")]
    assert sorted(results[0]["fresh"]) == image, "the null text is PixArt's own"
    assert sorted(results[1]["fresh"]) == sorted([*image, "null_text"])
    assert results[0]["left_out"] == ["pos_embed"]


@pytest.mark.parametrize("sized", [False, True], ids=["256", "1024"])
def test_the_pth_and_the_folder_give_the_same_tensors(sized: bool, tmp_path: Path):
    config = DiTConfig(**NARROW_DIT, size_conditioning=sized)
    peer = randomized(pixart(config, sample_size=32, use_additional_conditions=sized))
    peer.save_pretrained(tmp_path / "transformer")
    names = original_names(peer.state_dict(), 2, 256, (7, 20))
    torch.save({"state_dict": {f"module.{n}": t for n, t in names.items()}}, tmp_path / "PixArt.pth")
    changes = NARROW_DIT | {"size_conditioning": sized}
    first = convert(tmp_path / "PixArt.pth", tmp_path / "a", config=changes)
    second = convert(tmp_path / "transformer", tmp_path / "b", config=changes, null_text="fresh")
    a, b = (load_model(ReducioDiT, DiTConfig, tmp_path / name) for name in "ab")
    assert a.config == b.config == config
    assert torch.equal(a.null_text, names["y_embedder.y_embedding"])
    assert set(second["fresh"]) - set(first["fresh"]) == {"null_text"}
    kept = [n for n in a.state_dict() if n != "null_text"]
    assert all(torch.equal(a.state_dict()[n], b.state_dict()[n]) for n in kept), "the fresh ones too: a fixed seed"
    # And back: only patches and fused layers were rearranged, so every value of PixArt's weights is recovered.
    back = a.state_dict()
    back["pos_embed.proj.weight"] = back["pos_embed.proj.weight"].view(48, 4, 2, 2)
    for leaf in ("weight", "bias"):
        rows = back[f"proj_out.{leaf}"]
        back[f"proj_out.{leaf}"] = rows.unflatten(0, (8, 2, 2)).movedim(0, 2).flatten(0, 2)
    assert equal({n: back[n] for n in peer.state_dict()}, peer.state_dict())


@pytest.mark.parametrize("learn_sigma", [True, False], ids=["sigma", "no-sigma"])
@torch.no_grad()
def test_a_pixart_predicts_the_same_as_a_reducio_dit(learn_sigma: bool, tmp_path: Path):
    """A 4-channel PixArt of patch size 2 equals our model on the space-to-depth latent, with or without variance."""
    config = DiTConfig(**NARROW_DIT, learn_sigma=learn_sigma, position_base_size=4)
    peer = randomized(pixart(config, sample_size=8, in_channels=4, out_channels=8, patch_size=2), seed=4)
    peer.save_pretrained(tmp_path / "transformer")
    changes = NARROW_DIT | {"learn_sigma": learn_sigma, "position_base_size": 4}
    convert(tmp_path / "transformer", tmp_path / "ours", preset="reducio-256", config=changes, null_text="fresh")
    model = load_model(ReducioDiT, DiTConfig, tmp_path / "ours")
    generator = torch.Generator().manual_seed(5)
    image, text = torch.randn(2, 4, 8, 12, generator=generator), torch.randn(2, 7, 20, generator=generator)
    timestep = torch.tensor([3.0, 700.0])
    noise, variance = peer(image, encoder_hidden_states=text, timestep=timestep).sample.chunk(2, dim=1)
    parts = [noise, variance] if learn_sigma else [noise]
    expected = torch.cat([F.pixel_unshuffle(part, 2) for part in parts], dim=1)
    actual = model(F.pixel_unshuffle(image, 2)[:, :, None], timestep, text)[:, :, 0]
    assert (actual - expected).norm() / expected.norm() < 1e-5


def test_pixart_weights_that_do_not_fit(tmp_path: Path):
    config = DiTConfig(**NARROW_DIT)
    peer = pixart(config, sample_size=32, use_additional_conditions=True).state_dict()
    names = original_names(peer, 2, 256, (7, 20))
    del names["blocks.1.cross_attn.proj.bias"]
    names |= {"t_block.1.bias": torch.zeros(5), "blocks.0.attn.rope": torch.zeros(1)}
    torch.save(names, tmp_path / "PixArt.pth")
    with pytest.raises(ReducioError) as caught:
        convert(tmp_path / "PixArt.pth", tmp_path / "out", config=NARROW_DIT)
    message = str(caught.value)
    assert "1 missing: transformer_blocks.1.attn2.to_out.0.bias;" in message
    assert "9 unexpected: adaln_single.emb." in message, "size embeddings, which this configuration does not have"
    assert "1 of another shape: adaln_single.linear.bias [5] instead of [288]" in message
    assert not (tmp_path / "out").exists()
    del names["pos_embed"]
    torch.save({n: t for n, t in names.items() if "csize" not in n and "ar_" not in n}, tmp_path / "PixArt.pth")
    with pytest.raises(ReducioError, match="does not say its size; give a preset, one of reducio-256, reducio-512"):
        convert(tmp_path / "PixArt.pth", tmp_path / "out", config=NARROW_DIT)
    with pytest.raises(ReducioError, match="config: DiTConfig: unknown colour"):
        convert(tmp_path / "PixArt.pth", tmp_path / "out", preset="reducio-256", config={"colour": 1})
    with pytest.raises(ReducioError, match="preset: must be one of reducio-256, .* for transformer, is 'sdxl'"):
        convert(tmp_path / "PixArt.pth", tmp_path / "out", preset="sdxl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proj_out": None}, "1 missing: proj_out.weight"),
        ({"qkv": torch.zeros(())}, "transformer_blocks.0.attn.qkv.weight|blocks.0.attn.qkv"),
        ({"final": torch.zeros(())}, r"1 of another shape: proj_out.weight \[\]"),
        ({"patch": torch.zeros(288, 4, 2, 0)}, "1 of another shape: pos_embed.proj.weight"),
    ],
)
def test_odd_pixart_tensors_are_named(changes: dict[str, Tensor | None], message: str, tmp_path: Path):
    config = DiTConfig(**NARROW_DIT)
    tensors = original_names(pixart(config, sample_size=32).state_dict(), 2, 256, (7, 20))
    places = {
        "proj_out": "final_layer.linear.weight",
        "qkv": "blocks.0.attn.qkv.weight",
        "final": "final_layer.linear.weight",
        "patch": "x_embedder.proj.weight",
    }
    for name, value in changes.items():
        tensors.pop(places[name])
        tensors |= {} if value is None else {places[name]: value}
    torch.save(tensors, tmp_path / "PixArt.pth")
    with pytest.raises(ReducioError, match=message):
        convert(tmp_path / "PixArt.pth", tmp_path / "out", preset="reducio-256", config=NARROW_DIT)
    assert not (tmp_path / "out").exists()


# ---- the image VAE -----------------------------------------------------------------------------------------------


def ldm_names(vae: AutoencoderKL) -> dict[str, str]:
    """LDM's name of every tensor of an AutoencoderKL."""
    levels = len(vae.config.block_out_channels)
    block = [("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2")]
    places = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, level, blocks in (("encoder", "down", 2), ("decoder", "up", 3)):
        places |= {f"{side}.{n}": f"{side}.{n}" for n in ("conv_in", "conv_out")}
        places[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for i in range(levels):
            theirs = i if side == "encoder" else levels - 1 - i  # LDM counts levels from full resolution
            for j in range(blocks):
                for a, b in (*block, ("conv_shortcut", "nin_shortcut")):
                    places[f"{side}.{level}_blocks.{i}.resnets.{j}.{a}"] = f"{side}.{level}.{theirs}.block.{j}.{b}"
            scale = "downsample" if side == "encoder" else "upsample"
            places[f"{side}.{level}_blocks.{i}.{scale}rs.0.conv"] = f"{side}.{level}.{theirs}.{scale}.conv"
        for j in (0, 1):
            for a, b in block:
                places[f"{side}.mid_block.resnets.{j}.{a}"] = f"{side}.mid.block_{j + 1}.{b}"
        attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        places |= {f"{side}.mid_block.attentions.0.{a}": f"{side}.mid.attn_1.{b}" for a, b in attention.items()}
    leaves = (name.rpartition(".") for name in vae.state_dict())
    return {f"{stem}.{leaf}": f"{places[stem]}.{leaf}" for stem, _, leaf in leaves}


def as_ldm(vae: AutoencoderKL) -> dict[str, Tensor]:
    names, state = ldm_names(vae), vae.state_dict()
    # In LDM the attention's layers are 1x1 convolutions.
    return {names[n]: t[:, :, None, None] if ".attentions." in n and t.ndim == 2 else t for n, t in state.items()}


@pytest.mark.parametrize(("preset", "scale"), [("sd", 0.18215), ("sdxl", 0.13025)])
def test_the_image_vaes_at_full_size(preset: str, scale: float, tmp_path: Path, written: list):
    with torch.device("meta"):
        vae = AutoencoderKL(**conversion.CONTENT_PRESETS[preset])
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863  # as diffusers counts the published one
    state = weightless({n: t.shape for n, t in as_ldm(vae).items()})
    unet = weightless({"model.diffusion_model.out.2.bias": (4,)})
    torch.save({"state_dict": {f"first_stage_model.{n}": t for n, t in state.items()} | unet}, tmp_path / "whole.ckpt")
    torch.save(state, tmp_path / "vae.pt")
    results = [convert(tmp_path / name, tmp_path / name[0], preset=preset) for name in ("whole.ckpt", "vae.pt")]
    for result, tensors in zip(results, written, strict=True):
        assert result["component"] == "content_encoder"
        assert {n: t.shape for n, t in tensors.items()} == shapes_of(vae)
        assert json.loads(Path(result["path"], "config.json").read_text())["scaling_factor"] == scale
    assert results[0]["left_out"] == list(unet) and results[1]["left_out"] == []


def test_an_ldm_file_becomes_what_diffusers_makes_of_it(tmp_path: Path):
    vae = randomized(AutoencoderKL(**NARROW_SD))
    save_file({n: t.contiguous() for n, t in as_ldm(vae).items()}, tmp_path / "vae.safetensors")
    for bad in ({"norm_num_groups": 0}, {"act_fn": "none of these"}, {"down_block_types": [5]}):
        with pytest.raises(ReducioError, match="config: "):
            convert(tmp_path / "vae.safetensors", tmp_path / "ours", config=NARROW_SD | bad)
    without = {n: t.contiguous() for n, t in as_ldm(vae).items() if n != "encoder.down.0.downsample.conv.bias"}
    save_file(without, tmp_path / "without.safetensors")
    with pytest.raises(ReducioError, match="its tensors are not those of an LDM autoencoder|missing"):
        convert(tmp_path / "without.safetensors", tmp_path / "without", config=NARROW_SD)
    convert(tmp_path / "vae.safetensors", tmp_path / "ours", config=NARROW_SD)
    vae.save_config(tmp_path / "peer")
    peer = AutoencoderKL.from_single_file(
        str(tmp_path / "vae.safetensors"), config=str(tmp_path / "peer"), local_files_only=True
    )
    ours = load_foreign("diffusers", "AutoencoderKL", tmp_path / "ours", torch.float32, "cpu")
    assert equal(ours.state_dict(), peer.state_dict()) and equal(ours.state_dict(), vae.state_dict())


def test_a_diffusers_vae_folder_with_its_old_attention_names(tmp_path: Path):
    vae = randomized(AutoencoderKL(**NARROW_SD))
    folder = tmp_path / "vae"
    vae.save_pretrained(folder)
    convert(folder, tmp_path / "new")
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        state = {n.replace(f"attentions.0.{new}", f"attentions.0.{old}"): t for n, t in state.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in state
    save_file(state, file)
    json_file(tmp_path / "model_index.json", {"vae": ["diffusers", "AutoencoderKL"]})
    convert(tmp_path, tmp_path / "old")  # a whole pipeline without a transformer
    for name in ("new", "old"):
        ours = load_foreign("diffusers", "AutoencoderKL", tmp_path / name, torch.float32, "cpu")
        assert equal(ours.state_dict(), vae.state_dict()), name
    with pytest.raises(ReducioError, match="1 unexpected: encoder.mystery"):
        save_file(state | {"encoder.mystery": torch.zeros(1)}, file)
        convert(folder, tmp_path / "other")


def test_shards_and_variants(tmp_path: Path):
    """Weights in several files with an index, and a half-precision copy beside the plain file: the latter is read."""
    vae = randomized(AutoencoderKL(**NARROW_SD))
    vae.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    vae.save_pretrained(tmp_path / "both")
    vae.half().save_pretrained(tmp_path / "both", variant="fp16")
    for name in ("shards", "both"):
        convert(tmp_path / name, tmp_path / f"{name}-out")
        ours = load_file(tmp_path / f"{name}-out" / "diffusion_pytorch_model.safetensors")
        assert {t.dtype for t in ours.values()} == {torch.float32}
        assert all(torch.equal(ours[n].half(), t) for n, t in vae.state_dict().items())
    (tmp_path / "both" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "both" / "other.safetensors")
    with pytest.raises(ReducioError, match="must hold one file of weights, holds .*fp16.* name the file itself"):
        convert(tmp_path / "both", tmp_path / "out")
