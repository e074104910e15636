"""Every kernel of this folder by the name of its op."""

from __future__ import annotations

from . import (
    ada_layer_norm,
    attention,
    blend_tiles,
    conv3d,
    frame_attention,
    gated_residual_ada_layer_norm,
    geglu_linear,
    group_norm_silu,
    guidance_dpm_step,
    quantised_conv3d,
    stream_layer_norm,
    temporal_conv,
    upsample_conv3d,
    warp_frames,
)

OPS = {
    module.OP: module
    for module in (
        ada_layer_norm,
        gated_residual_ada_layer_norm,
        attention,
        conv3d,
        quantised_conv3d,
        upsample_conv3d,
        group_norm_silu,
        guidance_dpm_step,
        blend_tiles,
        temporal_conv,
        geglu_linear,
        frame_attention,
        stream_layer_norm,
        warp_frames,
    )
}
