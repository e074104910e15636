"""benchmarks/report.py turns rows into a table between markers and into a picture."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def report(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", root / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figures(decode: float, ratio: float, **changes: object) -> dict:
    def spread(value: float) -> dict:
        return {"median": value, "min": value * 0.9, "max": value * 1.1}

    return {
        "what": "an optimisation",
        "dtype": "float32",
        "first_s": 3.0,
        "above_start_gb": 0.5,
        "joules": None,
        "clip_s": spread(decode + 0.5),
        "speed_up": spread(ratio),
        "stages_s": {"dit.step": spread(0.5), "vae.decode": spread(decode)},
        "stages_speed_up": {"dit.step": spread(1.0), "vae.decode": spread(ratio)},
        "tflops": {"dit.step": 0.02, "vae.decode": 0.1 / decode},
        "share_of_roof": {"dit.step": 0.1, "vae.decode": 0.25},
    } | changes


def row(date: str = "2026-11-20", **changes: object) -> dict:
    return {
        "benchmark": "bench", "what": "default: 16x128x128 from a prompt, 20 steps", "note": None, "pairs": 3,
        "machine": {"device": {"name": "A card"}, "packages": {"torch": "2.11.0"}, "commit": "0123456789abcdef",
                    "date": date},
        "roof": {"matmul_tflops": 0.2, "dtype": "float32", "copy_gbs": 10.0},
        "flops": {"direct": {"dit.step": 1e10, "vae.decode": 1e11}},
        "contenders": {"reference": figures(1.5, 1.0), "fast": figures(0.5, 2.0),
                       "compiled": {"skipped": "RuntimeError: no compiler"}},
        "ladder": {}, "cold": {"fast": {"empty_caches": {"load_s": 1.0, "first_clip_s": 2.0}}},
    } | changes  # fmt: skip


def test_table(report: ModuleType) -> None:
    lines = report.table(row())
    text = "\n".join(lines)
    assert "| | reference (float32) | fast (float32) |" in lines
    assert "| `vae.decode` | 1.50 s (25% of roof) | 500 ms (2.00x, 25% of roof) |" in lines
    assert "| **clip** | **2.00 s** | **1.00 s** |" in lines
    assert "| speed-up (least to most) | 1 | **2.00x** (1.80 to 2.20) |" in lines
    assert "| fresh process, empty caches |  | load 1.0 s, clip 2.0 s |" in lines
    assert "commit `0123456789`" in text and "compiled was skipped: RuntimeError: no compiler." in text
    assert "energy" not in text and "rung" not in text
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {4}  # every line has as many cells as the head


def test_a_row_whose_time_ran_out_is_read(report: ModuleType, tmp_path: Path) -> None:
    """`bench` writes it after each first clip: that contender has no turns yet."""
    unfinished = {name: figures(1.0, 1.0)[name] for name in ("what", "dtype", "first_s", "above_start_gb")}
    contenders = {"reference": figures(1.5, 1.0), "fast": unfinished}
    (tmp_path / "bench-a.json").write_text(json.dumps(row(contenders=contenders, ladder={"decoder": unfinished})))
    (tmp_path / "bench-b.json").write_text(json.dumps(row("2026-12-01", contenders={"fast": unfinished})))
    (found,) = report.rows(tmp_path)
    assert found["file"] == "bench-a.json" and "| | reference (float32) |" in report.table(found)


def test_ladder(report: ModuleType) -> None:
    lines = report.table(row(ladder={"reference": figures(1.5, 1.0), "decoder": figures(0.5, 2.0)}))
    assert "| decoder | 1.00 s | 2.00x | 2.00x | an optimisation |" in lines


def test_the_latest_row_of_a_workload_and_device_counts(report: ModuleType, tmp_path: Path) -> None:
    for name, each in {
        "bench-a.json": row("2026-11-21"),
        "bench-b.json": row("2026-11-20"),
        "bench-c.json": row(what="full size 1024: 16x1024x1024"),
        "bench-d.json": row("2026-11-30", contenders={"fast": {"skipped": "x"}}),
        "other.json": row("2026-12-01"),
    }.items():
        (tmp_path / name).write_text(json.dumps(each))
    assert [r["file"] for r in report.rows(tmp_path)] == ["bench-a.json", "bench-c.json"]


def test_between_markers(report: ModuleType) -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.put(text, ["new", "lines"])
    assert once == f"before\n{report.BEGIN}\nnew\nlines\n{report.END}\nafter\n"
    assert report.put(once, ["new", "lines"]) == once
    for wrong in ("none", f"{report.END}{report.BEGIN}", text + text):
        with pytest.raises(ValueError, match="needs one <!-- bench:begin -->"):
            report.put(wrong, [])


@pytest.mark.slow
def test_picture(report: ModuleType, tmp_path: Path) -> None:
    report.picture([row(), row(what="full size")], tmp_path / "bench.png")
    image = Image.open(tmp_path / "bench.png")
    assert image.size[0] > 1000 and image.size[1] > 700
    colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(0x9A, 0xA5, 0xB1), (0x2A, 0x7F, 0x62), (0xB0, 0x3A, 0x2E)} <= colours  # both contenders and the roof
