import random
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import timm
import torch
from conftest import SIZE, Images, make_model
from PIL import Image
from torch import nn
from transformers import AutoModelForImageClassification, ResNetConfig, ViTConfig, ViTImageProcessor

from hf_rft import PixelNormalization, ThreatModel, evaluate_robustness
from hf_rft.attacks import apgd
from hf_rft.evaluation import evaluator, flags, subject
from hf_rft.models.folding import folded_weights
from hf_rft.threat_model import NORMS


SHAPE = (3, 4, 5)
GRID = ["0", "2/255", "8/255", "32/255"]


class TensorImages(torch.utils.data.Dataset):
    """Images given as pixels in [0, 1], normalised with mean and std 0.5."""

    def __init__(self, pixels, labels):
        self.pixel_values, self.labels = (pixels - 0.5) / 0.5, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index], "labels": int(self.labels[index])}


class LinearClassifier(nn.Module):
    """A float64 model whose distances are known, and 12 examples of which it gets every fourth wrong."""

    def __init__(self, classes=4, shape=SHAPE, seed=0, count=12, outputs="tensor"):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.outputs, self.scale = outputs, 1.0
        self.pixels = 0.4 + 0.2 * torch.rand((count, *shape), generator=generator, dtype=torch.float64)
        weight = torch.randn((classes, self.pixels[0].numel()), generator=generator, dtype=torch.float64)
        self.linear = nn.Linear(weight.shape[1], classes, dtype=torch.float64)
        self.linear.weight.data = weight
        self.linear.bias.data = -((2 * self.pixels - 1).flatten(1) @ weight.T).mean(dim=0)
        logits = self.logits((self.pixels - 0.5) / 0.5).detach()
        self.labels = logits.argmax(dim=1)
        self.labels[::4] = (self.labels[::4] + 1) % classes
        self.lead = logits.gather(1, self.labels.unsqueeze(1)) - logits
        self.eval()

    def logits(self, pixel_values):
        return self.scale * self.linear(pixel_values.flatten(1))

    def forward(self, pixel_values):
        logits = self.logits(pixel_values)
        return {"tensor": logits, "logits": SimpleNamespace(logits=logits), "dict": {"logits": logits}}[self.outputs]

    def images(self):
        return TensorImages(self.pixels, self.labels)

    def distances(self, norm):
        """The margin to each class over the dual norm of the difference of the weights, which act on `2 p - 1`."""
        weight = 2 * self.linear.weight.detach()
        dual = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
        slope = torch.linalg.vector_norm(weight[self.labels].unsqueeze(1) - weight, ord=dual, dim=2)
        nearest = (self.lead / slope.clamp_min(1e-12)).scatter(1, self.labels.unsqueeze(1), torch.inf).amin(dim=1)
        assert nearest.max() < 0.4  # the box does not bind
        return nearest.clamp_min(0).numpy()


@pytest.fixture(autouse=True)
def quick_checks(monkeypatch):
    """Trust checks have tests of their own; here their long random search need not be long."""
    monkeypatch.setattr(flags, "SQUARE_STEPS", 10)


@pytest.fixture
def linear():
    return LinearClassifier()


def square_processor(size=SIZE, **options):
    return ViTImageProcessor(
        **{"size": {"height": size, "width": size}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **options}
    )


def evaluate(model, dataset=None, processor=None, **options):
    """`evaluate_robustness` with attacks that are quick."""
    defaults = {"norm": "linf", "epsilons": GRID, "tier": [("apgd", 5)], "progress_bar": False}
    dataset = model.images() if dataset is None else dataset
    return evaluate_robustness(model, dataset, processor or square_processor(), **{**defaults, **options})


def numbers(report):
    """What must be equal where only the way to it differed."""
    columns = (report.labels, report.clean_predictions, report.adversarial_predictions, report.broken_at)
    return [column.tolist() for column in (*columns, report.distances)]


def picture_dataset(model=None, processor=None, count=8, size=(20, 18), mode="RGB", classes=4):
    """Images in a `datasets.Dataset`; labelled as the model predicts, but for the first, or at random."""
    generator = np.random.default_rng(0)
    bands = {"RGB": 3, "L": 1}[mode]
    arrays = generator.integers(0, 256, (count, *size, bands)).astype(np.uint8)
    images = [Image.fromarray(array if mode == "RGB" else array[:, :, 0]) for array in arrays]
    labels = generator.integers(0, classes, count)
    if model is not None:
        with torch.no_grad():
            labels = model(processor(images, return_tensors="pt")["pixel_values"]).logits.argmax(dim=1).numpy()
        labels[0] = (labels[0] + 1) % classes
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)


def test_a_stream_is_evaluated_like_the_dataset(processor):
    model = make_model("vit").eval()
    dataset = picture_dataset(model, processor)
    options = {"norm": "linf", "epsilons": ["0", "1/255"], "tier": [("pgd", 2)], "progress_bar": False}
    expected = evaluate_robustness(model, dataset.take(5), processor, **options)
    report = evaluate_robustness(model, dataset.to_iterable_dataset(2).take(5), processor, **options)
    assert report.accuracies == expected.accuracies and report.accuracies[0] == 0.8
    assert report.settings["dataset"]["sha256"] == expected.settings["dataset"]["sha256"]


# --- The numbers ---


def between(distances):
    """A grid whose points lie in the wide gaps between the distances."""
    inner = np.sort(distances[distances > 0])
    ratios = inner[1:] / inner[:-1]
    gaps = np.sort(np.argsort(ratios)[-3:])
    assert ratios[gaps].min() > 1.1
    return [Fraction(0), *(Fraction(float(np.sqrt(inner[gap] * inner[gap + 1]))) for gap in gaps)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("classes", "outputs"), [(2, "tensor"), (3, "logits"), (4, "dict")])
def test_linear_classifier_of_known_distances(norm, classes, outputs):
    model = LinearClassifier(classes, outputs=outputs)
    true_distances = model.distances(norm)
    grid = between(true_distances)
    report = evaluate(model, norm=norm, epsilons=grid, tier=[("apgd", 20), ("fmn", 30)], batch_size=6)
    points = np.array([float(epsilon) for epsilon in grid])
    broken_at = np.searchsorted(points, true_distances)
    accuracies = (broken_at[:, None] > np.arange(len(grid))).mean(axis=0)

    assert len(report) == 12 and report.norm == norm and report.epsilons == grid
    assert report.labels.tolist() == model.labels.tolist()
    assert (report.clean_predictions != report.labels).tolist() == [index % 4 == 0 for index in range(12)]
    assert report.broken_at.tolist() == broken_at.tolist()
    assert report.per_example == [grid[index] if index < len(grid) else None for index in broken_at]
    assert report.accuracies == pytest.approx(accuracies.tolist())
    assert (report.clean_accuracy, report.robust_accuracy) == (report.accuracies[0], report.accuracies[-1]) != (1, 1)
    widths = np.diff(points) / points[-1]
    assert report.bracket == pytest.approx(((widths * accuracies[1:]).sum(), (widths * accuracies[:-1]).sum()))
    assert report.expected_robustness == pytest.approx(sum(report.bracket) / 2)

    found = report.distances
    assert (found[broken_at == 0] == 0).all() and np.isinf(found[broken_at == len(grid)]).all()
    is_broken = (broken_at > 0) & (broken_at < len(grid))
    assert 0 < is_broken.sum() < 9
    assert (found[is_broken] >= true_distances[is_broken] * (1 - 1e-6)).all()
    assert (found[is_broken] <= points[broken_at[is_broken]] * (1 + 1e-4)).all()
    assert (report.adversarial_predictions != report.labels).tolist() == (broken_at < len(grid)).tolist()


def test_distances_of_a_tier_are_close_to_the_true_ones(linear):
    """Where an example is broken, and might be broken nearer, a minimum-norm search follows."""
    report = evaluate(linear, epsilons=["0", "0.00001", "0.1"], tier="fast")
    assert report.robust_accuracy == 0 and set(report.broken_at.tolist()) == {0, 2}
    np.testing.assert_allclose(report.distances, linear.distances("linf"), rtol=0.01)
    assert report.expected_robustness_from_distances == pytest.approx(linear.distances("linf").mean() / 0.1, rel=0.01)


def test_settings_hold_what_the_numbers_depend_on(linear):
    epsilons = [0, "1/255", 0.05]
    report = evaluate(linear, epsilons=epsilons, tier=[("apgd", 3), (apgd, 4, 2)], seed=7, batch_size=5)
    settings = report.settings
    assert (settings["norm"], settings["epsilons"], settings["seed"]) == ("linf", ["0", "1/255", "0.05"], 7)
    assert (settings["tier"], settings["batch_size"], settings["autocast_dtype"]) == ("custom", 5, None)
    assert settings["attacks"] == [
        {"attack": "apgd", "steps": 3, "restarts": 1},
        {"attack": "apgd", "steps": 4, "restarts": 2},
    ]
    assert settings["model"]["name"] == "LinearClassifier" and len(settings["model"]["sha256"]) == 64
    assert settings["dataset"]["name"] is None and len(settings["dataset"]["sha256"]) == 64
    assert "image_mean=[0.5, 0.5, 0.5]" in settings["processor"]["source"]
    assert {"hf_rft", "torch", "transformers"} <= set(settings["versions"])


@pytest.mark.parametrize("tier", ["fast", "standard"])
def test_named_tier_is_recorded_with_its_attacks(linear, tier):
    report = evaluate(linear, tier=tier)
    attacks = [attack["attack"] for attack in report.settings["attacks"]]
    assert (report.settings["tier"], attacks) == (tier, ["apgd", "apgd_targeted"][: 1 if tier == "fast" else 2])
    assert all(attack["steps"] == 100 for attack in report.settings["attacks"])


def test_hash_of_the_data_is_of_the_data_alone(linear):
    first, second = evaluate(linear, batch_size=5), evaluate(linear, batch_size=4, seed=1)
    assert first.settings["dataset"]["sha256"] == second.settings["dataset"]["sha256"]


def test_hash_of_the_data_is_the_same_for_processors_that_only_normalise_otherwise():
    """So that models of different families can be compared."""
    dataset, seen = picture_dataset(count=4), []
    for mean, std in ((0.5, 0.5), (0.485, 0.229), (0.1, 1 / 3)):
        processor = square_processor(image_mean=[mean] * 3, image_std=[std] * 3)
        report = evaluate(make_model("vit").eval(), dataset, processor, tier=[("fgsm", 1)])
        seen.append(report.settings["dataset"])
    assert len({one["sha256"] for one in seen}) == 1 and seen[0]["image_shape"] == [3, SIZE, SIZE]
    other = dataset.map(lambda example: {"label": (example["label"] + 1) % 4})
    report = evaluate(make_model("vit").eval(), other, tier=[("fgsm", 1)])
    assert report.settings["dataset"]["sha256"] != seen[0]["sha256"]


def test_passes_are_counted(linear):
    """Where all are wrong already, a clean pass each, and none for attacks and checks."""
    wrong = TensorImages(linear.pixels, linear((linear.pixels - 0.5) / 0.5).argmin(dim=1))
    report = evaluate(linear, wrong, batch_size=5)
    assert report.clean_accuracy == 0 and tuple(report.passes) == (12, 0)
    attacked = evaluate(linear, batch_size=5)
    assert attacked.passes.forward > 12 and attacked.passes.backward > 0


def test_clean_accuracy_of_a_randomised_model_is_that_of_its_clean_predictions():
    """Whatever the attacks draw, an example that was right without a perturbation is right at epsilon 0."""

    class Randomised(LinearClassifier):
        def forward(self, pixel_values):
            logits = super().forward(pixel_values)
            return logits + 3 * torch.randn(logits.shape, dtype=logits.dtype)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        report = evaluate(Randomised(count=40), tier="fast", epsilons=["0", "0.01/255", "1/255"])
    is_right = report.clean_predictions == report.labels
    assert 0 < is_right.sum() < 40
    assert report.clean_accuracy == is_right.mean()
    assert "random_outputs" in report.flags


# --- Models and data of every usual form ---


@pytest.mark.parametrize("family", ["vit", "timm"])
def test_forms_of_a_dataset_give_the_same_report(family, processor):
    model = make_model(family).eval()
    pictures = picture_dataset(model, processor)

    def transform(examples):
        return {
            "pixel_values": processor(examples["image"], return_tensors="pt")["pixel_values"],
            "labels": examples["label"],
        }

    transformed = pictures.with_transform(transform)
    pixel_values = torch.stack([transformed[index]["pixel_values"] for index in range(len(pictures))])
    tensors = [{"pixel_values": x, "labels": y} for x, y in zip(pixel_values, pictures["label"], strict=True)]
    renamed = pictures.rename_columns({"image": "picture", "label": "kind"})
    reports = [evaluate(model, dataset, processor) for dataset in (pictures, transformed, tensors)]
    reports.append(evaluate(model, renamed, processor, image_column="picture", label_column="kind"))
    first = reports[0]
    assert first.clean_accuracy == 7 / 8 and first.robust_accuracy < 7 / 8
    assert first.accuracies == sorted(first.accuracies, reverse=True)
    for other in reports[1:]:
        assert numbers(other)[:4] == numbers(first)[:4]
        np.testing.assert_allclose(other.distances, first.distances, rtol=1e-4)
    assert first.settings["dataset"]["name"] is None
    assert first.settings["dataset"]["fingerprint"] == pictures._fingerprint
    assert reports[2].settings["dataset"]["fingerprint"] is None


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes, processor):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=classes)
    model = AutoModelForImageClassification.from_config(config).eval()
    pictures = picture_dataset(model, processor, classes=classes)
    attacks = [("apgd", 5), ("apgd_targeted", 5), ("fmn", 5), ("square", 20)]
    report = evaluate(model, pictures, processor, tier=attacks)
    assert report.clean_accuracy == 7 / 8
    assert report.accuracies == sorted(report.accuracies, reverse=True) and report.robust_accuracy < 7 / 8
    assert set(report.adversarial_predictions.tolist()) <= set(range(classes))


class AnySize(nn.Module):
    """A plain convolutional network for images of any size."""

    def __init__(self, channels=3):
        super().__init__()
        torch.manual_seed(0)
        pooling = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.layers = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), *pooling, nn.Linear(8, 4))

    def forward(self, images):
        return self.layers(images)


@pytest.mark.parametrize("as_pair", [True, False])
def test_plain_module_with_mean_and_std_instead_of_a_processor(as_pair):
    model, dataset = AnySize().eval(), picture_dataset()
    mean, std = [0.5, 0.4, 0.3], [0.3, 0.4, 0.5]
    processor = square_processor(do_resize=False, image_mean=mean, image_std=std)
    expected = evaluate(model, dataset, processor)
    report = evaluate(model, dataset, (mean, std) if as_pair else PixelNormalization(mean, std))
    assert numbers(report) == numbers(expected) and report.settings["dataset"] == expected.settings["dataset"]
    assert report.settings["model"] == expected.settings["model"]
    assert (report.settings["processor"]["mean"], report.settings["processor"]["std"]) == (mean, std)


def test_images_have_as_many_channels_as_the_mean_has_values():
    report = evaluate(AnySize(channels=1).eval(), picture_dataset(), (0.5, 0.5))
    assert report.settings["dataset"]["image_shape"] == [1, 20, 18]


def test_timm_model_with_its_own_transform():
    model = timm.create_model("test_resnet", num_classes=4).eval()
    config = timm.data.resolve_model_data_config(model)
    prepare = timm.data.create_transform(**{**config, "input_size": (3, SIZE, SIZE)})
    dataset = picture_dataset(count=4).with_transform(
        lambda batch: {"pixel_values": [prepare(image) for image in batch["image"]], "label": batch["label"]}
    )
    report = evaluate(model, dataset, (config["mean"], config["std"]))
    assert report.settings["dataset"]["image_shape"] == [3, SIZE, SIZE]
    assert report.settings["model"]["name"] == "ResNet" and len(report) == 4


@pytest.mark.parametrize("batch_size", [1, 2])
def test_images_of_several_sizes_are_refused_before_any_attack(batch_size, monkeypatch):
    monkeypatch.setattr(evaluator, "find_breaking_points", refuse)
    sizes = [(20, 18), (20, 18), (16, 16)] if batch_size == 1 else [(20, 18), (16, 16)]
    images = [Image.new("RGB", size) for size in sizes]
    dataset = datasets.Dataset.from_dict({"image": images, "label": [0] * len(images)})
    with pytest.raises(ValueError, match=r"\(3, 16, 16\).*; resize them to one size, that of the model"):
        evaluate(AnySize().eval(), dataset, ([0.5] * 3, 0.5), batch_size=batch_size)


def check_shown(report, model, processor):
    """The adversarial examples that a report shows are what it says they are."""
    shown = report.examples
    normalization = PixelNormalization.from_processor(processor)
    with torch.no_grad():
        logits = model(normalization.from_pixels(shown.adversarial)).logits
    labels = torch.from_numpy(report.labels[shown.positions])
    true = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(dim=1)
    assert (others > true - 1e-6).all()
    assert (shown.logits.argmax(dim=1) == labels).all()
    torch.testing.assert_close(shown.adversarial_logits, logits)
    assert shown.adversarial.min() >= 0 and shown.adversarial.max() <= 1
    distances = ThreatModel(report.norm, 0).distance(shown.adversarial, shown.pixels).double().numpy()
    np.testing.assert_allclose(distances, report.distances[shown.positions], rtol=1e-5)
    grid = np.array([float(epsilon) for epsilon in report.epsilons])
    broken_at = report.broken_at[shown.positions]
    assert (distances <= grid[broken_at] * (1 + 1e-4)).all() and (distances >= grid[broken_at - 1] * (1 - 1e-4)).all()


@pytest.mark.parametrize(
    ("config", "processor", "mode"),
    [
        (
            ViTConfig(
                image_size=(16, 24),
                patch_size=8,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                num_labels=4,
                num_channels=1,
            ),
            ViTImageProcessor(size={"height": 16, "width": 24}, image_mean=[0.3], image_std=[0.2]),
            "L",
        ),
        (
            ResNetConfig(
                num_channels=3,
                embedding_size=8,
                hidden_sizes=[8],
                depths=[1],
                layer_type="basic",
                num_labels=4,
            ),
            ViTImageProcessor(size={"height": 24, "width": 16}, image_mean=[0.2, 0.4, 0.6], image_std=[0.3, 0.2, 0.1]),
            "RGB",
        ),
    ],
    ids=["vit, one channel, wide", "resnet, high"],
)
def test_one_channel_and_images_that_are_not_square(config, processor, mode):
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config).eval()
    with torch.no_grad():  # as they are, tiny models hardly look at the image
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    pictures = picture_dataset(model, processor, mode=mode, size=(processor.size["height"], processor.size["width"]))
    report = evaluate(model, pictures, processor, epsilons=["0", "8/255", "64/255"], batch_size=3)
    assert report.clean_accuracy == 7 / 8 and report.robust_accuracy < 7 / 8
    exact = processor(pictures["image"][:], return_tensors="pt")["pixel_values"]
    assert report.examples.pixels.shape[1:] == exact.shape[1:]
    shown_pixels = PixelNormalization.from_processor(processor).to_pixels(exact)[report.examples.positions]
    torch.testing.assert_close(report.examples.pixels, shown_pixels)
    check_shown(report, model, processor)


def test_colour_images_become_grey_for_a_one_channel_model():
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    config.num_labels = 4
    model = AutoModelForImageClassification.from_config(config).eval()
    processor = square_processor(image_mean=[0.5], image_std=[0.5])
    colour = picture_dataset(count=4)
    grey = colour.map(lambda example: {"image": example["image"].convert("L")})
    reports = [evaluate(model, dataset, processor) for dataset in (colour, grey)]
    assert numbers(reports[0]) == numbers(reports[1])


def test_channels_last_changes_nothing(processor):
    model = make_model("resnet").double().eval()
    pictures = picture_dataset(make_model("resnet").eval(), processor)
    contiguous = evaluate(model, pictures, processor)
    channels_last = evaluate(model.to(memory_format=torch.channels_last), pictures, processor)
    assert contiguous.robust_accuracy < contiguous.clean_accuracy == 7 / 8
    assert numbers(channels_last)[:4] == numbers(contiguous)[:4]
    np.testing.assert_allclose(channels_last.distances, contiguous.distances, rtol=1e-4)
    assert channels_last.settings["model"]["sha256"] == contiguous.settings["model"]["sha256"]


def conv_formats_seen(model):
    """Whether the weight of the first convolution was channels_last, pass by pass."""
    convolution = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
    seen = []
    convolution.register_forward_hook(
        lambda part, *_: seen.append(part.weight.is_contiguous(memory_format=torch.channels_last))
    )
    return seen, convolution.weight


@pytest.mark.parametrize("family", ["resnet", "timm", "vit"])
def test_convolutions_run_channels_last_on_a_cpu_and_get_their_format_back(family, processor):
    """However the model was loaded, the report is the same to the last bit."""
    pictures = picture_dataset(make_model(family).eval(), processor)
    reports = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = make_model(family).eval().to(memory_format=memory_format)
        seen, weight = conv_formats_seen(model)
        before = weight.data_ptr(), weight.stride()
        reports.append(evaluate(model, pictures, processor))
        assert len(seen) > 10 and all(seen)
        assert (weight.data_ptr(), weight.stride()) == before
    assert reports[0].to_dict() == reports[1].to_dict()
    assert reports[0].robust_accuracy < reports[0].clean_accuracy


class FlattensWithView(nn.Module):
    """What many write by hand; `view` cannot take channels_last images."""

    def __init__(self):
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8 * 7 * 7, 4)

    def forward(self, pixel_values):
        features = self.convolution(pixel_values).relu()
        return self.head(features.view(len(features), -1))


def test_model_that_cannot_run_channels_last_keeps_its_format():
    torch.manual_seed(0)
    model = FlattensWithView().eval()
    seen, weight = conv_formats_seen(model)
    report = evaluate(model, Images(6))
    assert seen[0] and not any(seen[1:])  # one trial
    assert weight.is_contiguous() and len(report) == 6
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        model.to(memory_format=torch.channels_last)(torch.rand(2, 3, SIZE, SIZE))


@pytest.mark.parametrize("family", ["vit", "timm"])
def test_what_is_crafted_under_autocast_fools_in_float32(family, processor):
    model = make_model(family).eval()
    pictures = picture_dataset(model, processor)
    seen = []
    handle = model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    report = evaluate(model, pictures, processor, autocast_dtype=torch.bfloat16)
    handle.remove()
    assert {True, False} == set(seen) and report.settings["autocast_dtype"] == "bfloat16"
    assert report.clean_accuracy == 7 / 8
    check_shown(report, model, processor)


class WrongUnderAutocast(LinearClassifier):
    """Half precision may predict anything: here always a wrong class."""

    def forward(self, pixel_values):
        logits = super().forward(pixel_values)
        return logits.roll(1, dims=1) if torch.is_autocast_enabled("cpu") else logits


def test_half_precision_that_errs_changes_no_number():
    """Where what half precision claims is not true, the model's own precision is attacked."""
    exact = evaluate(LinearClassifier(), tier=[("apgd", 20), ("apgd_targeted", 20)])
    report = evaluate(WrongUnderAutocast(), tier=[("apgd", 20), ("apgd_targeted", 20)], autocast_dtype=torch.bfloat16)
    assert report.accuracies == exact.accuracies and report.robust_accuracy < report.clean_accuracy
    is_broken = np.isfinite(report.distances)
    assert (report.distances >= LinearClassifier().distances("linf") * (1 - 1e-6))[is_broken].all()


def with_own_statistics(model):
    """As after training: BatchNorm neither centred nor of unit variance."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = 0.1 * torch.randn(module.num_features, generator=generator)
            module.running_var = 0.5 + torch.rand(module.num_features, generator=generator)
    return model


@pytest.mark.parametrize("family", ["resnet", "timm"])
def test_attacks_run_without_batch_norm_and_the_result_is_the_same(family, processor, monkeypatch):
    model = with_own_statistics(make_model(family)).eval()
    dataset, calls = picture_dataset(model, processor), Counter()
    normalise = torch.nn.functional.batch_norm

    def counted(*args, **options):
        calls[is_folded] += 1
        return normalise(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "batch_norm", counted)
    is_folded = True
    folded = evaluate(model, dataset, processor, tier=[("apgd", 20)])
    is_folded = False
    monkeypatch.setattr(subject, "folded_weights", lambda pairs: {})
    plain = evaluate(model, dataset, processor, tier=[("apgd", 20)])
    assert numbers(folded) == numbers(plain)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert calls[False] - calls[True] >= 20 * norms > 0, "the steps of the attack"


def test_folding_that_errs_changes_no_number(processor, monkeypatch):
    """Whatever fools the folded model counts only if it fools the model."""
    model = with_own_statistics(make_model("resnet")).eval()
    dataset, tier = picture_dataset(model, processor), [("apgd", 5)]
    expected = evaluate(model, dataset, processor, tier=tier)

    def wrong(pairs):
        return {pair: (nn.Parameter(-weight, False), bias) for pair, (weight, bias) in folded_weights(pairs).items()}

    monkeypatch.setattr(subject, "folded_weights", wrong)
    found = evaluate(model, dataset, processor, tier=tier)
    assert found.clean_accuracy == expected.clean_accuracy > found.robust_accuracy
    adversarial = found.examples.adversarial
    predicted = model.eval()((adversarial - 0.5) / 0.5).logits.argmax(dim=1)
    assert (predicted.numpy() != found.labels[found.examples.positions]).all()


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(5, 64, [5]), (63, 1, [1] * 63), (64, 1, [2] * 32), (64, 2, [2] * 32), (3000, 5, [40] * 75)],
)
def test_groups_of_batches(count, batch_size, sizes):
    groups = subject.groups_of_batches(count, batch_size)
    assert [len(group) for group in groups] == sizes
    assert [position for group in groups for position in group] == list(range(count))


def test_groups_of_batches_change_nothing_in_float64(processor, tmp_path, monkeypatch):
    model = make_model("resnet").double().eval()
    pictures = picture_dataset(make_model("resnet").eval(), processor, count=17)
    monkeypatch.setattr(subject, "FEWEST_GROUPS", 8)
    one, grouped = (evaluate(model, pictures, processor, batch_size=size, cache_dir=tmp_path) for size in (64, 1))
    assert numbers(one)[:4] == numbers(grouped)[:4] and one.table() == grouped.table()
    assert len(list(tmp_path.iterdir())) == 1 + 9
    assert grouped.settings["batch_size"] == 1


def test_batch_size_changes_nothing_in_float64(processor):
    model = make_model("resnet").double().eval()
    pictures = picture_dataset(make_model("resnet").eval(), processor, count=5)
    reports = [evaluate(model, pictures, processor, batch_size=size, seed=3) for size in (1, 3, 64)]
    assert reports[0].robust_accuracy < reports[0].clean_accuracy
    for other in reports[1:]:
        assert other.table() == reports[0].table()
        assert numbers(other)[:4] == numbers(reports[0])[:4]
        np.testing.assert_allclose(other.distances, reports[0].distances, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_curve_starts_at_the_clean_accuracy_and_never_rises(batch_size, processor):
    model, images = make_model("resnet").eval(), Images(11)
    with torch.no_grad():
        pixel_values = torch.stack([images[index]["pixel_values"] for index in range(len(images))])
        predictions = model(pixel_values).logits.argmax(dim=1)
    report = evaluate(model, images, processor, batch_size=batch_size)
    assert report.clean_predictions.tolist() == predictions.tolist()
    assert (report.broken_at > 0).tolist() == (predictions == images.labels).tolist()
    assert report.accuracies[0] == report.clean_accuracy == (predictions == images.labels).double().mean().item()
    assert report.accuracies == sorted(report.accuracies, reverse=True)


# --- The model is as it was ---


def state_of(model):
    modes = [part.training for part in model.modules()]
    parameters = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return modes, parameters, weights, [(p.data_ptr(), p.stride()) for p in model.parameters()]


def generator_states():
    numpy_state = np.random.get_state()
    return torch.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2], random.getstate()


def check_same(before, after):
    assert after[0] == before[0] and after[3] == before[3]
    for (flag, gradient), (flag_before, gradient_before) in zip(after[1], before[1], strict=True):
        assert flag == flag_before
        assert (gradient is None) == (gradient_before is None)
        assert gradient is None or torch.equal(gradient, gradient_before)
    for name, tensor in before[2].items():
        assert torch.equal(after[2][name], tensor), name


@pytest.mark.parametrize("interrupted", [False, True])
def test_model_and_random_state_are_left_alone(interrupted, processor, monkeypatch):
    model = make_model("timm")
    for number, part in enumerate(model.modules()):
        part.training = number % 3 == 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
        parameter.grad = torch.full_like(parameter, 0.5) if number % 4 == 0 else None
    before, generators = state_of(model), generator_states()
    assert {True, False} == set(before[0])
    if interrupted:
        monkeypatch.setattr(evaluator, "find_breaking_points", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, Images(6), processor)
    else:
        report = evaluate(model, Images(6), processor, tier=[("apgd", 3), ("fmn", 3), ("square", 10)])
        assert set(report.flags) >= {"train_mode"}
    check_same(before, state_of(model))
    assert generator_states() == generators


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("family", ["vit", "timm"])
def test_model_in_training_mode_gives_the_same_numbers_and_a_flag(family, processor):
    pictures = picture_dataset(make_model(family).eval(), processor)
    evaluated = evaluate(make_model(family).eval(), pictures, processor)
    trained = evaluate(make_model(family).train(), pictures, processor)
    assert numbers(trained) == numbers(evaluated) and trained.passes == evaluated.passes
    assert set(trained.flags) - set(evaluated.flags) == {"train_mode"}
    assert set(evaluated.flags) <= set(trained.flags)
    assert evaluated.robust_accuracy < evaluated.clean_accuracy


# --- Cache ---


@pytest.fixture
def attacked(monkeypatch):
    """The positions of every batch that is attacked."""
    batches, find = [], evaluator.find_breaking_points

    def recorded(*args, positions, **kwargs):
        batches.append(list(positions))
        return find(*args, positions=positions, **kwargs)

    monkeypatch.setattr(evaluator, "find_breaking_points", recorded)
    return batches


def refuse(*args, **kwargs):
    raise AssertionError("an attack was run")


def test_second_run_attacks_nothing_and_returns_the_same(linear, tmp_path, monkeypatch):
    options = {"cache_dir": tmp_path / "new" / "cache", "batch_size": 5, "tier": "fast"}
    first = evaluate(linear, **options)
    without_cache = evaluate(linear, batch_size=5, tier="fast")
    monkeypatch.setattr(evaluator, "find_breaking_points", refuse)
    second = evaluate(linear, **options)
    assert second.to_dict() == first.to_dict() == without_cache.to_dict()
    for ours, theirs in zip(second.examples, first.examples, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_cache_holds_tensors_only(linear, tmp_path):
    evaluate(linear, cache_dir=tmp_path, batch_size=5)
    files = list(tmp_path.iterdir())
    assert len(files) == 3 and {file.suffix for file in files} == {".safetensors"}


def test_interrupted_run_goes_on_where_it_was(linear, tmp_path, attacked, monkeypatch):
    undisturbed = evaluate(linear, batch_size=3)
    attacked.clear()
    recorded = evaluator.find_breaking_points

    def until_second_batch(*args, **kwargs):
        return interrupt() if len(attacked) == 1 else recorded(*args, **kwargs)

    monkeypatch.setattr(evaluator, "find_breaking_points", until_second_batch)
    with pytest.raises(KeyboardInterrupt):
        evaluate(linear, batch_size=3, cache_dir=tmp_path)
    assert attacked == [[0, 1, 2]] and len(list(tmp_path.iterdir())) == 1

    monkeypatch.setattr(evaluator, "find_breaking_points", recorded)
    resumed = evaluate(linear, batch_size=3, cache_dir=tmp_path)
    assert attacked == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert resumed.to_dict() == undisturbed.to_dict()


def other_weights(model):
    with torch.no_grad():
        model.linear.weight[0, 0] += 1e-6
    return {}


def other_structure(model):
    model.unused = nn.Identity()
    return {}


def other_order(model):
    order = torch.arange(len(model.labels)).roll(1)
    return {"dataset": TensorImages(model.pixels[order], model.labels[order])}


def other_labels(model):
    labels = model.labels.clone()
    labels[-1] = (labels[-1] + 1) % 4
    labels[0] = (labels[0] + 1) % 4
    return {"dataset": TensorImages(model.pixels, labels)}


@pytest.mark.parametrize(
    "change",
    [
        other_weights,
        other_structure,
        other_order,
        other_labels,
        lambda model: {"seed": 1},
        lambda model: {"epsilons": GRID[:-1]},
        lambda model: {"norm": "l2"},
        lambda model: {"tier": [("apgd", 6)]},
        lambda model: {"tier": "fast"},
        lambda model: {"tier": [("apgd", 5, 2)]},
        lambda model: {"autocast_dtype": torch.bfloat16},
        lambda model: {"processor": square_processor(image_mean=[0.5, 0.5, 0.5], image_std=[0.4] * 3)},
    ],
    ids="weights structure order labels seed epsilons norm steps tier restarts autocast processor".split(),
)
def test_other_evaluations_in_the_same_folder_are_never_read(linear, tmp_path, attacked, change):
    options = {"batch_size": 6, "cache_dir": tmp_path}
    first = evaluate(linear, **options)
    changed = change(linear)
    attacked.clear()
    other = evaluate(linear, **options, **changed)
    assert attacked == [list(range(6)), list(range(6, 12))]
    assert other.to_dict() == evaluate(linear, batch_size=6, **changed).to_dict() != first.to_dict()
    assert len(list(tmp_path.iterdir())) == 4


def test_same_images_normalised_otherwise_are_another_evaluation(tmp_path, attacked, caplog):
    """Black and white, so that the pixels are the same to the last bit."""
    model = LinearClassifier(shape=(3, SIZE, SIZE))
    pixels = torch.rand((12, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.float64).round()
    processors = [square_processor(), square_processor(image_mean=[0.0] * 3, image_std=[1.0] * 3)]
    images = [TensorImages(pixels, model.labels), TensorImages(pixels / 2 + 0.5, model.labels)]
    runs = [(model, dataset, processor) for dataset, processor in zip(images, processors, strict=True)]
    reports = [evaluate(*run, cache_dir=tmp_path) for run in (*runs, *runs)]
    assert len(attacked) == 2 and not caplog.records
    assert reports[2].to_dict() == reports[0].to_dict() and reports[3].to_dict() == reports[1].to_dict()


def test_other_batch_size_is_another_file(linear, tmp_path, attacked):
    first = evaluate(linear, batch_size=6, cache_dir=tmp_path)
    attacked.clear()
    other = evaluate(linear, batch_size=4, cache_dir=tmp_path)
    assert len(attacked) == 3 and other.accuracies == first.accuracies


def test_other_code_with_the_same_weights_is_told_by_its_predictions(linear, tmp_path, attacked, caplog):
    evaluate(linear, cache_dir=tmp_path, batch_size=6)
    linear.scale = -1.0
    attacked.clear()
    other = evaluate(linear, cache_dir=tmp_path, batch_size=6)
    assert len(attacked) == 2 and caplog.text.count("is from a model with other predictions") == 2
    assert other.to_dict() == evaluate(linear, batch_size=6).to_dict()


def test_other_code_is_told_also_where_logits_are_small(linear, tmp_path, attacked):
    linear.scale = 1e-5
    evaluate(linear, cache_dir=tmp_path)
    linear.scale = -1e-5
    attacked.clear()
    evaluate(linear, cache_dir=tmp_path)
    assert len(attacked) == 1


@pytest.mark.parametrize("damage", [lambda old: old[: len(old) // 2], lambda old: b"no tensors", lambda old: b""])
def test_damaged_file_is_evaluated_again_with_a_warning(linear, tmp_path, attacked, caplog, damage):
    options = {"cache_dir": tmp_path, "batch_size": 6}
    first = evaluate(linear, **options)
    torn = sorted(tmp_path.iterdir())[0]
    torn.write_bytes(damage(torn.read_bytes()))
    attacked.clear()
    assert evaluate(linear, **options).to_dict() == first.to_dict()
    assert len(attacked) == 1 and f"{torn} cannot be read" in caplog.text
    evaluate(linear, **options)
    assert len(attacked) == 1 and len(list(tmp_path.iterdir())) == 2


# --- What is refused ---


class Returns(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, pixel_values):
        return self.outputs(pixel_values)


def pictures_with(**columns):
    return picture_dataset(count=4).remove_columns("label").add_column("label", columns["label"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilons": "8/255"}, r"`epsilons='8/255'` must be a list, for example \['0', '2/255', '4/255'\]"),
        ({"epsilons": ["1/255", "2/255"]}, r"`epsilons=\['1/255', '2/255'\]` must start with 0 and increase strictly"),
        ({"epsilons": ["0", "2/255", "2/255"]}, "must start with 0 and increase strictly"),
        ({"epsilons": ["0", "2/255", "1/255"]}, "must start with 0 and increase strictly"),
        ({"epsilons": [0]}, r"`epsilons=\['0'\]` must start with 0 and increase strictly, with at least two values"),
        ({"epsilons": []}, "must start with 0"),
        ({"epsilons": [0, -0.1]}, "`epsilon=-0.1` is negative"),
        ({"epsilons": [0, "eight"]}, "`epsilon='eight'` is not a number"),
        ({"epsilons": [0, 8]}, "`epsilon=8` is above 1, but pixels lie in .*; did you mean '8/255'"),
        ({"norm": "l0"}, r"`norm='l0'` is unknown; choose one of \['linf', 'l2', 'l1'\]"),
        ({"tier": "strong"}, r"`tier='strong'` is unknown; choose one of \['fast', 'lean', 'standard', 'full'\]"),
        ({"tier": []}, "`tier` is an empty list"),
        ({"tier": ["apgd"]}, "`tier` holds 'apgd'; an attack is given as"),
        ({"tier": [("apgd",)]}, r"`tier` holds \('apgd',\); an attack is given as \(attack, steps\)"),
        ({"tier": [("pdg", 5)]}, "`tier` holds the unknown attack 'pdg'; choose among"),
        ({"tier": [(3, 5)]}, "`tier` holds 3, which is not an attack"),
        ({"tier": [("apgd", 0)]}, "`tier` holds steps 0 for apgd; give a whole number from 1"),
        ({"tier": [("apgd", 5, 1.5)]}, "`tier` holds restarts 1.5 for apgd"),
        ({"batch_size": 0}, "`batch_size=0` must be a whole number from 1"),
        ({"batch_size": 2.0}, "`batch_size=2.0` must be a whole number from 1"),
        ({"model": lambda pixel_values: pixel_values}, "`model` must be a torch module, got function"),
        ({"model": Returns(lambda x: {"scores": x})}, "`model` returned no `logits`; an image classifier returns"),
        ({"model": Returns(lambda x: x)}, r"`model` returned logits of shape \(12, 3, 4, 5\)"),
        ({"model": Returns(lambda x: x.flatten(1)[:, :1])}, r"logits of shape \(12, 1\).*at least 2 classes"),
        ({"model": LinearClassifier(classes=2)}, "holds labels from 0 to 3, but the model has 2 classes"),
        ({"dataset": []}, "`dataset` is empty"),
        ({"dataset": iter([])}, "`dataset` is list_iterator, which cannot be indexed"),
        ({"dataset": picture_dataset().to_iterable_dataset().take(0)}, "a stream, cannot be read: .*no data"),
        ({"dataset": [(torch.zeros(SHAPE), 1)]}, "`dataset` returns tuple objects; an example must be a dictionary"),
        ({"dataset": [{"pixels": 0, "label": 1}]}, r"hold \['label', 'pixels'\], none of \['image', 'img'\]; name"),
        ({"dataset": [{"image": 0, "target": 1}]}, "none of .'labels', 'label'.; name the column with `label_column`"),
        ({"image_column": "picture"}, "`image_column='picture'` is not in the dataset's examples; they hold"),
        ({"label_column": "kind"}, r"`label_column='kind'` is not in .*; they hold \['labels', 'pixel_values'\]"),
        ({"dataset": pictures_with(label=[0.0, 1.0, 0.0, 1.0])}, "'label' must hold one class index per image, got"),
        ({"dataset": pictures_with(label=[[0], [1], [0], [1]])}, "'label' must hold one class index per image, got"),
        ({"dataset": pictures_with(label=[0, 1, -1, 0])}, "labels down to -1; negative ones mark unlabelled examples"),
        (
            {"processor": square_processor(image_mean=[0.2] * 3, image_std=[2.0] * 3)},
            r"image_std=\[2.0, 2.0, 2.0\].* is undone, but pixels must lie in \[0, 1\]",
        ),
        (
            {"processor": object()},
            "is not an image processor.*for a model of your own, for example `ViT",
        ),
        ({"processor": (0.5, 0.0)}, "PixelNormalization has `std=0.0`; standard deviations must be positive"),
    ],
)
def test_bad_arguments_are_refused_before_any_attack(linear, options, message, monkeypatch):
    monkeypatch.setattr(evaluator, "find_breaking_points", refuse)
    options = {"model": linear, "dataset": linear.images(), **options}
    if isinstance(options["dataset"], datasets.Dataset):
        options["model"] = LinearClassifier(shape=(3, SIZE, SIZE)).float()
    with pytest.raises(ValueError, match=message):
        evaluate(options.pop("model"), options.pop("dataset"), **options)


def test_unrelated_classes_are_refused_before_any_attack(processor, monkeypatch):
    monkeypatch.setattr(evaluator, "find_breaking_points", refuse)
    model = make_model("vit").eval()
    model.config.id2label = dict(enumerate(["T-shirt", "trouser", "pullover", "dress"]))
    pets = picture_dataset(classes=3).cast_column("label", datasets.ClassLabel(names=["cat", "dog", "owl"]))
    with pytest.raises(ValueError, match=r"The model has no classes \['cat', 'dog', 'owl'\].*\(`dataset`\).*int64"):
        evaluate(model, pets, processor)
    monkeypatch.undo()
    numbered = pets.cast_column("label", datasets.Value("int64"))
    assert len(evaluate(model, numbered, processor, tier=[("fgsm", 1)])) == 8


def test_bad_label_in_the_last_batch_is_refused_before_any_attack(linear, monkeypatch):
    monkeypatch.setattr(evaluator, "find_breaking_points", refuse)
    linear.labels[-1] = 4
    with pytest.raises(ValueError, match="examples 9 to 11. holds labels from 1 to 4, but the model has 4 classes"):
        evaluate(linear, batch_size=3)


def test_own_attack_is_run_and_named_but_not_cached(linear, tmp_path):
    def mine(forward, pixels, labels, *, early_stop=False, **options):
        return apgd(forward, pixels, labels, early_stop=early_stop, **options)

    report = evaluate(linear, tier=[(mine, 5)])
    assert numbers(report) == numbers(evaluate(linear))
    assert report.settings["attacks"] == [{"attack": "mine", "steps": 5, "restarts": 1}]
    with pytest.raises(ValueError, match="`cache_dir` cannot distinguish attacks of your own"):
        evaluate(linear, tier=[(mine, 5)], cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_own_attack_that_leaves_the_ball_is_refused(linear):
    def cheat(forward, pixels, labels, *, threat_model, steps, generator=None):
        return torch.zeros_like(pixels)

    with pytest.raises(ValueError, match="outside the linf ball"):
        evaluate(linear, tier=[(cheat, 1)])
