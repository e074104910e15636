"""`reducio-fast serve`: binds the address, loads the model while the server already answers, ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import socket
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..system import cache_folder
from ..system.checksum import folder_sample
from ..system.errors import ReducioError
from .errors import ApiError
from .files import CLIP, JobFiles, check_rate
from .jobs import Store
from .keys import Keys
from .requests import Checker, Limits

if TYPE_CHECKING:
    from .app import Service
    from .clips import Clips, Event
    from .dispatcher import Home

LOG = logging.getLogger("reducio_fast.server")
DEFAULT_NAME = "reducio-tiny"  # of the embedded model


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of a server. model, dtype, device, backend, compile, quantise, encoding, threads: arguments of
    `clips.Clips`. name: the model's name for clients. data: the folder of jobs and clips. grace: seconds that a running
    clip has when the server is ended. ray: address of a cluster, "local" for one on this machine, None to make clips in
    this process.
    """

    model: str | None = None
    dtype: str | None = None
    device: str | None = None
    backend: str = "auto"
    compile: bool | None = None
    quantise: str | None = None
    encoding: str = "quality"
    threads: int | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: str | None = None
    data: str | None = None
    grace: float = 30.0
    limits: Limits = field(default_factory=Limits)
    ray: str | None = None
    replicas: tuple[int, int] = (1, 1)  # smallest and largest number
    gpus: float | None = None  # per replica; None: one if the cluster has any

    @property
    def worker(self) -> dict[str, Any]:
        """The arguments of `clips.Clips`."""
        names = ("model", "dtype", "device", "backend", "compile", "quantise", "encoding", "threads")
        return {name: getattr(self, name) for name in names}


class LocalHome:
    """One worker in this process. Two jobs at once: the file of one is written while the next clip is made."""

    slots = 2

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def make(self, request: dict[str, Any], given: Mapping[str, bytes]) -> AsyncIterator[Event]:
        return self.clips.make(request, given)


def serve(settings: Settings) -> tuple[str, Callable[[], None]]:
    """Bind the address; returns it as a URL, and a function that serves until the process is told to end.

    Raises ReducioError if the extra is not installed, if the address cannot be bound or is open to others without keys,
    if clips cannot be encoded, or if the folder is in use or its file of jobs cannot be read; the returned function
    raises it if there is no such model, or if the model has no clip of one of `limits.sizes` or a frame rate that no
    clip can have.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ReducioError('serve: FastAPI is not installed; pip install "reducio-fast[serve]"') from error
    if not _is_loopback(settings.host) and settings.api_keys is None:
        raise ReducioError(f"host: {settings.host} is open to others; name the keys with --api-keys FILE")
    from ..media.video_files import check_format

    check_format(f"clip{CLIP}", encoding=settings.encoding)
    if settings.quantise is not None and settings.ray is None:
        from ..pipelines.call.validation import check_quantise
        from ..system.devices import resolve_device

        check_quantise(settings.quantise, settings.backend, resolve_device(settings.device))
    keys = Keys(settings.api_keys)
    listener = _bind(settings.host, settings.port)
    files = JobFiles(settings.data or cache_folder.root() / "serve")
    store = _recovered(files)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run() -> None:
        from .app import create_app

        started = _Started(settings, keys, files, store)
        app = create_app(started.service, settings.limits)
        config = uvicorn.Config(
            app, log_config=None, timeout_graceful_shutdown=int(settings.grace) + 10, access_log=False
        )
        server = _new_server(config)
        started.server = server
        try:
            server.run(sockets=[listener])
        finally:
            store.close()
            files.close()
        if started.failure is not None:
            raise started.failure

    return url, run


class _Started:
    """The state of a running server: the service, and the model that is loaded in the background."""

    def __init__(self, settings: Settings, keys: Keys, files: JobFiles, store: Store) -> None:
        self.settings, self.keys, self.files, self.store = settings, keys, files, store
        self.server: Any = None
        self.failure: BaseException | None = None
        self._close_home: Callable[[], None] = lambda: None

    @contextlib.asynccontextmanager
    async def service(self) -> AsyncIterator[Service]:
        from .app import Service
        from .dispatcher import Dispatcher
        from .metrics import Metrics

        store = self.store
        dispatcher = Dispatcher(store, self.files, self.settings.limits, Metrics())
        service = Service(store, self.files, dispatcher, self.keys, self.settings.limits)
        dispatcher.start()
        assert self.server is not None
        self.server.when_told_to_end(dispatcher.stop)
        loading = asyncio.create_task(self._load(service))
        try:
            yield service
        finally:
            loading.cancel()
            await dispatcher.drain(self.settings.grace)
            await asyncio.to_thread(self._close_home)

    async def _load(self, service: Service) -> None:
        """Load the checker first, which reads only configurations, so that requests are accepted; then the weights."""
        try:
            checker = await asyncio.to_thread(self._checker)
            service.checker.set_result(checker)
            home = await asyncio.to_thread(self._home, service)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.failure = error
            LOG.error("the model cannot be loaded: %s", error)
            if not service.checker.done():
                service.checker.set_exception(ApiError(503, "the model cannot be loaded", code="not_loaded"))
                service.checker.exception()  # retrieved, because asyncio logs exceptions that nothing retrieves
            service.dispatcher.stop()
            self.server.should_exit = True
            return
        for id in await asyncio.to_thread(self.store.fail_others, checker.served):
            LOG.warning("%s: was accepted for another model or other settings; it is not made", id)
        service.dispatcher.open(home)
        LOG.info("ready: %s", service.described())

    def _checker(self) -> Checker:
        from ..pipelines import registry

        settings = self.settings
        entry = registry.find(settings.model)
        given = {"compile": settings.compile, "quantise": settings.quantise}
        entry.check_call(settings.backend, {name: value for name, value in given.items() if value is not None})
        if entry.fps is not None:
            check_rate(entry.fps, settings.encoding)
        name = settings.name or (DEFAULT_NAME if settings.model is None else Path(settings.model).name)
        pipeline = None if entry.checker is None else entry.checker()
        checker = Checker(name, pipeline, entry.call_defaults, settings.limits, entry.fps, settings.encoding)
        # What makes another clip of the same request. A name may stay the same when the model is replaced.
        of_files = [folder_sample(part) if isinstance(part, Path) else part for part in entry.key]
        checker.served = repr((of_files, settings.dtype, settings.quantise, settings.backend))
        return checker

    def _home(self, service: Service) -> Home:
        if self.settings.ray is None:
            from .clips import Clips

            clips = Clips(**self.settings.worker)
            service.described = clips.describe
            return LocalHome(clips)
        from .on_ray import RayHome

        home = RayHome(self.settings.worker, self.settings.ray, self.settings.replicas, self.settings.gpus)
        self._close_home = home.close
        service.described = home.describe
        return home


def _new_server(config: Any) -> Any:
    """A uvicorn server that calls a function when a signal arrives: connections that wait for a clip must be released
    before it ends itself. The class is defined here, because uvicorn is not installed without the extra."""
    import uvicorn

    class Server(uvicorn.Server):
        _stop: Callable[[], None] | None = None

        def when_told_to_end(self, stop: Callable[[], None]) -> None:
            loop = asyncio.get_running_loop()
            self._stop = functools.partial(_call, loop, stop)

        def handle_exit(self, sig: int, frame: Any) -> None:
            if self._stop is not None:
                self._stop()
            super().handle_exit(sig, frame)

    return Server(config)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(function)


def _recovered(files: JobFiles) -> Store:
    """The jobs of this folder, with those put back that the last process had in work. Raises ReducioError if their file
    cannot be read or written."""
    try:
        store = Store(files.jobs)
        for job in store.recover():
            LOG.warning("%s: was in work when the server ended; now %s", job.id, job.status)
    except sqlite3.Error as error:
        files.close()
        raise ReducioError(f"data: {files.jobs} cannot be used as the file of jobs ({error})") from error
    return store


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ReducioError(f"port: {host}:{port} cannot be had ({reason})") from error
    return listener
