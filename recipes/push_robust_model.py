"""Publish a robust model with its evidence: weights, report and a card that states what was measured.

    python recipes/evaluate_robustness.py --model_name_or_path my_model --tier standard --output_dir outputs/robustness
    python recipes/push_robust_model.py --model_dir my_model --report outputs/robustness/robustness.json \\
        --repo_id my-name/my-robust-model
    python recipes/push_robust_model.py --model_dir outputs/efficientnet_lite0_hinge --repo_id my-name/again

`--model_dir` is any folder that `AutoModelForImageClassification` loads, trained here or elsewhere. Its README.md
keeps its text; the results are added, and robustness.json and robustness_curve.png are written beside the weights.
Without --repo_id that is all: nothing is pushed. A folder that has its evidence already needs no --report. The report
must be about the very weights in the folder.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from hf_rft import RobustnessReport, load_robust_model
from hf_rft.cli import exit_with, parse_with_config, run_program
from hf_rft.evidence import CARD_NAME, CURVE_NAME, REPORT_NAME, read_report, write_evidence
from hf_rft.files import check_links, write_text
from hf_rft.hub import PushError, push_folder
from hf_rft.model_card import update_card
from hf_rft.ranges import SECONDS, check_ranges


@dataclass
class PushArguments:
    """Which model, which report, and where to."""

    model_dir: str = field(metadata={"help": "Folder with the model and its processor."})
    report: str | None = field(
        default=None, metadata={"help": "robustness.json of evaluate_robustness.py. Default: the one in --model_dir."}
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
            raise ValueError(f"--report {self.report} is not a file; evaluate_robustness.py writes robustness.json.")
        check_ranges(self, {"timeout": SECONDS}, is_flag=True)
        if self.repo_id is not None:
            try:
                validate_repo_id(self.repo_id)
            except ValueError as error:
                raise ValueError(f"--repo_id {self.repo_id!r} is no name of a repository: {error}") from error


def write_card(folder: Path, report: RobustnessReport, name: str, args: PushArguments) -> None:
    """Add the results to the folder's README.md, or write one."""
    path = folder / CARD_NAME
    if path.is_file():
        card = ModelCard.load(path)
    else:
        data = ModelCardData(library_name="transformers", pipeline_tag="image-classification", model_name=name)
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n")
    for key in ("license", "base_model"):
        if getattr(args, key) is not None and card.data.get(key) is None:
            card.data[key] = getattr(args, key)
    update_card(card, report, curve=CURVE_NAME)
    write_text(path, card.content)


def main(arguments: list[str] | None = None) -> None:
    (args,) = parse_with_config((PushArguments,), arguments, description=__doc__)
    folder = Path(args.model_dir)
    name = args.repo_id or folder.resolve().name
    try:
        check_links(folder)  # before the text of a card goes into another
        report = read_report(args.report or folder / REPORT_NAME)
        report = write_evidence(folder, report, name=name)
        write_card(folder, report, name.split("/")[-1], args)
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


if __name__ == "__main__":
    run_program(main)
