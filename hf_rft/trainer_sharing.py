"""The model card of `RobustTrainer`, and how it pushes to the Hub.

The parent uploads its whole output folder: `training_args.bin`, a pickle that holds local paths, and event files
included; it has no time limit, and loses the errors of uploads in the background. So `push_to_hub` and
`_push_from_checkpoint` keep the parent's behaviour, but not its code, and upload with hub.py.
"""

import copy
import functools
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo, ModelCard
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.modelcard import TrainingSummary, make_markdown_table
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from .alarms import recorded_alarms
from .attacks import Attack
from .callbacks import EpsilonScheduleCallback
from .evaluation.provenance import versions
from .evaluation.report import RobustnessReport
from .evaluation.tiers import Tier, attack_name
from .evidence import CARD_NAME, CURVE_NAME, write_evidence
from .files import replacing, write_text
from .hub import NOT_PUSHED, PushError, create_repo, push_folder
from .losses import LOSSES, RobustLoss
from .model_card import Progress, Training, describe_onset, make_card
from .plots import plot_epsilon_schedule
from .threat_model import ThreatModel
from .training_args import RobustTrainingArguments


logger = logging.get_logger(__name__)

SCHEDULE_PLOT_NAME = "epsilon_schedule.png"

# Of a checkpoint, what only resuming needs.
_FOR_RESUMING = ["optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*", "global_step*"]

_OPTIMISATION = [
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "label_smoothing_factor",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
]


class SharingMixin(Trainer):
    """The part of [`RobustTrainer`] that publishes."""

    args: RobustTrainingArguments
    model: PreTrainedModel
    attack: Attack
    robust_loss: RobustLoss
    threat_model: ThreatModel
    eval_tier: Tier
    robustness_report: RobustnessReport | None = None
    _epsilon_callback: EpsilonScheduleCallback | None
    _has_own_schedule: bool
    _eval_prefix: str
    # The command that started the training, for the card; set by recipes.
    command: str | None = None
    # Uploads wait for each other here, and training for none of them.
    _uploads: ThreadPoolExecutor | None = None

    # --- Model card ---

    @functools.wraps(Trainer.create_model_card)
    def create_model_card(self, *args, **kwargs):
        # Says how robust the model is, with robustness.json and its curve beside the weights, and how it was trained.
        # `robustness_report` is left out if it is not about the weights in the output folder.
        if not self.is_world_process_zero():
            return
        summary = TrainingSummary.from_trainer(self, *args, **kwargs)
        if not _is_repo_id(summary.finetuned_from):  # a folder, gone in the meantime, or nothing at all
            summary.finetuned_from = None
        metadata = summary.create_metadata()
        for of_the_last_evaluation in ("model-index", "metrics"):  # numbers without a threat model
            metadata.pop(of_the_last_evaluation, None)
        folder = Path(self.args.output_dir)
        path = folder / CARD_NAME
        report = None
        if self.robustness_report is not None:
            try:
                report = write_evidence(folder, self.robustness_report, name=self.hub_model_id)
            except ValueError as error:
                logger.warning("The model card states no robustness: %s", error)
        history, progress, dataset = self.state.log_history, self._progress(), summary.dataset
        card = make_card(
            ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None,
            name=summary.model_name,
            report=report,
            curve=CURVE_NAME,
            training=Training(
                self._described_arguments(),
                progress,
                best_by=self.args.metric_for_best_model,
                onset=describe_onset(history, self.model.config.num_labels, self._eval_prefix),
                alarms=recorded_alarms(history) if self.state.global_step > 0 else None,
                command=self.command,
                schedule_plot=self._write_schedule_plot(folder, progress),
                history=make_markdown_table(summary.eval_lines),
                versions=versions(),
            ),
            base_model=summary.finetuned_from,
            dataset=dataset if isinstance(dataset, str | None) else ", ".join(dataset),
            metadata=metadata,
        )
        write_text(path, card.content)

    def _described_arguments(self) -> dict[str, Any]:
        """What made the model robust, and the optimisation around it; JSON values."""
        inherited = {field.name for field in fields(TrainingArguments)}
        own = [
            field.name for field in fields(RobustTrainingArguments) if field.name not in inherited | {"hub_timeout"}
        ]
        values = self.args.to_dict()
        # Where a function was passed, the argument says nothing.
        values["attack"] = attack_name(self.attack)
        if self.robust_loss is not LOSSES[self.args.robust_loss]:
            values["robust_loss"] = attack_name(self.robust_loss.function)
        if self._has_own_schedule:
            values |= {"epsilon_schedule_type": "custom", "epsilon_schedule_kwargs": None}
        values["world_size"] = self.args.world_size
        return {name: values[name] for name in [*own, *_OPTIMISATION, "world_size"] if values.get(name) is not None}

    def _progress(self) -> Progress:
        """What was trained, and which weights the model now has."""
        state = self.state
        if state.global_step == 0:
            return Progress()
        has_best = self.args.load_best_model_at_end and state.best_model_checkpoint and not self.is_in_train
        kept_step = cast(int, state.best_global_step) if has_best else state.global_step
        steps = [*self._drawn_steps(), kept_step - 1, state.global_step - 1]
        epsilons = {step: self._epsilon_after(step) for step in steps if step < state.global_step}
        return Progress(
            planned_steps=state.max_steps,
            steps=state.global_step,
            epsilon=max(epsilons.values()),
            kept_step=kept_step,
            kept_epsilon=max(epsilon for step, epsilon in epsilons.items() if step < kept_step),
        )

    def _drawn_steps(self) -> list[int]:
        last = self.state.max_steps
        return sorted({round(share * last / 200) for share in range(201)} | {self.state.global_step})

    def _epsilon_after(self, step: int) -> float:
        """Epsilon of the training step that came, or would have come, after `step` steps."""
        callback, done = self._epsilon_callback, self.state
        if not self.robust_loss.needs_adversarial:
            return 0.0
        if callback is None:
            return float(self.threat_model.epsilon)
        state = replace(
            done,
            global_step=step,
            epoch=round((done.epoch or 0.0) * step / done.global_step, 6),
            log_history=[entry for entry in done.log_history if entry.get("step", 0) <= step],
        )
        return callback.multiplier(state) * float(self.threat_model.epsilon)

    def _write_schedule_plot(self, folder: Path, progress: Progress) -> str | None:
        """Epsilon over the steps that were planned, with those that were trained and the kept one."""
        if progress.steps == 0 or not self.robust_loss.needs_adversarial:
            return None
        steps = self._drawn_steps()
        epsilons = [self._epsilon_after(step) for step in steps]
        with replacing(folder / SCHEDULE_PLOT_NAME) as scratch:
            plot_epsilon_schedule(
                steps,
                epsilons,
                self.threat_model,
                scratch,
                done=(progress.steps, progress.epsilon),
                kept=(progress.kept_step, progress.kept_epsilon),
            )
        return SCHEDULE_PLOT_NAME

    # --- Pushing ---

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if not self.is_world_process_zero():
            return
        self.hub_model_id = create_repo(
            self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            token=token if token is not None else self.args.hub_token,
            private=private if private is not None else self.args.hub_private_repo,
            revision=self.args.hub_revision,
        )
        self.push_in_progress = None

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        # The parent pickles the arguments as they are, with the token.
        public = copy.copy(self.args)
        for field in fields(public):
            if field.name.endswith("token"):
                setattr(public, field.name, None)
        torch.save(public, Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # With `args.push_to_hub` the parent pushes what it saved.
        try:
            super().save_model(output_dir, _internal_call)
        except PushError as error:
            logger.error("The model is saved. %s", error)

    def push_to_hub(
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
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._finish_current_push()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        own_tags = kwargs.pop("tags", None) or []
        tags = [own_tags] if isinstance(own_tags, str) else list(own_tags)
        tags += getattr(self.model, "model_tags", None) or []  # as the parent does
        name = kwargs.pop("model_name", None) or self.hub_model_id.split("/")[-1]
        self.create_model_card(model_name=name, tags=list(dict.fromkeys(tags)), **kwargs)
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
        return push() if blocking else self._in_background(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
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
        upload = self._in_background(functools.partial(self._push_snapshot, snapshot, message, path_in_repo))
        self.push_in_progress = PushInProgress([upload])  # one after the other: all are done when the last is

    def _push_snapshot(self, snapshot: TemporaryDirectory, message: str, path_in_repo: str | None) -> None:
        """The model to the top of the repository, and the whole checkpoint to `path_in_repo`, if that is asked for."""
        args = self.args
        options = {"token": args.hub_token, "revision": args.hub_revision, "timeout": args.hub_timeout}
        push = functools.partial(push_folder, repo_id=self.hub_model_id, progress_bar=False, **options)
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


def _is_repo_id(name: str | None) -> bool:
    try:
        validate_repo_id(name or "")
    except ValueError:
        return False
    return True


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
