"""Model folders and the Hugging Face hub: find or fetch one, upload one."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ..system.errors import ReducioError, first_line
from ..system.paths import expanded, is_file, is_folder, printable
from .model_card import CARD


def push(save: Callable[[Path], None], repo_id: str, private: bool | None, token: str | None, message: str) -> str:
    """Upload what `save` writes to the hub repository `repo_id`, made if there is none; returns the commit's address.

    A model card that the repository has already stays. Raises ReducioError for whatever the hub refuses.
    """
    from huggingface_hub import HfApi  # a bare GPU machine is without, and never uploads

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / repo_id.rpartition("/")[2]
        save(folder)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            kept = [CARD] if api.file_exists(repo_id, CARD) else None
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=kept
            )
        except (
            OSError,
            ValueError,
        ) as error:  # all that the hub client raises
            reason = first_line(error)
            raise ReducioError(f"repo_id: {repo_id!r} could not be written on the hub ({reason})") from error
    return str(commit.commit_url)


MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # what a folder of the diffusers layout holds


def find_model(model: str | os.PathLike[str], argument: str = "model", files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of a model: itself if it is one, else the local copy of a Hugging Face hub repository `owner/name`.

    `argument` names what was given, `files` are patterns of those to fetch. Raises ReducioError where there is neither;
    with no network, the line says what to download.
    """
    name = str(model)
    path = expanded(name, argument)
    parts = name.split("/")
    may_be_hub_id = len(parts) == 2 and all(re.fullmatch(r"[\w][\w.-]*", part) for part in parts)
    if is_folder(path, argument):
        return path
    if not may_be_hub_id or is_file(path, argument):  # a folder `owner` in the current one hides no repository
        raise ReducioError(f"{argument}: {printable(name)!r} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        # Weights as safetensors and the small files around them; pickles in the same repository stay where they are.
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (
        OSError,
        ValueError,
    ) as error:  # all that the hub client raises
        certain = not any("*" in file or "/" in file for file in files)  # else they may not all be there
        raise not_fetched(argument, name, error, files if certain else ()) from error


def not_fetched(argument: str, name: str, error: Exception, files: Sequence[str] = ()) -> ReducioError:
    """The error, in one line, for a hub repository that is neither here nor reachable; it says what to download."""
    reason = first_line(error)
    wanted = " ".join([name, *files])
    return ReducioError(
        f"{argument}: {name!r} is no local folder and could not be fetched from the hub ({reason}); "
        f"where there is a network, run `hf download {wanted} --local-dir DIR`, then pass DIR"
    )
