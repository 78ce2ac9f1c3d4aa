"""Measure how robust an image classifier is: the accuracy-versus-epsilon curve and expected robustness.

    hf-rft evaluate --model_name_or_path outputs/efficientnet_lite0_hinge --max_samples 100
    hf-rft evaluate --num_processes 8 --model_name_or_path google/vit-base-patch16-224 \\
        --dataset_name ILSVRC/imagenet-1k --split validation --epsilons 0 1/255 2/255 4/255
    hf-rft evaluate --model_name_or_path my_model --image_dir my_images/test --norm l2 --epsilons 0 0.5 1 2
    hf-rft evaluate --model_name_or_path openai/clip-vit-base-patch32 --class_names cat dog "red fox" \\
        --image_dir my_images/test

Writes into --output_dir: robustness.json (the whole report), robustness_curve.png, adversarial_examples.png, with
--profile robustness_profile.png, and cache/ with the finished batches, from which the same command goes on if it was
killed.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from transformers import PreTrainedModel

from ..data import bundled
from ..data.examples import Examples, num_image_channels
from ..data.labels import class_numbers, has_class_names
from ..data.loading import check_folder, checked_columns, display_name, encode_labels, load_image_folders, subset
from ..evaluation import corruptions
from ..evaluation.evaluate import evaluate_robustness
from ..evaluation.plots import plot_adversarial_examples
from ..evaluation.reference import ATTACKS, check_installed, run_autoattack
from ..evaluation.report import RobustnessReport
from ..evaluation.tiers import TIERS
from ..hub.pretrained import load_model_and_processor, load_zero_shot_classifier
from ..models.classifier import PixelClassifier
from ..models.pixel_space import PixelNormalization
from ..models.zero_shot import TEMPLATE
from ..threat_model import NORMS, ThreatModel, format_epsilon, parse_epsilons
from ..utils.files import check_writable
from ..utils.values import COUNT, SEED, check_ranges, naming
from .parsing import parse_with_config


@dataclass
class EvaluationArguments:
    """Which model, which images, which attacks."""

    model_name_or_path: str = field(metadata={"help": "Hub id (transformers or timm) or local folder."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Hub token, for private or gated repositories."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    class_names: list[str] | None = field(
        default=None,
        metadata={"help": "For CLIP and its kin: the classes in words, in the order of the data's own."},
    )
    templates: list[str] = field(
        default_factory=lambda: [TEMPLATE], metadata={"help": "Sentences with {} for the name, for --class_names."}
    )
    channels_last: bool = field(
        default=False,
        metadata={
            "help": "Memory format of the weights, for convolutional networks on a GPU; on a CPU it is used anyway."
        },
    )

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, local dataset folder, or bundled: name. Default: the bundled data."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    split: str = field(default="test", metadata={"help": "Split of the dataset."})
    image_dir: str | None = field(default=None, metadata={"help": "Folder of images, one sub-folder per class."})
    image_column_name: str = field(default="image", metadata={"help": "Column that holds the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column that holds the labels."})
    match_labels: str = field(
        default="name",
        metadata={
            "help": "How the data's classes are found among the model's: by their names, or by their numbers.",
            "choices": ["name", "index"],
        },
    )
    max_samples: int | None = field(default=None, metadata={"help": "Evaluate a random subset of this size."})

    norm: str = field(default="linf", metadata={"help": "Norm of the perturbation.", "choices": list(NORMS)})
    epsilons: list[str] = field(
        default_factory=lambda: ["0", "1/255", "2/255", "4/255", "8/255"],
        metadata={"help": "Grid of epsilons, in pixels scaled to [0, 1]: increasing, the first is 0."},
    )
    tier: str = field(default="standard", metadata={"help": "How strong the attacks are.", "choices": list(TIERS)})
    batch_size: int = field(default=64, metadata={"help": "Images in a pass, on each process."})
    seed: int = field(default=0, metadata={"help": "Of the random subset and of the attacks' random starts."})
    autocast_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Craft in this precision; what is found is verified in the model's own.",
            "choices": ["bfloat16", "float16"],
        },
    )
    profile: bool = field(
        default=False,
        metadata={
            "help": "Also measure the other norms, at comparable radii, and common corruptions; 3 to 6 times the work."
        },
    )
    reference: str | None = field(
        default=None,
        metadata={"help": "Also run the public AutoAttack, once per epsilon.", "choices": ["autoattack"]},
    )
    reference_attacks: list[str] = field(
        default_factory=lambda: list(ATTACKS), metadata={"help": f"Which of its attacks, of {', '.join(ATTACKS)}."}
    )
    output_dir: str = field(
        default="outputs/robustness", metadata={"help": "Where report, figures and finished batches go."}
    )

    def __post_init__(self):
        if self.dataset_name is not None and self.image_dir is not None:
            raise ValueError("Give either --dataset_name or --image_dir, not both.")
        if self.dataset_name is None and self.image_dir is None:
            self.dataset_name = bundled.DATASET
        check_folder("--image_dir", self.image_dir)
        check_ranges(self, {"max_samples": COUNT, "batch_size": COUNT, "seed": SEED}, is_flag=True)
        if not self.model_name_or_path:
            raise ValueError("--model_name_or_path is empty; give a Hub id or a local folder.")
        parse_epsilons(self.norm, self.epsilons)
        unknown = [attack for attack in self.reference_attacks if attack not in ATTACKS]
        if unknown:
            raise ValueError(f"--reference_attacks {unknown} are unknown; choose among {', '.join(ATTACKS)}.")


def load_images(args: EvaluationArguments) -> Dataset:
    """The examples to evaluate, in a fixed order."""
    if args.image_dir is not None:
        dataset = load_image_folders({"image_dir": args.image_dir})["image"]
    else:
        path = bundled.resolve(args.dataset_name)
        with naming("--dataset_name", args.dataset_name, "give a Hub id or a folder with a dataset, and its --split"):
            dataset = load_dataset(path, args.dataset_config_name, split=args.split, token=args.token)
        if not isinstance(dataset, Dataset):
            raise ValueError(f"--split {args.split!r} names several splits; give one.")
    checked_columns(args.split, dataset, args.image_column_name, args.label_column_name)
    return subset(dataset, args.max_samples, args.seed)


def with_numbers_of(class_names: list[str], dataset: Dataset, column: str) -> Dataset:
    """The dataset with class numbers alone, if these names can be those of its classes."""
    if str(getattr(dataset.features[column], "dtype", "")).endswith("string"):
        dataset = encode_labels(DatasetDict({"train": dataset}), column)["train"]
    names = getattr(dataset.features[column], "names", None) or class_names
    if len(names) != len(class_names):
        raise ValueError(f"--class_names holds {len(class_names)} names, the data have {len(names)} classes.")
    for ours, theirs in zip(class_names, names, strict=True):
        if ours != theirs and ours in names:
            raise ValueError(
                f"--class_names has {ours!r} where the data have {theirs!r}; the order must be that of the data's "
                f"classes: {names}."
            )
    return dataset.cast_column(column, Value("int64"))


def with_model_labels(dataset: Dataset, model: PreTrainedModel, args: EvaluationArguments) -> Dataset:
    """The dataset with the model's class numbers in place of its own."""
    feature = dataset.features[args.label_column_name]
    is_text = str(getattr(feature, "dtype", "")).endswith("string")
    by_name = args.match_labels == "name"
    if not has_class_names(model.config) or not (isinstance(feature, ClassLabel) or (is_text and by_name)):
        return dataset
    if is_text:
        dataset = encode_labels(DatasetDict({"train": dataset}), args.label_column_name)["train"]
        feature = dataset.features[args.label_column_name]
    if not by_name:  # the data's names are not the model's, so they must not be compared
        return dataset.cast_column(args.label_column_name, Value("int64"))
    numbers = class_numbers(
        "--image_dir, --dataset_name", feature.names, model.config, numbers_are_right="pass --match_labels index"
    )
    if numbers == list(range(len(numbers))):
        return dataset
    column = args.label_column_name
    return dataset.cast_column(column, Value("int64")).map(lambda example: {column: numbers[example[column]]})


def run_reference(
    args: EvaluationArguments, model: PreTrainedModel, processor, dataset: Dataset, report: RobustnessReport
) -> dict:
    """The public AutoAttack at each epsilon, beside the report, example by example."""
    classifier = PixelClassifier(model, PixelNormalization.from_processor(processor))
    examples = Examples(
        dataset,
        processor,
        num_channels=num_image_channels(model.config),
        image_column=args.image_column_name,
        label_column=args.label_column_name,
    )

    result = {"attacks": args.reference_attacks, "accuracies": {}, "agreement": {}}
    print(f"\nAutoAttack ({', '.join(args.reference_attacks)}), on the same examples:")
    for place, epsilon in enumerate(report.epsilons[1:], start=1):
        robust = []
        for first in range(0, len(examples), args.batch_size):
            positions = range(first, min(first + args.batch_size, len(examples)))
            pixels, labels = classifier.load(examples, positions)
            with classifier.under_attack():
                found = run_autoattack(
                    classifier.forward_in(None),
                    pixels,
                    labels,
                    threat_model=ThreatModel(args.norm, epsilon),
                    num_classes=model.config.num_labels,
                    attacks=args.reference_attacks,
                    seed=args.seed,
                    batch_size=args.batch_size,
                )
            result["attacks"] = list(found.attacks)
            robust += found.robust.tolist()
        ours = torch.from_numpy(report.broken_at > place)
        theirs = torch.tensor(robust)
        written = format_epsilon(epsilon)
        result["accuracies"][written] = theirs.float().mean().item()
        result["agreement"][written] = (ours == theirs).float().mean().item()
        print(
            f"  accuracy at {written:<8} {100 * result['accuracies'][written]:5.1f} %   (this report: "
            f"{100 * report.accuracies[place]:.1f} %, the same for {100 * result['agreement'][written]:.1f} % of the "
            "examples)",
            flush=True,
        )
    return result


def main(arguments: list[str] | None = None) -> RobustnessReport:
    (args,) = parse_with_config((EvaluationArguments,), arguments, description=__doc__, is_launched=True)
    if args.reference is not None:
        check_installed()
    if args.profile:
        corruptions.check_installed()
    check_writable("--output_dir", args.output_dir)
    state = PartialState(cpu=not torch.accelerator.is_available())

    # --- Data and model ---
    hub_options = {
        "revision": args.model_revision,
        "token": args.token,
        "trust_remote_code": args.trust_remote_code,
    }
    dataset = load_images(args)
    name_or_path = bundled.resolve(args.model_name_or_path)
    if args.class_names is None:
        model, processor = load_model_and_processor("--model_name_or_path", name_or_path, **hub_options)
        dataset = with_model_labels(dataset, model, args)
    else:
        dataset = with_numbers_of(args.class_names, dataset, args.label_column_name)
        model, processor = load_zero_shot_classifier(
            "--model_name_or_path", name_or_path, args.class_names, args.templates, **hub_options
        )
    model.eval().to(state.device)
    if args.channels_last:
        torch.nn.Module.to(model, memory_format=torch.channels_last)  # in place

    # --- Evaluate ---
    output_dir = Path(args.output_dir)
    report = evaluate_robustness(
        model,
        dataset,
        processor,
        norm=args.norm,
        epsilons=args.epsilons,
        tier=args.tier,
        batch_size=args.batch_size,
        seed=args.seed,
        cache_dir=output_dir / "cache",
        autocast_dtype=getattr(torch, args.autocast_dtype) if args.autocast_dtype else None,
        profile=args.profile,
        image_column=args.image_column_name,
        label_column=args.label_column_name,
    )
    measured = report.settings["dataset"]
    if args.image_dir is not None:
        measured |= {"name": display_name(args.image_dir), "split": None}
    if len(report) == args.max_samples:
        measured["shuffle_seed"] = args.seed

    # --- Report ---
    if state.is_main_process:
        report.save(output_dir / "robustness.json")
        report.plot(output_dir / "robustness_curve.png")
        page = output_dir / "adversarial_examples.png"
        page.unlink(missing_ok=True)  # of an earlier run
        if report.examples is not None:
            plot_adversarial_examples(report.examples, report.labels, model.config.id2label, page)
        if report.profile is not None:
            report.plot_profile(output_dir / "robustness_profile.png")
        print(f"\n{report.table()}\n\nWritten to {output_dir}")
        if args.reference is not None:
            reference = run_reference(args, model, processor, dataset, report)
            (output_dir / "reference.json").write_text(json.dumps(reference, indent=2) + "\n", encoding="utf-8")
    state.wait_for_everyone()
    return report
