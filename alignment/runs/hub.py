"""Upload of the trained model to the hub as TRL does it, of `final/` alone: no preferences, metrics or checkpoints.

Who uploads is known before anything is spent (`check_login`), the repository is there before the first step (`claim`),
and the upload comes last, when the run is on disk and complete (`push`). The token is the business of huggingface_hub:
it is in no recipe, argument or file of the run. Where the hub is: `HF_ENDPOINT`, as everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError

from alignment.errors import UserError

LOGIN = "log in with `hf auth login` (or set HF_TOKEN)"


@contextlib.contextmanager
def _said_in_one_line(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, HFValidationError, OSError, ValueError, RuntimeError) as error:  # the last two: of an upload
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"training.push_to_hub: {what} ({reason}); {remedy}") from error


def check_login() -> None:
    """Ask the hub who we are.

    Raises:
        UserError: it does not know us, or does not answer.
    """
    with _said_in_one_line("the hub does not let us in", f"{LOGIN}, or set training.push_to_hub=false"):
        HfApi().whoami()


def claim(trainer: Any) -> None:
    """Create the repository (and branch) unless they are there, as TRL does when a trainer is built, and see that we
    may write: a repository of others that we may read would pass for ours until the upload.

    Raises:
        UserError: the name is not one, or not ours.
    """
    remedy = f"check training.hub_model_id and the token's write permission: {LOGIN}"
    with _said_in_one_line("the repository cannot be made ready", remedy):
        trainer.init_hf_repo()
        HfApi().auth_check(trainer.hub_model_id, write=True)
        if trainer.args.hub_revision is not None:
            HfApi().create_branch(trainer.hub_model_id, branch=trainer.args.hub_revision, exist_ok=True)


def push(trainer: Any, final: Path) -> str:
    """Upload `final`, by transformers' `push_to_hub` with our model card; returns the repository's name.

    Raises:
        UserError: the upload failed. What is on disk stays as it is.
    """
    name = str(trainer.hub_model_id)
    trainer.args.output_dir = str(final)  # what transformers uploads
    trainer.save_model = _saved_already
    remedy = f"the trained model is safe in {final}: {LOGIN}, then `hf upload {name} {final}`"
    with _said_in_one_line("the upload failed", remedy):
        trainer.push_to_hub()
    return name


def _saved_already(output_dir: str | None = None, _internal_call: bool = False) -> None:
    """`final/` is complete; transformers would write it a second time, visibly half-done, and TRL's `ref` with it."""
