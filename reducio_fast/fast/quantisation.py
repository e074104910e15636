"""Which layers of the video decoder compute in 8-bit numbers, and with what scales.

The 3x3x3 convolutions of the decoder's residual blocks are quantised. Each reads the output of a GroupNorm pass, which
rounds it to 8 bits: no pass over memory is added, and the output's bytes are halved. They are 88% of a full-size
decoder's multiply-adds. All other layers keep their precision: up-sampling convolutions, whose input another
convolution writes; the first and the last convolution; attention and fusion; the encoders; the transformer. With the
transformer's linears in FP8 and one scale per token, a step has 3.9 times bfloat16's error, in e4m3fnuz 3.5 times
(`benchmarks/results/quantised_quality.json`); the limit is twice.
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
    """The requested mode and, for each convolution by its path in the network, the largest magnitude of every channel
    of its input, float32 [C]."""

    word: str  # a key of `eight_bits.WORDS`
    largest: Mapping[str, Tensor]

    def serves(self, network: nn.Module) -> bool:
        """Whether it is for `network`: other networks, such as the first stage's, have layers with the same paths."""
        return type(network) is ReducioVAE

    def described(self, vae: nn.Module, device: torch.device) -> str:
        """For the report: what is quantised and what is left."""
        total = sum(isinstance(m, nn.Conv3d) and m.kernel_size[-1] == 3 for m in vae.decoder.modules())
        kind = str(eight_bit_type(self.word, device)).removeprefix("torch.")
        line = f"{len(self.largest)} of {total} convolutions of the decoder in {self.word} ({kind}), the rest as before"
        return line + ", emulated: no faster" * (device.type == "cpu")


def eight_bit_type(word: str, device: torch.device) -> torch.dtype:
    """The 8-bit dtype of the mode `word` on `device`. Raises ValueError, one line, for an unknown mode and for one that
    the device does not support."""
    if not isinstance(word, str) or word not in WORDS:
        raise ValueError(f"{word!r} is not known; known are {', '.join(WORDS)}")
    arch = arch_of(device) if device.type in ("cuda", "cpu") else device.type
    if (dtype := WORDS[word].get(arch)) is not None:
        return dtype
    others = [other for other, types in WORDS.items() if arch in types]
    runs_here = f"{', '.join(others)} runs here" if others else "nothing quantised runs here"
    archs = ", ".join(name for name in WORDS[word] if name != "interpreter")
    raise ValueError(
        f"{word!r} does not run on {arch}; it needs one of {archs}, or a CPU, which emulates it; {runs_here}"
    )


def quantisable(vae: ReducioVAE) -> Iterator[tuple[str, nn.Conv3d]]:
    """The convolutions that can be quantised, and their paths."""
    for path, module in vae.named_modules():
        if path.startswith("decoder.") and isinstance(module, ResBlock):
            for part in PARTS:
                yield f"{path}.{part}", getattr(module, part)


@torch.no_grad()
def measure_largest(vae: ReducioVAE, run: Callable[[], None]) -> dict[str, Tensor]:
    """The largest magnitude of each input channel of every quantisable convolution, while `run` decodes with `vae`."""
    largest = {path: torch.zeros(conv.in_channels) for path, conv in quantisable(vae)}

    def recorder(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            magnitudes = args[0].detach().abs().amax([d for d in range(args[0].ndim) if d != 1])
            largest[path] = torch.maximum(largest[path], magnitudes.float().cpu())

        return record

    hooks = [conv.register_forward_pre_hook(recorder(path)) for path, conv in quantisable(vae)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return largest
