"""The documentation is correct: links lead to files, commands parse, Python compiles, and what is marked `run` runs.

A fence is marked in its info string: ```bash run``` goes through the command, ```python run``` is executed, each in a
folder with a picture `photo.png`; `MODEL` is the embedded model's folder. Other fences are parsed only: they need a
network, a GPU or minutes.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reducio_fast.cli import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(ROOT.glob("docs/*.md"))
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(*languages: str, pages: list[Path], run: bool | None = None) -> list:
    """The code of the fences in these languages, each with its page and line as id."""
    found = []
    for page in pages:
        text = page.read_text()
        for fence in FENCE.finditer(text):
            language, mark, code = fence.groups()
            assert mark.strip() in ("", "run"), f"{page}: unknown mark {mark!r}"
            if language in languages and run in (None, mark.strip() == "run"):
                line = text.count("\n", 0, fence.start()) + 1
                found.append(pytest.param(code, id=f"{page.name}:{line}"))
    return found


def commands(code: str) -> list[list[str]]:
    """The arguments of each `reducio-fast` in a shell snippet."""
    lines = code.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.split(r"&&|;|\|", line) if "reducio-fast" in part]
    words = [shlex.split(part, comments=True) for part in parts]
    return [each[each.index("reducio-fast") + 1 :] for each in words if "reducio-fast" in each]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    picture = np.random.default_rng(0).integers(0, 256, (96, 120, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_pages_are_there() -> None:
    assert {page.stem for page in PAGES} >= {"quickstart", "weights", "speed", "amd", "troubleshooting"}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("code", snippets("bash", "sh", pages=[ROOT / "README.md", *PAGES]))
def test_commands_parse(code: str) -> None:
    assert subprocess.run(["bash", "-n"], input=code, text=True, capture_output=True, check=False).stderr == ""
    for argv in commands(code):
        main.parser().parse_args(argv)  # exits with status 2 if an argument is wrong


@pytest.mark.parametrize("code", snippets("bash", pages=PAGES, run=True))
def test_commands_run(code: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argvs = commands(code)
    assert argvs
    for argv in argvs:
        assert main.main(argv) == 0
        assert capsys.readouterr().out
        if "--out" in argv:
            assert (here / argv[argv.index("--out") + 1]).stat().st_size > 0


@pytest.mark.parametrize("code", snippets("python", pages=[ROOT / "README.md", *PAGES]))
def test_python_compiles(code: str) -> None:
    compile(code, "snippet", "exec")


@pytest.mark.parametrize("code", snippets("python", pages=PAGES, run=True))
def test_python_runs(code: str, here: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "snippet", "exec"), {"MODEL": bundle})
    assert capsys.readouterr().out or list(here.iterdir())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_a_page_names_exist(page: Path) -> None:
    """Only options in running text; those in commands are parsed above."""
    actions = next(a for a in main.parser()._actions if isinstance(a, argparse._SubParsersAction))
    known = {option for command in actions.choices.values() for option in command._option_string_actions}
    foreign = {"--local-dir"}  # of `hf download`
    named = set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]+)", FENCE.sub("", page.read_text())))
    assert named - known - foreign == set()
