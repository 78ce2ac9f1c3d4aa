"""Plain modules as image classifiers of transformers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput

from .classifier import logits_of


class ModuleForImageClassification(nn.Module):
    """Wraps a plain module as an image classifier that [`RobustTrainer`] can train.

    For a timm model prefer [`~transformers.TimmWrapperForImageClassification`] (`AutoModelForImageClassification` with
    a timm checkpoint): it saves its configuration. Of this wrapper only the weights are saved, under the names of its
    `state_dict()`, and neither `AutoModelForImageClassification` nor [`load_robust_model`] can load them; read them
    with `safetensors.torch.load_model(wrapper, "output/model.safetensors")`. `module` itself is trained in place.

    Args:
        module (`nn.Module`):
            Maps `pixel_values` of shape `(batch, channels, height, width)` to logits of shape `(batch, classes)`, or
            to an object or dictionary that holds `logits`.
        class_names (`Sequence[str]`):
            Names of the classes, in the order of the logits.

    Example:

    ```python
    trainer = RobustTrainer(
        model=ModuleForImageClassification(module, class_names=["cat", "dog"]),
        args=RobustTrainingArguments("output"),
        train_dataset=train_dataset,  # of `pixel_values` and `labels`
        processing_class=ViTImageProcessor(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    )
    ```
    """

    def __init__(self, module: nn.Module, class_names: Sequence[str]):
        super().__init__()
        self.module = module
        self.config = PreTrainedConfig(
            id2label=dict(enumerate(class_names)), label2id={name: index for index, name in enumerate(class_names)}
        )

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Logits, and with `labels` of shape `(batch,)` the cross-entropy."""
        logits = logits_of(self.module(pixel_values))
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)
