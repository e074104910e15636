"""Networks from strict files: our own, and those of diffusers and transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..reference import ReducioDiT, ReducioVAE
from ..reference.reducio.image_vae import ImageVAE
from ..reference.reducio.pixart import PixArt
from ..reference.reducio.preview import PreviewDecoder
from ..reference.reducio.text_encoder import T5Encoder
from ..reference.svd.unet import VideoUNet
from ..reference.svd.vae import FrameVAE, TemporalVAE
from ..system.errors import ReducioError, first_line, is_out_of_memory
from ..system.paths import is_file, is_folder
from . import published_names
from .strict_files import (
    CONFIG,
    WEIGHTS,
    check_component,
    check_fit,
    check_model_folder,
    load_tensors,
    read_json,
    report,
    save_tensors,
    version,
    weight_files,
    write_json,
)

_Model = TypeVar("_Model", bound=nn.Module)


LIBRARIES = ("diffusers", "transformers")  # a folder may name their classes besides our own and open_clip's tower
DISTRIBUTIONS = {  # by module, for modules that not every machine has
    "bs4": "beautifulsoup4",
    "ftfy": "ftfy",
    "google.protobuf": "protobuf",
    "sentencepiece": "sentencepiece",
}


# Our networks, by the library and class that a model folder names for each. SVD's folders are diffusers' own.
PUBLISHED: dict[type[nn.Module], tuple[str, str]] = {
    ReducioVAE: ("reducio_fast", "ReducioVAE"),
    ReducioDiT: ("reducio_fast", "ReducioDiT"),
    PreviewDecoder: ("reducio_fast", "PreviewDecoder"),
    VideoUNet: ("diffusers", "UNetSpatioTemporalConditionModel"),
    TemporalVAE: ("diffusers", "AutoencoderKLTemporalDecoder"),
    FrameVAE: ("diffusers", "AutoencoderKL"),
    PixArt: ("diffusers", "PixArtTransformer2DModel"),
    ImageVAE: ("diffusers", "AutoencoderKL"),
    T5Encoder: ("transformers", "T5EncoderModel"),
}


def is_ours(component: object) -> TypeGuard[nn.Module]:
    return isinstance(component, tuple(PUBLISHED))


def published_class(network_class: type[nn.Module]) -> tuple[str, str]:
    """Library and class of a network of ours; of a subclass, those of its base."""
    return next((PUBLISHED[base] for base in network_class.__mro__ if base in PUBLISHED), ("", network_class.__name__))


def pipeline_networks(pipeline: Any) -> list[nn.Module]:
    """The torch modules of a diffusers pipeline."""
    return [c for c in pipeline.components.values() if isinstance(c, nn.Module)]


def assign(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Make `tensors` the weights of `module`, all or nothing. `where` names their file in the report."""
    check_fit(where, module.state_dict(), tensors)
    module.load_state_dict(tensors, strict=True, assign=True)


class _NoRandomInit(TorchFunctionMode):
    """Leave fresh weights zero. Filling a billion numbers that a file replaces takes longer than loading them.

    Unlike construction on the meta device this keeps the buffers that no file holds (masks, tables) real.
    """

    # A mode intercepts the functions of nn.init that dispatch to it, and the tensor methods that the others call.
    FILLS = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, torch.Tensor.uniform_, torch.Tensor.normal_)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.FILLS:
            # Zero, not what the memory held: `trunc_normal_` draws again until every value lies in its range.
            return nn.init.zeros_(args[0] if args else (kwargs or {})["tensor"])
        return func(*args, **(kwargs or {}))


def skeleton(make: Callable[[], _Model], argument: str) -> _Model:
    """Build a network without memory for its weights. Raises ReducioError if `make`, which reads `argument`, fails."""
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:  # the errors of diffusers and transformers have no class in common
        reason = f"unknown {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ReducioError(f"{argument}: {reason}") from error


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
    variant: str | None = None,
    weights: Path | None = None,
) -> _Model:
    """Load one of our networks (see PUBLISHED) from its component folder.

    `dtype` None keeps the stored dtype. `variant`: the variant of the weight files, such as "fp16"; None takes the
    plain files. `weights`: a file that is read instead of them.
    Raises ReducioError for a missing or broken file, a configuration that does not validate, and weights that do not
    fit it.
    """
    folder = Path(folder)
    if not is_folder(folder):
        check_model_folder(folder.parent)
    published = published_class(model_class)[1]
    stated = read_json(folder / CONFIG).get("_class_name", published)
    if stated != published:
        raise ReducioError(f"{folder / CONFIG}: describes a {stated}, not a {published}")
    config = read_config(config_class, folder)
    if weights is None:
        check_component(folder, variant)
    files = weight_files(folder, variant) if weights is None else [weights]
    if not files:
        what = "several safetensors files and no index of shards" if variant is None else f"no {variant} weights"
        raise ReducioError(f"{folder}: holds {what}; call one {WEIGHTS}")
    stored = (pair for file in files for pair in load_tensors(file, dtype, device).items())
    tensors = {published_names.current_name(name): tensor for name, tensor in stored}
    where = files[0] if len(files) == 1 else folder

    def make() -> _Model:
        try:
            return model_class(config)
        except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise ReducioError(f"{folder / CONFIG}: {first_line(error)}") from error

    return build(make, tensors, where, device)


def read_config(config_class: Any, folder: Path) -> Any:
    """The validated configuration of one of our networks, from its component folder. Raises ReducioError."""
    try:
        return config_class.from_dict(read_json(folder / CONFIG))
    except (TypeError, ValueError) as error:
        if isinstance(error, ReducioError):
            raise
        raise ReducioError(f"{folder / CONFIG}: {error}") from error


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Write `config.json` and the weights of one of our networks into `folder`, in the dtype they have."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"_class_name": published_class(type(model))[1], "_reducio_fast_version": version()}
    write_json(folder / CONFIG, metadata | model.config.to_dict())  # type: ignore[operator, union-attr]
    save_tensors(model.state_dict(), folder / WEIGHTS)


def load_foreign(
    library: str,
    class_name: str,
    folder: Path,
    dtype: torch.dtype,
    device: str | torch.device,
    skip: tuple[str, ...] = (),
    variant: str | None = None,
) -> Any:
    """Load a component of diffusers or transformers by class name; a network strictly, in `dtype`, and frozen.

    Tensors in the files that the network has no place for are an error, unless their names begin with one of `skip`.
    """
    if library.split(".")[0] not in LIBRARIES:
        raise ReducioError(f"{folder}: is of library {library!r}; known are {', '.join(LIBRARIES)}")
    try:
        cls = getattr(importlib.import_module(library), class_name, None)
    except (ImportError, RuntimeError) as error:  # RuntimeError: transformers imports a class when it is first read
        raise ReducioError(f"{folder}: {library}.{class_name} cannot be imported ({first_line(error)})") from error
    if not hasattr(cls, "from_pretrained"):
        installed = f"{library} {_installed(library.split('.')[0])}"
        raise ReducioError(f"{folder}: is a {class_name}, which {installed} does not have")
    if not is_folder(folder):
        raise ReducioError(f"{folder}: no such folder")
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        if is_file(folder / "spiece.model") and not is_file(folder / "tokenizer.json"):
            require("sentencepiece", "google.protobuf", argument=str(folder / "spiece.model"))
        # Without this an Auto class asks at the terminal whether it may run code that lies in the folder.
        safe = {"trust_remote_code": False} if class_name.startswith("Auto") else {}
        return _from_pretrained(cls, folder, **safe)
    check_component(folder, variant)
    # diffusers renamed `torch_dtype` to `dtype` and warns about the old name, so its models are cast after loading.
    kwargs: dict[str, Any] = {"dtype": dtype} if library == "transformers" else {}
    kwargs["variant"] = _variant(folder) if variant is None else variant
    if library.startswith("diffusers") and importlib.util.find_spec("accelerate") is None:
        kwargs["low_cpu_mem_usage"] = False  # as diffusers does without accelerate, after five lines on stderr
    with quiet_transformers():
        model, info = _from_pretrained(cls, folder, output_loading_info=True, use_safetensors=True, **kwargs)
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
        module_dtype = torch.float32 if kept & set(path.split(".")) else dtype
        module._apply(lambda t, dtype=module_dtype: t.to(dtype) if t.is_floating_point() else t, recurse=False)
    return network


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers shows no progress bar for each file."""
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


def _from_pretrained(cls: Any, folder: Path, **kwargs: Any) -> Any:
    try:
        return cls.from_pretrained(str(folder), local_files_only=True, **kwargs)
    except Exception as error:  # as in `skeleton`
        if is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ReducioError(f"{folder}: {cls.__name__} could not be loaded: {' '.join(lines[:3])}") from error


def require(*modules: str, argument: str) -> None:
    """Raise ReducioError, naming the distributions to install, if any of `modules` is missing."""
    missing = [module for module in modules if not _importable(module)]
    if missing:
        names = " and ".join(DISTRIBUTIONS[module] for module in missing)
        raise ReducioError(f"{argument}: needs {names}, not installed here (pip install {names.replace(' and', '')})")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # the parent package is missing; a module that was blocked by None
        return False
