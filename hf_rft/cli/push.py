"""Publish a robust model with its evidence: weights, report and a card that states what was measured.

    hf-rft evaluate --model_name_or_path my_model --tier standard --output_dir outputs/robustness
    hf-rft push --model_dir my_model --report outputs/robustness/robustness.json \\
        --repo_id my-name/my-robust-model
    hf-rft push --model_dir outputs/efficientnet_lite0_hinge --repo_id my-name/again

`--model_dir` is any folder that `AutoModelForImageClassification` loads, trained here or elsewhere. Its README.md
keeps its text; the results are added, and robustness.json and robustness_curve.png are written beside the weights.
Without --repo_id that is all: nothing is pushed. A folder that has its evidence already needs no --report. The report
must be about the very weights in the folder.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from ..hub.evidence import REPORT_NAME, attach_report, read_report
from ..hub.loading import load_robust_model
from ..hub.pushing import PushError, push_folder
from ..utils.values import SECONDS, check_ranges
from .exits import exit_with
from .parsing import parse_with_config


@dataclass
class PushArguments:
    """Which model, which report, and where to."""

    model_dir: str = field(metadata={"help": "Folder with the model and its processor."})
    report: str | None = field(
        default=None, metadata={"help": "robustness.json of hf-rft evaluate. Default: the one in --model_dir."}
    )
    repo_id: str | None = field(
        default=None,
        metadata={"help": "Where to push, name or namespace/name. Default: nowhere, write the card only."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch; made if it is not there."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    token: str | None = field(default=None, metadata={"help": "Hub token with write access."})
    license: str | None = field(default=None, metadata={"help": "Licence of the model, for a card without one."})
    base_model: str | None = field(default=None, metadata={"help": "Hub id of the model it was fine-tuned from."})
    commit_message: str = field(default="Robust model with its evidence", metadata={"help": "Of the commit."})
    timeout: float | None = field(
        default=None, metadata={"help": "Seconds the upload may take. Default: 5 minutes plus the time at 250 kB/s."}
    )

    def __post_init__(self):
        if not os.path.isdir(self.model_dir):
            raise ValueError(f"--model_dir {self.model_dir} is not a folder.")
        if self.report is not None and not os.path.isfile(self.report):
            raise ValueError(f"--report {self.report} is not a file; hf-rft evaluate writes robustness.json.")
        check_ranges(self, {"timeout": SECONDS}, is_flag=True)
        if self.repo_id is not None:
            try:
                validate_repo_id(self.repo_id)
            except ValueError as error:
                raise ValueError(f"--repo_id {self.repo_id!r} is not the name of a repository: {error}") from error


def main(arguments: list[str] | None = None) -> None:
    (args,) = parse_with_config((PushArguments,), arguments, description=__doc__)
    folder = Path(args.model_dir)
    try:
        report = read_report(args.report or folder / REPORT_NAME)
        report = attach_report(folder, report, name=args.repo_id, license=args.license, base_model=args.base_model)
        load_robust_model(folder)  # what is pushed can be loaded
    except ValueError as error:
        exit_with(f"--model_dir {args.model_dir}: {error}")
    print(f"{report.table()}\n\nWritten to {folder}")
    if args.repo_id is None:
        return
    try:
        commit = push_folder(
            folder,
            args.repo_id,
            revision=args.revision,
            private=args.private or None,
            token=args.token,
            commit_message=args.commit_message,
            timeout=args.timeout,
        )
    except (PushError, ValueError) as error:
        sys.exit(f"error: {error}\nOr run this command again.")
    print(f"Pushed: {commit.commit_url}")
