"""Recipes as files, and values of recipes and options that are refused before any work."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from reducio_fast.cli.main import main
from reducio_fast.system.errors import ReducioError
from reducio_fast.training import recipe_file
from reducio_fast.training.reducio import dit, vae


def test_recipes_as_files(tmp_path: Path) -> None:
    shipped = {name: recipe_file.load(dit.DiTRecipe, name) for name in recipe_file.shipped() if name.startswith("dit-")}
    assert set(shipped) == {"dit-256", "dit-512", "dit-1024"}
    assert [shipped[f"dit-{n}"].batch for n in (256, 512, 1024)] == [512, 512, 768]
    assert all(
        r.objective == "epsilon" and r.condition_drop == 0.1 and r.loop.parallel == "fsdp" for r in shipped.values()
    )
    assert all(r.loop.eps == 1e-10 and r.loop.weight_decay == 0.03 for r in shipped.values())  # PixArt-alpha's
    changed = recipe_file.load(dit.DiTRecipe, "dit-256", ["loop.steps=7", "batch=64", 'start="somewhere"'])
    assert (
        changed.loop.steps == 7
        and changed.batch == 64
        and changed.loop.learning_rate == shipped["dit-256"].loop.learning_rate
    )
    path = tmp_path / "mine.toml"
    for text, message in (
        ("bach = 4", "unknown key 'bach'; known are loop, batch"),
        ("batch = 'four'\n[loop]\nsteps = 1\nlearning_rate = 1", "batch='four' must be of type int"),
        (
            "batch = 4\nmodel = 'reducio-256'\n[loop]\nsteps = 1\nlearning_rate = 1\nrate = 3",
            "loop: unknown key 'rate'",
        ),
        ("batch = 4\n[loop]\nsteps = 1\nlearning_rate = 1", "a recipe needs `model` .* or `start`"),
        (
            "batch = 5\nmodel = 'reducio-256'\n[loop]\nsteps = 1\nlearning_rate = 1\nmicro_batches = 2",
            "must be a multiple of",
        ),
        ("model = 'big'\nbatch = 1\n[loop]\nsteps = 1\nlearning_rate = 1", "model='big': must be one of"),
        ("not toml", "mine.toml: "),
        ("batch = 1", "loop"),
    ):
        path.write_text(text)
        with pytest.raises(ReducioError, match=message):
            recipe_file.load(dit.DiTRecipe, str(path))
    with pytest.raises(ReducioError, match="no such file, and none of ablation-dit, ablation-vae, dit-1024, dit-256"):
        recipe_file.load(dit.DiTRecipe, "dit-128")
    with pytest.raises(ReducioError, match="must be KEY=VALUE in TOML's notation"):
        recipe_file.load(dit.DiTRecipe, "dit-256", ["loop.steps"])


@pytest.mark.parametrize(("what", "build"), [(dit.DiTRecipe, dit.build_network), (vae.VAERecipe, vae.build_vae)])
def test_the_config_and_the_start_of_a_network_are_checked(what: type, build: Callable, tmp_path: Path) -> None:
    switch = {dit.DiTRecipe: "clip_conditioning", vae.VAERecipe: "causal"}[what]
    name = {dit.DiTRecipe: "dit-256", vae.VAERecipe: "vae-ft4"}[what]
    for value in ("false", 0, 1.0):
        recipe = recipe_file.load(what, name, [f"config.{switch}={json.dumps(value)}"])
        recipe = dataclasses.replace(recipe, start=None, model=recipe.model or "reducio-256")
        with pytest.raises(ReducioError, match=f"config: {switch}={value!r} must be true or false"):
            build(recipe)
    for start in ("", str(tmp_path / "none"), str(tmp_path / "none" / "model")):
        with pytest.raises(ReducioError, match=f"start='{start}': no such folder"):
            build(dataclasses.replace(recipe, config={}, start=start))


OF_THE_LOOP = (
    ("loop.clip_norm=nan", "clip_norm must be above 0, got nan"),
    ("loop.clip_norm=-1", "clip_norm must be above 0, got -1"),
    ("loop.learning_rate=inf", "learning_rate must be finite and above 0, got inf"),
    ("loop.learning_rate=nan", "learning_rate must be finite and above 0, got nan"),
    ("loop.weight_decay=nan", "weight_decay must be finite and at least 0, got nan"),
    ("loop.warmup_steps=-1", "warmup_steps must be finite and at least 0, got -1"),
    ("loop.max_seconds=nan", "max_seconds must be finite and at least 0, got nan"),
    ("loop.betas=[1.5, 2]", "betas must be two numbers in [0, 1), got (1.5, 2.0)"),
    ("loop.seed=-1", "seed must be a whole number from 0 to"),
    ("threads=-1", "threads=-1: must be from 1 to 1024"),
    ("threads=1000000000000", "threads=1000000000000: must be from 1 to 1024"),
)
OF_A_RECIPE = {
    "dit": (
        ("held_out=-1", "held_out must be finite and at least 0, got -1"),
        ("image_drop=nan", "image_drop=nan must"),
        ("image_conditions=[]", "image_conditions=[]: must be one or both of semantic, content"),
    ),
    "vae": (
        ("held_out=-1", "held_out must be finite and at least 0, got -1"),
        ("rate=0", "rate must be finite and above 0, got 0"),
        ("least_area=2", "least_area=2.0 must lie in 0..1"),
        ("discriminator_warmup=-1", "discriminator_warmup must be finite and at least 0, got -1"),
        ("kl_weight=inf", "kl_weight must be finite and at least 0, got inf"),
    ),
    "svd-lora": (
        ("rate=0", "rate must be finite and above 0, got 0"),
        ("rank=0", "rank must be finite and at least 1, got 0"),
        ("num_frames=0", "num_frames must be finite and at least 1, got 0"),
        ("noise_mean=nan", "noise_mean must be finite"),
        ("layers='('", "layers='(' is no regular expression"),
    ),
}


@pytest.mark.parametrize(("what", "recipe"), [("dit", "dit-256"), ("vae", "vae-ft4"), ("svd-lora", "svd-lora")])
def test_impossible_values_are_refused(
    what: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"dit": ["--latents", "x"], "vae": ["--clips", "x"], "svd-lora": ["--clips", "x", "--model", "x"]}[what]
    for change, message in (*OF_THE_LOOP, *OF_A_RECIPE[what]):
        argv = ["train", what, "--recipe", recipe, *data, "-o", str(tmp_path / "out"), "--set", change]
        assert main(argv) == 2, change
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1, (change, errors)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("train tiny --steps-scale inf", "scale=inf must be above 0 and at most 1000"),
        ("train svd-tiny --steps-scale nan", "scale=nan must be above 0 and at most 1000"),
        ("train tiny --steps-scale 1e308", "scale=1e+308 must be above 0 and at most 1000"),
        ("train dit --recipe dit-256 --latents x --price nan", "--price nan: must be a finite number of at least 0"),
        ("train dit --recipe ablation-dit --latents x --ablation attention --price 3", "--price"),
        (
            "train dit --recipe ablation-dit --latents x --ablation attention --set loop.seed=7",
            "--set loop.seed: an ablation runs seeds 0 to N - 1; name their number by --seeds",
        ),
        ("train svd-tiny --stages image_encoder --device gpu", "device: 'gpu' cannot be used here"),
        ("train svd-tiny --stages image_encoder --device cuda:99", "device: 'cuda:99' cannot be used here"),
        ("extract x --device gpu", "device: 'gpu' cannot be used here"),
        ("extract x --seed 4294967296", "seed=4294967296: must be a whole number from 0 to 4294967295"),
    ],
)
def test_options_are_checked_before_any_work(
    argv: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv.split(), "-o", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
