"""Runs the curation: reads each video once and writes its shots and their scores into a part of the manifest.

`curate_video` is a plain function of a path and settings. A pool of processes runs it on one machine, Ray Data on many.
Both write the same parts and so produce the same manifest.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...media import ffmpeg
from ...system import cores, process_pool
from ...system.checksum import file_sha256
from ...system.errors import ReducioError, first_line, lacks_space, shown
from ...system.paths import is_file, is_folder, is_unicode, printable
from . import manifest, scores
from .on_ray import map_on_ray
from .shots import ShotFinder

LOG = logging.getLogger("reducio_fast")
SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
SAMPLED = 2.0  # frames a second that are kept: they measure motion and supply a shot's first, middle and last picture
DETECTION_SIDE = 144  # pixels of the short side of the frames in which cuts are searched
THUMBNAIL = (80, 144)
IN_MEMORY = 2**27  # bytes of a video's kept frames; more go to a temporary file
VIDEOS_A_WORKER = 32  # videos a worker on average, after which all are replaced: decoders and detectors leak memory


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a worker; pickled and sent to it."""

    out: str
    text: bool = True  # measure `text_area`: half of the computation
    clip_weights: str | None = None
    aesthetic_head: str | None = None

    def __post_init__(self) -> None:
        if self.aesthetic_head is not None and self.clip_weights is None:
            raise ReducioError("the aesthetic head (--aesthetic) needs the open_clip model that it belongs to (--clip)")

    def with_absolute_paths(self) -> Settings:
        """The same settings for a process that runs in another folder."""
        names = [name for name in ("out", "clip_weights", "aesthetic_head") if getattr(self, name) is not None]
        return dataclasses.replace(self, **{name: os.path.abspath(getattr(self, name)) for name in names})


@dataclass(frozen=True, slots=True)
class Source:
    """A video to curate, named by its path in the manifest, and its caption."""

    path: str
    caption: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Counts of a run: `kept` parts existed before, `made` parts were written, `broken` of those hold an error."""

    kept: int
    made: int
    broken: int


def find_sources(inputs: Sequence[str | os.PathLike[str]], captions: Mapping[str, str] | None = None) -> list[Source]:
    """The named videos and all videos below the named folders, sorted. Keys of `captions` are paths, from the current
    folder, or file names.

    Their paths are absolute, so that a list of them can be used from another folder. Raises `ReducioError` for a path
    that does not exist, for a name that is not UTF-8, or if there is no video at all.
    """
    videos = set()
    for given in map(Path, inputs):
        if is_folder(given):
            videos |= {p.absolute() for p in given.rglob("*") if p.suffix.lower() in SUFFIXES and is_file(p)}
        elif is_file(given):
            videos.add(given.absolute())
        else:
            raise ReducioError(f"no such file or folder: {given}")
    if not videos:
        raise ReducioError(f"no video ({', '.join(SUFFIXES)}) in {', '.join(map(str, inputs))}")
    if odd := sorted(str(path) for path in videos if not is_unicode(str(path))):
        raise ReducioError(
            f"{printable(odd[0])!r}: the name is not UTF-8, and a manifest holds UTF-8 only; rename it"
            + (f", and {len(odd) - 1} more" if len(odd) > 1 else "")
        )
    captions = captions or {}
    by_path = {Path(name).absolute(): caption for name, caption in captions.items()}
    sources = [Source(str(p), by_path.get(p, captions.get(p.name))) for p in sorted(videos)]
    names = {path.name for path in videos}
    unused = [name for name in captions if name not in names and Path(name).absolute() not in videos]
    if unused:
        LOG.warning("captions: %d of %d names are no video's, such as %s", len(unused), len(captions), shown(unused[0]))
    return sources


def curate(
    inputs: Sequence[str | os.PathLike[str]],
    settings: Settings,
    captions: Mapping[str, str] | None = None,
    workers: int | None = None,
    ray: str | None = None,
    progress: bool = True,
) -> Outcome:
    """Write the parts of the manifest that `settings.out` lacks, or that were made with other settings or captions or
    of other files under the same names.

    Raises `ReducioError` before any video is read if there is no video or `prepare` cannot load something.

    Args:
        workers: processes on this machine; None means one per core that this process may use, 0 runs in this process.
        ray: address of a Ray cluster to run on instead; "local" starts one on this machine.
    """
    from tqdm import tqdm

    sources = find_sources(inputs, captions)
    todo = [source for source in sources if not _is_made(source, settings)]
    if todo:
        prepare(settings)
    (Path(settings.out) / manifest.PARTS).mkdir(parents=True, exist_ok=True)
    if ray is not None:
        shared = settings.with_absolute_paths()
        results: Iterable[bool] = map_on_ray(todo, lambda source: curate_video(source, shared), ray)
    elif workers == 0:
        results = (curate_video(source, settings) for source in todo)
    else:
        results = _pool(todo, settings, workers or cores.usable())
    fine = list(tqdm(results, desc="curate", total=len(todo), disable=not progress, unit="video"))
    return Outcome(len(sources) - len(todo), len(fine), fine.count(False))


def _pool(todo: list[Source], settings: Settings, workers: int) -> Iterator[bool]:
    """Yield one result per video. A video whose worker dies becomes a row with an error.

    Each pool gets a limited number of videos. `max_tasks_per_child` of `ProcessPoolExecutor` cannot replace the
    workers: from Python 3.11 until July 2026, an executor with more tasks waits forever (python/cpython#115634).
    """
    remaining = list(todo)
    while remaining:
        done, died = set(), False
        begun = remaining[: workers * VIDEOS_A_WORKER]
        pool = process_pool.spawned(workers)
        try:
            futures = {pool.submit(curate_video, source, settings): source for source in begun}
            for future in as_completed(futures):
                try:
                    yield future.result()
                    done.add(futures[future])
                except BrokenProcessPool:
                    died = True
        finally:  # after an error, wait only for the videos that have been begun
            pool.shutdown(cancel_futures=True)
        remaining = [source for source in begun if source not in done] + remaining[len(begun) :]
        if not died:
            continue
        # Videos are begun in order, so one of the first `workers` that are left killed its worker. Each of them runs
        # again in a pool of its own, where only the video that caused the crash crashes again.
        for source in remaining[:workers]:
            try:
                with process_pool.spawned(1) as alone:
                    yield alone.submit(curate_video, source, settings).result()
            except BrokenProcessPool:
                _write_error(source, settings, "the process that decoded it died")
                yield False
            remaining.remove(source)


@functools.lru_cache(maxsize=1)
def prepare(settings: Settings) -> scores.ClipScorer | None:
    """Import and load what a video of these settings needs, once per process; return the scorer, if there is one.

    Raises `ReducioError` for a package that is not installed and a file that cannot be loaded, `OSError` if there is no
    folder for temporary files.
    """
    tempfile.gettempdir()
    scores.opencv()
    ffmpeg.program()
    ShotFinder(24.0)
    if settings.text:
        scores.text_reader()
    if settings.clip_weights is None:
        return None
    return scores.ClipScorer(settings.clip_weights, settings.aesthetic_head)


def curate_video(source: Source, settings: Settings) -> bool:
    """Write a video's part. Returns False if the video could not be read; the part then holds the error.

    Raises `ReducioError` as `prepare` does, and `OSError` if a disk is full.
    """
    scorer = prepare(settings)
    with tempfile.SpooledTemporaryFile(IN_MEMORY) as file:
        try:
            decoded = _decode(source, file)
        except (ReducioError, OSError) as error:
            if lacks_space(error):
                raise
            _write_error(source, settings, first_line(error))
            return False
        _write_part(list(_clips(source, decoded, settings, scorer)), source, settings)
    return True


def _made_with(source: Source, settings: Settings) -> dict[str, Any]:
    """What a part depends on: settings, and the video by its size and time of change."""
    clip, head = (path and os.path.abspath(path) for path in (settings.clip_weights, settings.aesthetic_head))
    made: dict[str, Any] = {"caption": source.caption, "text": settings.text, "clip": clip, "aesthetic": head}
    with suppress(OSError):  # a video that is gone becomes a row with an error
        stat = os.stat(source.path)
        made |= {"bytes": stat.st_size, "changed": stat.st_mtime_ns}
    return made


def _is_made(source: Source, settings: Settings) -> bool:
    """Whether the part exists, with these settings and of this file. Older parts do not tell of which file they are."""
    made, wanted = manifest.made_with(manifest.part_path(settings.out, source.path)), _made_with(source, settings)
    return made is not None and wanted | made == wanted


def _write_part(rows: list[dict[str, Any]], source: Source, settings: Settings) -> None:
    manifest.write(rows, manifest.part_path(settings.out, source.path), _made_with(source, settings))


def _write_error(source: Source, settings: Settings, reason: str) -> None:
    row = {
        "id": manifest.part_path("", source.path).stem,
        "video": source.path,
        "caption": source.caption,
        "error": reason,
    }
    _write_part([row], source, settings)


@dataclass(frozen=True, slots=True)
class _Decoded:
    """What is kept of a video's frames. `file` holds a small gray frame and a JPEG of two frames per second."""

    sha256: str
    fps: float
    height: int
    width: int
    shots: list[tuple[int, int]]
    kept: list[tuple[int, int, int]]  # frame number, places of its gray frame and of its JPEG in `file`
    file: IO[bytes]


def _decode(source: Source, file: IO[bytes]) -> _Decoded:
    """Decode each frame once, keep two per second in `file`, and find the shots.

    Raises `ReducioError` or `OSError` if the video cannot be read.
    """
    cv2 = scores.opencv()
    finder: ShotFinder | None = None
    kept: list[tuple[int, int, int]] = []
    fps, height, width, every = 0.0, 0, 0, 1
    for number, (frame, rate) in enumerate(ffmpeg.frames(Path(source.path))):
        if finder is None:
            fps, (height, width) = rate, frame.shape[:2]
            finder, every = ShotFinder(fps), max(1, round(fps / SAMPLED))
        finder.add(_small(cv2, frame))
        if number % every == 0:
            jpeg = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
            kept.append((number, _append(file, scores.small_gray(frame)), _append(file, jpeg)))
    assert finder is not None, "ffmpeg.frames raises if there is no frame"
    return _Decoded(file_sha256(source.path), fps, height, width, finder.shots(), kept, file)


def _append(file: IO[bytes], array: np.ndarray) -> int:
    """Write an array to the end of a file; return its place for `_read`."""
    place = file.tell()
    np.save(file, array)
    return place


def _read(file: IO[bytes], place: int) -> np.ndarray:
    file.seek(place)
    array: np.ndarray = np.load(file)
    return array


def _clips(
    source: Source, decoded: _Decoded, settings: Settings, scorer: scores.ClipScorer | None
) -> Iterator[dict[str, Any]]:
    """Yield one row per shot."""
    cv2 = scores.opencv()
    numbers = [number for number, _, _ in decoded.kept]
    for start, end in decoded.shots:
        inside = decoded.kept[bisect_left(numbers, start) : bisect_left(numbers, end)]
        chosen = [inside[i] for i in sorted({0, len(inside) // 2, len(inside) - 1})] if inside else []
        pictures = [cv2.imdecode(_read(decoded.file, jpeg), cv2.IMREAD_COLOR)[..., ::-1] for _, _, jpeg in chosen]
        middle = pictures[len(pictures) // 2] if pictures else None
        row: dict[str, Any] = {
            "id": f"{decoded.sha256[:16]}-{start:07d}",
            "video": source.path,
            "sha256": decoded.sha256,
            "start": start,
            "end": end,
            "fps": decoded.fps,
            "height": decoded.height,
            "width": decoded.width,
            "caption": source.caption,
            # One by one: an hour without a cut has 7,200 of these frames, 210 MB in 16:9.
            "motion": scores.motion(_read(decoded.file, gray) for _, gray, _ in inside),
            "text_area": scores.text_area(pictures) if settings.text and pictures else None,
        }
        if middle is not None:
            small = cv2.resize(middle, THUMBNAIL[::-1], interpolation=cv2.INTER_AREA)
            row[manifest.THUMBNAIL] = cv2.imencode(".jpg", small[..., ::-1])[1].tobytes()
            if scorer is not None:
                row |= scorer(middle, source.caption)
        yield row


def _small(cv2: Any, frame: np.ndarray) -> np.ndarray:
    scale = DETECTION_SIDE / min(frame.shape[:2])
    if scale >= 1:
        return frame
    size = round(frame.shape[1] * scale), round(frame.shape[0] * scale)
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
