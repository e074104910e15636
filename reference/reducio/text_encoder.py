"""T5's encoder and ByT5's tokenizer, for models whose prompts are bytes, such as the embedded one.

Sources: T5 v1.1 (arXiv 1910.10683) and ByT5 (arXiv 2105.13626). State-dict names and configuration are those of
transformers' `T5EncoderModel`, whose arithmetic it repeats step by step. Legend: B prompts, L tokens, D hidden size,
N heads, K channels of a head.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DictMixin

# Fields of the configuration that this encoder fixes; transformers' class could also build other encoders.
FIXED = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class T5Config(DictMixin):
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    vocab_size: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        self.check_numbers()
        if self.relative_attention_num_buckets < 4:
            raise ValueError(
                f"relative_attention_num_buckets={self.relative_attention_num_buckets}: must be at least 4, two for "
                "each direction"
            )

    @property
    def hidden_size(self) -> int:
        return self.d_model

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> T5Config:
        """From a published config.json. Raises ValueError for another kind of encoder."""
        for name, value in FIXED.items():
            if values.get(name) != value:
                raise ValueError(f"{name}={values.get(name)!r}: must be {value!r}")
        known = [f.name for f in dataclasses.fields(cls)]
        return cls(**{name: value for name, value in values.items() if name in known})


class RMSNorm(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.d_model)), config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps)).to(self.weight.dtype)


class SelfAttention(nn.Module):
    """Without a scale: T5 puts it into its initialisation."""

    def __init__(self, config: T5Config, biased: bool) -> None:
        super().__init__()
        self.config, inner = config, config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if biased:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x_BLD: Tensor, bias_BNLL: Tensor) -> Tensor:
        q, k, v = (
            to(x_BLD).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2) for to in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BNLL, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2))

    def position_bias(self, length: int) -> Tensor:
        """The bias that the distance of two tokens adds to their score, [1, N, L, L]. Each direction has half of the
        buckets: half of those are for single steps, the rest for logarithmically longer ones."""
        config = self.config
        place = torch.arange(length, device=self.o.weight.device)
        distance = place[None, :] - place[:, None]
        half = config.relative_attention_num_buckets // 2
        exact = half // 2
        far = (distance.abs().float() / exact).log() / math.log(config.relative_attention_max_distance / exact)
        far = (exact + (far * (half - exact)).long()).clamp(max=half - 1)
        bucket = torch.where(distance.abs() < exact, distance.abs(), far) + (distance > 0) * half
        return self.relative_attention_bias(bucket).permute(2, 0, 1)[None]


class AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, biased: bool) -> None:
        super().__init__()
        self.SelfAttention, self.layer_norm = SelfAttention(config, biased), RMSNorm(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class GatedDense(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.wi_0(x)
        # transformers' "gelu_new", written out: F.gelu(approximate="tanh") rounds otherwise.
        gate = 0.5 * gate * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (gate + 0.044715 * torch.pow(gate, 3.0))))
        return self.wo(gate * self.wi_1(x))


class DenseLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense, self.layer_norm = GatedDense(config), RMSNorm(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    def __init__(self, config: T5Config, biased: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config, biased), DenseLayer(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, bias))


class Stack(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(config, i == 0) for i in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        bias = self.block[0].layer[0].SelfAttention.position_bias(x_BLD.shape[1])
        mask_bias = torch.where(mask_BL.bool()[:, None, None], 0.0, torch.finfo(x_BLD.dtype).min).to(x_BLD.dtype)
        for block in self.block:
            x_BLD = block(x_BLD, bias + mask_bias)
        return self.final_layer_norm(x_BLD)


class T5Encoder(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared, self.encoder = nn.Embedding(config.vocab_size, config.d_model), Stack(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        """input_ids and attention_mask [B, L] -> (last hidden state [B, L, D],), as transformers returns it."""
        return (self.encoder(self.shared(input_ids), attention_mask),)


@dataclasses.dataclass(frozen=True, slots=True)
class Tokens:
    input_ids: Any  # a list, or a tensor [B, L]
    attention_mask: Any


class ByteTokenizer:
    """ByT5's tokenizer: the bytes of a text, offset by the three special tokens, then an end token. It is called like
    the one of transformers."""

    PAD, END, OFFSET = 0, 1, 3
    SPECIAL = ("<pad>", "</s>", "<unk>")  # a text may contain them

    def __call__(self, text: str | list[str], max_length: int | None = None, **kwargs: Any) -> Tokens:
        """One text -> lists of ids; a list with `max_length` -> tensors, padded and cut to that."""
        if isinstance(text, str):
            ids = self.encode(text)
            return Tokens(ids, [1] * len(ids))
        assert max_length is not None
        rows = [self.encode(each) for each in text]
        rows = [row if len(row) <= max_length else [*row[: max_length - 1], self.END] for row in rows]
        ids = torch.tensor([row + [self.PAD] * (max_length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (max_length - len(row)) for row in rows])
        return Tokens(ids, mask)

    def encode(self, text: str) -> list[int]:
        """The ids of a text. A special token in the text becomes its id, and the spaces around it are dropped."""
        parts = re.split(rf"\s*({'|'.join(self.SPECIAL)})\s*", text)
        ids: list[int] = []
        for number, part in enumerate(parts):
            ids += [self.SPECIAL.index(part)] if number % 2 else [byte + self.OFFSET for byte in part.encode()]
        return ids if ids and ids[-1] == self.END else [*ids, self.END]
