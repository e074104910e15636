"""Model folders and the Hugging Face hub: find or fetch one, upload one."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ..system.errors import ReducioError, first_line
from ..system.paths import expanded, is_file, is_folder, printable, status
from .model_card import CARD


def push(save: Callable[[Path], None], repo_id: str, private: bool | None, token: str | None, message: str) -> str:
    """Upload what `save` writes to the hub repository `repo_id`, created if there is none; returns the commit's URL.

    An existing model card in the repository stays. Raises ReducioError if the hub refuses a request.
    """
    from huggingface_hub import HfApi  # a bare GPU machine does not have it, and never uploads

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / repo_id.rpartition("/")[2]
        save(folder)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            ignored = [CARD] if api.file_exists(repo_id, CARD) else None
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=ignored
            )
        except Exception as error:  # the client's errors, and those of its HTTP library, have no class in common
            reason = first_line(error)
            raise ReducioError(f"repo_id: {repo_id!r} could not be written on the hub ({reason})") from error
    return str(commit.commit_url)


MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # what a folder of the diffusers layout holds


def find_model(
    model: str | os.PathLike[str],
    argument: str = "model",
    files: Sequence[str] = MODEL_FILES,
    ignored: Sequence[str] = (),
) -> Path:
    """The folder `model`, or the local copy of the Hugging Face hub repository `model`, given as `owner/name`.

    `argument` is the argument's name in errors; `files` are patterns of the files to fetch, `ignored` of those to skip.
    Raises ReducioError if there is neither; without a network, the message says what to download.
    """
    name = str(model)
    path = expanded(name, argument)
    parts = name.split("/")
    may_be_hub_id = len(parts) == 2 and all(re.fullmatch(r"[\w][\w.-]*", part) for part in parts)
    if is_folder(path, argument):
        return path
    if not may_be_hub_id or is_file(path, argument):  # a folder `owner` in the current folder hides no repository
        raise ReducioError(f"{argument}: {printable(name)!r} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        # Weights as safetensors and the small files around them; pickles in the same repository stay where they are.
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=list(ignored)))
    except Exception as error:  # as in `push`
        certain = not any("*" in file or "/" in file for file in files)  # else they may not all be there
        raise not_fetched(argument, name, error, files if certain else ()) from error


def lasting_name(model: str | os.PathLike[str]) -> str:
    """The hub id of a model, or its absolute path: what a later command in another folder can name it by."""
    path = expanded(model, "model")
    if match := re.search(r"[/\\]models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]", str(path)):  # the hub's own cache
        return f"{match[1]}/{match[2]}"
    return str(model) if status(path, "model") is None else str(path.absolute())


RELEASE = "microsoft/Reducio-VAE"
RELEASE_FILE = "reducio-ft4-fs32-attn23.ckpt"
WEIGHT_SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".safetensors")
COMPONENT_FILES = ("model_index.json", "config.json", "diffusion_pytorch_model*")


def find_weights(source: str | os.PathLike[str], component: str | None = None, argument: str = "source") -> Path:
    """The file or folder of weights `source`, or its local copy from the hub: `owner/name` is a component or a whole
    diffusers folder, `owner/name/FILE` is one file. Raises ReducioError if there is neither."""
    name, path = str(source), expanded(source, argument)
    if status(path, argument) is not None:
        return path
    parts = name.split("/")
    if name == RELEASE:
        return fetch_file(RELEASE, RELEASE_FILE, argument)
    if len(parts) > 2 and path.suffix in WEIGHT_SUFFIXES and not path.is_absolute() and not name.startswith((".", "~")):
        return fetch_file("/".join(parts[:2]), "/".join(parts[2:]), argument)
    if len(parts) != 2 or path.suffix in WEIGHT_SUFFIXES or path.is_absolute():
        raise ReducioError(f"{printable(path)}: no such file or folder, and no hub id (owner/name or owner/name/FILE)")
    part = "vae" if component == "content_encoder" else component
    folders = ("transformer", "vae") if part is None else (part,)
    return find_model(source, argument, (*COMPONENT_FILES, *(f"{folder}/*" for folder in folders)))


def fetch_file(repository: str, file: str, argument: str) -> Path:
    """One file of a hub repository, in the hub's cache. Raises ReducioError that says what to download."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # as in `push`
        raise not_fetched(argument, repository, error, one_file=file) from error


def not_fetched(
    argument: str, name: str, error: Exception, files: Sequence[str] = (), one_file: str | None = None
) -> ReducioError:
    """The error, in one line, for a hub repository, or one file of it, that is neither here nor reachable; it says what
    to download."""
    reason = first_line(error)
    what, wanted, place = "is no local folder and could", " ".join([name, *files]), "DIR"
    if one_file is not None:
        what, wanted, place = "could", f"{name} {one_file}", f"DIR/{one_file}"
    if type(error).__name__ == "GatedRepoError" or "gated" in str(error).lower():
        return ReducioError(
            f"{argument}: {name!r} is gated ({reason}); accept its licence on https://huggingface.co/{name}, then run "
            "`hf auth login`"
        )
    return ReducioError(
        f"{argument}: {name!r} {what} not be fetched from the hub ({reason}); "
        f"where there is a network, run `hf download {wanted} --local-dir DIR`, then pass {place}"
    )
