"""What a user may pass: the checks made before any tensor work. Each message names the argument and both values."""

from __future__ import annotations

import inspect
import itertools
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...reference import DiTConfig
from ...system.devices import triton_missing, widened
from ...system.errors import ReducioError, check_word, shown
from ...system.real_numbers import to_float
from .request import Arguments, Embeds

OUTPUT_TYPES = ("np", "pil", "pt", "latent")
BACKENDS = ("reference", "fast", "auto")
MAX_SEED = 2**63 - 1
MAX_SIDE = 16384  # pixels: 16 frames of that square are 13 GB as bytes alone
MAX_VIDEOS = 1000  # of one prompt: a call holds all of its clips in memory


def check_prompts(prompt: Any, negative_prompt: Any, prompt_embeds: Any = None) -> tuple[list[str], list[str], bool]:
    """Prompts and negative prompts ("" for none) as lists of one length, and whether a list was asked for.

    Without a prompt, `prompt_embeds` [L, C] ask for one clip and [N, L, C] for a list of N.
    """
    if prompt is None and isinstance(prompt_embeds, Tensor):
        is_list = prompt_embeds.ndim > 2
        return (*_negatives(negative_prompt, [""] * (len(prompt_embeds) if is_list else 1)), is_list)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ReducioError(f"prompt: must be text or a list of texts, is {_brief(prompt)}")
    for i, text in enumerate(prompts):
        if not text.strip():
            where = "" if isinstance(prompt, str) else f" number {i}"
            raise ReducioError(f"prompt{where}: is empty ({shown(text)}); describe the clip")
    _check_encodable("prompt", prompts)
    return (*_negatives(negative_prompt, prompts), not isinstance(prompt, str))


def _negatives(negative_prompt: Any, prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    negatives = negative_prompt
    if negatives is None or isinstance(negatives, str):
        negatives = [negatives or ""] * len(prompts)
    if not isinstance(negatives, list | tuple) or not all(isinstance(n, str) for n in negatives):
        raise ReducioError(f"negative_prompt: must be text or a list of texts, is {_brief(negative_prompt)}")
    if len(negatives) != len(prompts):
        raise ReducioError(f"negative_prompt: {len(negatives)} texts for {len(prompts)} prompts")
    _check_encodable("negative_prompt", negatives)
    return list(prompts), list(negatives)


def _check_encodable(name: str, texts: Sequence[str]) -> None:
    """Bytes of a command line or file that are not UTF-8 become lone surrogates, which no tokenizer takes."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            wrong = text[error.start]
            raise ReducioError(f"{name}: holds {shown(wrong)}, which is no character; is {_brief(text)}") from None


def check_names(call: Any, arguments: Iterable[str], others: Iterable[str] = (), of: str = "this model's call") -> None:
    """Refuse, by name, arguments that neither the call of a pipeline nor `others` have."""
    parameters = inspect.signature(call).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [name for name in parameters if name != "self"]
    if not takes_any and (unknown := sorted(set(arguments) - {*known, *others})):
        raise ReducioError(f"{unknown[0]}: no argument of {of}; known are {', '.join(known)}")


def check_size(config: Any, height: Any, width: Any) -> None:
    for name, value in (("height", height), ("width", width)):
        check_multiple(name, value, config.spatial_factor)


def check_count(name: str, value: Any, most: int | None = None, least: int = 1) -> int:
    if not is_integer(value) or value < least or (most is not None and value > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ReducioError(f"{name}: must be a whole number {span}, is {shown(value)}")
    return int(value)


def check_callback(callback: Any, names: Any, known: Sequence[str]) -> None:
    if callback is not None and not callable(callback):
        raise ReducioError(f"callback_on_step_end: must be callable, is {_brief(callback)}")
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        raise ReducioError(f"callback_on_step_end_tensor_inputs: must be a list of names, is {_brief(names)}")
    if unknown := [n for n in names if n not in known]:
        raise ReducioError(
            f"callback_on_step_end_tensor_inputs: unknown {', '.join(unknown)}; known are {', '.join(known)}"
        )


def check_multiple(name: str, value: Any, factor: int) -> None:
    if not is_integer(value) or not 1 <= value < 2**63:  # Python prints no number of 4300 digits
        raise ReducioError(f"{name}: must be a positive multiple of {factor}, is {shown(value)}")
    if value % factor:
        below = value // factor * factor
        near = f"{below} and {below + factor}" if below else f"{factor} and {2 * factor}"
        raise ReducioError(f"{name}: {value} is not a multiple of {factor}; the two nearest legal sizes are {near}")
    if value > MAX_SIDE:
        raise ReducioError(f"{name}: {value} is above the largest side, {MAX_SIDE}")


def check_number(name: str, value: Any) -> float:
    """A finite number of at least 0 that float32 can hold, as a float."""
    number = to_float(value)
    if not 0 <= number < math.inf:
        reason = ", which float32 cannot hold" if number == math.inf else ""
        raise ReducioError(f"{name}: must be a finite number of at least 0, is {shown(value)}{reason}")
    return number


def check_sampling(steps: Any, max_steps: int, guidance_scale: Any, output_type: Any) -> float:
    """Check what every family's call has; returns the guidance scale as a float."""
    if not is_integer(steps) or not 1 <= steps <= max_steps:
        raise ReducioError(f"num_inference_steps: must be a whole number from 1 to {max_steps}, is {shown(steps)}")
    scale = check_number("guidance_scale", guidance_scale)
    check_word("output_type", output_type, OUTPUT_TYPES)
    return scale


def check_times(scheduler: Any, timesteps: Tensor) -> None:
    """Refuse a number of steps at which two steps share a time: a multistep scheduler divides by the time between."""
    if len(torch.unique(timesteps)) < len(timesteps):
        raise ReducioError(
            f"num_inference_steps: {len(timesteps)} is too many for this {type(scheduler).__name__}: two of the steps "
            "share a time; ask for fewer"
        )


def check_latents(latents: Any, shape: Sequence[int], count: int, is_list: bool, name: str = "latents") -> list[Tensor]:
    """Latents as one float32 [1, C, T, H, W] per clip. Those of a single clip may come without the clip axis."""
    return [item.float() for item in check_tensor(latents, shape, count, is_list, name)]


def check_tensor(value: Any, shape: Sequence[int | None], count: int, is_list: bool, name: str) -> list[Tensor]:
    """A finite floating-point tensor [count, *shape] as one [1, *shape] per clip; None in `shape` is any length from 1.

    The tensor of a single clip may come without the clip axis.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ReducioError(f"{name}: must be a floating-point tensor, is {_brief(value)}")
    check_values(value, name)
    value = widened(_with_clip_axis(value, shape, count, is_list, name), name)
    if not value.numel():
        raise ReducioError(f"{name}: is empty, of shape {list(value.shape)}")
    if not torch.isfinite(value).all():
        raise ReducioError(f"{name}: holds values that are not finite (NaN or infinite)")
    return list(value.split(1))


def check_values(value: Tensor, name: str) -> None:
    """Raise ReducioError for a tensor without values in memory: on the meta device, or sparse."""
    if value.is_meta or value.layout is not torch.strided:
        raise ReducioError(f"{name}: must hold its values; it is {value.layout} on {value.device}")


def check_text(
    embeds: Any, mask: Any, shape: tuple[int, int], count: int, is_list: bool, negative: bool = False
) -> list[tuple[Tensor, Tensor] | None]:
    """`prompt_embeds` [count, L, C] and `prompt_attention_mask` [count, L] as one pair per clip; None if not given."""
    prefix = "negative_" if negative else ""
    name, mask_name = f"{prefix}prompt_embeds", f"{prefix}prompt_attention_mask"
    if embeds is None:
        if mask is not None:
            raise ReducioError(f"{mask_name}: given without {name}")
        return [None] * count
    texts = check_tensor(embeds, shape, count, is_list, name)
    if not isinstance(mask, Tensor):
        # A missing mask is not taken for all ones: the model would read the padding, and no shape would show it.
        raise ReducioError(f"{mask_name}: must be the tensor that belongs to {name}, is {_brief(mask)}")
    check_values(mask, mask_name)
    masks = widened(_with_clip_axis(mask, shape[:1], count, is_list, mask_name), mask_name).bool().split(1)
    return list(zip(texts, masks, strict=True))


def check_embeds(
    config: DiTConfig, content_size: tuple[int, int], count: int, is_list: bool, arguments: Arguments
) -> list[Embeds]:
    """The conditions that the caller gives instead of having them computed, per clip, in the widths of the DiT."""
    text = (config.caption_length, config.caption_channels)
    none = [None] * count
    embeds, mask = arguments.prompt_embeds, arguments.prompt_attention_mask
    texts = check_text(embeds, mask, text, count, is_list)
    embeds, mask = arguments.negative_prompt_embeds, arguments.negative_prompt_attention_mask
    negatives = check_text(embeds, mask, text, count, is_list, negative=True)
    tokens, size = (None, config.semantic_channels), (config.content_channels, *content_size)
    semantics, contents = (
        none if value is None else check_tensor(value, shape, count, is_list, name)
        for name, value, shape in (
            ("semantic_embeds", arguments.semantic_embeds, tokens),
            ("content_latents", arguments.content_latents, size),
        )
    )
    return [Embeds(*each) for each in zip(texts, negatives, semantics, contents, strict=True)]


def _with_clip_axis(value: Tensor, shape: Sequence[int | None], count: int, is_list: bool, name: str) -> Tensor:
    if not is_list and value.ndim == len(shape):
        value = value[None]
    expected = (count, *shape)
    if value.ndim != len(expected) or any(e not in (None, n) for n, e in zip(value.shape, expected, strict=True)):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ReducioError(f"{name}: has shape {list(value.shape)}, this call needs [{wanted}]")
    return value


def check_generators(count: int, seed: Any, generator: Any) -> list[torch.Generator]:
    """One generator per clip: the caller's, or CPU generators of seed, seed + 1, ...; seed None draws the first."""
    if generator is not None:
        generators = [generator] if isinstance(generator, torch.Generator) else generator
        if not isinstance(generators, list | tuple) or not all(isinstance(g, torch.Generator) for g in generators):
            raise ReducioError(f"generator: must be a torch.Generator or a list of them, is {_brief(generator)}")
        if len(generators) != count:
            raise ReducioError(f"generator: {len(generators)} given for {count} clips; give one a clip")
        return list(generators)
    if seed is None:
        # 32 bits: a reported seed stays easy to type.
        seed = torch.Generator().seed() % 2**32
    if not is_integer(seed) or not 0 <= seed <= MAX_SEED - count:
        raise ReducioError(f"seed: must be a whole number from 0 to {MAX_SEED - count}, is {shown(seed)}")
    return [torch.Generator().manual_seed(int(seed) + i) for i in range(count)]


def resolve_backend(backend: Any) -> tuple[str, str]:
    """The backend that will run, "reference" or "fast", and why. Raises ReducioError for "fast" without Triton."""
    check_word("backend", backend, BACKENDS)
    if backend == "reference":
        return "reference", "asked for"
    missing = triton_missing()
    if missing is None:
        return "fast", "asked for" if backend == "fast" else "the best there is"
    if backend == "fast":
        raise ReducioError(f"backend: 'fast' cannot run here: {missing}; use 'reference' or 'auto'")
    return "reference", missing


def check_compile(compile: Any, backend: str, why: str) -> None:
    """Raises ReducioError for an invalid `compile`, and for True without the fast path."""
    if compile is not None and not isinstance(compile, bool):
        raise ReducioError(f"compile: must be True, False or None, is {shown(compile)}")
    if compile and backend == "reference":
        raise ReducioError(f"compile: True needs the fast path, but backend is reference: {why}")


def check_quantise(word: Any, backend: str, device: torch.device) -> None:
    """Raises ReducioError for a mode that is not known or cannot run on `device`, and without the fast path."""
    chosen, why = resolve_backend(backend)
    if chosen != "fast":
        raise ReducioError(f"quantise: {shown(word)} needs the fast path, but backend is reference: {why}")
    from ...fast.quantisation import eight_bit_type

    try:
        eight_bit_type(word, device)
    except ValueError as error:
        raise ReducioError(f"quantise: {error}") from error


def is_integer(value: Any) -> bool:
    # A time span of NumPy says that it is a whole number.
    return isinstance(value, numbers.Integral) and not isinstance(value, bool | np.timedelta64)


def _brief(value: Any) -> str:
    return f"{type(value).__name__} {shown(value)}"


def check_sigmas(sigmas: Any) -> None:
    """Check a schedule of noise levels: numbers that fall from step to step."""
    is_list = isinstance(sigmas, list | tuple | np.ndarray | Tensor) and getattr(sigmas, "ndim", 1) == 1
    if not is_list or len(sigmas) < 2:
        raise ReducioError(f"sigmas: must be a list of at least two numbers, is {_brief(sigmas)}")
    try:
        values = [float(sigma) for sigma in sigmas]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ReducioError(f"sigmas: must be numbers, are {_brief(sigmas)}") from None
    falls = all(before > after for before, after in itertools.pairwise(values))
    if not falls or values[-1] < 0 or not math.isfinite(to_float(values[0])):
        raise ReducioError(f"sigmas: must fall from step to step, from a finite float32 to 0 or more, are {values}")
