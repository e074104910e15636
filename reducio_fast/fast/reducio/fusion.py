"""The fast twins of `reference/reducio/fusion.py`, on channels-last tensors: what differs is listed in `vae`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...reference.reducio.fusion import AddFusion, AttentionFusion, LinearFusion, place_table
from ..packed_layers import Activation, FastConv, FastNorm, channels_first, channels_last, frozen, pad
from ..plan import Plan


class FastAttentionFusion(nn.Module):
    """Content keys and values are computed once and serve every frame. With windows, the reference's own code runs."""

    def __init__(self, fusion: AttentionFusion, plan: Plan, path: str) -> None:
        super().__init__()
        self.windowed = fusion
        self.pos_embed = frozen(fusion.pos_embed[0, :, 0])
        self.norm, self.num_heads, self.cells = fusion.norm, fusion.attn.num_heads, fusion.cells
        self.to_q, self.to_out = fusion.attn.to_q, fusion.attn.to_out[0]
        self.kv_weight = frozen(torch.cat([fusion.attn.to_k.weight, fusion.attn.to_v.weight]))
        self.attend = plan.pick(path, "attention", f"fusion {len(self.to_out.weight) // self.num_heads}")

    def forward(self, act: Activation, content: Tensor) -> Activation:
        N, T, H, W, C = act.x.shape
        reference = self.windowed
        x, image = channels_first(act.x), channels_first(content)[:, :, 0]
        if reference.windows(x.shape, image.shape) is not None:
            return Activation(channels_last(reference(x, image)))
        y = act.x + self.pos_embed[None, :, None, None]
        h, kv = self.norm(y), F.linear(content.flatten(1, 3), self.kv_weight)
        if self.cells is not None:
            h = h + place_table(H, W, C, self.cells[0], h).movedim(0, -1)
            places = place_table(*content.shape[2:], self.cells[1], content).flatten(1).T
            kv[..., :C] += F.linear(places, self.kv_weight[:C])  # only to the keys
        q = self.to_q(h).view(N, T * H * W, self.num_heads, -1)
        k, v = kv.unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return Activation(y + self.to_out(self.attend(q, k, v).flatten(2)).view(y.shape))


class FastAddFusion(nn.Module):
    def __init__(self, fusion: AddFusion, plan: Plan, path: str) -> None:
        super().__init__()
        self.conv_context = FastConv(fusion.conv_context, plan, f"{path}.conv_context")
        self.temp_embed = frozen(fusion.temp_embed[0, :, :, 0, 0].T)
        self.conv, self.norm = (
            FastConv(fusion.conv, plan, f"{path}.conv", stats=True),
            FastNorm(fusion.norm, plan, f"{path}.norm"),
        )

    def forward(self, act: Activation, content: Tensor) -> Activation:
        image = _same_grid(self.conv_context(pad(content, self.conv_context.padding)).x, act.x)
        mixed = self.conv(pad(act.x + (image + self.temp_embed[None, :, None, None]), self.conv.padding))
        return Activation(act.x + self.norm(mixed))


class FastLinearFusion(nn.Module):
    """The map over frames [T, T + 1] as one matrix product; the content frame's column comes last."""

    def __init__(self, fusion: LinearFusion, plan: Plan, path: str) -> None:
        super().__init__()
        self.conv_context = FastConv(fusion.conv_context, plan, f"{path}.conv_context")
        self.weight = frozen((fusion.conv.weight * fusion.visible).flatten(1))
        self.bias = fusion.conv.bias
        self.norm = FastNorm(fusion.norm, plan, f"{path}.norm")

    def forward(self, act: Activation, content: Tensor) -> Activation:
        image = _same_grid(self.conv_context(pad(content, self.conv_context.padding)).x, act.x)
        mixed = torch.matmul(self.weight, torch.cat([act.x, image], dim=1).flatten(2)) + self.bias[:, None]
        return Activation(act.x + self.norm(Activation(mixed.view(act.x.shape))))


def fusions(owner: nn.Module, plan: Plan, path: str) -> nn.ModuleList:
    """The twins of the fusions in a level's or the middle's `fuse`, in order."""
    twins: dict[type, Callable[..., nn.Module]] = {
        AttentionFusion: FastAttentionFusion,
        AddFusion: FastAddFusion,
        LinearFusion: FastLinearFusion,
    }
    chain = getattr(owner, "fuse", ())
    return nn.ModuleList(twins[type(fusion)](fusion, plan, f"{path}.fuse.{i}") for i, fusion in enumerate(chain))


def _same_grid(content: Tensor, x: Tensor) -> Tensor:
    """Cut the content [N, 1, H, W, C] to the video's grid, as the reference does in the tiled path."""
    H, W = x.shape[2:4]
    if content.shape[2] < H or content.shape[3] < W:
        raise ValueError(f"content feature is {tuple(content.shape[2:4])}, smaller than the video's {(H, W)}")
    return content[:, :, :H, :W]
