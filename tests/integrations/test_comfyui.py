"""The ComfyUI node pack, loaded from its folder as ComfyUI loads one, against a stand-in for ComfyUI's documented
interface: classes with the signatures of `comfy_api.latest.io`, which refuse arguments that those do not have. ComfyUI
itself is not an installable package, so its own loader is not run here."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2] / "integrations" / "comfyui"
PROMPT = "a red circle moving right on a black background"


class _Socket:
    def __init__(self, id: str, display_name: str | None = None, optional: bool = False, tooltip: str | None = None):
        self.id, self.optional = id, optional


class _Widget(_Socket):
    def __init__(self, id: str, *, default: Any = None, tooltip: str | None = None, optional: bool = False):
        super().__init__(id, None, optional, tooltip)
        self.default = default


class _Number(_Widget):
    def __init__(
        self,
        id: str,
        *,
        default: Any = None,
        min: Any = None,
        max: Any = None,
        step: Any = None,
        control_after_generate: bool | None = None,
        tooltip: str | None = None,
        optional: bool = False,
    ):
        super().__init__(id, default=default, tooltip=tooltip, optional=optional)
        assert min <= default <= max


class _Text(_Widget):
    def __init__(self, id: str, *, multiline: bool = False, default: Any = None, tooltip: str | None = None):
        super().__init__(id, default=default, tooltip=tooltip)


class _Combo(_Widget):
    def __init__(self, id: str, *, options: list[str], default: Any = None, tooltip: str | None = None):
        super().__init__(id, default=default or options[0], tooltip=tooltip)


class _Output:
    def __init__(self, id: str | None = None, display_name: str | None = None, tooltip: str | None = None):
        self.display_name = display_name


class _Schema:
    def __init__(
        self, node_id: str, display_name: str | None = None, category: str = "", inputs: Any = (), outputs: Any = ()
    ):
        self.node_id, self.inputs, self.outputs = node_id, list(inputs), list(outputs)


class _NodeOutput:
    def __init__(self, *args: Any):
        self.args = args


def _type(of: type) -> SimpleNamespace:
    return SimpleNamespace(Input=of, Output=_Output)


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """State of the stand-in: `progress` records the nodes' updates, `interrupted` means that the user interrupts."""
    state = SimpleNamespace(progress=[], interrupted=False)

    class ProgressBar:
        def __init__(self, total: int, node_id: Any = None):
            pass

        def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
            state.progress.append((value, total, preview))

    def throw() -> None:
        if state.interrupted:
            raise InterruptedError

    io = SimpleNamespace(
        ComfyNode=object, Schema=_Schema, NodeOutput=_NodeOutput, Custom=lambda name: _type(_Socket),
        Image=_type(_Socket), String=_type(_Text), Int=_type(_Number), Float=_type(_Number), Boolean=_type(_Widget),
        Combo=_type(_Combo),
    )  # fmt: skip
    modules = {
        "comfy": {},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.model_management": {"throw_exception_if_processing_interrupted": throw},
        "comfy_api": {},
        "comfy_api.latest": {"ComfyExtension": object, "io": io},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return state


@pytest.fixture
def nodes(comfy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The nodes by id. ComfyUI imports `__init__.py` under a name that it chooses and awaits `comfy_entrypoint()`."""
    name = "custom_nodes_comfyui"
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, f"{name}.nodes", raising=False)
    spec.loader.exec_module(module)

    async def load() -> list[Any]:
        return await (await module.comfy_entrypoint()).get_node_list()

    try:
        return {node.define_schema().node_id: node for node in asyncio.run(load())}
    finally:
        sys.modules.pop(f"{name}.nodes", None)


def test_schemas_fit_their_functions(nodes: dict[str, Any]) -> None:
    assert list(nodes) == ["ReducioLoad", "ReducioGenerate", "ReducioEncodeMotion", "ReducioDecode", "ReducioLongClip"]
    for node in nodes.values():
        schema, params = node.define_schema(), inspect.signature(node.execute).parameters
        assert {each.id for each in schema.inputs} == set(params)
        assert all(each.optional == (params[each.id].default is not inspect.Parameter.empty) for each in schema.inputs)
        assert schema.outputs and all(output.display_name for output in schema.outputs)


@pytest.mark.slow
def test_a_workflow(nodes: dict[str, Any], comfy: SimpleNamespace) -> None:
    (model,) = nodes["ReducioLoad"].execute("", "auto", "float32").args
    options = {"negative_prompt": "", "seed": 1, "steps": 2, "guidance": 4.5, "previews": True}
    motion, content = nodes["ReducioGenerate"].execute(model, PROMPT, **options).args
    assert content.shape == (1, 128, 128, 3) and content.dtype == torch.float32 and 0 <= content.min() <= 1
    assert [(value, total) for value, total, _ in comfy.progress] == [(1, 2), (2, 2)]
    kind, picture, _ = comfy.progress[-1][2]
    assert kind == "JPEG" and picture.size == (256, 64)  # by the preview decoder, half the size
    frames, fps = nodes["ReducioDecode"].execute(model, motion, content, 1.0, False).args
    assert frames.shape == (16, 128, 128, 3) and fps == 16.0
    direct = model(PROMPT, seed=1, num_inference_steps=2, progress=False)
    assert np.array_equal((frames * 255).round().to(torch.uint8).numpy(), direct.frames)
    other, middle = nodes["ReducioEncodeMotion"].execute(model, frames).args
    assert other.shape == motion.shape and torch.equal(middle[0], frames[7])
    comfy.progress.clear()
    long, _ = nodes["ReducioLongClip"].execute(
        model, PROMPT, **options | {"previews": False}, num_frames=24, motion_strength=1.0, loop=True, image=content
    ).args  # fmt: skip
    assert long.shape == (46, 128, 128, 3) and [value for value, *_ in comfy.progress] == [1, 2, 3, 4]
    comfy.interrupted = True
    with pytest.raises(InterruptedError):
        nodes["ReducioGenerate"].execute(model, PROMPT, **options)
