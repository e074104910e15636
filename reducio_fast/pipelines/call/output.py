"""What a call returns: frames in the form asked for, with everything needed to make or judge them again."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...media import ffmpeg
from ...media.contact_sheet import contact_sheet
from ...media.frame_interpolation import interpolate
from ...media.kept_frames import keep_frames
from ...media.pixels import to_bytes
from ...media.video_files import check_output_path, numbered, write_video
from ...system.errors import ReducioError
from ...system.paths import expanded
from ...system.stage_clock import annotate


@dataclass
class ReducioOutput:
    """What a call returns. For a single prompt nothing has a clip axis; for a list everything has it in front.

    `frames`: "np" uint8 [T, H, W, 3]; "pil" a list of images; "pt" float32 [T, 3, H, W] in [0, 1], as in diffusers;
    "latent" the motion latent [16, T/f, H/32, W/32] (SVD: [T, 4, H/8, W/8]). `content`: the content frame, uint8
    [H, W, 3], which is frame number (T - 1) // 2 of the model's own T frames, in a longer clip of the first T that were
    made (SVD: the image at the clip's size); passed as `image` with the same seed it makes the same clip (None for
    latents that needed none, and for peers that use text alone).
    `timings`: seconds per stage, summed over the clips.
    """

    frames: Any
    content: np.ndarray | None
    seeds: list[int]  # empty for clips that were encoded from a file
    fps: float
    timings: dict[str, float]
    output_type: str = "np"
    is_list: bool = False
    encoder: str = ""  # what `save` wrote with: "libx264", "h264_nvenc", "gif" ...
    interrupted: bool = False  # a callback ended the call: later prompts of the list have no clip

    @property
    def seed(self) -> int:
        """Seed of the first clip."""
        return self.seeds[0]

    def as_float(self) -> np.ndarray:
        """Frames as float32 in [0, 1], [T, H, W, 3] or [N, T, H, W, 3]: what diffusers calls "np".

        `diffusers.utils.export_to_video` takes these, or PIL images; it would multiply bytes by 255.
        """
        if self.output_type == "latent":
            raise ReducioError("as_float: output_type='latent' holds no frames; use pipe.decode(latents, image)")
        clips = list(self.frames) if self.is_list else [self.frames]
        frames = np.stack([as_array(clip) for clip in clips]).astype(np.float32) / 255
        return frames if self.is_list else frames[0]

    def grid(self, columns: int | None = None) -> np.ndarray:
        """All clips of a list side by side as one, uint8 [T, rows * H, columns * W, 3], a contact sheet of seeds: see
        `media.contact_sheet`. Raises ReducioError for latents, and for `columns` not from 1 to the number of clips."""
        if self.output_type == "latent":
            raise ReducioError("grid: output_type='latent' holds no frames; use pipe.decode(latents, image)")
        return contact_sheet([as_array(clip) for clip in (self.frames if self.is_list else [self.frames])], columns)

    def as_grid(self, columns: int | None = None) -> ReducioOutput:
        """The clips side by side as one clip, which has no content frame: see `grid`."""
        return dataclasses.replace(self, frames=self.grid(columns), content=None, output_type="np", is_list=False)

    def interpolated(self, factor: int) -> ReducioOutput:
        """The same clips at `factor` (2 or 4) times the frame rate, as bytes: see `media.frame_interpolation`."""
        if self.output_type == "latent":
            raise ReducioError("interpolate: output_type='latent' holds no frames; use pipe.decode(latents, image)")
        clips = [interpolate(as_array(clip), factor) for clip in (self.frames if self.is_list else [self.frames])]
        frames = np.stack(clips) if self.is_list else clips[0]
        fps = self.fps * factor
        return dataclasses.replace(self, frames=frames.view(ByteFrames), fps=fps, output_type="np")

    def save(self, path: str | os.PathLike[str], encoding: str = "quality") -> Path | list[Path]:
        """Write .mp4, .gif, .webp or a folder of PNGs, and return the path; for a list, clip i goes to NAME-i.SUFFIX.

        encoding: for .mp4. "quality" and "fast" encode H.264 on the CPU at one quality, "fast" in a third of the CPU
            time; "hardware" uses a hardware encoder and raises if none works; "auto" uses one if it works, else "fast".
            `encoder` names the one that was used.
        Raises ReducioError if writing fails. Frames that were not written are then kept in the cache folder, as PNGs,
        and the error says where: after `generate(...).save(path)` no variable holds them.
        """
        if self.output_type == "latent":
            raise ReducioError("save: output_type='latent' holds no frames; make them with pipe.decode(latents, image)")
        start, encoder = time.perf_counter(), ffmpeg.encoder(encoding)
        clips = self.frames if self.is_list else [self.frames]
        written = 0
        try:
            name = expanded(path, "path")
            paths = numbered(name, len(clips)) if self.is_list else [name]
            for each in paths:
                check_output_path(each, trial=False)  # all of them before the first is written
            with annotate("video.write"):
                for each, frames in zip(paths, clips, strict=True):
                    write_video(as_array(frames), each, self.fps, encoding)
                    written += 1
        except ReducioError as error:
            unwritten = [as_array(clip) for clip in list(clips)[written:]]
            label = f"seed{self.seeds[written]}" if self.seeds else f"clip{written}"
            raise ReducioError(f"{error}; {keep_frames(unwritten, self.fps, label)}") from error
        self.encoder = encoder.name if name.suffix.lower() == ".mp4" else name.suffix.lower().removeprefix(".") or "png"
        self.timings["video.write"] = self.timings.get("video.write", 0.0) + time.perf_counter() - start
        return paths if self.is_list else name


def to_output(video: Tensor, output_type: str) -> Any:
    """float32 [3, T, H, W] in [-1, 1] -> what `ReducioOutput.frames` holds for one clip. Also takes bytes, uint8
    [T, H, W, 3], except for "pt"."""
    return from_frames(as_frames(video, output_type), output_type)


def as_frames(video: Tensor, output_type: str) -> Tensor:
    """The same video with the frames in front: for "pt" float32 [T, 3, H, W] in [0, 1], else uint8 [T, H, W, 3]."""
    if output_type == "pt":
        return (video.transpose(0, 1) + 1) / 2
    return video if video.dtype == torch.uint8 else to_bytes(video.transpose(0, 1))


def from_frames(frames: Tensor, output_type: str) -> Any:
    """What `as_frames` returned -> what `ReducioOutput.frames` holds for one clip."""
    if output_type == "pt":
        return frames
    array = frames.cpu().numpy()
    return array.view(ByteFrames) if output_type == "np" else [_frame_image(frame) for frame in array]


def there_and_back(frames: Any) -> Any:
    """A clip that ends where it began: its frames, then all but the last and the first in reverse, so that no frame is
    shown twice where the loop closes."""
    back = list(range(len(frames) - 2, 0, -1))
    if isinstance(frames, list):
        return [*frames, *(frames[i] for i in back)]
    if isinstance(frames, Tensor):
        return torch.cat([frames, frames[back]])
    return np.concatenate([frames, frames[back]]).view(type(frames))


def as_array(frames: Any) -> np.ndarray:
    """Back to uint8 [T, H, W, 3]."""
    if isinstance(frames, Tensor):
        return (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return frames if isinstance(frames, np.ndarray) else np.stack([np.asarray(frame) for frame in frames])


def stack(frames: list[Any]) -> Any:
    first = frames[0]
    if isinstance(first, Tensor):
        return torch.stack(frames)
    return np.stack(frames).view(ByteFrames) if isinstance(first, np.ndarray) else frames


# diffusers returns a list of clips, as floats, and its users write `export_to_video(out.frames[0])`. Here that is one
# frame, or bytes, which `export_to_video` multiplies by 255 and takes modulo 256: a file of noise, without an error.
INSTEAD = "write export_to_video(out.as_float(), path), or out.save(path)"


class ByteFrames(np.ndarray):
    """Frames as bytes. Raises ReducioError when they are scaled by 255, as if they were floats in [0, 1]."""

    def __mul__(self, other: Any) -> Any:
        if self.dtype == np.uint8 and isinstance(other, int) and other == 255 and self.size and self.max() > 1:
            raise ReducioError(f"frames: are bytes from 0 to 255 already, of one clip; {INSTEAD}")
        return super().__mul__(other)

    __rmul__ = __mul__

    def __array_wrap__(self, array: np.ndarray, context: Any = None, return_scalar: bool = False) -> Any:
        """What NumPy computes from frames is a plain array or number: a sum of this class could not be rounded."""
        return array if array is self else np.asarray(array)[()]


class FrameImage(Image.Image):
    """One frame. Raises ReducioError when it is indexed, as if it were a list of frames."""

    def __getitem__(self, index: Any) -> Any:
        raise ReducioError(f"frames: this is one image of the clip, not the clip; {INSTEAD}")


def _frame_image(frame: np.ndarray) -> Image.Image:
    image = Image.fromarray(frame)
    image.__class__ = FrameImage
    return image
