"""Which layers of the video decoder compute in 8-bit numbers, and with what scales.

Quantised are the 3x3x3 convolutions of the decoder's residual blocks: each reads what a GroupNorm pass writes, which
rounds to 8 bits on the way, so that no pass over memory is added and its bytes are halved. They are 88% of a full-size
decoder's multiply-adds. All else keeps its precision: up-sampling convolutions, whose input another convolution writes;
first and last convolution; attention and fusion; the encoders; the transformer. With its linears in FP8 a step has 3.6
times bfloat16's error, with a scale for each token (`benchmarks/quantised_quality.py`), where twice is the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..reference import ReducioVAE
from ..reference.reducio.vae import ResBlock
from ..triton_kernels.eight_bits import WORDS
from ..triton_kernels.tables import arch_of

PARTS = ("conv1", "conv2")  # of a residual block


@dataclass(frozen=True, slots=True, eq=False)
class Quantisation:
    """What was asked for, and of each convolution, by its path in the network, the largest magnitude of every channel
    of its input, float32 [C]."""

    word: str  # of `eight_bits.WORDS`
    largest: Mapping[str, Tensor]

    def serves(self, network: nn.Module) -> bool:
        """Other networks, the first stage's among them, have layers of the same paths."""
        return type(network) is ReducioVAE

    def described(self, vae: nn.Module, device: torch.device) -> str:
        """For the report: what is quantised and what is left."""
        whole = sum(isinstance(m, nn.Conv3d) and m.kernel_size[-1] == 3 for m in vae.decoder.modules())
        kind = str(eight_bit_type(self.word, device)).removeprefix("torch.")
        line = f"{len(self.largest)} of {whole} convolutions of the decoder in {self.word} ({kind}), the rest as before"
        return line + ", emulated: no faster" * (device.type == "cpu")


def eight_bit_type(word: str, device: torch.device) -> torch.dtype:
    """The type of 8-bit numbers for `device`. Raises ValueError, one line, for an unknown word and for one that the
    device cannot follow."""
    if word not in WORDS:
        raise ValueError(f"{word!r} is not known; known are {', '.join(WORDS)}")
    arch = arch_of(device) if device.type in ("cuda", "cpu") else device.type
    if (found := WORDS[word].get(arch)) is not None:
        return found
    others = [other for other, types in WORDS.items() if arch in types]
    here = f"{', '.join(others)} runs here" if others else "nothing quantised runs here"
    able = ", ".join(name for name in WORDS[word] if name != "interpreter")
    raise ValueError(f"{word!r} does not run on {arch}; it needs one of {able}, or a CPU, which emulates it; {here}")


def quantisable(vae: ReducioVAE) -> Iterator[tuple[str, nn.Conv3d]]:
    """The convolutions that can be quantised, and their paths."""
    for path, module in vae.named_modules():
        if path.startswith("decoder.") and isinstance(module, ResBlock):
            for part in PARTS:
                yield f"{path}.{part}", getattr(module, part)


@torch.no_grad()
def measure_largest(vae: ReducioVAE, run: Callable[[], None]) -> dict[str, Tensor]:
    """The largest magnitude of each input channel of what can be quantised, over all that `run` decodes with `vae`."""
    largest = {path: torch.zeros(conv.in_channels) for path, conv in quantisable(vae)}

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen = args[0].detach().abs().amax([d for d in range(args[0].ndim) if d != 1])
            largest[path] = torch.maximum(largest[path], seen.float().cpu())

        return look

    hooks = [conv.register_forward_pre_hook(watch(path)) for path, conv in quantisable(vae)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return largest
