"""The model folder as a hub repository: its card, loading with diffusers' own loader, and its upload."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError  # of the HTTP library, which differs between releases

from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints import hub, model_card
from reducio_fast.checkpoints.diffusers_folders import find_text_to_image
from reducio_fast.checkpoints.layouts import REDUCIO
from reducio_fast.pipelines.reducio.diffusers_bridge import DiffusersReducioPipeline
from reducio_fast.system.errors import ReducioError

ONE_STEP = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent", "progress": False}


@pytest.fixture(scope="module")
def pipe() -> ReducioPipeline:
    folder = Path(__file__).resolve().parents[2] / "reducio_fast" / "models" / "tiny"
    return ReducioPipeline.from_pretrained(folder, device="cpu", backend="reference")


@pytest.fixture(scope="module")
def folder(pipe: ReducioPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("hub") / "moving-shapes"
    pipe.save_pretrained(target)
    return target


@pytest.fixture(autouse=True)
def own_module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """diffusers copies a folder's pipeline.py into this cache before it imports it."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def open_with_diffusers(folder: Path, **kwargs) -> DiffusersReducioPipeline:
    return DiffusionPipeline.from_pretrained(
        folder, custom_pipeline="pipeline", trust_remote_code=True, backend="reference", **kwargs
    )


@pytest.mark.slow
def test_diffusers_opens_the_folder(folder: Path, pipe: ReducioPipeline, caplog: pytest.LogCaptureFixture):
    same = open_with_diffusers(folder)
    assert isinstance(same, ReducioPipeline) and isinstance(same, DiffusionPipeline)
    assert type(same.vae) is type(pipe.vae) and same.text_to_image.text_encoder is same.text_encoder
    assert (same.fps, same.sample_height, same.backend) == (pipe.fps, pipe.sample_height, "reference")
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    clips = [p("a red circle moving right", image, **ONE_STEP) for p in (pipe, same)]
    assert torch.equal(clips[0].frames, clips[1].frames)
    stages = [p.text_to_image.transformer.state_dict() for p in (pipe, same)]
    assert stages[0].keys() == stages[1].keys() and all(torch.equal(t, stages[1][n]) for n, t in stages[0].items())
    assert not [r for r in caplog.records if "xpected" in r.message], "diffusers finds a type or a setting odd"


def test_diffusers_words_are_obeyed(folder: Path, tmp_path: Path):
    half = open_with_diffusers(folder, torch_dtype=torch.bfloat16, text_to_image=None, image_encoder=None)
    assert half.text_to_image is None and half.image_encoder is None
    assert {p.dtype for n in half.parts.networks() for p in n.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "half")
    index = json.loads((tmp_path / "half" / "model_index.json").read_text())
    assert index["text_to_image"] == [None, None] and index["transformer"] == ["reducio_fast", "ReducioDiT"]
    again = open_with_diffusers(tmp_path / "half", torch_dtype=torch.bfloat16)
    for name, tensor in half.transformer.state_dict().items():
        assert torch.equal(tensor, again.transformer.state_dict()[name])
    with pytest.raises(ReducioError, match="no such folder|holds no safetensors"):
        (tmp_path / "half" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
        open_with_diffusers(tmp_path / "half")


def test_diffusers_runs_no_code_of_a_folder_unasked(folder: Path):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline")


def test_the_loader_knows_all_words_of_the_pipeline():
    parameters = [list(inspect.signature(c.__init__).parameters) for c in (DiffusersReducioPipeline, ReducioPipeline)]
    assert parameters[0] == parameters[1]


def test_the_card(folder: Path, pipe: ReducioPipeline, tmp_path: Path):
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-to-video" and card.data.library_name == "reducio-fast"
    assert "a clip of 16 frames of 128x128\nat 16 frames a second" in card.text
    count = sum(p.numel() for p in pipe.transformer.parameters())
    assert f"| transformer | ReducioDiT | {count:,} |" in card.text and "| scheduler | DPMSolverM" in card.text
    compile((folder / "pipeline.py").read_text(), "pipeline.py", "exec")

    (tmp_path / "model").mkdir()
    model_card.write_card(
        tmp_path / "model",
        {"vae": pipe.vae, "text_to_image": None},
        {"fps": 8, "sample_height": 64, "sample_width": 96},
        "model",
        REDUCIO,
    )
    assert ModelCard.load(tmp_path / "model" / "README.md").data.pipeline_tag == "image-to-video"


def test_saving_again_keeps_the_card_of_its_author(folder: Path, tmp_path: Path):
    absent = {name: None for name in ("text_encoder", "tokenizer", "image_encoder", "content_encoder", "text_to_image")}
    small = ReducioPipeline.from_pretrained(folder, device="cpu", backend="reference", **absent)
    target = tmp_path / "model"
    small.save_pretrained(target)
    assert "# model\n" in (target / "README.md").read_text()
    (target / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    small.save_pretrained(target)
    assert (target / "README.md").read_text() == "---\nlicense: mit\n---\nmine\n"


class FakeHub:
    """The methods of huggingface_hub's HfApi that `push` calls; no test has a network."""

    has_card, uploads, refusal = False, [], None

    def __init__(self, token: str | None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
        if self.refusal is not None:
            raise self.refusal
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id: str, name: str) -> bool:
        assert name == "README.md"
        return self.has_card

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str, ignore_patterns: list | None):
        names = sorted(str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file())
        self.uploads.append((repo_id, names, commit_message, ignore_patterns))
        return SimpleNamespace(commit_url="the commit")


def test_push_to_hub_uploads_what_is_saved(folder: Path, monkeypatch: pytest.MonkeyPatch):
    absent = {name: None for name in REDUCIO.optional}
    small = ReducioPipeline.from_pretrained(folder, device="cpu", backend="reference", **absent)
    monkeypatch.setattr(FakeHub, "uploads", [])
    real = {name for name, _ in inspect.getmembers(huggingface_hub.HfApi)}
    assert {"create_repo", "file_exists", "upload_folder"} <= real
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    assert small.push_to_hub("me/moving-shapes", commit_message="first") == "the commit"
    monkeypatch.setattr(FakeHub, "has_card", True)
    small.push_to_hub("me/moving-shapes")
    (name, files, message, ignored), second = FakeHub.uploads
    assert (name, message, ignored) == ("me/moving-shapes", "first", None) and second[3] == ["README.md"]
    weights = [
        f"{n}/{f}" for n in ("transformer", "vae") for f in ("config.json", "diffusion_pytorch_model.safetensors")
    ]
    assert files == sorted(
        [
            "README.md",
            "calibration.safetensors",
            "model_index.json",
            "pipeline.py",
            *weights,
            "scheduler/scheduler_config.json",
        ]
    )
    for refusal in (OSError("no network\nat all"), HTTPError("no network\nat all")):
        monkeypatch.setattr(FakeHub, "refusal", refusal)
        with pytest.raises(ReducioError, match=r"repo_id: 'me/x' could not be written on the hub \(no network\)$"):
            small.push_to_hub("me/x")


def test_a_download_that_the_http_library_ends(monkeypatch: pytest.MonkeyPatch):
    """The hub client passes on some errors of the library below it, such as those of a proxy."""

    def refuse(*_, **__) -> None:
        raise HTTPError("the proxy\nsays no")

    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    monkeypatch.setattr(DiffusionPipeline, "download", refuse)
    for find in (hub.find_model, hub.find_weights, find_text_to_image):
        with pytest.raises(ReducioError, match=r"could not be fetched from the hub \(the proxy\); .*hf download"):
            find("owner/name")
    with pytest.raises(
        ReducioError, match=r"'owner/name' could not be fetched from the hub \(the proxy\).* pass DIR/file.ckpt$"
    ):
        hub.find_weights("owner/name/file.ckpt")


@pytest.mark.parametrize("file", ["sv3d_p.safetensors", "deep/svd_xt.safetensors"])
def test_a_gated_file_names_its_page(file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from reducio_fast.cli.main import main

    class GatedRepoError(OSError):
        pass

    def refuse(*_, **__) -> None:
        raise GatedRepoError("403 Client Error.\nAccess to this repository is restricted")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert main(["convert", f"owner/name/{file}", "--out", "none"]) == 2
    errors = capsys.readouterr().err
    page = (
        "'owner/name' is gated (403 Client Error.); accept its licence on https://huggingface.co/owner/name, then run"
    )
    assert f"{page} `hf auth login`" in errors and errors.count("\n") == 1


def test_the_folder_of_another_pipeline_is_not_replaced(pipe: ReducioPipeline, tmp_path: Path):
    index = tmp_path / "model_index.json"
    for content, message in (('{"_class_name": "StableDiffusionPipeline"}', "holds a Stable"), ("{}", "without _cl")):
        index.write_text(content)
        with pytest.raises(ReducioError, match=f"{message}.*, which is not replaced by another class .ReducioPipeline"):
            pipe.save_pretrained(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == [index.name] and index.read_text() == content
