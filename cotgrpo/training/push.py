"""Upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from cotgrpo.config import ConfigError
from cotgrpo.distributed.processes import on_process_0
from cotgrpo.models.huggingface.family import ModelError
from cotgrpo.terminal import say

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_access(name: str) -> None:
    """Check the name of a model on the hub, and that a token is there and valid.

    Raises:
        ConfigError: the name is not `owner/name`.
        ModelError: no token, a token that the hub refuses, or the hub cannot be reached.
    """
    if not REPOSITORY.fullmatch(name) or len(name) > 96:
        raise ConfigError(f"--push: expected OWNER/NAME of a model on the Hugging Face Hub, got {name!r}.")

    def ask() -> None:
        from huggingface_hub import HfApi

        with explain_hub_errors(name):
            HfApi().whoami()

    on_process_0(ask)


def push_folder(folder: Path, name: str, console: Console, *, private: bool = True) -> None:
    """Upload a model folder in one commit. It may be repeated: files that are there already are not sent again.

    Args:
        folder: what `export` wrote.
        name: `owner/name`. The model is made if it does not exist.
        console: where the address is printed.
        private: whether a new model is private. One that exists stays as it is.

    Raises:
        ModelError: the folder is not a model's, or the hub refuses it or cannot be reached.
    """
    if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ModelError(f"{folder} has no config.json or adapter_config.json: expected a folder that export wrote.")

    def upload() -> str:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        if not console.is_terminal:
            disable_progress_bars()
        again = f"{folder} is whole: repeat with `cotgrpo export --out {folder} --push {name}`."
        with explain_hub_errors(name, again):
            api = HfApi()
            api.create_repo(name, private=private, exist_ok=True)
            message = f"cotgrpo export of {folder.resolve().name}"
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message).commit_url)

    say(console, f"{folder} uploaded to {name}: {on_process_0(upload)}")


@contextlib.contextmanager
def explain_hub_errors(name: str, again: str = "") -> Iterator[None]:
    """Turn an error of the hub's client into a ModelError of one line."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    def line(error: BaseException) -> str:
        cause = f": {error.__cause__}" if error.__cause__ is not None else ""
        return " ".join(f"{error}{cause}".split())[:300]

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ModelError(
            f"--push {name}: no token of the Hugging Face Hub. Run `hf auth login`, or set HF_TOKEN to a token with "
            "write access."
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ModelError(
                f"--push {name}: the hub refuses the token (HTTP {status}): it is invalid, or may not write there. "
                f"Run `hf auth login` with a token that has write access. {again}".rstrip()
            ) from error
        raise ModelError(f"--push {name}: the hub answered: {line(error)}. {again}".rstrip()) from error
    except Exception as error:  # the client raises whatever its HTTP library does
        raise ModelError(
            f"--push {name}: the hub cannot be reached, or the upload broke off ({type(error).__name__}: "
            f"{line(error)}). {again}".rstrip()
        ) from error
