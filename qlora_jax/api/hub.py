"""Handing an adapter to the Hugging Face hub."""

import re
from pathlib import Path

from qlora_jax.errors import InputError
from qlora_jax.io import peft
from qlora_jax.io.folder import COMPANIONS
from qlora_jax.io.peft_config import CONFIG, read_config

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def push_folder(adapter: Path, repo: str, private: bool, message: str) -> str:
    """Uploads a PEFT folder's files as the model `repo`, which is made where it is not there; returns its address.

    Nothing else of the folder goes along. Raises InputError for a damaged adapter, or what the hub says against it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not _NAME.fullmatch(repo):
        raise InputError(f"{repo!r} is no name of a repository; expected owner/name")
    read_config(adapter)
    peft.check_weights(adapter)
    files = [CONFIG, peft.WEIGHTS, peft.PROMPTS, *COMPANIONS]
    try:
        hub = HfApi()
        hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=adapter, allow_patterns=files, commit_message=message)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the hub did not take the adapter as {repo}: {reason}; `hf auth login` or HF_TOKEN says who uploads"
        ) from error
    return f"{hub.endpoint}/{repo}"
