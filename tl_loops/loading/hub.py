"""Putting a model on the Hugging Face hub, as its checkpoint directory."""

import tempfile
from typing import Any

from huggingface_hub import HfApi

from tl_loops.errors import CheckpointError, first_line


def push_to_hub(
    self: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Write the model as ``save_pretrained`` does, and upload that as one commit.

    Args:
        self: The looped model.
        repo_id: ``"owner/name"``; the repository is made where it is missing.
        private: Whether a new repository is private; ``None``: the owner's default.
        token: Hub token, as for ``huggingface_hub``; ``None``: the one that is stored.
        revision: The branch that gets the commit; ``None``: the main one.
        commit_message: What the commit says.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: The hub cannot be reached or does not allow it; nothing is left behind.
    """
    with tempfile.TemporaryDirectory() as directory:
        self.save_pretrained(directory)
        api = HfApi(token=token)
        try:
            repository = api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository.repo_id,
                folder_path=directory,
                revision=revision,
                commit_message=commit_message,
            )
        except Exception as error:  # errors of hub, network and arguments have no common base
            raise CheckpointError(
                f"{repo_id!r} could not be uploaded to the Hugging Face hub "
                f"({type(error).__name__}: {first_line(error)}). Give 'owner/name' and a token "
                "that may write there (token=..., or log in with 'hf auth login')"
            ) from error
    return str(commit.commit_url)
