"""A page for one robust model: drop an image, choose norm and epsilon, and watch the model being attacked for real.

    hf-rft app --model_name_or_path outputs/efficientnet_lite0_hinge
    hf-rft app --model_name_or_path user/robust-model --compare_with google/vit-base-patch16-224

The model must carry the evidence of its robustness (`hf_rft.load_robust_model`); the one beside it need not.

As a Space: a Gradio Space whose requirements.txt says hf_rft[app] and whose app.py says
`from hf_rft.cli.app import main; main()`, with the settings as variables: MODEL, and optionally COMPARE_WITH,
REVISION, EXAMPLE_DIR, MAX_STEPS; a token for private models is the secret HF_TOKEN. Flags win over variables. The page
is served at GRADIO_SERVER_NAME and GRADIO_SERVER_PORT.

Needs the extra `app`.
"""

import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from gradio.themes import Default

from ..data import bundled
from ..hub.loading import load_robust_model
from ..hub.pretrained import load_model_and_processor
from .app_attack import MAX_FILE_BYTES
from .app_page import CSS, NUM_EXAMPLES, Page
from .parsing import parse_with_config


# The settings of a Space that are flags of the same name.
VARIABLES = ("COMPARE_WITH", "REVISION", "EXAMPLE_DIR", "MAX_STEPS")
EXAMPLE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


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


# --- The command line ---


@dataclass
class AppArguments:
    """Which models, which examples, and where the page is served."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The robust model: repository or folder."})
    compare_with: str | None = field(default=None, metadata={"help": "Any image classifier, shown beside it."})
    example_dir: str | None = field(
        default=None, metadata={"help": "Images to try. Default: bundled ones, if they fit."}
    )
    max_steps: int = field(default=100, metadata={"help": "Steps of APGD: the most a visitor can choose."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the robust model."})
    token: str | None = field(default=None, metadata={"help": "Hub token, for private or gated repositories."})

    def __post_init__(self):
        if self.model_name_or_path is None:
            raise ValueError("Give --model_name_or_path or, in a Space, the variable MODEL.")
        if self.example_dir is not None and not os.path.isdir(self.example_dir):
            raise ValueError(f"--example_dir {self.example_dir} is not a folder.")
        if not 1 <= self.max_steps <= 10_000:
            raise ValueError(f"--max_steps {self.max_steps} must be a whole number from 1 to 10000.")


def flags_from_environment(environment: Mapping[str, str]) -> list[str]:
    """The settings of a Space as flags. An empty variable is one that is not set."""
    flags = {"MODEL": "--model_name_or_path", **{name: f"--{name.lower()}" for name in VARIABLES}}
    return [f"{flag}={environment[name]}" for name, flag in flags.items() if environment.get(name)]


def find_examples(folder: str | Path) -> list[Path]:
    """Some images of a folder and its sub-folders, in order of their names."""
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in EXAMPLE_ENDINGS)[:NUM_EXAMPLES]


def bundled_examples(classes: Iterable[str], folder: str | Path) -> list[Path]:
    """Bundled test images of different classes, written into `folder`; none if the model's classes are others."""
    classes = set(classes)
    for bundle in bundled.DATASETS:
        dataset = load_dataset(bundled.resolve(bundle), split="test")
        names, labels = dataset.features["label"].names, dataset["label"][:]
        if set(names) == classes:
            paths = [Path(folder, f"{name.replace('/', '-')}.png") for name in names[:NUM_EXAMPLES]]
            for label, path in enumerate(paths):
                dataset[labels.index(label)]["image"].save(path)
            return paths
    return []


def display_name(name_or_path: str) -> str:
    """A repository's name; of a local folder the last part only: the rest is nobody's business."""
    return Path(name_or_path).name if Path(name_or_path).is_dir() else name_or_path


def main(arguments: list[str] | None = None) -> None:
    flags = [*flags_from_environment(os.environ), *(sys.argv[1:] if arguments is None else arguments)]
    (args,) = parse_with_config((AppArguments,), flags, description=__doc__)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    robust = load_robust_model(args.model_name_or_path, revision=args.revision, token=args.token)
    robust.model.to(device)
    baseline, names = None, [display_name(args.model_name_or_path)]
    if args.compare_with is not None:
        folder = bundled.resolve(args.compare_with)
        model, processor = load_model_and_processor("--compare_with", folder, token=args.token)
        baseline = (model.to(device), processor)
        names.append(display_name(args.compare_with))
    with tempfile.TemporaryDirectory() as scratch:
        if args.example_dir is not None:
            examples = find_examples(args.example_dir)
        else:
            examples = bundled_examples((robust.model.config.id2label or {}).values(), scratch)
        page = Page(robust, baseline, examples, names=names, max_steps=args.max_steps)
        launch(page)
