"""How a training run publishes its model; the trainer has a [`Publisher`].

The parent uploads its whole output folder: `training_args.bin`, a pickle that holds local paths, and event files
included; it has no time limit, and loses the errors of uploads in the background. So pushing keeps the parent's
behaviour, but not its code, and uploads with hub/pushing.py.
"""

import contextlib
import copy
import functools
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..hub.pushing import NOT_PUSHED, PushError, create_repo, push_folder
from ..utils.files import write_text


logger = logging.get_logger(__name__)

# Of a checkpoint, what only resuming needs.
_FOR_RESUMING = ["optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*", "global_step*"]


def save_arguments_without_tokens(args: Any, folder: str | None) -> None:
    """Write training_args.bin once more: the parent pickles the arguments as they are, with the token."""
    if not args.should_save:
        return
    public = copy.copy(args)
    for field in fields(public):
        if field.name.endswith("token"):
            setattr(public, field.name, None)
    torch.save(public, Path(folder or args.output_dir, TRAINING_ARGS_NAME))


@contextlib.contextmanager
def logged_push_errors(before: str) -> Iterator[None]:
    """Log a push that fails, for it must not stop what goes on; `before` begins the message."""
    try:
        yield
    except PushError as error:
        logger.error("%s %s", before, error)


class Publisher:
    """Pushes the model of a [`RobustTrainer`] to the Hub.

    Args:
        trainer ([`RobustTrainer`]):
            Whose output folder and checkpoints are published.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        # Uploads wait for each other here, and training for none of them.
        self._uploads: ThreadPoolExecutor | None = None

    def create_repo(self, token: str | None = None, private: bool | None = None) -> None:
        trainer = self._trainer
        if not trainer.is_world_process_zero():
            return
        trainer.hub_model_id = create_repo(
            trainer.args.hub_model_id or Path(trainer.args.output_dir).absolute().name,
            token=token if token is not None else trainer.args.hub_token,
            private=private if private is not None else trainer.args.hub_private_repo,
            revision=trainer.args.hub_revision,
        )
        trainer.push_in_progress = None

    def push(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        """Save the model and its card, and upload the output folder to `self.args.hub_model_id`.

        Left out are checkpoints, `training_args.bin`, `trainer_state.json` and event files, which hold paths and names
        of this machine.

        Args:
            commit_message, token, revision, private, kwargs:
                As in [`~transformers.Trainer.push_to_hub`]; `kwargs` go to `create_model_card`.
            blocking (`bool`, *optional*, defaults to `True`):
                If False, the upload goes on in the background.

        Returns:
            `CommitInfo`, or a `Future` of it if not `blocking`; None on other processes than the first.

        Raises:
            PushError: if the upload failed; it says why, and how to try again.
        """
        trainer = self._trainer
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
        if trainer.hub_model_id is None:
            trainer.init_hf_repo(token=token, private=private)
        trainer._finish_current_push()
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return None
        own_tags = kwargs.pop("tags", None) or []
        tags = [own_tags] if isinstance(own_tags, str) else list(own_tags)
        tags += getattr(trainer.model, "model_tags", None) or []  # as the parent does
        name = kwargs.pop("model_name", None) or str(trainer.hub_model_id).split("/")[-1]
        try:
            trainer.create_model_card(model_name=name, tags=list(dict.fromkeys(tags)), **kwargs)
        except OSError as error:
            raise PushError(
                f"The model is saved in {trainer.args.output_dir}, but its card could not be written ({error}). "
                "Nothing was pushed; call `push_to_hub` again."
            ) from error
        push = functools.partial(
            push_folder,
            trainer.args.output_dir,
            trainer.hub_model_id,
            commit_message=commit_message or "End of training",
            token=token if token is not None else trainer.args.hub_token,
            revision=revision if revision is not None else trainer.args.hub_revision,
            timeout=trainer.args.hub_timeout,
            progress_bar=blocking and not trainer.args.disable_tqdm,
        )
        return push() if blocking else self._in_background(push)

    def push_checkpoint(self, checkpoint_folder: str) -> None:
        trainer = self._trainer
        if not trainer.is_world_process_zero() or trainer.args.hub_strategy == HubStrategy.END:
            return
        unfinished = trainer.push_in_progress is not None and not trainer.push_in_progress.is_done()
        if unfinished and not trainer.args.hub_always_push:
            return
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
        message = f"Training in progress, step {trainer.state.global_step}"
        if trainer.args.save_strategy != SaveStrategy.STEPS:
            message = f"Training in progress, epoch {int(trainer.state.epoch or 0)}"
        path_in_repo = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name,
        }.get(trainer.args.hub_strategy)
        try:
            snapshot = _snapshot(Path(checkpoint_folder))
        except OSError as error:
            logger.error("%s is not pushed: %s", checkpoint_folder, error)
            return
        upload = self._in_background(functools.partial(self._push_snapshot, snapshot, message, path_in_repo))
        trainer.push_in_progress = PushInProgress([upload])  # one after the other: all are done when the last is

    def _push_snapshot(self, snapshot: TemporaryDirectory, message: str, path_in_repo: str | None) -> None:
        """The model to the top of the repository, and the whole checkpoint to `path_in_repo`, if that is asked for."""
        trainer = self._trainer
        args = trainer.args
        options = {"token": args.hub_token, "revision": args.hub_revision, "timeout": args.hub_timeout}
        push = functools.partial(push_folder, repo_id=trainer.hub_model_id, progress_bar=False, **options)
        with snapshot as folder:
            push(folder, commit_message=message, ignore_patterns=[*NOT_PUSHED, *_FOR_RESUMING])
            if path_in_repo is not None:
                patterns = [pattern for pattern in NOT_PUSHED if pattern != TRAINER_STATE_NAME]
                message = f"{message}, checkpoint"
                push(folder, path_in_repo=path_in_repo, commit_message=message, ignore_patterns=patterns)

    def _in_background(self, push) -> Future:
        if self._uploads is None:
            self._uploads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf_rft-push")
        return self._uploads.submit(_logging_failure, push)


def _snapshot(checkpoint: Path) -> TemporaryDirectory:
    """A copy beside the checkpoint that rotation does not delete during the upload; of links, so it takes no space."""
    snapshot = TemporaryDirectory(prefix="_push-", dir=checkpoint.parent, ignore_cleanup_errors=True)
    shutil.copytree(checkpoint, snapshot.name, copy_function=_link_or_copy, dirs_exist_ok=True)
    state_path = Path(snapshot.name, TRAINER_STATE_NAME)
    state = json.loads(state_path.read_text(encoding="utf-8"))
    if state.get("best_model_checkpoint"):  # a path on this machine
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
    write_text(state_path, json.dumps(state, indent=2) + "\n")
    return snapshot


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _logging_failure(push):
    """Run a push; whoever waits for it to end finds its failure logged (a callback of the future would come later)."""
    try:
        return push()
    except Exception as error:
        logger.error("%s", error)
        raise
