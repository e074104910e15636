"""LoRA adapters, against peft and diffusers, and by the bytes of the clip before and after."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reducio_fast import ReducioPipeline
from reducio_fast.reference import ReducioDiT
from reducio_fast.system.errors import ReducioError

PROMPT = "a red circle moving right"
FAST = {"num_inference_steps": 2, "progress": False, "seed": 3, "output_type": "latent"}
TARGETS = ["to_q", "to_v", "to_out.0", "ff.net.0.proj", "pos_embed.proj", "linear_1"]


@pytest.fixture
def own(folder: Path) -> ReducioPipeline:
    return ReducioPipeline.from_pretrained(folder, device="cpu", dtype="float32", text_to_image=None)


@pytest.fixture(scope="session")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def bits(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def lora(network: ReducioDiT, seed: int, rank: int = 4, paths: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Random A and B in peft's names for a few layers, a convolution among them."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for path in paths or ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2", "pos_embed.proj"):
        weight = network.get_submodule(path).weight
        kernel = (1,) * (weight.ndim - 2)
        shapes = {"lora_A": (rank, *weight.shape[1:]), "lora_B": (len(weight), rank, *kernel)}
        for part, shape in shapes.items():
            tensors[f"transformer.{path}.{part}.weight"] = torch.randn(shape, generator=generator) * 0.3
    return tensors


def peft_twin(network: ReducioDiT, **config):
    """A copy of the network with a random LoRA of peft's in it."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(1)
    twin = copy.deepcopy(network)
    config = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": TARGETS} | config
    return inject_adapter_in_model(LoraConfig(**config), twin)


def predict(network: ReducioDiT) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    shapes = {"text": (1, 40, 32), "semantic": (1, 4, 32), "content": (1, 4, 8, 8)}
    condition = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    with torch.no_grad():
        return network(torch.randn(1, 16, 4, 2, 2, generator=g), torch.tensor([500.0]), **condition)


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"attn1.to_q": 1, "ff.net.0.proj": 12}, "rank_pattern": {"to_v": 2}}],
    ids=["plain", "rank-stabilised", "patterns"],
)
@pytest.mark.slow
def test_a_folder_saved_by_peft_computes_as_peft_does(own: ReducioPipeline, config: dict, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    kwargs = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": TARGETS} | config
    twin = get_peft_model(copy.deepcopy(own.transformer), LoraConfig(**kwargs))
    twin.save_pretrained(tmp_path)
    plain = predict(own.transformer)
    own.load_lora_weights(tmp_path)
    assert own.get_active_adapters() == ["default_0"] and own.get_list_adapters() == {"transformer": ["default_0"]}
    expected = predict(twin)
    torch.testing.assert_close(predict(own.transformer), expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).norm() > 0.05 * plain.norm(), "an adapter that does nothing would pass"


def test_a_file_saved_by_diffusers_brings_its_alpha(own: ReducioPipeline, tmp_path: Path):
    """Names have the prefix `transformer.`; the settings are in the file's header."""
    from diffusers.loaders import WanLoraLoaderMixin
    from peft import get_peft_model_state_dict

    twin = peft_twin(own.transformer)
    WanLoraLoaderMixin.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(twin),
        transformer_lora_adapter_metadata=twin.peft_config["default"].to_dict() | {"target_modules": TARGETS},
    )
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    own.load_lora_weights(str(tmp_path), adapter_name="red")
    torch.testing.assert_close(predict(own.transformer), predict(twin), rtol=1e-4, atol=1e-5)
    assert own.get_active_adapters() == ["red"]


def test_adapters_are_chosen_as_in_diffusers(own: ReducioPipeline):
    """The same calls on a layer of the same width in Wan's transformer give the same weights after each call."""
    from diffusers import WanTransformer3DModel

    path, peer_path = "transformer_blocks.0.attn1.to_q", "blocks.0.attn1.to_q"
    peer = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=16, ffn_dim=8, num_layers=1, text_dim=8)
    base = own.transformer.get_submodule(path).weight.clone()
    peer.get_submodule(peer_path).weight.data.copy_(base)

    def check(what: str) -> None:
        layer = peer.get_submodule(peer_path)
        expected = layer.base_layer.weight.clone()
        if not layer.merged and not layer.disable_adapters:
            for name in layer.active_adapters:
                expected += layer.get_delta_weight(name)
        torch.testing.assert_close(own.transformer.get_submodule(path).weight, expected, msg=lambda m: f"{what}: {m}")
        assert own.get_active_adapters() == list(layer.active_adapters), what

    both = [lora(own.transformer, seed, paths=(path,)) for seed in (1, 2)]
    for name, tensors in zip(("red", "blue"), both, strict=True):
        own.load_lora_weights(tensors, adapter_name=name)
        peer.load_lora_adapter({n.replace(path, peer_path): t for n, t in tensors.items()}, adapter_name=name)
        check(f"load {name}")
    for names, weights in ((["red", "blue"], [0.5, 2.0]), ("red", None), (["blue", "red"], 0.25)):
        own.set_adapters(names, weights)
        peer.set_adapters(names, weights)
        check(f"set {names} {weights}")
    for method in ("disable_lora", "enable_lora"):
        getattr(own, method)()
        getattr(peer, method)()
        check(method)
    own.fuse_lora(lora_scale=0.5)
    peer.fuse_lora(lora_scale=0.5)
    check("fuse")
    assert own.fused_loras == {"red", "blue"} and not torch.equal(own.transformer.get_submodule(path).weight, base)


@pytest.mark.parametrize("backend", ["reference", "fast"])
@pytest.mark.slow
def test_fused_then_unfused_is_the_same_clip(folder: Path, backend: str, image: np.ndarray):
    own = ReducioPipeline.from_pretrained(folder, device="cpu", dtype="float32", text_to_image=None, backend=backend)
    before, weights = own(PROMPT, image, **FAST).frames, bits(own.transformer)
    own.load_lora_weights(lora(own.transformer, 1), adapter_name="red")
    loaded, loaded_weights = own(PROMPT, image, **FAST).frames, bits(own.transformer)
    assert not torch.equal(loaded, before)
    own.fuse_lora(lora_scale=0.5)
    half = own(PROMPT, image, **FAST).frames
    assert not torch.equal(half, loaded)
    own.unfuse_lora()
    assert same(bits(own.transformer), loaded_weights) and torch.equal(own(PROMPT, image, **FAST).frames, loaded)
    own.set_adapters("red", 0.5)
    assert torch.equal(own(PROMPT, image, **FAST).frames, half), "a scale is a scale, fused or not"
    own.load_lora_weights(lora(own.transformer, 2, rank=2), adapter_name="blue")
    own.set_adapters(["red", "blue"], [-1, 3])
    own.fuse_lora(adapter_names=["blue"])
    own.unfuse_lora()
    own.disable_lora()
    assert same(bits(own.transformer), weights) and torch.equal(own(PROMPT, image, **FAST).frames, before)
    own.enable_lora()
    own.unload_lora_weights()
    assert same(bits(own.transformer), weights) and torch.equal(own(PROMPT, image, **FAST).frames, before)
    assert own.get_list_adapters() == {} and own.get_active_adapters() == []


def test_fast_equals_reference_with_an_adapter(folder: Path, image: np.ndarray):
    made = []
    for backend in ("reference", "fast"):
        kwargs = {"device": "cpu", "dtype": "float32", "text_to_image": None, "backend": backend}
        own = ReducioPipeline.from_pretrained(folder, **kwargs)
        without = own(PROMPT, image, **FAST).frames  # so that the fast twins exist before the swap
        own.load_lora_weights(lora(own.transformer, 1))
        made.append((without, own(PROMPT, image, **FAST).frames))
    (plain, reference), (_, fast) = made
    assert (fast - reference).norm() < 1e-4 * reference.norm()
    assert (reference - plain).norm() > 1e-2 * reference.norm()


def test_half_precision_round_trips_to_the_bit(folder: Path):
    own = ReducioPipeline.from_pretrained(folder, device="cpu", dtype="bfloat16", text_to_image=None)
    before = bits(own.transformer)
    own.load_lora_weights(lora(own.transformer, 1))
    merged = bits(own.transformer)
    path = "transformer_blocks.0.attn1.to_q"
    tensors = lora(own.transformer, 1)
    down, up = (tensors[f"transformer.{path}.lora_{part}.weight"] for part in "AB")
    expected = (before[f"{path}.weight"].float() + up @ down).bfloat16()
    assert torch.equal(merged[f"{path}.weight"], expected), "added in float32, rounded once"
    own.to(torch.float32).to(torch.bfloat16)
    own.unload_lora_weights()
    assert same(bits(own.transformer), before)


def test_a_fused_adapter_is_saved_and_stays(own: ReducioPipeline, tmp_path: Path):
    own.load_lora_weights(lora(own.transformer, 1), adapter_name="red")
    with pytest.raises(ReducioError, match=r"save_pretrained: the adapters red are active; fuse_lora\(\) to write"):
        own.save_pretrained(tmp_path / "model")
    own.fuse_lora()
    fused = bits(own.transformer)
    own.save_pretrained(tmp_path / "model")
    own.unload_lora_weights()
    own.unfuse_lora()
    assert same(bits(own.transformer), fused) and own.get_list_adapters() == {} and own.fused_loras == set()
    assert same(bits(ReducioPipeline.from_pretrained(tmp_path / "model", device="cpu").transformer), fused)


def test_hotswap_replaces_an_adapter_and_keeps_its_weight(own: ReducioPipeline):
    first, second = lora(own.transformer, 1), lora(own.transformer, 2, rank=2)
    own.load_lora_weights(second, adapter_name="x")
    own.set_adapters("x", 0.5)
    expected = bits(own.transformer)
    own.delete_adapters("x")
    own.load_lora_weights(first, adapter_name="x")
    own.set_adapters("x", 0.5)
    own.load_lora_weights(second, adapter_name="x", hotswap=True)
    assert same(bits(own.transformer), expected)


def damaged(own: ReducioPipeline) -> dict[str, tuple[dict, str]]:
    good = lora(own.transformer, 1)
    names = list(good)
    down, up = names[0], names[1]
    return {
        "unknown": (
            good | {"text_encoder.x.lora_B.weight": good[up], "transformer.blocks.9.attn.lora_A.weight": good[down]},
            "2 unexpected: text_encoder.x.lora_B.weight, transformer.blocks.9.attn.lora_A.weight",
        ),
        "dora": (good | {f"{down[:-14]}.lora_magnitude_vector": torch.ones(32)}, "1 unexpected: .*magnitude_vector"),
        "half a pair": (
            {n: t for n, t in good.items() if n != up},
            "1 missing: transformer_blocks.0.attn1.to_q.lora_B.weight",
        ),
        "wide": (
            good | {down: torch.zeros(4, 31)},
            r"1 of another shape: .*lora_A.weight \[4, 31\] instead of \[4, 32\]",
        ),
        "ranks": (good | {up: torch.zeros(32, 3)}, r"lora_B.weight \[32, 3\] instead of \[32, 4\]"),
        "no rank": (good | {down: torch.zeros(0, 32)}, r"lora_A.weight \[0, 32\] instead of \[1, 32\]"),
        "scalar": (good | {down: torch.tensor(1.0)}, r"lora_A.weight \[\] instead of \[1, 32\]"),
        "NaN": (good | {up: good[up] * torch.nan}, "to_q holds values that are not finite"),
        "integers": (good | {up: good[up].int()}, "lora_B.weight' is no floating-point tensor"),
        "alpha": (
            good | {f"{down[:-14]}.alpha": torch.tensor(torch.inf)},
            "alpha of .*to_q: must be a finite number, is",
        ),
        "nothing": ({}, "holds no LoRA"),
    }


@pytest.mark.parametrize("what", [
    "unknown", "dora", "half a pair", "wide", "ranks", "no rank", "scalar", "NaN", "integers", "alpha", "nothing",
])  # fmt: skip
@pytest.mark.slow
def test_what_does_not_fit_is_refused_and_listed(own: ReducioPipeline, what: str, tmp_path: Path):
    before = bits(own.transformer)
    tensors, message = damaged(own)[what]
    with pytest.raises(ReducioError, match=message) as caught:
        own.load_lora_weights(tensors)
    assert "\n" not in str(caught.value)
    assert same(bits(own.transformer), before) and own.get_list_adapters() == {}
    if what not in ("integers", "nothing"):
        save_file({n: t.clone() for n, t in tensors.items()}, tmp_path / "lora.safetensors")
        with pytest.raises(ReducioError, match=message):
            own.load_lora_weights(tmp_path / "lora.safetensors")


def test_broken_files_are_refused(own: ReducioPipeline, tmp_path: Path):
    good = lora(own.transformer, 1)
    torch.save(good, tmp_path / "lora.bin")
    with pytest.raises(ReducioError, match="lora.bin: is a pickle, not safetensors"):
        own.load_lora_weights(tmp_path / "lora.bin")
    with pytest.raises(ReducioError, match=r"weight_name: .*; there is no .safetensors file \(pickles are never"):
        own.load_lora_weights(tmp_path)
    for name in ("a", "b"):
        save_file(good, tmp_path / f"{name}.safetensors")
    with pytest.raises(ReducioError, match="weight_name: name the LoRA's file in .*; there is a.safetensors, b.safe"):
        own.load_lora_weights(tmp_path)
    own.load_lora_weights(tmp_path, weight_name="b.safetensors")
    with pytest.raises(ReducioError, match="c.safetensors: no such file"):
        own.load_lora_weights(tmp_path, weight_name="c.safetensors")
    with pytest.raises(ReducioError, match="'nowhere' is neither a folder nor a hub id"):
        own.load_lora_weights("nowhere")
    for config, message in (
        ({"peft_type": "LOKR"}, "is an adapter of type LOKR; LORA is what can be loaded"),
        ({"lora_alpha": "six"}, "the alpha of .* is not readable"),
        ({"alpha_pattern": {"(": 1}}, "the alpha of .* is not readable"),
        ({"alpha_pattern": [1]}, "the alpha of .* is not readable"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ReducioError, match=message):
            own.load_lora_weights(tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").unlink()
    save_file(good, tmp_path / "c.safetensors", metadata={"lora_adapter_metadata": "[]"})
    with pytest.raises(ReducioError, match="lora_adapter_metadata is not readable as JSON"):
        own.load_lora_weights(tmp_path / "c.safetensors")


def test_words_that_do_not_fit_the_adapters(own: ReducioPipeline):
    with pytest.raises(ReducioError, match="fuse_lora: no adapter is active; loaded are none"):
        own.fuse_lora()
    own.load_lora_weights(lora(own.transformer, 1), adapter_name="red")
    before = bits(own.transformer)
    for call, message in (
        (lambda: own.load_lora_weights({}, adapter_name="red"), "'red' is loaded already .*; pass hotswap=True"),
        (lambda: own.load_lora_weights({}, "blue", hotswap=True), "no adapter 'blue' to replace; loaded are red"),
        (lambda: own.load_lora_weights({}, 7), "adapter_name: must be text, is 7"),
        (lambda: own.set_adapters("blue"), "adapter_names: 'blue' not loaded; loaded are red"),
        (lambda: own.set_adapters([["red"]]), r"adapter_names: \['red'\] not loaded"),
        (lambda: own.set_adapters(["red", "red"]), "names an adapter twice"),
        (lambda: own.set_adapters("red", [1, 2]), "adapter_weights: 2 given for 1 adapters"),
        (lambda: own.set_adapters("red", "1"), "adapter_weights: must be a finite number, is '1'"),
        (lambda: own.fuse_lora(lora_scale=float("inf")), "lora_scale: must be a finite number, is inf"),
        (lambda: own.fuse_lora(["text_encoder"]), r"components: must be \['transformer'\], is \['text_encoder'\]"),
        (lambda: own.delete_adapters("blue"), "adapter_names: 'blue' not loaded"),
    ):
        with pytest.raises(ReducioError, match=message):
            call()
    own.fuse_lora()
    for call, message in (
        (lambda: own.load_lora_weights({}), r"load_lora_weights: red is fused; unfuse_lora\(\) first"),
        (lambda: own.set_adapters("red"), r"set_adapters: red is fused; unfuse_lora\(\) first"),
        (lambda: own.fuse_lora(), r"fuse_lora: red is fused"),
        (lambda: own.delete_adapters("red"), "delete_adapters: red is fused"),
        (lambda: own.disable_lora(), "disable_lora: red is fused"),
    ):
        with pytest.raises(ReducioError, match=message):
            call()
    assert same(bits(own.transformer), before)
    with torch.no_grad():
        own.transformer.pos_embed.proj.weight.mul_(2)
    with pytest.raises(ReducioError, match="LoRA: pos_embed.proj.weight was changed by others while red was loaded"):
        own.unfuse_lora()


def test_a_refusal_changes_no_setting(own: ReducioPipeline):
    for name, seed in (("red", 1), ("blue", 2)):
        own.load_lora_weights(lora(own.transformer, seed), adapter_name=name)
    with torch.no_grad():
        own.transformer.pos_embed.proj.weight.mul_(2)
    before = bits(own.transformer)
    for call in (
        own.unload_lora_weights,
        own.fuse_lora,
        own.disable_lora,
        lambda: own.set_adapters("red"),
        lambda: own.delete_adapters("blue"),
        lambda: own.load_lora_weights(lora(own.transformer, 3), adapter_name="green"),
        lambda: own.load_lora_weights(lora(own.transformer, 3), adapter_name="red", hotswap=True),
    ):
        with pytest.raises(ReducioError, match="LoRA: pos_embed.proj.weight was changed by others"):
            call()
        assert own.get_active_adapters() == ["blue"] and own.get_list_adapters() == {"transformer": ["red", "blue"]}
        assert own.fused_loras == set() and own.adapters.effect == {"blue": 1.0}
        assert same(bits(own.transformer), before)


def test_a_swap_packs_the_transformer_alone(own: ReducioPipeline, image: np.ndarray) -> None:
    """The decoder and its graphs stay: each network has a fingerprint of its own."""
    own(PROMPT, image, **FAST | {"output_type": "np"})
    transformer, vae = (own.executor.network(name) for name in ("transformer", "vae"))
    for step in (
        lambda: own.load_lora_weights(lora(own.transformer, 1), "red"),
        lambda: own.load_lora_weights(lora(own.transformer, 2), "red", hotswap=True),
        own.unload_lora_weights,
    ):
        step()
        packed = own.executor.network("transformer")
        assert packed is not transformer and own.executor.network("vae") is vae
        transformer = packed
    with torch.no_grad():
        own.vae.decoder.conv_out.bias.add_(0.5)
    assert own.executor.network("vae") is not vae and own.executor.network("transformer") is transformer
