"""CLIP, SigLIP and their kin as classifiers: images are compared with the names of the classes.

Radford et al. 2021, "Learning transferable visual models from natural language supervision"
(https://huggingface.co/papers/2103.00020), section 3.1.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


# That of transformers' `pipeline("zero-shot-image-classification")`.
TEMPLATE = "This is a photo of {}."


class ZeroShotClassifier(nn.Module):
    """An image tower with the features of the classes' names as a frozen head; see [`zero_shot_classifier`].

    Args:
        model (`PreTrainedModel`):
            Has `get_image_features`, and `logit_scale`.
        text_features (`torch.Tensor` of shape `(classes, features)`):
            Of length 1.
        class_names (`Sequence[str]`):
            In the same order.
    """

    model: Any
    text_features: torch.Tensor

    def __init__(self, model: PreTrainedModel, text_features: torch.Tensor, class_names: Sequence[str]):
        super().__init__()
        self.model = model
        self.register_buffer("text_features", text_features)
        names = dict(enumerate(class_names))
        self.config = PreTrainedConfig(id2label=names, label2id={name: number for number, name in names.items()})
        self.config.name_or_path = model.config.name_or_path
        self.config._commit_hash = getattr(model.config, "_commit_hash", None)

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        features = F.normalize(self.model.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)
        logits = self.model.logit_scale.exp() * features @ self.text_features.T
        bias = getattr(self.model, "logit_bias", None)  # of SigLIP
        return ImageClassifierOutput(logits=logits if bias is None else logits + bias)


@torch.no_grad()
def zero_shot_classifier(
    model: Any,
    processor: Any,
    class_names: Sequence[str],
    templates: Sequence[str] = (TEMPLATE,),
) -> ZeroShotClassifier:
    """A model that compares images with text, as an image classifier, for [`evaluate_robustness`].

    The features of the class names are computed once. With one template, the logits are those of
    `pipeline("zero-shot-image-classification")`; with several, a class is the mean direction of its sentences. Pass
    `processor.image_processor` to [`evaluate_robustness`].

    Args:
        model (`PreTrainedModel`):
            From `AutoModelForZeroShotImageClassification.from_pretrained(...)`. It is not copied.
        processor:
            From `AutoProcessor.from_pretrained(...)`.
        class_names (`Sequence[str]`):
            In the order of the labels, in words that the text tower knows.
        templates (`Sequence[str]`, *optional*):
            Sentences with `{}` where the name of the class belongs.

    Raises:
        ValueError: if the model has no two towers, or there are fewer than two classes, two of the same name, or a
            template without `{}`.
    """
    missing = [name for name in ("get_image_features", "get_text_features", "logit_scale") if not hasattr(model, name)]
    if missing or model.config.model_type == "siglip2":  # whose images come as patches
        raise ValueError(
            f"`model` is {type(model).__name__}; only CLIP, SigLIP and models that are built alike can be used, "
            "loaded with `AutoModelForZeroShotImageClassification`."
        )
    class_names = [class_names] if isinstance(class_names, str) else list(class_names)
    templates = [templates] if isinstance(templates, str) else list(templates)
    if len(class_names) < 2 or len(set(class_names)) < len(class_names):
        raise ValueError(f"`class_names={class_names}` must hold at least two names, each once.")
    if not templates or any("{}" not in template for template in templates):
        raise ValueError(f"`templates={templates}` must hold sentences with {{}} where the class's name belongs.")
    if not hasattr(processor, "tokenizer"):
        raise ValueError(
            f"`processor` is {type(processor).__name__}, without a tokenizer; load it by `AutoProcessor`."
        )
    # As in the pipeline: SigLIP was trained on sentences filled up to this length.
    padding = {"padding": "max_length", "max_length": 64, "truncation": True}
    options = padding if "siglip" in model.config.model_type else {"padding": True}
    device, features = next(model.parameters()).device, []
    for template in templates:
        sentences = [template.replace("{}", name) for name in class_names]
        inputs = processor.tokenizer(sentences, return_tensors="pt", **options).to(device)
        features.append(F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1))
    return ZeroShotClassifier(model, F.normalize(torch.stack(features).mean(dim=0), dim=-1), class_names).eval()
