"""How a training run publishes its model: methods of [`RobustTrainer`] that replace those of `Trainer`.

`Trainer` uploads the whole output folder, including `training_args.bin` (a pickle with local paths) and event files,
without a time limit, and loses the errors of background uploads. These methods behave like its own otherwise, but
upload with hub/pushing.py.
"""

import copy
import functools
import json
import os
import shutil
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, run_as_future
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..hub.pushing import NOT_PUSHED, PushError, create_repo, push_folder
from ..utils.files import write_text
from .averaging import TRAINED_NAME


logger = logging.get_logger(__name__)

# Files of a checkpoint that only resuming needs.
_FOR_RESUMING = [TRAINED_NAME, "optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*", "global_step*"]


def save_arguments_without_tokens(args: Any, folder: str | None) -> None:
    """Write training_args.bin again: `Trainer` pickles the arguments with the token."""
    if not args.should_save:
        return
    public = copy.copy(args)
    for field in fields(public):
        if field.name.endswith("token"):
            setattr(public, field.name, None)
    torch.save(public, Path(folder or args.output_dir, TRAINING_ARGS_NAME))


def init_hf_repo(self: Any, token: str | None = None, private: bool | None = None) -> None:
    if not self.is_world_process_zero():
        return
    self.hub_model_id = create_repo(
        self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
        token=token if token is not None else self.args.hub_token,
        private=private if private is not None else self.args.hub_private_repo,
        revision=self.args.hub_revision,
    )
    self.push_in_progress = None


def push_to_hub(
    self: Any,
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **kwargs,
) -> CommitInfo | Future | None:
    """Save the model and its card, and upload the output folder to `self.args.hub_model_id`.

    Checkpoints, `training_args.bin`, `trainer_state.json` and event files, which contain paths and names of this
    machine, are not uploaded.

    Args:
        commit_message, token, revision, private, kwargs:
            As in [`~transformers.Trainer.push_to_hub`]; `kwargs` go to `create_model_card`.
        blocking (`bool`, *optional*, defaults to `True`):
            If False, the upload runs in the background.

    Returns:
        `CommitInfo`, or a `Future` of it if not `blocking`; None on all processes but the first.

    Raises:
        PushError: if the upload failed; it says why, and how to try again.
    """
    self.callback_handler.on_push_begin(self.args, self.state, self.control)
    if self.hub_model_id is None:
        self.init_hf_repo(token=token, private=private)
    self._finish_current_push()
    self.save_model(_internal_call=True)
    if not self.is_world_process_zero():
        return None
    tags = kwargs.pop("tags", None) or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    tags += getattr(self.model, "model_tags", None) or []  # as `Trainer` does
    name = kwargs.pop("model_name", None) or str(self.hub_model_id).split("/")[-1]
    try:
        self.create_model_card(model_name=name, tags=list(dict.fromkeys(tags)), **kwargs)
    except OSError as error:
        raise PushError(
            f"The model is saved in {self.args.output_dir}, but its card could not be written ({error}). "
            "Nothing was pushed; call `push_to_hub` again."
        ) from error
    push = functools.partial(
        push_folder,
        self.args.output_dir,
        self.hub_model_id,
        commit_message=commit_message or "End of training",
        token=token if token is not None else self.args.hub_token,
        revision=revision if revision is not None else self.args.hub_revision,
        timeout=self.args.hub_timeout,
        progress_bar=blocking and not self.args.disable_tqdm,
    )
    return push() if blocking else run_as_future(_logging_failure, push)


def push_from_checkpoint(self: Any, checkpoint_folder: str) -> None:
    if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
        return
    is_pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
    if is_pushing and not self.args.hub_always_push:
        return
    self.callback_handler.on_push_begin(self.args, self.state, self.control)
    message = f"Training in progress, step {self.state.global_step}"
    if self.args.save_strategy != SaveStrategy.STEPS:
        message = f"Training in progress, epoch {int(self.state.epoch or 0)}"
    path_in_repo = {
        HubStrategy.CHECKPOINT: "last-checkpoint",
        HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name,
    }.get(self.args.hub_strategy)
    try:
        snapshot = _snapshot(Path(checkpoint_folder))
    except OSError as error:
        logger.error("%s is not pushed: %s", checkpoint_folder, error)
        return
    push = functools.partial(_push_snapshot, self, snapshot, message, path_in_repo)
    # Uploads run one after the other: when the last is done, all are.
    self.push_in_progress = PushInProgress([run_as_future(_logging_failure, push)])


def _push_snapshot(trainer: Any, snapshot: TemporaryDirectory, message: str, path_in_repo: str | None) -> None:
    """Upload the model to the top of the repository and, unless `path_in_repo` is None, the whole checkpoint there."""
    args = trainer.args
    options = {"token": args.hub_token, "revision": args.hub_revision, "timeout": args.hub_timeout}
    push = functools.partial(push_folder, repo_id=trainer.hub_model_id, progress_bar=False, **options)
    with snapshot as folder:
        push(folder, commit_message=message, ignore_patterns=[*NOT_PUSHED, *_FOR_RESUMING])
        if path_in_repo is not None:
            patterns = [pattern for pattern in NOT_PUSHED if pattern != TRAINER_STATE_NAME]
            message = f"{message}, checkpoint"
            push(folder, path_in_repo=path_in_repo, commit_message=message, ignore_patterns=patterns)


def _snapshot(checkpoint: Path) -> TemporaryDirectory:
    """A copy of the checkpoint that rotation cannot delete during the upload; hard links, so it takes no space."""
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
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target)


def _logging_failure(push):
    """Run a push and log its failure before the future is done; a callback of the future would run after that."""
    try:
        return push()
    except Exception as error:
        logger.error("%s", error)
        raise
