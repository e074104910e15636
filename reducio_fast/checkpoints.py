"""Model folders: safetensors only, loaded strictly, written whole or not at all.

A folder follows diffusers: `model_index.json` and one sub-folder a component. Where a file and a model disagree, the
error lists what is missing, unexpected or of another shape; a file that is cut short or a pickle is refused by name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import ReducioError

INDEX = "model_index.json"
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
LIBRARIES = ("diffusers", "transformers")  # whose classes a folder may name besides our own and open_clip's tower
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # what a folder of the diffusers layout holds
# Of an element, by safetensors' name of its type; the narrow ones are packed.
DTYPE_BITS = (
    dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
    | dict.fromkeys(("U32", "I32", "F32"), 32)
    | dict.fromkeys(("U64", "I64", "F64", "C64"), 64)
    | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
)
DISTRIBUTIONS = {  # of the modules that not every machine has
    "bs4": "beautifulsoup4",
    "ftfy": "ftfy",
    "google.protobuf": "protobuf",
    "sentencepiece": "sentencepiece",
}
NAMES_SHOWN = 8  # of each kind in a report: an error stays one readable line even when all 437 names differ

_Model = TypeVar("_Model", bound=nn.Module)


def version() -> str:
    """Of this package, as installed."""
    return importlib.metadata.version("reducio-fast")


def embedded_model() -> Path:
    """Folder of the small model inside the package; ReducioError where an installation came without."""
    folder = Path(str(resources.files("reducio_fast"))) / "models" / "tiny"
    if not (folder / INDEX).is_file():
        raise ReducioError(f"model: none named, and this installation has no embedded one ({folder})")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ReducioError if there is none or it is no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReducioError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ReducioError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise ReducioError(f"{path}: holds a JSON {type(values).__name__}, must hold an object")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


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


def _check_header(path: Path, header: bytes) -> int:
    """The bytes of data that a safetensors header announces. Refuses one whose tensors are not what they claim to be.

    Nothing is allocated by what a header says, so a shape of 10^18 costs no more than the line that refuses it.
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
    """A JSON object without repeated names: readers differ in which of two they believe."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("repeated name")
    return values


def check_component(folder: Path) -> None:
    """Refuse a component folder without whole safetensors weights: missing, pickled, cut short or short of a shard."""
    if not folder.is_dir():
        raise ReducioError(f"{folder}: no such folder")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES]
        if pickles:
            raise ReducioError(f"{folder}: holds the pickle {pickles[0]} and no safetensors; pickles are never loaded")
        raise ReducioError(f"{folder}: holds no safetensors file")
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(read_json(index).get("weight_map", {}).values())
        if missing := sorted(shards - {f.name for f in files}):
            raise ReducioError(f"{folder}: {index.name} names {', '.join(missing)}, which is not there")
    for file in files:
        check_safetensors(file)


def load_tensors(
    path: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", skip: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """All tensors of one safetensors file but those whose names begin with one of `skip`, which are not read.

    Floating-point ones come as `dtype` if one is given.
    """
    check_safetensors(path)
    tensors = {}
    with safe_open(path, framework="pt", device=str(device)) as file:
        for name in file.keys():  # noqa: SIM118  safe_open is not iterable
            if name.startswith(skip):
                continue
            tensor = file.get_tensor(name)
            tensors[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    return tensors


def report(where: Path, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
    """Raise one ReducioError that lists every disagreement between a file and its model; return if there is none."""
    parts = []
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    for kind, names in kinds:
        if names:
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            parts.append(f"{len(names)} {kind}: {', '.join(names[:NAMES_SHOWN])}{more}")
    if parts:
        raise ReducioError(f"{where}: weights do not fit the configuration; {'; '.join(parts)}")


def assign(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Make `tensors` the weights of `module`, all or nothing. `where` names their file in the report."""
    own = module.state_dict()
    misshapen = [
        f"{n} {list(t.shape)} instead of {list(own[n].shape)}"
        for n, t in tensors.items()
        if n in own and t.shape != own[n].shape
    ]
    report(where, [n for n in own if n not in tensors], [n for n in tensors if n not in own], misshapen)
    module.load_state_dict(tensors, strict=True, assign=True)


class _NoRandomInit(TorchFunctionMode):
    """Leave fresh weights zero. Filling a billion numbers that a file replaces takes longer than loading them.

    Unlike construction on the meta device this keeps the buffers that no file holds (masks, tables) real.
    """

    # The functions of nn.init are what a mode sees where they look out for one, else the method they call.
    FILLS = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, torch.Tensor.uniform_, torch.Tensor.normal_)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.FILLS:
            # Zero, not whatever the memory held: `trunc_normal_` draws again until every value lies in its range.
            return nn.init.zeros_(args[0] if args else (kwargs or {})["tensor"])
        return func(*args, **(kwargs or {}))


def build(
    make: Callable[[], _Model], tensors: Mapping[str, Tensor], where: Path, device: str | torch.device = "cpu"
) -> _Model:
    """A frozen model in eval mode: `make()` without its random initialisation, then `tensors` as its weights."""
    with _NoRandomInit():
        model = make()
    assign(model, tensors, where)
    return model.to(device).requires_grad_(False).eval()


def load_model(
    model_class: type[_Model],
    config_class: Any,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> _Model:
    """Load one of our two networks (`ReducioVAE`, `ReducioDiT`) from its component folder.

    `dtype` None keeps what is stored. Raises ReducioError for a missing or broken file, a configuration that does not
    validate, and weights that do not fit it.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    stated = values.get("_class_name", model_class.__name__)
    if stated != model_class.__name__:
        raise ReducioError(f"{folder / CONFIG}: describes a {stated}, not a {model_class.__name__}")
    try:
        config = config_class.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ReducioError(f"{folder / CONFIG}: {error}") from error
    check_component(folder)
    path = folder / WEIGHTS
    return build(lambda: model_class(config), load_tensors(path, dtype, device), path, device)


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Write `config.json` and the weights of a `ReducioVAE` or `ReducioDiT` into `folder`, in the dtype they have."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"_class_name": type(model).__name__, "_reducio_fast_version": version()}
    write_json(folder / CONFIG, metadata | model.config.to_dict())  # type: ignore[operator, union-attr]
    save_tensors(model.state_dict(), folder / WEIGHTS)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})


def load_foreign(
    library: str,
    class_name: str,
    folder: Path,
    dtype: torch.dtype,
    device: str | torch.device,
    skip: tuple[str, ...] = (),
) -> Any:
    """Load a component of diffusers or transformers by class name; a network strictly, in `dtype`, and frozen.

    Tensors in the files that the network has no place for are an error, unless their names begin with one of `skip`.
    """
    if library.split(".")[0] not in LIBRARIES:
        raise ReducioError(f"{folder}: is of library {library!r}; known are {', '.join(LIBRARIES)}")
    cls = getattr(importlib.import_module(library), class_name, None)
    if not hasattr(cls, "from_pretrained"):
        installed = f"{library} {_installed(library.split('.')[0])}"
        raise ReducioError(f"{folder}: is a {class_name}, which {installed} does not have")
    if not folder.is_dir():
        raise ReducioError(f"{folder}: no such folder")
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        if (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file():
            require("sentencepiece", "google.protobuf", argument=str(folder / "spiece.model"))
        # An Auto class would else ask at the terminal whether it may run code that lies in the folder.
        safe = {"trust_remote_code": False} if class_name.startswith("Auto") else {}
        return _from_pretrained(cls, folder, **safe)
    check_component(folder)
    # diffusers renamed `torch_dtype` to `dtype` and warns about the old word, so its models are cast after loading.
    words: dict[str, Any] = {"dtype": dtype} if library == "transformers" else {}
    words["variant"] = _variant(folder)
    if library.startswith("diffusers") and importlib.util.find_spec("accelerate") is None:
        words["low_cpu_mem_usage"] = False  # what it does then anyway, but not without five lines on stderr
    with quiet_transformers():
        model, info = _from_pretrained(cls, folder, output_loading_info=True, use_safetensors=True, **words)
    misshapen = [str(m[0]) for m in info.get("mismatched_keys", ())]
    unexpected = [name for name in sorted(info["unexpected_keys"]) if not name.startswith(skip)]
    report(folder, sorted(info["missing_keys"]), unexpected, misshapen)
    return cast(model, device, dtype).requires_grad_(False).eval()


def _variant(folder: Path) -> str | None:
    """The variant of a folder that holds weights of one variant alone, such as "fp16" (model.fp16.safetensors)."""
    names = [file.name.split(".") for file in folder.glob("*.safetensors")]
    variants = {name[1].split("-")[0] if len(name) == 3 else None for name in names}
    return variants.pop() if len(variants) == 1 else None


def cast(network: _Model, device: str | torch.device, dtype: torch.dtype) -> _Model:
    """`network.to`, in place, without the line that diffusers' models print at every change of dtype.

    Layers that transformers keeps in float32 when the rest is float16 stay so: T5's `wo`, whose sums leave float16's
    range in the published weights.
    """
    nn.Module.to(network, device=device)
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    for path, module in network.named_modules():
        kind = torch.float32 if kept & set(path.split(".")) else dtype
        module._apply(lambda t, kind=kind: t.to(kind) if t.is_floating_point() else t, recurse=False)
    return network


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bar for each file that transformers reads or writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _installed(library: str) -> str:
    return importlib.metadata.version(library)


def _from_pretrained(cls: Any, folder: Path, **words: Any) -> Any:
    try:
        return cls.from_pretrained(str(folder), local_files_only=True, **words)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ReducioError(f"{folder}: {cls.__name__} could not be loaded: {' '.join(lines[:3])}") from error


def share(path: Path, mode: int) -> None:
    """Make a file, or each file of a folder, as readable and writable as `mode` is: safetensors 0.8 writes 0600."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            file.chmod(mode & 0o666)


@contextmanager
def new_folder(target: Path, mark: str = INDEX) -> Iterator[Path]:
    """Yield an empty folder that takes the name `target` when the block ends well and vanishes when it fails.

    An earlier folder of that name is replaced if it holds the file `mark`, as a model folder does its index; anything
    else that is not empty is left alone (ReducioError).
    """
    if target.exists() and not (target.is_dir() and ((target / mark).is_file() or not any(target.iterdir()))):
        kind = "model" if mark == INDEX else "component"
        raise ReducioError(f"save_directory: {target} exists and is no {kind} folder (it has no {mark})")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ReducioError(f"save_directory: cannot write {target} ({error.strerror})") from error
    try:
        fresh, old = work / "new", work / "old"
        fresh.mkdir()  # within the private one that mkdtemp makes: this one has the permissions of the user's umask
        yield fresh
        share(fresh, fresh.stat().st_mode)
        if target.exists():
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def find_model(model: str | os.PathLike[str], argument: str = "model", files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of a model: itself if it is one, else the local copy of a Hugging Face hub repository `owner/name`.

    `argument` names what was given, `files` are patterns of those to fetch. Raises ReducioError where there is neither;
    with no network, the line says what to download.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    name = str(model)
    parts = name.split("/")
    if path.exists() or len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~") or path.parent.is_dir():
        raise ReducioError(f"{argument}: {name!r} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        # Weights as safetensors and the small files around them; pickles in the same repository stay where they are.
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # every failure of the hub client is one of these, a lost network too
        certain = not any("*" in file or "/" in file for file in files)  # else they may not all be there
        raise not_fetched(argument, name, error, files if certain else ()) from error


def not_fetched(argument: str, name: str, error: Exception, files: Sequence[str] = ()) -> ReducioError:
    """The one line for a hub repository that is not here and cannot be had: it says what to download."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    wanted = " ".join([name, *files])
    return ReducioError(
        f"{argument}: {name!r} is no local folder and could not be fetched from the hub ({reason}); "
        f"where there is a network, run `hf download {wanted} --local-dir DIR`, then pass DIR"
    )


def require(*modules: str, argument: str) -> None:
    """ReducioError naming the distributions of `modules` that are not installed."""
    missing = [module for module in modules if not _importable(module)]
    if missing:
        names = " and ".join(DISTRIBUTIONS[module] for module in missing)
        raise ReducioError(f"{argument}: needs {names}, not installed here (pip install {names.replace(' and', '')})")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # the parent package is missing; a module that was blocked by None
        return False
