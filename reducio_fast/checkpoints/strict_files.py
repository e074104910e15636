"""Safetensors and JSON files, read strictly.

If a file and a model disagree, the error lists what is missing, unexpected or of another shape. A truncated file or a
pickle is refused, with an error that says what it is.
"""

from __future__ import annotations

import importlib.util
import json
import math
import pickle
import struct
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..system.devices import widened
from ..system.errors import ReducioError, first_line
from ..system.paths import entries, is_file, is_folder

INDEX = "model_index.json"
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format
# Bits per element by safetensors' name of its type; types of less than 8 bits are packed.
DTYPE_BITS = (
    dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
    | dict.fromkeys(("U32", "I32", "F32"), 32)
    | dict.fromkeys(("U64", "I64", "F64", "C64"), 64)
    | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
)
NAMES_SHOWN = 8  # of each kind in a report: an error stays one readable line even when all 437 names differ


def version() -> str:
    """The version of this package, as installed."""
    return importlib.metadata.version("reducio-fast")


SVD_TINY = "svd-tiny"  # the name of the embedded Stable Video Diffusion


def embedded_model(name: str = "tiny") -> Path:
    """Folder of a small model inside the package. Raises ReducioError if the installation does not have it."""
    folder = Path(str(resources.files("reducio_fast"))) / "models" / name
    if not (folder / INDEX).is_file():
        if name == SVD_TINY:
            made = f"`reducio-fast train {SVD_TINY} --out DIR` makes it, in DIR/bundle"
            raise ReducioError(f"model: this installation has no {SVD_TINY} ({folder}); {made}")
        raise ReducioError(f"model: none named, and this installation has no embedded one ({folder})")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ReducioError if there is no file or it holds no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReducioError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ReducioError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise ReducioError(f"{path}: holds a JSON {type(values).__name__}, must hold an object")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def check_model_folder(folder: Path) -> None:
    """Raise ReducioError for a folder without a model's index, and say what it is instead."""
    if is_file(folder / INDEX):
        return
    if not is_folder(folder):
        raise ReducioError(f"{folder}: no such folder")
    files = entries(folder)
    weights = [file.name for file in files if file.suffix in (".safetensors", *PICKLES)]
    if is_file(folder / CONFIG):
        class_name = read_json(folder / CONFIG).get("_class_name")
        what = f"holds one component{f', a {class_name}' if class_name else ''}"
    elif weights:
        what = f"holds {weights[0]}; `reducio-fast convert` makes a model of a single file"
    else:
        what = f"has no {INDEX}" if files else "is empty"
    raise ReducioError(f"{folder}: is no model folder, it {what}")


def check_same_class(folder: Path, file: str, class_name: str) -> None:
    """Raise ReducioError if `folder` has the JSON file `file` and that names a class other than `class_name`, or none:
    folders of other programs have files of these names too."""
    if not is_file(folder / file):
        return
    earlier = read_json(folder / file).get("_class_name")
    if earlier != class_name:
        holds = f"a {earlier}" if earlier else f"a {file} without _class_name"
        raise ReducioError(f"{folder}: holds {holds}, which is not replaced by another class ({class_name})")


def check_safetensors(path: Path) -> None:
    """Refuse a file that is not a whole safetensors file, and say what it is instead. Reads the header only."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            header = file.read(length) if length <= MAX_HEADER else b""
    except FileNotFoundError:
        raise ReducioError(f"{path}: no such file") from None
    except OSError as error:
        raise ReducioError(f"{path}: not readable ({error.strerror})") from error
    if len(start) == 8 and length > MAX_HEADER:  # so the file does not begin with the length of a header
        if start[:2] == b"PK" or start[:1] == pickle.PROTO:
            raise ReducioError(f"{path}: is a pickle, not safetensors; pickles can run code and are never loaded")
        if start == b"version ":
            raise ReducioError(f"{path}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
        raise ReducioError(f"{path}: not a safetensors file")
    if len(start) < 8 or length > size - 8:
        raise ReducioError(f"{path}: truncated, its {size} bytes do not even hold the header")
    end = _check_header(path, header)
    if size != 8 + length + end:
        state = "truncated" if size < 8 + length + end else "damaged"
        raise ReducioError(f"{path}: {state}, has {size} bytes and its header announces {8 + length + end}")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:  # its parser is stricter, for instance about metadata and the encoding
        raise ReducioError(f"{path}: not a safetensors file ({first_line(error)})") from error


def _check_header(path: Path, header: bytes) -> int:
    """The bytes of data that a safetensors header announces. Refuses a header whose shapes, types and offsets disagree.

    Nothing is allocated by a header's numbers, so a shape of 10^18 costs no more than the error that refuses it.
    """
    try:
        entries = json.loads(header, object_pairs_hook=_unique)
        spans = []
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            shape, (start, stop), bits = entry["shape"], entry["data_offsets"], DTYPE_BITS[entry["dtype"]]
            if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
                raise ReducioError(f"{path}: damaged, {name} has shape {shape} at bytes {start} to {stop}")
            if stop - start != (needed := math.prod(shape) * bits // 8):
                has = f"{stop - start} bytes ({start} to {stop})"
                raise ReducioError(f"{path}: damaged, {name} has {has}; {entry['dtype']} {shape} needs {needed}")
            spans.append((start, stop, name))
    except ReducioError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise ReducioError(f"{path}: not a safetensors file") from None
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            fault = "overlaps the tensor before it" if start < end else f"leaves {start - end} bytes unused before it"
            raise ReducioError(f"{path}: damaged, {name} at bytes {start} to {stop} {fault}")
        end = stop
    return end


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. Raises ValueError for a repeated name: readers differ in which of its values they take."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("repeated name")
    return values


def check_component(folder: Path, variant: str | None = None) -> None:
    """Refuse a component folder whose safetensors weights are missing, pickled, truncated or lack a shard: one of this
    variant ("fp16"), by default of the plain weights."""
    if not is_folder(folder):
        raise ReducioError(f"{folder}: no such folder")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [p.name for p in entries(folder) if p.suffix in PICKLES]
        if pickles:
            raise ReducioError(f"{folder}: holds the pickle {pickles[0]} and no safetensors; pickles are never loaded")
        raise ReducioError(f"{folder}: holds no safetensors file")
    for index in _shard_indices(folder, variant):
        _shards(index)
    for file in files:
        check_safetensors(file)


def _shard_indices(folder: Path, variant: str | None) -> list[Path]:
    end = ".safetensors.index.json" if variant is None else f".safetensors.index.{variant}.json"
    return [path for path in entries(folder) if path.name.endswith(end)]


def _shards(index: Path) -> list[Path]:
    """The files of weights that an index names. Raises ReducioError for one that is not beside the index."""
    weight_map = read_json(index).get("weight_map")
    named = sorted({str(file) for file in weight_map.values()}) if isinstance(weight_map, dict) else [""]
    if any(Path(name).name != name or not name.endswith(".safetensors") for name in named):
        raise ReducioError(f"{index}: has no weight_map of tensors to safetensors files beside it")
    if missing := [name for name in named if not is_file(index.parent / name)]:
        raise ReducioError(f"{index.parent}: {index.name} names {', '.join(missing)}, which is not there")
    return [index.parent / name for name in named]


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component folder: one, or the shards that its index names; [] if it holds several and
    no index. A file with the plain name comes first, because a half-precision variant of the same weights may lie
    beside it; `variant` ("fp16") selects that variant."""
    if variant is not None:
        stem, suffix = WEIGHTS.rsplit(".", 1)
        if is_file(folder / f"{stem}.{variant}.{suffix}"):
            return [folder / f"{stem}.{variant}.{suffix}"]
        for index in _shard_indices(folder, variant):
            return _shards(index)
        return []
    if is_file(folder / WEIGHTS):
        return [folder / WEIGHTS]
    for index in _shard_indices(folder, None):
        check_component(folder)
        return _shards(index)
    files = sorted(folder.glob("*.safetensors"))
    return files if len(files) == 1 else []


def load_tensors(
    path: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", skip: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """All tensors of one safetensors file, except those whose names begin with one of `skip`, which are not read.

    Floating-point tensors are converted to `dtype` if it is given.
    """
    check_safetensors(path)
    tensors = {}
    with safe_open(path, framework="pt", device=str(device)) as file:
        for name in file.keys():  # noqa: SIM118  safe_open is not iterable
            if name.startswith(skip):
                continue
            try:
                tensor = file.get_tensor(name)
            except SafetensorError as error:  # of a type that torch does not have
                raise ReducioError(f"{path}: {name} is not readable ({first_line(error)})") from error
            if dtype is not None and tensor.is_floating_point():
                tensor = widened(tensor, f"{path}: {name}").to(dtype)
            tensors[name] = tensor
    return tensors


def report(
    where: Path, missing: list[str], unexpected: list[str], misshapen: list[str], mistyped: Sequence[str] = ()
) -> None:
    """Raise one ReducioError that lists every disagreement between a file and its model; return if there is none."""
    parts = []
    kinds: tuple[tuple[str, Sequence[str]], ...] = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", misshapen),
        ("of another type", mistyped),
    )
    for problem, names in kinds:
        if names:
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            parts.append(f"{len(names)} {problem}: {', '.join(names[:NAMES_SHOWN])}{more}")
    if parts:
        raise ReducioError(f"{where}: weights do not fit the configuration; {'; '.join(parts)}")


def check_fit(where: Path, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], fresh: Any = ()) -> None:
    """Compare `tensors` with `expected` and `report` the differences; tensors named in `fresh` may be missing.

    Floating-point types may differ, because weights are stored in any precision.
    """
    misshapen = [
        f"{n} {list(t.shape)} instead of {list(expected[n].shape)}"
        for n, t in tensors.items()
        if n in expected and t.shape != expected[n].shape
    ]
    mistyped = [
        f"{n} {t.dtype} instead of {expected[n].dtype}"
        for n, t in tensors.items()
        if n in expected and t.is_floating_point() != expected[n].is_floating_point()
    ]
    missing = [n for n in expected if n not in tensors and n not in fresh]
    report(where, missing, [n for n in tensors if n not in expected], misshapen, mistyped)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> None:
    """Write tensors by name; tensors that share memory, such as tied weights, are written separately."""
    own, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if place in storages or not _is_whole(tensor) else tensor
        storages.add(place)
    save_file(own, path, metadata={"format": "pt", **metadata})


def _is_whole(tensor: Tensor) -> bool:
    """Whether nothing but this tensor is in its storage."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes
