"""Longer, steered and transferred clips, checked on the default model: `python benchmarks/control_check.py`.

long: 64 frames of held-out prompts: what the detector sees, jumps and PSNR at seams against those within the model's
own clips. strength: motion against motion_strength. transfer: a scene's motion with another colour, against the latent
of the recoloured scene itself; and on another background; with the encoder's latents and with refined ones. kept: PSNR
with `keep_content`. bytes: the same seed twice, and the first frames of a stream that is closed early. memory: peak
bytes of tensors, and of the process, while 64 frames are made, against one clip.
`--pictures DIR` writes the pictures of docs/control.md instead; the last one needs `--clips DIR`, a folder of real .mp4
files. Prints one JSON object per part, and with `--out` writes a row. It takes minutes, so it is not a test.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from reducio_fast import ReducioPipeline
from reducio_fast.checkpoints.strict_files import embedded_model
from reducio_fast.data import photos, toy_world
from reducio_fast.data.toy_detector import Detection, detect
from reducio_fast.evaluation.toy_report import held_out_scenes
from reducio_fast.measurement import instruments
from reducio_fast.measurement.bench import write
from reducio_fast.media.contact_sheet import film_strip
from reducio_fast.media.image_files import cover_crop
from reducio_fast.media.similarity import psnr, psnr_per_frame
from reducio_fast.media.video_files import read_video

REFINE = 10  # steps, of `transfer` and of the pictures
COLOURS = {"red": "blue", "blue": "yellow", "green": "red"}  # else red


def jumps(frames: np.ndarray) -> np.ndarray:
    """Mean absolute change from frame to frame, in grey levels, [T - 1]."""
    return np.abs(np.diff(frames.astype(np.float64), axis=0)).mean((1, 2, 3))


def long(pipe: ReducioPipeline, count: int) -> dict[str, Any]:
    """A seam is where a new clip begins to show, before frame 8 k, or where the old one ends, before frame 8 k + 8."""
    # At the slowest speed a moving object, or most of it, stays in view for four clips.
    scenes = [dataclasses.replace(scene, speed="slowly") for scene in held_out_scenes(count)]
    right, ratios, losses, seen = 0, [], [], dict.fromkeys(("colour", "motion", "shape"), 0)
    for seed, scene in enumerate(scenes):
        frames = pipe(scene.caption(), seed=seed, num_frames=64, num_inference_steps=8, progress=False).frames
        matches = detect(frames).matches(scene)
        right += all(matches.values())
        seen = {name: number + matches[name] for name, number in seen.items()}
        step, close = jumps(frames), psnr_per_frame(frames[1:], frames[:-1])
        at = np.zeros(63, bool)
        at[[8 * k - 1 for k in range(1, 8)]] = True
        ratios.append(float(step[at].mean() / step[~at].mean()))
        losses.append(float(np.mean(close[~at][np.isfinite(close[~at])]) - np.mean(close[at][np.isfinite(close[at])])))
    figures = {f"{name}_right": number for name, number in seen.items()}
    seams = {"seam_jump_ratio": _summary(ratios), "seam_psnr_loss": _summary(losses)}
    return {"prompts": count, "right": right} | figures | seams


def strength(pipe: ReducioPipeline, count: int) -> dict[str, Any]:
    levels, monotonic, directions, stills = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0), 0, 0, []
    shares = []
    for seed, scene in enumerate(held_out_scenes(count)):
        full = pipe(scene.caption(), seed=seed, num_inference_steps=8, progress=False, output_type="latent")
        clips = [pipe.decode(full.frames, full.content, motion_strength=level) for level in levels]
        seen = [detect(clip) for clip in clips]
        change = [float(jumps(clip).sum()) for clip in clips]
        monotonic += all(a <= b * 1.02 for a, b in zip(change, change[1:], strict=False))
        directions += all(leads(found, scene) for found in seen[1:])
        stills.append(float(jumps(clips[0]).mean()))
        shares.append([value / change[4] for value in change])
    return {
        "prompts": count, "monotonic": monotonic, "direction_right_from_0.25": directions,
        "grey_levels_a_frame_at_0": _summary(stills),
        "change_of_1": dict(zip(map(str, levels), np.mean(shares, 0).round(2).tolist(), strict=True)),
    }  # fmt: skip


def leads(found: Detection, scene: toy_world.Scene) -> bool:
    """Whether the object moves in the scene's direction, however far. The detector names a motion only from half of the
    slowest clip's on, and a quarter of a slow motion is less than that."""
    if scene.motion not in toy_world.DIRECTIONS:
        return found.growth > 0 if scene.motion == "growing" else found.growth < 0
    along, across = toy_world.DIRECTIONS[scene.motion], toy_world.DIRECTIONS[scene.motion][::-1]
    return float(np.dot(found.travel, along)) > abs(float(np.dot(found.travel, across)))


def transfer(pipe: ReducioPipeline, count: int) -> dict[str, Any]:
    """With the encoder's latents and with refined ones."""
    return {f"refine_{steps}": recoloured(pipe, count, steps) for steps in (0, REFINE)}


def recoloured(pipe: ReducioPipeline, count: int, refine: int) -> dict[str, Any]:
    """Scenes whose content frame has another colour, or another background too."""
    rng, right, colours, own, other, backgrounds = np.random.default_rng(3), 0, 0, [], [], 0
    for scene in held_out_scenes(count):
        seed = int(rng.integers(2**31))
        clip = toy_world.render(scene, np.random.default_rng(seed), 128, 16)
        other_colour = dataclasses.replace(scene, colour=COLOURS.get(scene.colour, "red"))
        wanted = toy_world.render(other_colour, np.random.default_rng(seed), 128, 16)
        motion = pipe.encode_motion(clip, refine=refine)
        moved = pipe.decode(motion, wanted[7])
        found = detect(moved)
        right += found.motion == scene.motion
        colours += found.colour == other_colour.colour
        other.append(psnr(moved, wanted))
        own.append(psnr(pipe.decode(pipe.encode_motion(wanted, refine=refine), wanted[7]), wanted))
        placed = dataclasses.replace(other_colour, background="gray" if scene.background != "gray" else "black")
        place = toy_world.render(placed, np.random.default_rng(seed), 128, 16)
        backgrounds += detect(pipe.decode(motion, place[7])).motion == scene.motion
    return {
        "clips": count, "motion_right": right, "colour_right": colours,
        "motion_right_on_another_background": backgrounds,
        "psnr": float(np.mean(other)), "psnr_of_its_own_latent": float(np.mean(own)),
    }  # fmt: skip


def kept(pipe: ReducioPipeline, count: int) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    rows: dict[str, list[list[float]]] = {"scenes": [], "photographs": []}
    clips = [("scenes", toy_world.render(scene, rng, 128, 16)) for scene in held_out_scenes(count)]
    names = photos.HELD_OUT_PHOTOS[: max(1, count // 4)]
    clips += [("photographs", photos.render(rng, 128, 16, held_out=True, name=name)) for name in names]
    for kind, clip in clips:
        motion = pipe.encode_motion(clip)
        plain, held = (pipe.decode(motion, clip[7], keep_content=keep) for keep in (False, True))
        first = [float(min(psnr_per_frame(each[7:8], clip[7:8])[0], 99.0)) for each in (plain, held)]
        rows[kind].append([psnr(plain, clip), float(np.minimum(psnr_per_frame(held, clip), 99).mean()), *first])
    names = ("psnr", "psnr_kept", "frame_7", "frame_7_kept")
    return {kind: dict(zip(names, np.mean(row, 0).round(2).tolist(), strict=True)) for kind, row in rows.items()}


def same_bytes(pipe: ReducioPipeline, count: int) -> dict[str, Any]:
    again, part = 0, 0
    for seed, scene in enumerate(held_out_scenes(count)):
        kwargs = {
            "prompt": scene.caption(),
            "seed": seed,
            "num_inference_steps": 2,
            "progress": False,
            "num_frames": 64,
        }
        whole = pipe(**kwargs).frames
        again += np.array_equal(pipe(**kwargs).frames, whole)
        stream = pipe.stream(**kwargs)
        part += np.array_equal(np.stack(list(itertools.islice(stream, 40))), whole[:40])
        stream.close()
    return {"prompts": count, "same_again": again, "first_40_of_64": part}


def memory(pipe: ReducioPipeline, count: int) -> dict[str, Any]:
    """live: peak bytes of tensors, without the loaded model. resident: peak bytes of the process, medians of `count`
    turns after a first one."""
    resident = {16: list[int](), 64: list[int]()}
    for turn in range(count + 1):
        for frames, peaks in resident.items():
            with instruments.Peak(torch.device("cpu")) as peak:
                _four_steps(pipe, frames)
            if turn:
                peaks.append(peak.bytes)
    live = {frames: instruments.live_peak(functools.partial(_four_steps, pipe, frames)) for frames in resident}
    medians = {frames: float(np.median(peaks)) for frames, peaks in resident.items()}
    return {
        "turns": count,
        "live": live | {"ratio": round(live[64] / live[16], 3)},
        "resident": medians | {"ratio": round(medians[64] / medians[16], 3)},
    }


def _four_steps(pipe: ReducioPipeline, frames: int) -> None:
    pipe("a red circle moving right", seed=0, num_frames=frames, num_inference_steps=4, progress=False)


def _summary(values: list[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(values)), 3), "worst": round(float(np.max(values)), 3)}


def pictures(pipe: ReducioPipeline, folder: Path, clips: Path | None) -> None:
    """Film strips, small PNGs."""
    prompt = "a red circle moving right slowly on a checkered background"
    options = {"num_inference_steps": 10, "progress": False}

    def save(rows: list[np.ndarray], name: str) -> None:
        sheet = Image.fromarray(np.concatenate(rows, axis=0))
        small = sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)
        small.quantize(64).save(folder / name, optimize=True)

    save([film_strip(pipe(prompt, num_frames=64, **options).frames, 8)], "control-long.png")
    out = pipe(prompt, output_type="latent", **options)
    levels = [pipe.decode(out.frames, out.content, motion_strength=level) for level in (0.0, 0.5, 1.0)]
    save([film_strip(clip, 8) for clip in levels], "control-strength.png")
    edited = np.ascontiguousarray(out.content[..., ::-1])
    save([film_strip(pipe.decode(out.frames, frame), 8) for frame in (out.content, edited)], "control-edit.png")
    previews: list[np.ndarray] = []
    pipe(prompt, callback_on_step_end=lambda p, s, t, x: previews.append(x["frames"]), preview_every=1, **options)
    save([film_strip(previews[step], 8) for step in (1, 4, 9)], "control-preview.png")
    if clips is not None:
        rows = []
        for path in sorted(clips.glob("*.mp4"))[:2]:
            clip = cover_crop(read_video(path, 0, 16)[0], 128, 128)
            plain, refined = (pipe.encode_motion(clip, refine=steps) for steps in (0, REFINE))
            mirrored = np.ascontiguousarray(clip[7, :, ::-1])
            decoded = [pipe.decode(plain, clip[7]), pipe.decode(refined, clip[7]), pipe.decode(refined, mirrored)]
            rows += [film_strip(each, 8) for each in (clip, *decoded)]
        save(rows, "control-real.png")


PARTS = {"long": long, "strength": strength, "transfer": transfer, "kept": kept, "bytes": same_bytes, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="(default: all)")
    parser.add_argument("--count", type=int, default=16, help="prompts or clips of a part (default: 16)")
    parser.add_argument("--model", help="(default: the embedded one)")
    parser.add_argument("--out", help="a JSON row")
    parser.add_argument("--backend", choices=("fast", "reference"), default="fast")
    parser.add_argument("--pictures", type=Path, metavar="DIR")
    parser.add_argument("--clips", type=Path, metavar="DIR", help="real .mp4 files, for --pictures")
    arguments = parser.parse_args()
    folder = embedded_model() if arguments.model is None else arguments.model
    pipe = ReducioPipeline.from_pretrained(folder, device="cpu", dtype="float32", backend=arguments.backend)
    if arguments.pictures is not None:
        pictures(pipe, arguments.pictures, arguments.clips)
        return
    found = {}
    for part in arguments.part or PARTS:
        found[part] = PARTS[part](pipe, arguments.count)
        print(json.dumps({part: found[part]}), flush=True)
    if arguments.out:
        machine = instruments.machine(torch.device("cpu"))
        write({"benchmark": "control_check", "machine": machine, "backend": arguments.backend} | found, arguments.out)


if __name__ == "__main__":
    main()
