"""What the API's bodies look like, for the OpenAPI page and for clients that are generated from it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

DESCRIPTION = "Clips over HTTP, in the form of OpenAI's videos API."


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    error: ErrorBody


class JobError(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """A job. `error` is set where it failed; `timings` are seconds by stage."""

    model_config = ConfigDict(extra="allow")
    id: str
    object: str
    model: str
    status: str
    progress: int
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str | None = None
    size: str
    seconds: str
    seed: int
    remixed_from_video_id: str | None = None
    error: JobError | None = None
    attempts: int


class VideoList(BaseModel):
    object: str
    data: list[Video]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class Deleted(BaseModel):
    id: str
    object: str
    deleted: bool


class Model(BaseModel):
    model_config = ConfigDict(extra="allow")
    id: str
    object: str
    created: int
    owned_by: str
    sizes: list[str]
    fields: list[str]


class ModelList(BaseModel):
    object: str
    data: list[Model]


class Health(BaseModel):
    status: str


_STATUSES = {
    400: "An argument does not fit; the line names it",
    401: "No key of this server",
    404: "No such video of yours, or it is not ready",
    405: "Another method",
    413: "The body is too large",
    429: "The queue is full",
    503: "No room on disk (disk_full), or the model cannot be loaded (not_loaded)",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": text} for status, text in _STATUSES.items()
}
ERRORS[422] = {"model": Error, "description": "Not used: an argument that does not fit is a 400"}
NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "Loading, or ending"}}


def _binary(*kinds: str) -> dict[int | str, dict[str, Any]]:
    schema = {"schema": {"type": "string", "format": "binary"}}
    return {200: {"description": "Bytes", "content": dict.fromkeys(kinds, schema)}}


CONTENT = _binary("video/mp4", "image/webp", "image/jpeg", "application/octet-stream") | {
    206: {"description": "A range of them"}
}
CONTENT[416] = {"description": "A range that the file does not have"}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Events", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
}
METRICS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Counters", "content": {"text/plain": {"schema": {"type": "string"}}}}
}

# Every field of `requests.FIELDS`; a model has some of them, which /v1/models lists.
_FIELDS: dict[str, Any] = {
    "prompt": {
        "type": "string",
        "description": "what the clip shows; only for models that read text",
    },
    "model": {"type": "string", "description": "the name that /v1/models has; may be left out"},
    "size": {"type": "string", "description": "WIDTHxHEIGHT, one of those that /v1/models has"},
    "seconds": {"type": "string", "description": "those of the model's clips; may be left out"},
    "seed": {"type": "integer", "minimum": 0, "description": "drawn where there is none"},
    "negative_prompt": {"type": "string"},
    "image_fit": {"type": "string", "description": "stretch or crop, of the picture"},
    "num_inference_steps": {"type": "integer", "minimum": 1},
    "guidance_scale": {"type": "number", "minimum": 0},
    "content_kwargs": {"type": "object", "description": "of the first stage, such as num_inference_steps"},
    "min_guidance_scale": {"type": "number", "minimum": 0, "description": "of the first frame"},
    "max_guidance_scale": {"type": "number", "minimum": 0, "description": "of the last frame"},
    "sigmas": {"description": "noise levels, one more than there are steps, or align-your-steps"},
    "fps": {"type": "integer", "minimum": 1, "description": "frames per second of the clip"},
    "motion_bucket_id": {"type": "integer", "minimum": 0, "description": "amount of motion, 1 to 255"},
    "noise_aug_strength": {"type": "number", "minimum": 0, "description": "noise on the picture"},
    "decode_chunk_size": {"type": "integer", "minimum": 1, "description": "frames that are decoded at once"},
    "quality": {"type": "string", "description": "exact, balanced or draft"},
    "schedule": {"type": "string", "description": "own, quadratic, lu or exponential"},
    "guidance_interval": {
        "type": "array",
        "items": {"type": "number"},
        "description": "two shares of the steps, between which guidance is on",
    },
    "guidance_reuse": {"type": "integer", "minimum": 1, "description": "guided steps per computed guidance"},
    "cache_threshold": {"type": "number", "minimum": 0, "description": "a step that changes less is reused"},
    "num_frames": {"type": "integer", "minimum": 1, "description": "more than the model's: clips that continue"},
    "num_videos_per_prompt": {"type": "integer", "minimum": 1, "maximum": 9, "description": "seeds, side by side"},
    "direction": {"type": "string", "description": "of long clips: forward or both"},
    "overlap": {"type": "integer", "minimum": 1, "description": "frames that clips of a long clip share"},
    "match_colours": {"type": "boolean", "description": "of a long clip's parts"},
    "loop": {"type": "boolean", "description": "the last frame meets the first"},
    "motion_strength": {"type": "number", "minimum": 0, "maximum": 4},
    "motion_score": {"type": "number", "description": "amount of motion, of models that were trained with it"},
    "keep_content": {"type": "boolean", "description": "the content frame's own pixels where nothing moves"},
    "preview_every": {"type": "integer", "minimum": 1, "description": "steps between events with a preview"},
    "interpolate": {"type": "integer", "enum": [2, 4], "description": "times the frame rate"},
}


def _body(file: bool) -> dict[str, Any]:
    texts = {"input_reference": "the content frame", "motion_reference": "a clip whose motion this one takes"}
    texts = texts if file else {"motion_reference": texts["motion_reference"]}
    upload = {n: {"type": "string", "format": "binary", "description": text} for n, text in texts.items()}
    url = {n: {"type": "string", "description": f"{text}, as a data: URL"} for n, text in texts.items()}

    def schema(more: dict[str, Any]) -> dict[str, Any]:
        properties = _FIELDS | more
        return {"schema": {"type": "object", "properties": properties}}

    content = {"multipart/form-data": schema(upload), "application/json": schema(url)}
    return {"requestBody": {"required": True, "content": content}}


CREATE = _body(file=True)
REMIX = _body(file=False)
