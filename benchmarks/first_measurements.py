"""What every ratio rests on, measured before anything else on a new GPU: `python benchmarks/first_measurements.py`.

1. 3x3x3 convolutions, the five shapes that hold 81% of the decoder's work: the vendor's library in both layouts, ours.
2. GroupNorm + SiLU on full-resolution activations: aten in both layouts, ours.
3. Nearest up-sampling and the convolution after it: vendor's in two passes, its folded form, our kernel.
4. One full 320-pixel tile decoded: eager, compiled with channels_last_3d, fast. 14.44 of them make a 1024x1024 clip.

The row is written after every measurement, so that finished ones are kept when time is up. `--narrow` runs the same
code on small shapes, for a machine with no GPU.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from reducio_fast.fast.plan import Plan
from reducio_fast.fast.reducio.vae import FastReducioVAE
from reducio_fast.measurement import instruments
from reducio_fast.measurement.bench import write
from reducio_fast.measurement.contenders import NARROW, compile_reference
from reducio_fast.measurement.parity import liven
from reducio_fast.reference import ReducioVAE, VAEConfig
from reducio_fast.triton_kernels import conv3d, group_norm_silu, upsample_conv3d

CONVS = ((128, 128, 320), (256, 128, 320), (256, 256, 160), (512, 512, 80), (256, 256, 80))  # C, K, side
NORMS = ((128, 320), (256, 160))
UPSAMPLES = ((256, 160),)
FRAMES = 16
TILES = 14.44  # full tiles in a 1024x1024 clip, by pixels


class Session:
    def __init__(self, out: str | None, narrow: bool) -> None:
        self.out, self.narrow = out, narrow
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.row: dict[str, Any] = {
            "benchmark": "first_measurements",
            "machine": instruments.machine(self.device),
            "narrow": narrow,
            "roof": instruments.roof(self.device, self.dtype),
            "rows": [],
        }

    def random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype).mul_(scale)

    def time(self, what: str, way: str, run: Callable[[], Any], flop: float = 0, bytes_: float = 0) -> None:
        """One line: seconds, and the rate of the useful work, whose amount is the same for every way."""
        try:
            with torch.no_grad():
                if self.device.type == "cuda":
                    seconds = instruments.kernel_seconds(run, self.device)
                else:
                    seconds = min(instruments.timed(run, self.device, 3))
        except Exception as error:  # if a library does not take a shape, the row says so and the others follow
            self.add({"what": what, "way": way, "skipped": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
            return
        found = {"what": what, "way": way, "seconds": seconds}
        roof = self.row["roof"]
        for name, work, best in (
            ("tflops", flop / 1e12, roof["matmul_tflops"]),
            ("gbs", bytes_ / 1e9, roof["copy_gbs"]),
        ):
            if work:
                found |= {name: work / seconds, "of_roof": work / seconds / best}
        self.add(found)

    def add(self, found: dict[str, Any]) -> None:
        self.row["rows"].append(found)
        units = (("tflops", "TFLOP/s"), ("gbs", "GB/s"))
        rates = ", ".join(f"{found[name]:.3g} {unit}" for name, unit in units if name in found)
        result = found.get("skipped") or f"{found['seconds'] * 1e3:.3f} ms" + (f", {rates}" if rates else "")
        print(f"{found['what']:<44} {found['way']:<34} {result}", flush=True)
        if self.out:
            write(self.row, self.out)


def convolutions(s: Session) -> None:
    for C, K, side in [(16, 16, 8), (32, 16, 8)] if s.narrow else CONVS:
        what = f"conv3d {C}->{K} of {FRAMES}x{side}x{side}"
        flop = 2.0 * FRAMES * side * side * 27 * C * K
        x, w, b = s.random(1, C, FRAMES, side, side), s.random(K, C, 3, 3, 3, scale=(27 * C) ** -0.5), s.random(K)
        s.time(what, "vendor, channels first", lambda x=x, w=w, b=b: F.conv3d(x, w, b, padding=1), flop)
        last = [t.to(memory_format=torch.channels_last_3d) for t in (x, w)]
        s.time(what, "vendor, channels last", lambda last=last, b=b: F.conv3d(*last, b, padding=1), flop)
        padded = conv3d.with_halo(x.permute(0, 2, 3, 4, 1), 1, 1, True)
        packed = conv3d.pack_weight(w)
        run = functools.partial(torch.ops.reducio_fast.conv3d, padded, packed, b)
        s.time(what, "ours", run, flop)
        s.time(what, "ours, with statistics", functools.partial(run, None, True), flop)


def norms(s: Session) -> None:
    for C, side in [(16, 8)] if s.narrow else NORMS:
        what = f"GroupNorm + SiLU, {C} of {FRAMES}x{side}x{side}"
        x, w, b = s.random(1, C, FRAMES, side, side), s.random(C), s.random(C)
        groups = min(32, C // 2)
        moved = 2.0 * x.numel() * x.element_size()  # read once, written once: what the apply pass alone needs
        last = x.to(memory_format=torch.channels_last_3d)
        for layout, y in (("channels first", x), ("channels last", last)):
            aten = functools.partial(F.group_norm, y, groups, w, b, 1e-6)
            s.time(what, f"aten, {layout}", lambda aten=aten: F.silu(aten()), bytes_=moved)
        ours = x.permute(0, 2, 3, 4, 1).contiguous()
        inputs = (ours, w, b, groups, 1e-6, True, False)
        op = torch.ops.reducio_fast.group_norm_silu
        s.time(what, "ours, statistics too", functools.partial(op, *inputs, None, 1, 1, True), bytes_=moved)
        if s.device.type == "cuda":
            partials = group_norm_silu.statistics(ours, False)
            s.time(what, "ours, statistics given", functools.partial(op, *inputs, partials, 1, 1, True), bytes_=moved)


def upsamples(s: Session) -> None:
    for C, side in [(16, 4)] if s.narrow else UPSAMPLES:
        what = f"up-sampling conv3d {C}->{C} from {FRAMES}x{side}x{side}"
        flop = 2.0 * FRAMES * (2 * side) ** 2 * 27 * C * C  # of all 27 taps; the folded form computes 12
        x, w, b = s.random(1, C, FRAMES, side, side), s.random(C, C, 3, 3, 3, scale=(27 * C) ** -0.5), s.random(C)
        last = [t.to(memory_format=torch.channels_last_3d) for t in (x, w)]

        def two_passes(last: list[torch.Tensor] = last, b: torch.Tensor = b) -> torch.Tensor:
            return F.conv3d(F.interpolate(last[0], scale_factor=(1.0, 2.0, 2.0), mode="nearest"), last[1], b, padding=1)

        s.time(what, "vendor, nearest then conv3d", two_passes, flop)
        padded = conv3d.with_halo(x.permute(0, 2, 3, 4, 1), 1, 1, True)
        folded = upsample_conv3d.fold_weight(w, False, False)
        s.time(what, "vendor, folded", functools.partial(upsample_conv3d.twin, padded, folded, b), flop)
        s.time(what, "ours", functools.partial(torch.ops.reducio_fast.upsample_conv3d, padded, folded, b), flop)


def tile(s: Session, compiled: bool, mode: str | None) -> None:
    """Wall time, launches included: with hundreds of short kernels it is not the sum of the kernels' times."""
    config = NARROW[1] if s.narrow else VAEConfig()
    pixels = NARROW[2] if s.narrow else 320
    torch.manual_seed(0)
    with torch.device(s.device):
        vae = ReducioVAE(config).requires_grad_(False).eval()
    liven(vae)
    vae.to(s.dtype)
    image = s.random(1, 3, pixels, pixels)
    cells = pixels // config.spatial_factor
    latent = s.random(1, config.latent_channels, config.num_frames // config.temporal_factor, cells, cells)
    ways: dict[str, Callable[[], Any]] = {
        "eager": lambda: vae,
        "fast": lambda: FastReducioVAE(vae, Plan(s.device, s.dtype)).eval(),
    }
    if compiled:
        ways[f"compiled, channels_last_3d{f', {mode}' if mode else ''}"] = lambda: _compiled(vae, s.device, mode)
    for way, make in ways.items():
        with torch.no_grad():
            network = make()
            features = network.encode_content(image)
            first = instruments.timed(lambda n=network, f=features: n.decode(latent, f), s.device, 1, warm=0)[0]
            seconds = instruments.timed(lambda n=network, f=features: n.decode(latent, f), s.device, 5)
        spread = instruments.spread(seconds)
        found = {"what": f"one {pixels}-pixel tile", "way": way, "seconds": spread["median"], "spread": spread}
        s.add(found | {"first_s": first, "clip_s": None if s.narrow else spread["median"] * TILES})


def _compiled(vae: ReducioVAE, device: torch.device, mode: str | None) -> ReducioVAE:
    network = copy.deepcopy(vae)
    compile_reference(None, network, device, mode)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="JSON row to write")
    parser.add_argument("--narrow", action="store_true", help="small shapes, for a machine with no GPU")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="torch.compile too")
    parser.add_argument("--compile-mode", help="of torch.compile (default: max-autotune on a GPU, which takes minutes)")
    parser.add_argument("--only-tile", action="store_true", help="the fourth measurement alone")
    args = parser.parse_args()
    if not args.narrow and not torch.cuda.is_available():
        parser.error("there is no GPU here; --narrow runs the same code on small shapes")
    s = Session(args.out, args.narrow)
    if not args.only_tile:
        convolutions(s)
        norms(s)
        upsamples(s)
    tile(s, args.compiled, args.compile_mode)


if __name__ == "__main__":
    main()
