"""Uploading an export to the Hugging Face hub."""

from pathlib import Path

from trainer.extras import needs


def check_push(name: str) -> None:
    """Check, before hours of work, that a folder can be pushed.

    Raises:
        ValueError: huggingface_hub is not installed, the name is none, or there is no token.
    """
    hub = needs("--push", "hub", "huggingface_hub", "huggingface_hub.utils")
    try:
        hub.utils.validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"--push {name!r} is no ORG/NAME of the Hugging Face hub: {error}") from error
    if "/" not in name:
        raise ValueError(f"--push {name} names no owner: expected ORG/NAME, or USER/NAME")
    if hub.get_token() is None:
        raise ValueError(
            "--push needs a token of huggingface.co that may write: log in by `hf auth login`, or set HF_TOKEN"
        )


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a folder as the model `name` and return its address; the model is made if there is none.

    Raises:
        ValueError: it cannot be uploaded; says why, and how to try again.
    """
    hub = needs("--push", "hub", "huggingface_hub")
    try:
        api = hub.HfApi()
        address = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload an export of vaegan-trainer")
    except Exception as error:  # its versions' HTTP libraries raise errors of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--push {name}: {reason.rstrip('.')}. {folder} is complete: try again with `hf upload {name} {folder}`"
        ) from error
    return str(address)
