"""The rungs of `bench --ladder`: optimisations that can be switched on one after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Rung:
    """One line of the ablation ladder: what it adds to the rung before."""

    name: str
    what: str
    transformer: bool = False  # the fast twin
    vae: bool = False
    kernels: frozenset[str] = frozenset()  # ops that run our kernel; the others run the vendor's library
    contender: str = ""  # the name of the whole contender, for a rung that is one


def ladder() -> list[Rung]:
    """Every optimisation that can be switched on separately, each on top of those before it."""
    rungs = [
        Rung("reference", "plain PyTorch, eager"),
        Rung("transformer", "fast transformer on torch ops: fused QKV, keys and values once a clip, one modulation "
             "table a schedule, guidance halves share their start", transformer=True),
        Rung("decoder", "fast decoder on torch ops: channels-last, folded up-sampling, shared content keys "
             "and values", transformer=True, vae=True),
    ]  # fmt: skip
    kernels: frozenset[str] = frozenset()
    for name, ops, description in (
        ("group_norm_silu", ("group_norm_silu",), "parallel GroupNorm + SiLU kernel that writes the padded buffer"),
        ("conv3d", ("conv3d",), "implicit-GEMM convolution, bias, residual and statistics in its epilogue"),
        ("upsample_conv3d", ("upsample_conv3d",), "phase-folded up-sampling kernel"),
        ("attention", ("attention",), "flash attention with head dim 72 as 64 + 16"),
        (
            "ada_layer_norm",
            ("ada_layer_norm", "gated_residual_ada_layer_norm"),
            "residual + gate + LayerNorm + modulation in one kernel",
        ),
        ("guidance_dpm_step", ("guidance_dpm_step",), "guidance and scheduler in one kernel"),
        ("blend_tiles", ("blend_tiles",), "tiles blended, cropped and turned into bytes in one kernel"),
        (
            "warp_frames",
            ("warp_frames",),
            "the content frame moved by the flow in one kernel, where the decoder has one",
        ),
    ):
        kernels |= set(ops)
        rungs.append(Rung(name, description, transformer=True, vae=True, kernels=kernels))
    last = rungs[-1]
    return [
        *rungs,
        replace(last, name="engine", what="graphs, as backend='fast' has them", contender="fast"),
        replace(last, name="compile", what="compiled blocks, as compile=True has them", contender="fast-compiled"),
    ]
