"""The launches of a full-size clip on an absent GPU: which kernels are built, which statistics are read, and what is
compiled beforehand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from reducio_fast.compile.precompile import Call, precompile
from reducio_fast.compile.targets import TARGETS
from reducio_fast.fast.launches import keys_of
from reducio_fast.measurement.svd_clip import FULL
from reducio_fast.measurement.svd_shapes import svd_problems
from reducio_fast.system.deadline import DeadlinePassed

pytestmark = pytest.mark.slow

CODE = textwrap.dedent("""
    import json, math, os, sys, time
    from pathlib import Path
    from unittest import mock
    from torch import Tensor
    from reducio_fast.compile.precompile import precompile
    from reducio_fast.compile.targets import TARGETS
    from reducio_fast.fast.launches import calls_of, clip_launches, svd_launches
    from reducio_fast.checkpoints import calibration_file
    from reducio_fast.checkpoints.strict_files import embedded_model
    from reducio_fast.fast.quantisation import Quantisation
    from reducio_fast.measurement.quantised_decoder import unmeasured_quantisation
    from reducio_fast.measurement.rate_model import CHIPS
    from reducio_fast.reference import DiTConfig, VAEConfig
    from reducio_fast.triton_kernels import tables
    from reducio_fast.triton_kernels.registry import OPS

    launches = clip_launches("sm_90")
    in_fp8 = clip_launches("sm_90", quantisation=unmeasured_quantisation("fp8"), pixels=320)

    # Convolutions of one tile of a 1024 clip that fill less than the GPU.
    small = [
        [l.arguments["T"], l.arguments["H"], math.prod(l.grid)]
        for l in [*clip_launches("sm_90", pixels=320), *in_fp8]
        if l.kernel.fn.__name__.endswith("conv3d_kernel") and math.prod(l.grid) < CHIPS["sm_90"].units
    ]

    def build(kernel, constants, types):
        constants = {k: v for k, v in constants.items() if not k.startswith(("BLOCK", "num_"))}
        return [kernel, sorted((k, str(v)) for k, v in constants.items()), sorted(types.items())]

    def launched(launch):
        constexprs = {p.name for p in launch.kernel.params if p.is_constexpr}
        constants = {k: v for k, v in launch.arguments.items() if k in constexprs or v is None}
        types = {k: str(v.dtype).removeprefix("torch.") for k, v in launch.arguments.items() if isinstance(v, Tensor)}
        return build(launch.kernel.fn.__name__, constants, types)

    names = {"*bf16": "bfloat16", "*fp32": "float32", "*i32": "int32", "*u8": "uint8", "*fp16": "float16",
             "*fp8e4nv": "float8_e4m3fn"}
    built = [
        [op] + build(v.kernel.fn.__name__, v.constants, {k: names[t] for k, t in v.signature.items() if t[0] == "*"})
        for op, module in OPS.items() for v in module.variants("sm_90") if "*bf16" in v.signature.values()
    ]

    # Statistics: written by one launch, by whom are they read?
    written = {id(l.arguments["stats_ptr"]) for l in launches if l.arguments.get("stats_ptr") is not None}
    read = {id(l.arguments["partials_ptr"]) for l in launches if l.kernel.fn.__name__ == "finalise_kernel"}

    # Which launch settings does SVD read? They are looked up by op and shape class.
    class Entries(dict):
        def __init__(self, op, entries):
            super().__init__(entries)
            self.op = op

        def get(self, key, default=None):
            looked_up.add((self.op, key))
            return super().get(key, default)

    looked_up = set()
    whole = {op: Entries(op, entries) for op, entries in tables.table("sm_90").items()}
    with mock.patch.object(tables, "table", lambda arch: whole):
        svd = svd_launches("sm_90")

    # The embedded model has other layers: fusion by addition, heads of other widths, few channels.
    folder = embedded_model()
    configs = [json.loads((folder / part / "config.json").read_text()) for part in ("transformer", "vae")]
    configs = DiTConfig.from_dict(configs[0]), VAEConfig.from_dict(configs[1])
    tiny = calls_of(clip_launches("sm_90", *configs))
    fp8 = Quantisation("fp8", calibration_file.read(folder))
    quantised = [c for c in calls_of(clip_launches("sm_90", *configs, quantisation=fp8)) if c not in tiny]

    # Each round compiles in a process of its own, and the second one finds all done but what cannot be compiled.
    cheap = [call for call in calls_of(launches) if call.kernel in ("blend_tiles_kernel", "guidance_dpm_step_kernel")]
    cheap.append(next(call for call in quantised if call.kernel == "apply_kernel"))  # which writes FP8
    broken, cubins, failures = type(cheap[0])(cheap[0].module, cheap[0].kernel, (("nonsense", 1),)), [], []
    for calls in (cheap, [*cheap, broken]):
        failures.append(precompile(calls, TARGETS["sm_90"].triton_target, jobs=1))
        cubins.append(sorted(str(p) for p in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))
    print(json.dumps({
        "launched": [launched(l) for l in launches], "svd": [launched(l) for l in svd],
        "looked_up": sorted(looked_up),
        "fp8": [launched(l) for l in in_fp8], "small": small,
        "built": built, "unread": len(written - read),
        "written": len(written), "cubins": cubins, "calls": len(calls_of(launches)),
        "tiny": sorted({call.kernel for call in tiny}), "quantised": sorted({call.kernel for call in quantised}),
        "failures": failures,
    }))
""")


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # In a process of its own, where Triton compiles; in this one it interprets.
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_compile_check_builds_what_a_clip_launches(dry_run: dict[str, Any]) -> None:
    """Every launch of our clip, also in FP8, and of SVD's is among the builds. Every bfloat16 build of a convolution or
    of SVD's norms is launched, except those of a causal model."""
    built = {json.dumps(build[1:]): build[0] for build in dry_run["built"]}
    launched = {json.dumps(launch) for launch in dry_run["launched"] + dry_run["fp8"] + dry_run["svd"]}
    assert launched - set(built) == set()
    checked = {b for b, op in built.items() if op.endswith(("conv3d", "temporal_conv", "stream_layer_norm"))}
    assert {b for b in checked - launched if '"CAUSAL", "True"' not in b} == set()
    assert any(op == "quantised_conv3d" for op in built.values())


*_, STEPS = FULL

# Frames and side of the convolutions of one 320-pixel tile that have fewer blocks than sm_90 has multiprocessors (132),
# and why each may: blocks as recorded, in bfloat16 and in FP8, and the share of the tile's 36 TFLOP.
SMALL_GRIDS = {
    (4, 10): "10 to 80 blocks, 0.2%; equal tiles of a clip are decoded together where memory allows (`tile_batch`)",
    (8, 20): "62 to 124 blocks, 1%; decoded together too",
    (1, 40): "28 blocks, 0.1%; the content frame, one for all frames",
    (1, 80): "106 blocks, 0.3%; the content frame too",
}


def test_convolutions_fill_the_gpu(dry_run: dict[str, Any]) -> None:
    assert {(frames, side) for frames, side, _ in dry_run["small"]} == set(SMALL_GRIDS)
    assert min(blocks for *_, blocks in dry_run["small"]) == 10


def test_every_launch_setting_of_svd_is_tuned(dry_run: dict[str, Any]) -> None:
    """`bench svd --tune` has a problem for each shape class that a step or a decode reads. Of the ops that only the
    U-Net has, the problems count all calls but those of the one transformer at its coarsest level."""
    problems = svd_problems("sm_90")
    of_stills = {("conv3d", "K<=16")}  # the last layer of the image autoencoder; a clip has no such layer
    looked_up = {tuple(key) for key in dry_run["looked_up"]}
    assert looked_up - of_stills == {(p.op, p.key) for p in problems}
    launched = Counter(kernel.removesuffix("_kernel") for kernel, *_ in dry_run["svd"])
    in_a_transformer = {"geglu_linear": 3, "attention": 1, "frame_attention": 1, "stream_layer_norm": 4}
    for op, times in in_a_transformer.items():
        assert sum(p.calls for p in problems if p.op == op) / STEPS == launched[op] - times


def test_statistics_are_taken_where_they_are_read(dry_run: dict[str, Any]) -> None:
    assert dry_run["written"] > 40 and dry_run["unread"] == 0


def test_kernels_are_compiled_beforehand(dry_run: dict[str, Any]) -> None:
    first, second = dry_run["cubins"]
    assert len(first) == 3 and first == second
    assert 30 < dry_run["calls"] < 60
    assert {"conv3d_kernel", "attention_kernel", "guidance_dpm_step_kernel"} <= set(dry_run["tiny"])
    assert "quantised_conv3d_kernel" in dry_run["quantised"]
    none, (line,) = dry_run["failures"]
    assert none == [] and line.startswith("blend_tiles_kernel: TypeError")


def test_a_process_that_ends_early_loses_no_other_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashing.py").write_text("import os; os._exit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    calls = [Call("crashing", "first", ()), Call("crashing", "second", ())]
    failures = precompile(calls, TARGETS["sm_90"].triton_target, jobs=1)
    assert failures == ["first: its process ended with status 3", "second: not compiled, the processes ended early"]


def test_a_deadline_ends_the_processes_that_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = tmp_path / "pid"
    code = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    (tmp_path / "slow.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)

    def check() -> None:
        if pid.is_file() and pid.read_text():
            raise DeadlinePassed

    with pytest.raises(DeadlinePassed):
        precompile([Call("slow", "a_kernel", ())], TARGETS["sm_90"].triton_target, 1, check)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_keys_of_the_published_sizes() -> None:
    """Compared with the model itself, on tensors without data."""
    import torch

    from reducio_fast.reference import DIT_PRESETS, ReducioDiT

    for pixels in (256, 512, 1024):
        config = DIT_PRESETS[f"reducio-{pixels}"]
        with torch.device("meta"):
            network = ReducioDiT(config)
            condition = network.embed_condition(
                torch.empty(1, config.caption_length, config.caption_channels),
                torch.empty(1, config.caption_length, dtype=torch.long),
                torch.empty(1, 256, config.semantic_channels),
                torch.empty(1, config.content_channels, pixels // 8, pixels // 8),
            )
        assert {tokens.shape[1] for tokens in condition.tokens} == {keys_of(pixels)}
