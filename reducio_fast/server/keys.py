"""API keys, which give access to the server and identify the owner of a job."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path

from ..system.errors import ReducioError
from .errors import ApiError

EVERYBODY = ""  # the owner of all jobs of a server without keys


class Keys:
    """A file of lines `NAME:SHA256`, the hash in hex of the key that NAME sends. None: no key is required.

    Raises ReducioError for a file that cannot be read or holds anything else.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._hashes: dict[str, str] = {}
        self.required = path is not None
        if path is None:
            return
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise ReducioError(f"--api-keys {path}: cannot be read ({reason})") from error
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            match = re.fullmatch(r"([\w.@-]+):([0-9a-fA-F]{64})", line.strip())
            if match is None:
                raise ReducioError(f"--api-keys {path}: line {number} is not NAME:SHA256")
            if match[1] in self._hashes:
                raise ReducioError(f"--api-keys {path}: line {number} names {match[1]} a second time")
            self._hashes[match[1]] = match[2].lower()
        if not self._hashes:
            raise ReducioError(f"--api-keys {path}: holds no key")

    def owner(self, authorization: str | None) -> str:
        """The owner that an Authorization header names. Raises ApiError 401."""
        if not self.required:
            return EVERYBODY
        scheme, _, key = (authorization or "").partition(" ")
        # A header comes decoded as latin-1; the hash is of the bytes that were sent.
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).hexdigest()
        # Every entry is compared, so that the time of an answer does not reveal which names exist.
        owners = [name for name, known in self._hashes.items() if hmac.compare_digest(known, digest)]
        if scheme.lower() != "bearer" or not owners:
            raise ApiError(401, "the Authorization header must be 'Bearer KEY' with a key of this server",
                           code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        return owners[0]
