"""Model files: what is read back, what is refused and how it is named, and that nothing is left half-written."""

from __future__ import annotations

import ast
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reducio_fast.checkpoints.hub import find_model
from reducio_fast.checkpoints.networks import _NoRandomInit, assign, build, load_foreign, load_model, save_model
from reducio_fast.checkpoints.strict_files import (
    CONFIG,
    INDEX,
    WEIGHTS,
    check_component,
    check_safetensors,
    load_tensors,
)
from reducio_fast.reference import DiTConfig, ReducioDiT, ReducioVAE, VAEConfig
from reducio_fast.system.atomic_files import new_folder
from reducio_fast.system.errors import ReducioError

SIZES = {"hidden_size": 24, "depth": 1, "num_heads": 2, "caption_channels": 8, "caption_length": 6}
CONFIGS = {
    "dit": (ReducioDiT, DiTConfig(**SIZES, semantic_channels=8, attention="2d+1d")),
    # Linear fusion has a mask that is not stored in the file; loading must keep it.
    "vae": (
        ReducioVAE,
        VAEConfig(
            base_channels=8, channel_multipliers=(1, 1, 1, 1, 1, 1), content_base_channels=8, num_res_blocks=1,
            content_channel_multipliers=(1, 1, 1), norm_groups=4, num_heads=2, fusion_head_dim=8, fusion="linear",
            fusion_levels=(None, None, 2, None, None, None), causal=True,
        ),
    ),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def network(request: pytest.FixtureRequest):
    model_class, config = CONFIGS[request.param]
    return model_class(config).eval()


def test_a_network_comes_back_to_the_bit(network, tmp_path: Path):
    save_model(network, tmp_path)
    again = load_model(type(network), type(network.config), tmp_path)
    assert again.config == network.config and not again.training
    assert not any(p.requires_grad for p in again.parameters())
    for (name, a), (other, b) in zip(network.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b)
    own, fresh = dict(network.named_buffers()), dict(again.named_buffers())
    assert own.keys() == fresh.keys() and all(torch.equal(own[n], fresh[n]) for n in own)
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values["_class_name"] == type(network).__name__ and "_reducio_fast_version" in values


def test_dtype_asked_for(network, tmp_path: Path):
    save_model(network.half(), tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        again = load_model(type(network), type(network.config), tmp_path, dtype)
        assert {p.dtype for p in again.parameters()} == {dtype}
    kept = load_model(type(network), type(network.config), tmp_path)
    assert {p.dtype for p in kept.parameters()} == {torch.float16}


def test_integers_keep_their_type(tmp_path: Path):
    save_file({"a": torch.arange(3), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    tensors = load_tensors(tmp_path / "x.safetensors", torch.float16)
    assert (tensors["a"].dtype, tensors["b"].dtype) == (torch.int64, torch.float16)


def test_building_draws_no_random_numbers(tmp_path: Path):
    def make() -> torch.nn.Module:
        linear = torch.nn.Linear(4, 4)
        torch.nn.init.xavier_uniform_(linear.weight)
        torch.nn.init.normal_(linear.weight)
        return torch.nn.Sequential(linear, torch.nn.Conv3d(2, 2, 3), torch.nn.GroupNorm(1, 2))

    tensors = {n: torch.ones_like(t) for n, t in make().state_dict().items()}
    before = torch.get_rng_state()
    built = build(make, tensors, tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert all((p == 1).all() and not p.requires_grad for p in built.parameters())


def test_every_disagreement_is_listed():
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(12)))
    tensors = {n: t for n, t in model.state_dict().items() if not n.endswith("bias")}
    tensors |= {"0.weight": torch.zeros(3, 2), "extra": torch.zeros(1)}
    with pytest.raises(ReducioError) as caught:
        assign(model, tensors, Path("some/file"))
    assert str(caught.value) == (
        "some/file: weights do not fit the configuration; 12 missing: 0.bias, 1.bias, 2.bias, 3.bias, 4.bias, 5.bias, "
        "6.bias, 7.bias and 4 more; 1 unexpected: extra; 1 of another shape: 0.weight [3, 2] instead of [2, 2]"
    )
    assert model[0].weight.shape == (2, 2), "nothing was assigned"


@pytest.mark.parametrize("length", [0, 5, 8, 100, -1])
def test_truncated_file(tmp_path: Path, length: int):
    file = tmp_path / WEIGHTS
    save_file({"a": torch.ones(100)}, file)
    content = file.read_bytes()
    file.write_bytes(content[:length])
    with pytest.raises(ReducioError, match=f"{file}: truncated"):
        load_tensors(file)


def test_header_lengths_are_not_mistaken_for_pickles(tmp_path: Path):
    """A header of 640 bytes begins the file with the two bytes of a pickle of protocol 2."""
    file = tmp_path / WEIGHTS
    for padding in range(600):
        save_file({"a": torch.ones(1)}, file, metadata={"note": "x" * padding})
        length = struct.unpack("<Q", file.read_bytes()[:8])[0]
        if length == 640:
            break
    assert file.read_bytes()[:2] == b"\x80\x02"
    check_safetensors(file)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ReducioError, match="truncated"):
        check_safetensors(file)


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def test_other_files_are_named_for_what_they_are(tmp_path: Path):
    file = tmp_path / WEIGHTS
    torch.save({"a": Bomb()}, file)
    with pytest.raises(ReducioError, match=f"{file}: is a pickle, not safetensors"):
        load_tensors(file)
    file.write_bytes(pickle.dumps({"a": Bomb()}, protocol=4))
    with pytest.raises(ReducioError, match="is a pickle"):
        load_tensors(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ReducioError, match="is a Git LFS pointer"):
        load_tensors(file)
    file.write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(ReducioError, match=f"{file}: not a safetensors file"):
        load_tensors(file)
    file.write_bytes(struct.pack("<Q", 4) + b"[{}]")
    with pytest.raises(ReducioError, match="not a safetensors file"):
        load_tensors(file)
    save_file({"a": torch.ones(3)}, file)
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(ReducioError, match="damaged, has .* bytes and its header announces"):
        load_tensors(file)
    file.unlink()
    with pytest.raises(ReducioError, match="no such file"):
        load_tensors(file)


def with_header(path: Path, header: str | bytes, data: int) -> Path:
    """Write a safetensors file with this header, valid or not, and `data` zero bytes."""
    header = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(data))
    return path


def entry(shape: list, start: int, stop: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "damaged, b at bytes 4 to 12 overlaps the tensor before"),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8, "damaged, b at bytes 0 to 8 overlaps the tensor before it"),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20, "damaged, b .* leaves 4 bytes unused before it"),
        ({"a": entry([2], 4, 12)}, 12, "damaged, a at bytes 4 to 12 leaves 4 bytes unused before it"),
        ({"a": entry([2], 8, 0)}, 8, "damaged, a has -8 bytes .8 to 0.; F32 .2. needs 8"),
        ({"a": entry([3], 0, 8)}, 8, "damaged, a has 8 bytes .0 to 8.; F32 .3. needs 12"),
        ({"a": entry([4], 0, 8, "F16"), "b": entry([4], 8, 16, "F64")}, 16, "damaged, b has 8 bytes .* needs 32"),
        ({"a": entry([10**18, 10**18], 0, 8)}, 8, "damaged, a has 8 bytes .* needs 40{36}$"),
        ({"a": entry([2], 0, 2**63)}, 8, "damaged, a has 9223372036854775808 bytes"),
        ({"a": entry([-1, -2], 0, 8)}, 8, "damaged, a has shape .-1, -2. at bytes 0 to 8"),
        ({"a": entry([2.0], 0, 8)}, 8, "damaged, a has shape .2.0. at bytes 0 to 8"),
        ({"a": entry([True], 0, 4)}, 4, "damaged, a has shape .True. at bytes 0 to 4"),
        ({"a": entry([2**40], 0, 2**42)}, 8, "truncated, has .* bytes and its header announces 43980465"),
        ({"a": entry([2], 0, 8, "F31")}, 8, "not a safetensors file"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "not a safetensors file"),
        ({"a": entry([2], 0, 8) | {"data_offsets": [0]}}, 8, "not a safetensors file"),
        ({"a": [1]}, 8, "not a safetensors file"),
        ({"a": entry([2], 0, 8), "__metadata__": {"steps": 3}}, 8, "not a safetensors file"),
        ({"a": entry([4], 0, 3, "F6_E2M3")}, 3, "a is not readable"),
    ],
    ids=str,
)
def test_headers_that_lie_are_refused(entries: dict, data: int, message: str, tmp_path: Path):
    file = with_header(tmp_path / WEIGHTS, json.dumps(entries), data)
    with pytest.raises(ReducioError, match=f"^{file}: {message}"):
        load_tensors(file)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (struct.pack("<Q", 100_000_001), "not a safetensors file"),
        (struct.pack("<Q", 2**64 - 1), "not a safetensors file"),
        (struct.pack("<Q", 99_000_000), "truncated, its 18 bytes do not even hold the header"),
        (struct.pack("<Q", 10), "not a safetensors file"),
    ],
    ids=["above-the-limit", "largest", "longer-than-the-file", "no-json"],
)
def test_header_lengths_that_lie(start: bytes, message: str, tmp_path: Path):
    file = tmp_path / WEIGHTS
    file.write_bytes(start + b"{" * 10)
    with pytest.raises(ReducioError, match=f"{file}: {message}"):
        load_tensors(file)


def test_a_header_names_each_tensor_once(tmp_path: Path):
    """If two entries have the same name, some readers take the first and some the last."""
    one = json.dumps(entry([2], 0, 8))
    with pytest.raises(ReducioError, match="not a safetensors file"):
        load_tensors(with_header(tmp_path / WEIGHTS, f'{{"a": {one}, "a": {one}}}', 8))
    with pytest.raises(ReducioError, match="not a safetensors file"):
        load_tensors(with_header(tmp_path / WEIGHTS, "[" * 200_000, 0))  # deeper than any parser goes
    with pytest.raises(ReducioError, match="not a safetensors file"):
        load_tensors(with_header(tmp_path / WEIGHTS, f'{{"a": {one}}}'.encode("utf-16"), 8))


def test_honest_headers_pass(tmp_path: Path):
    """Entries in any order, tensors of no element and of no axis, metadata, and every type that torch can write."""
    entries = {"b": entry([2], 4, 12), "__metadata__": {"format": "pt"}, "a": entry([], 0, 4), "c": entry([0, 9], 4, 4)}
    tensors = load_tensors(with_header(tmp_path / WEIGHTS, json.dumps(entries) + "  ", 12))
    assert {n: list(t.shape) for n, t in tensors.items()} == {"a": [], "b": [2], "c": [0, 9]}
    kinds = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16)
    kinds += (torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)
    save_file({str(kind): torch.zeros(3, dtype=kind) for kind in kinds}, tmp_path / WEIGHTS)
    assert {t.dtype for t in load_tensors(tmp_path / WEIGHTS).values()} == set(kinds)


@pytest.mark.slow
def test_no_pickle_is_read_unrestricted(root: Path):
    """Every torch.load passes weights_only=True, and outside of tests no other function that unpickles is called."""
    loads = 0
    for file in sorted(root.rglob("*.py")):
        if any(part.startswith(".") or part == "build" for part in file.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called, where = ast.unparse(node.func), f"{file.relative_to(root)}:{node.lineno}"
            kwargs = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load":
                loads += 1
                assert kwargs.get("weights_only") == "True", where
            assert kwargs.get("allow_pickle") != "True", where
            unpickles = called in ("pickle.load", "pickle.loads", "torch.jit.load", "joblib.load", "pd.read_pickle")
            # TorchScript's reader loads no Python classes; the file is a network that the user names for scoring clips.
            allowed = called == "torch.jit.load" and file.parts[-2:] == ("evaluation", "networks.py")
            assert not unpickles or allowed or "tests" in file.parts, where
    assert loads >= 2, "the converter's, and that of a network that judges clips"


def test_shards_must_be_complete(tmp_path: Path):
    save_file({"a": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ReducioError, match="names model-00002-of-00002.safetensors, which is not there"):
        check_component(tmp_path)
    save_file({"b": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors")
    check_component(tmp_path)


def test_bad_configuration(network, tmp_path: Path):
    save_model(network, tmp_path)
    path = tmp_path / CONFIG
    good = json.loads(path.read_text())
    arguments = (type(network), type(network.config), tmp_path)
    path.write_text(json.dumps(good | {"colour": 1}))
    with pytest.raises(ReducioError, match=f"{path}: .*unknown colour; known are"):
        load_model(*arguments)
    path.write_text(json.dumps(good | {"_class_name": "UNet2D"}))
    with pytest.raises(ReducioError, match=f"describes a UNet2D, not a {type(network).__name__}"):
        load_model(*arguments)
    path.write_text("[1]")
    with pytest.raises(ReducioError, match="holds a JSON list, must hold an object"):
        load_model(*arguments)
    path.write_text("[" * 200_000)
    with pytest.raises(ReducioError, match="not readable as JSON"):
        load_model(*arguments)
    path.unlink()
    with pytest.raises(ReducioError, match=f"{path}: no such file"):
        load_model(*arguments)


def test_weights_of_another_type(network, tmp_path: Path):
    save_model(network, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(torch.int8)}, tmp_path / WEIGHTS)
    with pytest.raises(ReducioError, match=f"1 of another type: {name} torch.int8 instead of torch.float32$"):
        load_model(type(network), type(network.config), tmp_path)


def test_new_folder_appears_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "deep" / "model"
    with new_folder(target, INDEX, "model") as work:
        (work / "model_index.json").write_text("{}")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["model_index.json"]
    with pytest.raises(RuntimeError), new_folder(target, INDEX, "model") as work:
        (work / "half").touch()
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["model_index.json"], "the earlier model stays"
    with new_folder(target, INDEX, "model") as work:
        (work / "second").touch()
    assert [p.name for p in target.iterdir()] == ["second"], "and is replaced as a whole"
    with pytest.raises(ReducioError, match="exists and is no model folder"), new_folder(target, INDEX, "model"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(ReducioError, match="cannot write"), new_folder(tmp_path / "file" / "model", INDEX, "model"):
        pass
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "file", "model", "second"]


def test_files_are_as_readable_as_the_user_wants_them(network, tmp_path: Path):
    """safetensors itself writes files that only their owner can read."""
    umask = os.umask(0o027)
    try:
        with new_folder(tmp_path / "model", INDEX, "model") as work:
            save_model(network, work / "part")
            save_model(network, work)
    finally:
        os.umask(umask)
    files = [p for p in (tmp_path / "model").rglob("*") if p.is_file()]
    assert len(files) == 4 and {oct(p.stat().st_mode & 0o777) for p in files} == {"0o640"}


def test_find_model(tmp_path: Path):
    assert find_model(tmp_path) == tmp_path
    for name in ("nowhere", "a/b/c", str(tmp_path / "none"), "../none", "./none", "/none", "owner/"):
        with pytest.raises(ReducioError, match="is neither a folder nor a hub id"):
            find_model(name)
    with pytest.raises(ReducioError) as caught:
        find_model("some-owner/some-model")
    message = str(caught.value)
    assert "'some-owner/some-model' is no local folder and could not be fetched from the hub" in message
    assert message.endswith("run `hf download some-owner/some-model --local-dir DIR`, then pass DIR")
    assert "\n" not in message


def test_a_hub_repository_is_its_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    calls = []

    def snapshot_download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        calls.append((name, "*.safetensors" in allow_patterns, "*.bin" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_model("owner/name") == tmp_path and calls == [("owner/name", True, False)]


def test_autoencoder_loads_strictly(tmp_path: Path):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    AutoencoderKL(**blocks, block_out_channels=(4,), norm_num_groups=2, layers_per_block=1).save_pretrained(tmp_path)
    vae = load_foreign("diffusers", "AutoencoderKL", tmp_path, torch.bfloat16, "cpu")
    assert vae.dtype == torch.bfloat16 and not vae.training
    file = tmp_path / WEIGHTS
    tensors = load_file(file)
    save_file(tensors | {"encoder.conv_in.weight": torch.zeros(4, 3, 1, 1)}, file, metadata={"format": "pt"})
    with pytest.raises(ReducioError, match="AutoencoderKL.*encoder.conv_in.weight"):
        load_foreign("diffusers", "AutoencoderKL", tmp_path, torch.float32, "cpu")


def test_loading_ends_whatever_the_fresh_memory_held() -> None:
    """`trunc_normal_` draws until all values lie in its range, which never happens if the draws are left out."""
    weight = torch.full((8,), float("nan"))
    with _NoRandomInit():
        torch.nn.init.trunc_normal_(weight, std=0.02)
    assert torch.equal(weight, torch.zeros(8))
