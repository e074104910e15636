"""Bodies of requests: a form or JSON, as fields and files. What the fields say is checked in `requests`."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from .errors import ApiError, bad_request
from .files import MOTION, PICTURE

MAX_FIELDS = 256  # of a form: a list of numbers has one for each
# Fields that are files or `data:` URLs: the suffix of the job's file, and the kind of media in the URL.
UPLOADS = {"input_reference": (PICTURE, "image"), "motion_reference": (MOTION, "video")}


async def read_body(request: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Fields, and the files by suffix, of a JSON or form body. Raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    files: dict[str, bytes] = {}
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        try:
            form = await request.form(max_files=len(UPLOADS), max_fields=MAX_FIELDS)
        except HTTPException as error:
            raise bad_request(f"body: {error.detail}") from error
        fields: dict[str, Any] = {}
        lists: dict[str, list[Any]] = {}  # the `openai` client sends a list as several `NAME[]`
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in UPLOADS:
                    raise bad_request(f"{name[:60]}: must be text, is a file")
                if UPLOADS[name][0] in files:
                    raise bad_request(f"{name}: is given twice")
                files[UPLOADS[name][0]] = await value.read()
            elif name.endswith("[]"):
                lists.setdefault(name[:-2], []).append(value)
            elif name in fields:
                raise bad_request(f"{name[:60]}: is given twice")
            else:
                fields[name] = value
        fields = _unfolded(fields)
        if twice := sorted(fields.keys() & lists):
            raise bad_request(f"{twice[0][:60]}: is given in two forms")
        fields |= lists
        await form.close()
    else:
        body = await request.body()
        try:
            fields = json.loads(body or b"null")
        except (ValueError, RecursionError):
            raise bad_request("body: must be a form or a JSON object") from None
        if not isinstance(fields, dict):
            raise bad_request("body: must be a form or a JSON object")
    for name, (suffix, _) in UPLOADS.items():
        reference = fields.pop(name, None)
        if reference not in (None, ""):
            if suffix in files:
                raise bad_request(f"{name}: is given twice")
            files[suffix] = _file_of_url(name, reference)
    return fields, files


def _file_of_url(name: str, value: Any) -> bytes:
    """The bytes of a `data:` URL, given as text or as {"image_url": text}. Nothing is fetched from anywhere."""
    kind = UPLOADS[name][1]
    url = value.get(f"{kind}_url") if isinstance(value, dict) else value
    match = re.fullmatch(rf"data:{kind}/[\w.+-]+;base64,(.*)", url, re.DOTALL) if isinstance(url, str) else None
    if match is None:
        raise bad_request(f"{name}: must be a file or a data:{kind}/...;base64, URL; nothing is fetched")
    try:
        return base64.b64decode(match[1], validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"{name}: is no base64") from None


def _unfolded(form: Mapping[str, Any]) -> dict[str, Any]:
    """`content_kwargs[height]=512` as {"content_kwargs": {"height": "512"}}, `sigmas[0]=1` as {"sigmas": ["1"]}."""
    fields: dict[str, Any] = {}
    for name, value in form.items():
        if match := re.fullmatch(r"(\w+)\[(\w+)\]", name):
            inner = fields.setdefault(match[1], {})
            if not isinstance(inner, dict):
                raise ApiError(400, f"{match[1]}: is given in two forms", match[1], "invalid_value")
            inner[match[2]] = value
        else:
            fields[name] = value
    for name, inner in fields.items():
        if isinstance(inner, dict) and list(inner) == [str(index) for index in range(len(inner))]:
            fields[name] = list(inner.values())
    return fields
