"""Requests of clients: fields of a form or of JSON, checked and turned into the arguments of a call."""

from __future__ import annotations

import contextlib
import io
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..media import ffmpeg
from ..media.frame_interpolation import check_factor
from ..media.image_files import read_image
from ..system.errors import ReducioError
from .errors import bad_request
from .files import MOTION, PICTURE, check_rate

MAX_DRAWN_SEED = 2**32  # a seed that the server draws stays easy to type
MAX_CAPTION = 300  # tokens, of a model whose configuration does not tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of one server. `sizes`: (height, width); None: the model's own and the aspect buckets."""

    queue: int = 64
    queue_per_key: int = 16
    body_bytes: int = 20_000_000
    prompt_characters: int = 4000
    steps: int = 100
    frames: int = 64
    videos: int = 9  # per job, side by side
    sizes: tuple[tuple[int, int], ...] | None = None
    job_seconds: float = 600
    keep_seconds: float = 24 * 3600
    keep_bytes: int = 10 * 10**9


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ReducioError(f"{name}: must be text, is {_brief(value)}")
    return value


def _whole(name: str, value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,20}", value.strip()):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ReducioError(f"{name}: must be a whole number, is {_brief(value)}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    raise ReducioError(f"{name}: must be a number, is {_brief(value)}")


def _schedule(name: str, value: Any) -> Any:
    """Numbers, as a list or with commas between them, or the name of a schedule."""
    if isinstance(value, str) and "," in value:
        value = value.split(",")
    return [_number(name, each) for each in value] if isinstance(value, list) else _text(name, value)


def _numbers(name: str, value: Any) -> list[float]:
    """As a list, or with commas between them."""
    value = value.split(",") if isinstance(value, str) else value
    if not isinstance(value, list):
        raise ReducioError(f"{name}: must be a list of numbers, is {_brief(value)}")
    return [_number(name, each) for each in value]


def _boolean(name: str, value: Any) -> bool:
    value = _plain(value)
    if not isinstance(value, bool):
        raise ReducioError(f"{name}: must be true or false, is {_brief(value)}")
    return value


# Arguments of text-to-image pipelines that no number or text can be.
NOT_PLAIN = r"latents|timesteps|sigmas|callback\w*|ip_adapter\w*|\w+_(embeds|mask|kwargs)"


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ReducioError(f"{name}: must be an object, is {_brief(value)}")
    if refused := next((key for key in value if re.fullmatch(NOT_PLAIN, key)), None):
        raise ReducioError(f"{name}: {refused[:60]} is a tensor, list or function for callers in Python")
    plain = {key: _plain(each) for key, each in value.items()}
    for key, each in plain.items():
        if not isinstance(each, str | int | float | bool):
            raise ReducioError(f"{name}: {key[:60]} must be a number, text or true or false, is {_brief(each)}")
    return plain


def _plain(value: Any) -> Any:
    """Convert a form's text to the number or truth value that it spells."""
    if not isinstance(value, str):
        return value
    for spelled, meant in (("true", True), ("false", False)):
        if value.lower() == spelled:
            return meant
    try:
        return int(value) if re.fullmatch(r"[+-]?\d{1,20}", value) else float(value)
    except ValueError:
        return value


# Arguments of a call that a client may give, if the family has them: no tensors, callbacks or output types.
FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": _text,
    "negative_prompt": _text,
    "seed": _whole,
    "num_frames": _whole,
    "num_videos_per_prompt": _whole,
    "num_inference_steps": _whole,
    "guidance_scale": _number,
    "min_guidance_scale": _number,
    "max_guidance_scale": _number,
    "sigmas": _schedule,
    "fps": _whole,
    "motion_bucket_id": _whole,
    "noise_aug_strength": _number,
    "decode_chunk_size": _whole,
    "image_fit": _text,
    "quality": _text,
    "schedule": _text,
    "guidance_interval": _numbers,
    "guidance_reuse": _whole,
    "cache_threshold": _number,
    "direction": _text,
    "overlap": _whole,
    "match_colours": _boolean,
    "loop": _boolean,
    "motion_strength": _number,
    "motion_score": _number,
    "keep_content": _boolean,
    "preview_every": _whole,
    "content_kwargs": _object,
}
WIRE = ("model", "size", "seconds", "input_reference")  # of OpenAI's videos API
OWN = ("interpolate", "motion_reference")  # of this server, besides the arguments of the call
MAX_MOTION_PIXELS = 2**22  # per frame of `motion_reference`; 16 such frames are 200 MB


@dataclass(slots=True)
class Asked:
    """A checked request. `call`: arguments of the pipeline's call, plain data that JSON keeps; `files`: the picture and
    the clip that came with it, as bytes by suffix."""

    call: dict[str, Any]
    size: str
    model: str
    seconds: str
    seed_drawn: bool
    files: Mapping[str, bytes] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The request as the file of jobs stores it."""
        import hashlib

        return {
            "call": {n: v for n, v in self.call.items() if not (n == "seed" and self.seed_drawn)},
            "seed": self.call["seed"],
            "seed_drawn": self.seed_drawn,
            "size": self.size,
            "model": self.model,
            "seconds": self.seconds,
            "files": {suffix: hashlib.sha256(data).hexdigest() for suffix, data in self.files.items()},
        } | self.more


class Checker:
    """Checks requests for one model without its weights. `pipeline` is `registry.Model.checker()`, None for a peer,
    whose call checks its arguments when it runs. `served` names the model's state and its settings. Safe to call from
    several threads. Raises ReducioError if the model has no clip of one of `limits.sizes`.
    """

    def __init__(
        self, name: str, pipeline: Any, defaults: Mapping[str, Any], limits: Limits, fps: float | None, encoding: str
    ) -> None:
        self.name, self.pipeline, self.limits = name, pipeline, limits
        self.fields = {n: parse for n, parse in FIELDS.items() if n in defaults or n in ("prompt", "seed")}
        self.defaults, self.fps, self.encoding = defaults, fps, encoding
        self.seconds, self.served = "1", ""
        if pipeline is not None:
            own = pipeline.usual_size
            self.sizes = limits.sizes or _served(own)
            frames = getattr(getattr(pipeline, "unet", pipeline.vae).config, "num_frames", None)
            if frames and fps:
                self.seconds = f"{max(1, round(frames / fps))}"
        else:
            own = (defaults.get("height", 512), defaults.get("width", 512))
            self.sizes = limits.sizes or (own,)
        self.own = own
        for height, width in limits.sizes or ():
            try:
                self._check_size(height, width, has_picture=False)
            except ReducioError as error:
                raise ReducioError(f"sizes: {width}x{height} cannot be served; {error}") from error

    def __call__(
        self, fields: Mapping[str, Any], files: Mapping[str, bytes] | None = None, more: dict[str, Any] | None = None
    ) -> Asked:
        """Check a request. Raises ApiError 400 with the same line as the command line."""
        try:
            return self._check(fields, files or {}, more or {})
        except ReducioError as error:
            raise bad_request(str(error)) from error

    def _check(self, fields: Mapping[str, Any], files: Mapping[str, bytes], more: dict[str, Any]) -> Asked:
        picture, motion = files.get(PICTURE), files.get(MOTION)
        known = (*self.fields, *WIRE, *OWN)
        if unknown := sorted(str(name) for name in fields if name not in known):
            raise ReducioError(f"{unknown[0][:60]}: no field of a clip; known are {', '.join(known)}")
        if (model := fields.get("model")) not in (None, "", self.name):
            raise ReducioError(f"model: {_brief(model)} is not served here; {self.name} is")
        # A field that is null, or empty and not the prompt, was not given.
        call = {n: v for n, v in fields.items() if n in self.fields and v is not None and (v != "" or n == "prompt")}
        call = {name: self.fields[name](name, value) for name, value in call.items()}
        self._check_limits(call)
        height, width = self._size(fields.get("size"), picture is not None)
        drawn = "seed" not in call
        if drawn:
            call["seed"] = random.SystemRandom().randrange(MAX_DRAWN_SEED)
        if height is not None:
            call |= {"height": height, "width": width}
        if (factor := fields.get("interpolate")) not in (None, ""):
            more = more | {"interpolate": check_factor(_whole("interpolate", factor))}
        given: dict[str, Any] = {} if picture is None else {"image": open_picture(picture)}
        if "preview_every" in call:
            given["callback_on_step_end"] = _no_callback  # stands in for the worker's callback, which sends the frames
        if motion is not None and not hasattr(self.pipeline, "encode_motion"):
            raise ReducioError(f"motion_reference: {self.name} takes no motion of another clip")
        if self.pipeline is not None:
            request = self.pipeline.check_inputs(**call, **given)
            height, width = request.height, request.width
            if motion is not None:
                config = self.pipeline.vae.config
                check_motion(motion, config.num_frames)
                size = {"height": height, "width": width}
                self.pipeline.check_inputs(**call | size, **given, motion_latents=_blank(config, height, width))
            if (height, width) not in self.sizes:
                self._refuse_size(f"{width}x{height}")
        rate = call.get("fps", self.fps)
        if rate and ("fps" in call or "interpolate" in more):
            check_rate(rate * more.get("interpolate", 1), self.encoding)
        call |= {"height": height, "width": width}
        seconds = str(fields.get("seconds") or self.seconds)
        if seconds not in (self.seconds, f"{self.seconds}.0"):
            raise ReducioError(f"seconds: {_brief(seconds)} asked for, this model makes clips of {self.seconds}")
        more = more | {"served": self.served}
        return Asked(call, f"{width}x{height}", self.name, self.seconds, drawn, files, more)

    def _check_limits(self, call: dict[str, Any]) -> None:
        for name in ("prompt", "negative_prompt"):
            if len(call.get(name, "")) > self.limits.prompt_characters:
                most = self.limits.prompt_characters
                raise ReducioError(f"{name}: has {len(call[name])} characters, {most} are the most")
        steps = [("num_inference_steps", call.get("num_inference_steps"))]
        steps += [("content_kwargs: num_inference_steps", call.get("content_kwargs", {}).get("num_inference_steps"))]
        for name, value in (*steps, ("sigmas", len(call["sigmas"]) if isinstance(call.get("sigmas"), list) else None)):
            if isinstance(value, int | float) and value > self.limits.steps:
                raise ReducioError(f"{name}: {value} asked for, {self.limits.steps} are the most")
        caption = getattr(getattr(self.pipeline, "transformer", None), "config", None)
        longest = getattr(caption, "caption_length", MAX_CAPTION)
        for name, most in (("height", 2048), ("width", 2048), ("max_sequence_length", longest)):
            if isinstance(value := call.get("content_kwargs", {}).get(name), int | float) and value > most:
                raise ReducioError(f"content_kwargs: {name} is {value}, {most} is the most")
        for name, most in (("num_frames", self.limits.frames), ("num_videos_per_prompt", self.limits.videos)):
            if call.get(name, 1) > most:
                raise ReducioError(f"{name}: {call[name]} asked for, {most} are the most")

    def _size(self, size: Any, has_picture: bool) -> tuple[int | None, int | None]:
        """(height, width) of `WIDTHxHEIGHT`, OpenAI's notation; without a size (None, None), or a peer's own size."""
        if size in (None, "", "auto"):
            return (None, None) if self.pipeline is not None else self.own
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size) if isinstance(size, str) else None
        if match is None:
            raise ReducioError(f"size: must be WIDTHxHEIGHT such as {self.own[1]}x{self.own[0]}, is {_brief(size)}")
        height, width = int(match[2]), int(match[1])
        if (height, width) not in self.sizes:
            self._check_size(height, width, has_picture)
            self._refuse_size(size)
        return height, width

    def _check_size(self, height: int, width: int, has_picture: bool) -> None:
        """Raise the ReducioError that says why, if no clip of this model can have the size."""
        if self.pipeline is not None:
            call = {"prompt": "x"} if "prompt" in self.defaults else {}
            image = {"image": Image.new("RGB", (64, 64), "gray")} if "prompt" not in call or has_picture else {}
            self.pipeline.check_inputs(**call, **image, height=height, width=width)

    def _refuse_size(self, size: str) -> None:
        near = sorted(self.sizes, key=lambda s: abs(s[0] * s[1] - self.own[0] * self.own[1]))[:6]
        sizes = ", ".join(f"{w}x{h}" for h, w in near)
        more = "" if len(near) == len(self.sizes) else f" and {len(self.sizes) - len(near)} more"
        raise ReducioError(f"size: {size} is not served here; {sizes}{more} are")


def _served(own: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    from ..media.aspect_buckets import BASES, buckets

    return tuple(dict.fromkeys([own, own[::-1], *(size for base in BASES for size in buckets(base, 32))]))


def open_picture(data: bytes) -> Image.Image:
    """Decode a client's picture, so that its errors are reported before the job is accepted. Raises ReducioError for
    bytes that are no picture, and for too many pixels before they take memory."""
    try:
        image = Image.open(io.BytesIO(data))
    except Exception as error:  # Pillow raises RuntimeError, ZeroDivisionError and more on broken bytes
        reason = "too many pixels" if isinstance(error, Image.DecompressionBombError) else "no picture that is known"
        raise ReducioError(f"image: input_reference cannot be read: it is {reason}") from error
    return Image.fromarray(read_image(image))


def _no_callback(*_: Any) -> None:
    """Never called: a check runs no step."""


def check_motion(data: bytes, num_frames: int) -> None:
    """Raise ReducioError for bytes that are no clip of `num_frames` frames, and for frames of too many pixels."""
    with motion_file(data) as path, contextlib.closing(ffmpeg.frames(path)) as frames:
        count = 0
        try:
            for count, (frame, _) in enumerate(frames, start=1):
                height, width = frame.shape[:2]
                if height * width > MAX_MOTION_PIXELS:
                    most = f"{MAX_MOTION_PIXELS / 1e6:.1f} million pixels are the most"
                    raise ReducioError(f"motion_reference: has frames of {width}x{height}, {most}")
                if count == num_frames:
                    return
        except ReducioError as error:
            if str(error).startswith("motion_reference"):
                raise
            raise ReducioError("motion_reference: cannot be read: it is no video that is known") from error
    raise ReducioError(f"motion_reference: has {count} frames; the model takes {num_frames}")


@contextlib.contextmanager
def motion_file(data: bytes) -> Iterator[Path]:
    """The clip as a file. ffmpeg needs a file to find the clip's index."""
    with tempfile.TemporaryDirectory(prefix="reducio-serve-") as folder:
        path = Path(folder) / "motion"
        path.write_bytes(data)
        yield path


def _blank(config: Any, height: int, width: int) -> Any:
    """Zeros of the shape of a clip's motion latents, for checks."""
    import torch

    return torch.zeros(config.latent_shape(height, width))


def _brief(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
