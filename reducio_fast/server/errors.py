"""Errors for clients: one shape of body, one line of text, no path of the server."""

from __future__ import annotations

import re
from typing import Any

# An absolute path of at least two parts.
_PATH = re.compile(r"(?<![\w./:])(?:/[\w.@+-]+){2,}/?")


class ApiError(Exception):
    """Answered as `{"error": {"message", "type", "param", "code"}}`, as OpenAI's services do."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str) -> ApiError:
    """400 with the line of a ReducioError, whose argument stands before its first colon."""
    line = without_paths(" ".join(message.split()))
    line = line.encode("utf-8", "backslashreplace").decode()  # names of fields may hold surrogates, which UTF-8 has not
    argument = re.match(r"(\w+):", line)
    return ApiError(400, line, argument[1] if argument else None, "invalid_value")


def without_paths(message: str) -> str:
    """A message with each absolute path cut down to its last name: clients need not know the server's folders."""
    return _PATH.sub(lambda match: match[0].rstrip("/").rpartition("/")[2], message)
