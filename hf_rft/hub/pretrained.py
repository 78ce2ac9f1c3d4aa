"""Loading pretrained classifiers by name: as they are, or with a new head for the classes of a dataset."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import ClassLabel, DatasetDict, Value
from transformers import AutoImageProcessor, AutoModelForZeroShotImageClassification, AutoProcessor, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from ..data import bundled
from ..models.adapters import add_lora
from ..models.parts import head_parameters
from ..models.zero_shot import ZeroShotClassifier, zero_shot_classifier
from ..utils.files import check_writable
from ..utils.values import COUNT, POSITIVE, Range, check_ranges, naming
from .safe_loading import is_adapter, load_classifier, load_config, only_hub_options


# Larger images fill the memory before training starts.
IMAGE_SIZE = Range(1, 4096, is_whole=True)
LORA_DROPOUT = Range(0, 0.99)


@dataclass
class ModelArguments:
    """Which pretrained model to fine-tune."""

    model_name_or_path: str = field(
        default=bundled.MODEL, metadata={"help": "Hub id (transformers or timm), local folder, or bundled: name."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    token: str | None = field(default=None, metadata={"help": "Hub token, for private or gated repositories."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    ignore_mismatched_sizes: bool = field(
        default=True, metadata={"help": "Replace the classification head if the number of classes differs."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the square images, in pixels. Default: the processor's own."}
    )
    channels_last: bool = field(
        default=False, metadata={"help": "Memory format of the weights; convolutional networks often run faster."}
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Train LoRA adapters of this rank, and the head, instead of all weights."}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Adapters are multiplied by lora_alpha / lora_r. Default: twice lora_r."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapters' inputs."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to adapt, or their last parts. Default: linear layers and convolutions "
            "without groups."
        },
    )

    def __post_init__(self):
        ranges = {"image_size": IMAGE_SIZE, "lora_r": COUNT, "lora_alpha": POSITIVE, "lora_dropout": LORA_DROPOUT}
        check_ranges(self, ranges, is_flag=True)
        for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
            if self.lora_r is None and (value := getattr(self, name)):
                raise ValueError(f"--{name} {value} has no effect without --lora_r; set it, such as --lora_r 16.")
        if self.lora_r is not None and importlib.util.find_spec("peft") is None:
            raise ValueError(f'--lora_r {self.lora_r} needs peft: pip install "hf_rft[peft]"')
        if not self.model_name_or_path:
            raise ValueError("--model_name_or_path is empty; give a Hub id, a local folder, or a bundled: name.")
        bundled.check_name("--model_name_or_path", self.model_name_or_path)
        if self.cache_dir is not None:
            check_writable("--cache_dir", self.cache_dir)

    def hub_options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`."""
        options = {"revision": self.model_revision, "trust_remote_code": self.trust_remote_code}
        return {**options, "cache_dir": self.cache_dir, "token": self.token}


def load_model(model_args: ModelArguments, class_names: list[str]):
    """The pretrained model with a head for these classes, and its image processor."""
    name_or_path = bundled.resolve(model_args.model_name_or_path)
    hub_options = model_args.hub_options()
    if is_adapter(name_or_path, **only_hub_options(hub_options)):
        raise ValueError(
            f"--model_name_or_path {model_args.model_name_or_path!r} is an adapter; merge it into its base model "
            "(`load_robust_model(..., merge=True)`), save the result, and give its folder."
        )
    with naming("--model_name_or_path", model_args.model_name_or_path, "give a Hub id or a folder of a classifier"):
        config = load_config(
            name_or_path,
            num_labels=len(class_names),
            id2label=dict(enumerate(class_names)),
            label2id={name: index for index, name in enumerate(class_names)},
            **hub_options,
        )
        processor = AutoImageProcessor.from_pretrained(name_or_path, **hub_options)
    size = model_args.image_size
    if hasattr(config, "pretrained_cfg"):  # timm also keeps class names and processor values in the configuration
        config.label_names = class_names
        if size is not None:
            config.pretrained_cfg["input_size"] = [3, size, size]
            processor = type(processor)(pretrained_cfg=config.pretrained_cfg, architecture=config.architecture)
    elif size is not None:
        if "shortest_edge" in processor.to_dict()["size"]:
            processor.size = {"shortest_edge": size}
        else:
            processor.size = {"height": size, "width": size}
        if getattr(processor, "crop_size", None) is not None:
            processor.crop_size = {"height": size, "width": size}
        if hasattr(config, "image_size"):
            config.image_size = size
    with naming("--model_name_or_path", model_args.model_name_or_path, "give a folder or repository with its weights"):
        model, report = load_classifier(
            name_or_path,
            config,
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
            output_loading_info=True,
            **hub_options,
        )
    head_tensors = head_parameters(model)
    head = {name for name, parameter in model.named_parameters() if parameter in head_tensors}
    lost = sorted({str(key[0]) for key in report["mismatched_keys"]} - head)
    if lost:
        raise ValueError(
            f"The pretrained weights {lost} do not fit {name_or_path} with --image_size {size}, and fine-tuning must "
            "not start from random weights; leave --image_size out, or use a model that takes any size."
        )
    missing = [name for name in _random_parameters(model, report) if name not in head]
    if missing:
        raise ValueError(
            f"--model_name_or_path {model_args.model_name_or_path!r} has no weights {missing[:5]}, and fine-tuning "
            "must not start from random weights; give a pretrained model."
        )
    if model_args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if model_args.lora_r is not None:
        named = model_args.model_name_or_path
        with naming("--lora_target_modules", model_args.lora_target_modules, "name modules of this model"):
            model = add_lora(
                model,
                r=model_args.lora_r,
                alpha=model_args.lora_alpha,
                dropout=model_args.lora_dropout,
                target_modules=model_args.lora_target_modules,
                base_model=os.path.abspath(named) if os.path.isdir(named) else named,
                revision=_commit(name_or_path, hub_options),
            )
    return processor, model


def _commit(name_or_path: str, hub_options: dict[str, Any]) -> str | None:
    """The commit of a model from the Hub; None for a folder."""
    if os.path.isdir(name_or_path):
        return None
    return extract_commit_hash(cached_file(name_or_path, CONFIG_NAME, **hub_options), None)


def in_order_of_model(model_args: ModelArguments, splits: DatasetDict, column: str) -> DatasetDict:
    """The splits with their classes in the model's order, if both have the same classes.

    Otherwise the head of a model that was fine-tuned on these classes would start with the classes mixed up.
    """
    with naming("--model_name_or_path", model_args.model_name_or_path, "give a Hub id or a folder of a classifier"):
        config = load_config(bundled.resolve(model_args.model_name_or_path), **model_args.hub_options())
    names = [str(name) for _, name in sorted((config.id2label or {}).items())]
    ours = splits["train"].features[column].names
    if names == ours or sorted(names) != sorted(ours):
        return splits
    number_of = [names.index(name) for name in ours]
    feature = ClassLabel(names=names)
    relabelled = {
        split: dataset.cast_column(column, Value("int64"))
        .map(lambda example: {column: number_of[example[column]]})
        .cast_column(column, feature)
        for split, dataset in splits.items()
    }
    return DatasetDict(relabelled)


def load_model_and_processor(
    argument: str, name_or_path: str, **hub_options
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A classifier as it is, and its image processor.

    Args:
        argument (`str`):
            Name of the argument that names the model, for error messages.
        name_or_path (`str`):
            Repository on the Hub or local folder.
        hub_options:
            Arguments of `from_pretrained`.

    Raises:
        ValueError: if it cannot be loaded, or some of its weights would be random.
    """
    with naming(argument, name_or_path, "give a Hub id or a folder with an image classifier and its processor"):
        config = load_config(name_or_path, **hub_options)
        processor = AutoImageProcessor.from_pretrained(name_or_path, **{"trust_remote_code": False, **hub_options})
        model, found = load_classifier(name_or_path, config, output_loading_info=True, **hub_options)
    if random := _random_parameters(model, found):
        raise ValueError(
            f"{argument} {name_or_path!r} has no weights {random[:5]}, which would be random; give a model that was "
            "trained as an image classifier. One that compares images with text needs `--class_names`."
        )
    return model, processor


def load_zero_shot_classifier(
    argument: str, name_or_path: str, class_names: Sequence[str], templates: Sequence[str], **hub_options
) -> tuple[ZeroShotClassifier, BaseImageProcessor]:
    """A model that compares images with text, as a classifier, and its image processor.

    See [`load_model_and_processor`] and [`zero_shot_classifier`].
    """
    with naming(argument, name_or_path, "give a Hub id or a folder with a model such as CLIP and its processor"):
        config = load_config(name_or_path, **hub_options)
        processor = AutoProcessor.from_pretrained(name_or_path, **{"trust_remote_code": False, **hub_options})
        options = {"auto_class": AutoModelForZeroShotImageClassification, "output_loading_info": True, **hub_options}
        model, found = load_classifier(name_or_path, config, **options)
    if random := _random_parameters(model, found):
        raise ValueError(f"{argument} {name_or_path!r} has no weights {random[:5]}, which would be random.")
    return zero_shot_classifier(model.eval(), processor, class_names, templates), processor.image_processor


def _random_parameters(model: PreTrainedModel, loading_info: dict[str, Any]) -> list[str]:
    """Names of the parameters for which no weights were found."""
    return sorted({str(key) for key in loading_info["missing_keys"]} & {name for name, _ in model.named_parameters()})
