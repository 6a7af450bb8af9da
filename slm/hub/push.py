"""Upload of an export to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from slm.config import ConfigError

# Of an earlier export, what must not stay beside another one: shards, modules of code, results.
STALE = ["model*.safetensors", "model.safetensors.index.json", "slm_*.py", "evaluation.json"]


def is_repository(name: str) -> bool:
    """Whether the Hub takes it for 'user/name'."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def contents(folder: Path) -> dict[str, int]:
    """Name and size in bytes of each file that `push` uploads."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload the files of `folder` to the model repository 'user/name', made if it is not there.

    Broken off, it can be run again: what the Hub has got already is not sent again. The token is
    the one that `hf auth login` stored or HF_TOKEN holds. Returns the address of the commit. Raises
    ConfigError, in one line, if the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # httpx's, or that of its successor: whichever huggingface_hub is built on.
    transport_error: type[BaseException] = HfHubHTTPError.__bases__[0]
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Export by slm-frontier",
            delete_patterns=STALE,
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = " (log in with `hf auth login`)" if status in (401, 403) else ""
        reason = error.server_message or str(error).splitlines()[0]
        raise ConfigError([f"push_to: {api.endpoint} refuses: {status}: {reason}{hint}"]) from None
    except (transport_error, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError([f"push_to: {api.endpoint} cannot be reached: {reason}"]) from None
    return commit.commit_url
