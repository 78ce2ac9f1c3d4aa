"""A page for one robust model: drop an image, choose norm and epsilon, and watch the model being attacked for real.

    python recipes/app.py --model_name_or_path outputs/efficientnet_lite0_hinge
    python recipes/app.py --model_name_or_path user/robust-model --compare_with google/vit-base-patch16-224

The model must carry the evidence of its robustness (`hf_rft.load_robust_model`); the one beside it need not.

As a Space: put the four files `app*.py` into a Gradio Space whose requirements.txt names hf_rft, and give the settings
as variables: MODEL, and optionally COMPARE_WITH, REVISION, EXAMPLE_DIR, MAX_STEPS; a token for private models is the
secret HF_TOKEN. Flags win over variables.

Needs gradio, the extra `app`: pip install gradio
"""

import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from app_attack import MAX_FILE_BYTES, Classifier
from app_page import CSS, NUM_EXAMPLES, Page
from datasets import load_dataset
from gradio.themes import Default

from hf_rft import bundled
from hf_rft.cli import parse_with_config, run_program
from hf_rft.hub import RobustModel, load_robust_model
from hf_rft.loading import load_model_and_processor
from hf_rft.ranges import Range, check_ranges


# The settings of a Space, and the flags they stand for.
VARIABLES = {
    "MODEL": "model_name_or_path",
    "COMPARE_WITH": "compare_with",
    "REVISION": "revision",
    "EXAMPLE_DIR": "example_dir",
    "MAX_STEPS": "max_steps",
}
EXAMPLE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


@dataclass
class AppArguments:
    """Which models, which examples, and where the page is served."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The robust model: repository on the Hub or local folder."}
    )
    compare_with: str | None = field(
        default=None, metadata={"help": "Any image classifier, shown beside it: repository or local folder."}
    )
    example_dir: str | None = field(
        default=None, metadata={"help": "Folder of images to try. Default: bundled ones, if the classes are theirs."}
    )
    max_steps: int = field(default=100, metadata={"help": "Steps of APGD: the most a visitor can choose."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the robust model."})
    token: str | None = field(default=None, metadata={"help": "Hub token, for private or gated repositories."})
    server_name: str | None = field(
        default=None, metadata={"help": "Address to serve at. Default: $GRADIO_SERVER_NAME, or 127.0.0.1."}
    )
    server_port: int | None = field(
        default=None, metadata={"help": "Port. Default: $GRADIO_SERVER_PORT, or the first free one from 7860."}
    )

    def __post_init__(self):
        if self.model_name_or_path is None:
            raise ValueError("Give --model_name_or_path or, in a Space, the variable MODEL.")
        if self.example_dir is not None and not os.path.isdir(self.example_dir):
            raise ValueError(f"--example_dir {self.example_dir} is not a folder.")
        check_ranges(self, {"max_steps": Range(1, 10_000, True), "server_port": Range(0, 65535, True)}, is_flag=True)


def flags_from_environment(environment: Mapping[str, str]) -> list[str]:
    """The settings of a Space as flags. An empty variable is one that is not set."""
    return [f"--{flag}={environment[name]}" for name, flag in VARIABLES.items() if environment.get(name)]


# --- Examples ---


def find_examples(folder: str | Path) -> list[Path]:
    """Some images of a folder and its sub-folders, in order of their names."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in EXAMPLE_ENDINGS)
    return paths[:NUM_EXAMPLES]


def bundled_examples(classes: Iterable[str], folder: str | Path) -> list[Path]:
    """Bundled test images of different classes, written into `folder`; none if the model's classes are others."""
    try:
        dataset = load_dataset(bundled.resolve(bundled.DATASET), split="test")
    except FileNotFoundError:  # no clone of the repository: a Space
        return []
    names = dataset.features["label"].names
    if set(names) != set(classes):
        return []
    paths = []
    labels = dataset["label"][:]
    for label in range(min(len(names), NUM_EXAMPLES)):
        path = Path(folder, f"{names[label].replace('/', '-')}.png")
        dataset[labels.index(label)]["image"].save(path)
        paths.append(path)
    return paths


# --- The page ---


def build_app(
    robust: RobustModel,
    baseline: tuple[Any, Any] | None = None,
    examples: Sequence[str | Path] = (),
    *,
    names: Sequence[str] = ("the model", "the other model"),
    max_steps: int = 100,
) -> Page:
    """The page for a robust model, and what stands beside it.

    Args:
        robust ([`RobustModel`]):
            Model, processor and report. The models are put into evaluation mode and frozen.
        baseline (`tuple`, *optional*):
            Model and processor to compare with.
        examples (`Sequence` of paths, *optional*):
            Images to try.
        names (`Sequence[str]`, *optional*):
            What to call the two models.
        max_steps (`int`, *optional*, defaults to 100):
            The most steps of APGD that a visitor can choose.
    """
    models = [(robust.model, robust.processor), *([baseline] if baseline is not None else [])]
    classifiers = [Classifier(name, *model) for name, model in zip(names, models, strict=False)]
    return Page(robust.report, classifiers, [str(example) for example in examples], max_steps)


def launch(page: Page, **options) -> str:
    """Serve the page; returns its address. See `gradio.Blocks.launch` for the options."""
    _, address, _ = page.blocks.launch(
        css=CSS,
        theme=Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        max_file_size=MAX_FILE_BYTES,
        ssr_mode=False,  # it would need Node
        show_error=True,
        footer_links=[],
        **options,
    )
    return address


def display_name(name_or_path: str) -> str:
    """A repository's name; of a local folder the last part only: the rest is nobody's business."""
    return Path(name_or_path).name if Path(name_or_path).is_dir() else name_or_path


def main(arguments: list[str] | None = None) -> None:
    flags = [*flags_from_environment(os.environ), *(sys.argv[1:] if arguments is None else arguments)]
    (args,) = parse_with_config((AppArguments,), flags, description=__doc__)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"

    # --- Models ---
    names = [args.model_name_or_path, *([args.compare_with] if args.compare_with is not None else [])]
    robust = load_robust_model(args.model_name_or_path, revision=args.revision, token=args.token)
    robust.model.to(device)
    baseline = None
    if args.compare_with is not None:
        folder = bundled.resolve(args.compare_with)
        model, processor = load_model_and_processor("--compare_with", folder, token=args.token)
        baseline = (model.to(device), processor)

    # --- Page ---
    with tempfile.TemporaryDirectory() as scratch:
        if args.example_dir is not None:
            examples = find_examples(args.example_dir)
        else:
            examples = bundled_examples((robust.model.config.id2label or {}).values(), scratch)
        names = [display_name(name) for name in names]
        page = build_app(robust, baseline, examples, names=names, max_steps=args.max_steps)
        launch(page, server_name=args.server_name, server_port=args.server_port)


if __name__ == "__main__":
    run_program(main)
