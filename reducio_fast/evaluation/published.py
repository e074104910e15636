"""Figures of the Reducio paper (arXiv 2411.13552), which a report prints beside its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Table 1: autoencoders on a validation subset of Pexels, 1000 videos of one second at 256x256. Columns: factor (time,
# height, width), channels, PSNR dB, SSIM, LPIPS, rFVD on Pexels, rFVD on UCF-101.
AUTOENCODERS: tuple[tuple[str, str, int, float, float, float, float, float], ...] = (
    ("SD2.1-VAE", "1x8x8", 4, 29.23, 0.82, 0.09, 25.96, 21.00),
    ("SDXL-VAE", "1x8x8", 4, 30.54, 0.85, 0.08, 19.87, 23.68),
    ("OmniTokenizer", "4x8x8", 8, 27.11, 0.89, 0.07, 23.88, 30.52),
    ("OpenSora-1.2", "4x8x8", 16, 30.72, 0.85, 0.11, 60.88, 67.52),
    ("Cosmos", "8x8x8", 16, 30.84, 0.74, 0.12, 29.44, 22.06),
    ("Cosmos", "8x16x16", 16, 28.14, 0.65, 0.18, 77.87, 119.37),
    ("Reducio (ft4)", "4x32x32", 16, 35.88, 0.94, 0.05, 17.88, 65.17),
)
# Table 2, zero-shot, Reducio-DiT-512 with content frames of SDXL.
GENERATION: Mapping[str, float] = {"FVD UCF-101": 318.50, "FVD MSR-VTT": 291.0, "VBench": 81.39}


def autoencoder_table(name: str, factor: str, channels: int, scores: Mapping[str, float | None]) -> list[str]:
    """Lines of the paper's Table 1 plus a row with `scores`; LPIPS is of images in 0..1, as in the release."""
    columns = ("model", "factor", "z", "PSNR", "SSIM", "LPIPS", "rFVD")
    own = (name, factor, channels, scores["psnr"], scores["ssim"], scores.get("lpips_0_1"), scores.get("rfvd"))
    rows: list[Sequence[object]] = [columns, *(row[:7] for row in AUTOENCODERS), own]
    return [f"{_cell(r[0]):<22}{_cell(r[1]):>9}{''.join(f'{_cell(c):>8}' for c in r[2:])}" for r in rows]


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
