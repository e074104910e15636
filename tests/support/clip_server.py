"""A real `reducio-fast serve` in a process of its own, and the unmodified openai client for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any

PROMPT = "a red circle moving right on a black background"


class ClipServer:
    """Starts in the constructor; `ready()` waits for the model. `url` is its address, `log` its stderr so far."""

    def __init__(self, data: Path, *options: str, ray: bool = False) -> None:
        self.data, self._log = data, data.with_suffix(".log")
        command = [sys.executable, "-m", "reducio_fast", "serve", "--port", "0", "--json"]
        command += ["--data", str(data.absolute())]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(self._log, "a") as log:
            self.process = subprocess.Popen(
                [*command, *options], stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd="/"
            )
        assert self.process.stdout is not None
        text = ""
        while not text.rstrip().endswith("}"):
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError(self.log)
            text += line
        self.url = json.loads(text)["url"]

    @property
    def log(self) -> str:
        return self._log.read_text()

    def get(self, path: str, key: str | None = None, timeout: float = 60) -> tuple[int, bytes]:
        """Status and body."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=timeout) as r:
                return r.status, r.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def ready(self, seconds: float = 240) -> ClipServer:
        deadline = time.monotonic() + seconds
        while self.get("/readyz")[0] != 200:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(self.log)
            time.sleep(0.05)
        return self

    def client(self, key: str = "none", **kwargs: Any) -> Any:
        import openai

        warnings.filterwarnings("ignore", category=DeprecationWarning)  # every method of `videos` has the mark
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **({"timeout": 240} | kwargs))

    def rss(self) -> int:
        """Bytes that the process holds."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS")))

    def files(self) -> list[str]:
        return sorted(path.name for path in (self.data / "files").iterdir())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self, seconds: float = 60) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
