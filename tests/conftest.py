"""Tiny models of the supported families, and batches for them. All are random: nothing is downloaded."""

import pytest
import torch
from hub_server import WRITE_TOKEN, HubServer
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    Dinov2Config,
    ResNetConfig,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
    ViTImageProcessor,
)

from hf_rft import RobustTrainer, RobustTrainingArguments
from hf_rft.models.adapters import add_lora


# The models are tiny: more threads only wait for each other, for minutes where other work shares the cores.
torch.set_num_threads(1)

NUM_LABELS = 4
SIZE = 16

CONFIGS = {
    "vit": lambda: ViTConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.1,
        num_labels=NUM_LABELS,
    ),
    "swin": lambda: SwinConfig(
        image_size=SIZE,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        hidden_dropout_prob=0.1,
        num_labels=NUM_LABELS,
    ),
    "convnext": lambda: ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, num_labels=NUM_LABELS
    ),
    "resnet": lambda: ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=NUM_LABELS
    ),
    "dinov2": lambda: Dinov2Config(
        image_size=SIZE,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.1,
        num_labels=NUM_LABELS,
    ),
    "timm": lambda: TimmWrapperConfig(
        architecture="test_resnet",
        num_labels=NUM_LABELS,
        pretrained_cfg={"input_size": [3, SIZE, SIZE], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0},
        # Without a stride after the feature map has shrunk to 1x1: there, the bfloat16 weight gradient of torch 2.15
        # on CPU (oneDNN) reads memory nobody wrote, and is infinite whenever what lay there was large.
        model_args={"drop_rate": 0.1, "output_stride": 16},
    ),
}


def make_model(family: str, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForImageClassification.from_config(CONFIGS[family]())


def make_adapted(family: str, seed: int = 0):
    """With LoRA adapters of rank 2; the base model is the same for all seeds."""
    model = make_model(family)
    torch.manual_seed(seed)
    return add_lora(model, r=2)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def without_dropout(model):
    """Dropout draws other masks for other batch sizes."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if hasattr(model, "timm_model"):
        model.timm_model.drop_rate = 0.0
    return model


@pytest.fixture
def processor():
    """mean and std 0.5: pixel values lie in [-1, 1]."""
    return ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


class Images(torch.utils.data.Dataset):
    """Random images whose class shows in their brightness, normalised with mean and std 0.5."""

    def __init__(self, count: int, seed: int = 0, num_labels: int = NUM_LABELS, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(num_labels, (count,), generator=generator)
        noise = torch.rand((count, 3, SIZE, SIZE), generator=generator)
        self.pixels = (0.5 * noise + 0.5 * (self.labels / num_labels).reshape(-1, 1, 1, 1)).to(dtype)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": (self.pixels[index] - 0.5) / 0.5, "labels": int(self.labels[index])}


@pytest.fixture
def make_trainer(tmp_path, processor):
    """A trainer on tiny data: L-inf 8/255, constant epsilon, two PGD steps.

    What is computed in two ways is compared in float64, with `model.double()`: in float32 the sign of an L-inf step
    (and the first steps of Adam) make a whole step out of a rounding error, on one processor and not on another.
    """

    def make(model="vit", count=32, trainer_class=RobustTrainer, trainer_options=None, **args):
        defaults = {
            "output_dir": str(tmp_path / "output"),
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "per_device_train_batch_size": 8,
            "epsilon": "8/255",
            "attack": "pgd",
            "attack_steps": 2,
            "eval_attack_steps": 2,
            "epsilon_schedule_type": "constant",
            "save_strategy": "no",
            "logging_steps": 1,
        }
        model = make_model(model) if isinstance(model, str) else model
        dtype = torch.float32 if model is None else next(model.parameters()).dtype  # None: made by `model_init`
        datasets = {"train_dataset": Images(count, dtype=dtype), "eval_dataset": Images(13, seed=1, dtype=dtype)}
        options = {**datasets, "processing_class": processor}
        return trainer_class(
            model=model,
            args=RobustTrainingArguments(**{**defaults, **args}),
            **{**options, **(trainer_options or {})},
        )

    return make


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that pushes of this process go to: the process that uploads reads the environment anew."""
    with HubServer() as hub:
        for name, value in hub.environment(tmp_path / "home", WRITE_TOKEN).items():
            monkeypatch.setenv(name, value)
        yield hub
