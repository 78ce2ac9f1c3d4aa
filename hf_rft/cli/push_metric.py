"""Publish the `evaluate` modules of hf_rft as Gradio Spaces, from where everybody can load them by name.

    hf-rft push-metric --namespace my-name
    hf-rft push-metric --namespace my-organization --metrics robust_accuracy --private

Then `evaluate.load("my-name/expected_robustness")` works everywhere, without hf_rft. A Space holds the metric's
script, card and requirements, known cases, and a page to try it on. Log in before with `hf auth login`, or give a
--token.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from .. import metrics
from ..hub.pushing import PushError, push_folder
from ..utils.values import SECONDS, check_ranges
from .parsing import parse_with_config


FOLDER = Path(metrics.__file__).parent
METRICS = sorted(path.parent.name for path in FOLDER.glob("*/app.py"))


@dataclass
class PushArguments:
    """Which metrics go where."""

    namespace: str = field(metadata={"help": "Name of the user or organization."})
    metrics: list[str] = field(
        default_factory=lambda: list(METRICS), metadata={"help": f"Which metrics, of {', '.join(METRICS)}."}
    )
    private: bool = field(default=False, metadata={"help": "Make new Spaces private; old ones stay what they are."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch to push to, made if it is not there. Default: main."}
    )
    token: str | None = field(default=None, metadata={"help": "Hub token with write access. Default: the one stored."})
    timeout: float | None = field(default=None, metadata={"help": "Give up on a Space after this many seconds."})

    def __post_init__(self):
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            raise ValueError(f"--metrics {' '.join(unknown)} unknown; choose among {', '.join(METRICS)}.")
        if not self.namespace or "/" in self.namespace:
            raise ValueError(f"--namespace {self.namespace!r} must be the name of a user or organization.")
        for name in self.metrics:
            try:
                validate_repo_id(f"{self.namespace}/{name}")
            except ValueError as error:
                raise ValueError(f"--namespace {self.namespace!r} is not the name of a user: {error}") from error
        check_ranges(self, {"timeout": SECONDS}, is_flag=True)


def main(arguments: list[str] | None = None) -> None:
    (args,) = parse_with_config((PushArguments,), arguments, description=__doc__)
    options = "" if args.revision is None else f', revision="{args.revision}"'
    for name in args.metrics:
        space = f"{args.namespace}/{name}"
        try:
            commit = push_folder(
                FOLDER / name,
                space,
                repo_type="space",
                space_sdk="gradio",
                revision=args.revision,
                private=args.private or None,  # None: what the namespace has as its default
                token=args.token,
                commit_message=f"Upload {name}",
                timeout=args.timeout,
            )
        except PushError as error:
            sys.exit(str(error))
        print(f'{commit}\n  evaluate.load("{space}"{options})')
