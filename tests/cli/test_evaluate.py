"""The recipe as a user runs it, on a small trained model with a folder of images, and on the bundled data."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, SIZE, make_model
from models.test_zero_shot import make_model as make_clip
from models.test_zero_shot import make_processor
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessor

from hf_rft import RobustnessReport
from hf_rft.cli import evaluate as recipe
from hf_rft.data import bundled
from hf_rft.evaluation import corruptions, evaluator, flags, reference


PNG = b"\x89PNG\r\n\x1a\n"
NAMES = ["dark", "middle", "bright", "unseen"]  # the model's order; folders are sorted by name


@pytest.fixture(autouse=True, scope="module")
def quick_checks():
    """Trust checks have tests of their own; here their long random search need not be long."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(flags, "SQUARE_STEPS", 10)
        yield


def save(model, folder, names=None):
    if names is not None:
        model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    model.save_pretrained(folder)
    if not hasattr(model, "timm_model"):  # timm's keep their processor in the configuration
        size = {"height": SIZE, "width": SIZE}
        ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model, trained to tell how bright an image is."""
    with torch.random.fork_rng():
        model = make_model("timm")
        labels = torch.randint(3, (96,))
        pixels = (80 * labels.reshape(-1, 1, 1, 1) + 60 * torch.rand((96, 1, SIZE, SIZE))) / 255
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(40):
            optimizer.zero_grad()
            F.cross_entropy(model((2 * pixels - 1).expand(-1, 3, -1, -1)).logits, labels).backward()
            optimizer.step()
    return save(model, tmp_path_factory.mktemp("model"), NAMES)


@pytest.fixture(scope="module")
def image_dir(tmp_path_factory):
    """Three classes of grey images, told apart by brightness."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for index, name in enumerate(NAMES[:3]):
        (folder / name).mkdir()
        for number in range(3):
            pixels = 80 * index + generator.integers(0, 60, (SIZE, SIZE))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return str(folder)


@pytest.fixture(scope="module")
def arguments(model, image_dir):
    return ["--model_name_or_path", model, "--image_dir", image_dir, "--epsilons", "0", "2/255", "64/255"]


@pytest.fixture(scope="module")
def default_run(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("default")
    return folder, recipe.main([*arguments, "--tier", "fast", "--output_dir", str(folder)])


def forbid_attacks(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an attack was run")

    monkeypatch.setattr(evaluator, "find_breaking_points", refuse)


def test_run_writes_everything(default_run):
    folder, report = default_run
    assert {path.name for path in folder.iterdir()} == {
        "robustness.json",
        "robustness_curve.png",
        "adversarial_examples.png",
        "cache",
    }
    assert RobustnessReport.load(folder / "robustness.json").to_dict() == report.to_dict()
    for name in ("robustness_curve.png", "adversarial_examples.png"):
        assert (folder / name).read_bytes().startswith(PNG)
    assert [path.suffix for path in (folder / "cache").iterdir()] == [".safetensors"]
    assert report.settings["tier"] == "fast" and report.settings["seed"] == 0
    assert len(report) == 9 and report.clean_accuracy == 1 and report.robust_accuracy < 1


def test_classes_are_found_by_name(default_run):
    """Folders in alphabetical order: bright, dark, middle."""
    _, report = default_run
    assert report.labels.tolist() == [2, 2, 2, 0, 0, 0, 1, 1, 1]


def test_same_command_again_reads_the_cache(default_run, arguments, monkeypatch, capsys):
    folder, first = default_run
    forbid_attacks(monkeypatch)
    again = recipe.main([*arguments, "--tier", "fast", "--output_dir", str(folder)])
    assert again.to_dict() == first.to_dict()
    printed = capsys.readouterr().out
    assert again.table() in printed and f"Written to {folder}" in printed


def test_by_number_other_labels_result(default_run, arguments, tmp_path):
    options = ["--match_labels", "index", "--tier", "fast", "--output_dir", str(tmp_path)]
    report = recipe.main([*arguments, *options])
    assert report.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert report.clean_accuracy == 0
    assert not (tmp_path / "adversarial_examples.png").exists()  # nothing was right, so nothing was broken


def test_options_reach_the_evaluation(arguments, tmp_path):
    options = ["--norm", "l2", "--channels_last", "True", "--autocast_dtype", "bfloat16", "--seed", "5"]
    options += ["--batch_size", "2", "--max_samples", "3", "--tier", "fast", "--output_dir", str(tmp_path)]
    report = recipe.main([*arguments[:-3], "0", "8", *options])
    settings = report.settings
    assert (report.norm, settings["tier"], settings["seed"], settings["batch_size"]) == ("l2", "fast", 5, 2)
    assert settings["autocast_dtype"] == "bfloat16" and settings["epsilons"] == ["0", "8"]
    assert len(report) == 3 and len(list((tmp_path / "cache").iterdir())) == 2


def test_profile(arguments, tmp_path, capsys):
    options = [*arguments, "--tier", "fast", "--max_samples", "4", "--profile", "--output_dir", str(tmp_path)]
    report = recipe.main(options)
    assert set(report.profile.norms) == {"l2", "l1"} and len(report.profile.corruptions) == 15
    assert (tmp_path / "robustness_profile.png").read_bytes().startswith(PNG)
    assert RobustnessReport.load(tmp_path / "robustness.json").to_dict() == report.to_dict()
    assert "Beyond that threat model:" in capsys.readouterr().out
    for norm in ("l2", "l1"):
        assert report.profile.norms[norm].settings["dataset"]["image_column"] == "image"


def test_profile_without_its_package_fails_before_anything_runs(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(corruptions, "PACKAGE", "a-package-that-is-missing")
    monkeypatch.setattr(recipe, "load_images", lambda args: pytest.fail("read the data first"))
    with pytest.raises(ImportError, match=r'pip install "hf_rft\[corruptions\]"'):
        recipe.main([*arguments, "--profile", "--output_dir", str(tmp_path / "new")])


def test_standard_is_the_default_tier(arguments):
    (args,) = recipe.parse_with_config((recipe.EvaluationArguments,), arguments)
    assert (args.tier, args.norm, args.match_labels, args.split, args.max_samples) == (
        "standard",
        "linf",
        "name",
        "test",
        None,
    )


@pytest.fixture(scope="module")
def other_models(tmp_path_factory):
    """Without names for ten and for four classes, and with the names of other classes."""
    folder = tmp_path_factory.mktemp("models")
    models = {}
    for name, count, names in (("ten", 10, None), ("four", 4, None), ("named", 4, NAMES)):
        config = CONFIGS["vit"]()
        config.num_labels = count
        with torch.random.fork_rng():
            torch.manual_seed(0)
            models[name] = save(AutoModelForImageClassification.from_config(config), folder / name, names)
    return models


def test_bundled_data(other_models, tmp_path):
    """The default. A model without names for its classes is taken to number them as the data does."""
    arguments = ["--model_name_or_path", other_models["ten"], "--epsilons", "0", "4/255", "--tier", "fast"]
    report = recipe.main([*arguments, "--max_samples", "4", "--seed", "2", "--output_dir", str(tmp_path)])
    test = datasets.load_dataset(bundled.resolve(bundled.DATASET), split="test")
    assert report.labels.tolist() == test.shuffle(seed=2).select(range(4))["label"][:]
    assert report.settings["dataset"]["split"] == "test"
    assert (tmp_path / "robustness.json").is_file()


def test_bundled_data_and_a_model_of_other_classes(other_models, tmp_path):
    arguments = ["--max_samples", "5", "--output_dir", str(tmp_path)]
    with pytest.raises(
        ValueError, match=r"The model has no classes \['T-shirt/top', .* are \['dark', 'middle'.*index"
    ):
        recipe.main(["--model_name_or_path", other_models["named"], *arguments])
    with pytest.raises(ValueError, match=r"holds labels from \d to \d, but the model has 4 classes"):
        recipe.main(["--model_name_or_path", other_models["four"], *arguments])


# --- Classes of the data and of the model ---


def relabelled(names_of_data, names_of_model, labels, match_labels="name"):
    feature = names_of_data if names_of_data is None else datasets.ClassLabel(names=names_of_data)
    features = datasets.Features({"label": feature or datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict({"label": labels}, features=features)
    model = SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(names_of_model))))
    args = SimpleNamespace(label_column_name="label", match_labels=match_labels)
    return recipe.with_model_labels(dataset, model, args)


@pytest.mark.parametrize(
    ("names_of_data", "names_of_model", "expected"),
    [
        (["a", "b", "c"], ["a", "b", "c"], [0, 1, 2, 1]),
        (["a", "b", "c"], ["c", "a", "b"], [1, 2, 0, 2]),
        (["c", "a", "b"], ["a", "b", "c", "d", "e"], [2, 0, 1, 0]),
        (["a", "b", "c"], ["a", "b", "c", "d"], [0, 1, 2, 1]),
        (["a", "b", "c"], ["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1, 2, 1]),
        (None, ["c", "b", "a"], [0, 1, 2, 1]),
    ],
    ids=["same", "other order", "subset", "first ones", "model unnamed", "data unnamed"],
)
def test_labels_are_those_of_the_model(names_of_data, names_of_model, expected):
    dataset = relabelled(names_of_data, names_of_model, [0, 1, 2, 1])
    assert dataset["label"][:] == expected
    if names_of_data is not None and "a" in names_of_model:
        names = [names_of_model[label] for label in dataset["label"]]
        assert names == [names_of_data[label] for label in [0, 1, 2, 1]]


def test_by_number_names_play_no_part():
    assert relabelled(["a", "b"], ["b", "a"], [0, 1], match_labels="index")["label"][:] == [0, 1]
    assert relabelled(["a", "b"], ["x", "y"], [0, 1], match_labels="index")["label"][:] == [0, 1]


def test_class_that_the_model_does_not_have():
    with pytest.raises(
        ValueError, match=r"The model has no classes \['d'\]; its classes are \['a', 'b', 'c'\] and so on"
    ):
        relabelled(["a", "d"], ["a", "b", "c"], [0, 1])


@pytest.mark.parametrize("names_of_model", [["crane", "stork", "crane"], ["crane", "stork", "crane", "tower", "bird"]])
def test_name_that_two_classes_of_the_model_have(names_of_model):
    """As in ImageNet, where a bird and a machine are called crane."""
    with pytest.raises(ValueError, match="crane.*--match_labels index"):
        relabelled(["crane", "stork"], names_of_model, [0, 1])


# --- AutoAttack as a reference ---


def test_reference(arguments, tmp_path, capsys):
    pytest.importorskip("pyautoattack")
    options = ["--tier", "fast", "--max_samples", "5", "--output_dir", str(tmp_path)]
    options += ["--reference", "autoattack", "--reference_attacks", "apgd-ce"]
    report = recipe.main([*arguments[:-3], "0", "64/255", *options])
    assert report.clean_accuracy == 1 and report.robust_accuracy < 1
    result = json.loads((tmp_path / "reference.json").read_text())
    assert result["attacks"] == ["apgd-ce"]
    assert list(result["accuracies"]) == list(result["agreement"]) == ["64/255"]
    theirs, agreement = result["accuracies"]["64/255"], result["agreement"]["64/255"]
    assert abs(report.robust_accuracy - theirs) <= 0.2 + 1e-6  # of five examples, one at the most
    assert agreement <= 1 - abs(report.robust_accuracy - theirs) + 1e-6
    printed = capsys.readouterr().out
    assert "AutoAttack (apgd-ce), on the same examples:" in printed
    assert (
        f"accuracy at 64/255   {100 * theirs:5.1f} %   (this report: {100 * report.robust_accuracy:.1f} %" in printed
    )


def test_reference_that_is_not_installed_is_missed_before_anything_runs(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(reference.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(recipe, "load_model_and_processor", None)
    with pytest.raises(ImportError, match="`pip install pyautoattack==0.2.0`"):
        recipe.main([*arguments, "--reference", "autoattack", "--output_dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


# --- Models that compare images with text ---


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    make_clip("clip").save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


def test_zero_shot_classes_are_those_of_the_data_by_number(clip, image_dir, tmp_path):
    """The folders, in alphabetical order, are called otherwise."""
    options = ["--model_name_or_path", clip, "--image_dir", image_dir, "--epsilons", "0", "32/255", "--tier", "fast"]
    report = recipe.main([*options, "--class_names", "cat", "dog", "red fox", "--output_dir", str(tmp_path)])
    assert report.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert report.settings["model"]["num_classes"] == 3
    processor, model = make_processor(), make_clip("clip")
    images = datasets.load_dataset("imagefolder", data_dir=image_dir, split="train")["image"]
    inputs = processor(
        text=["This is a photo of cat.", "This is a photo of dog.", "This is a photo of red fox."],
        images=[image.convert("RGB") for image in images],
        return_tensors="pt",
        padding=True,
    )
    assert report.clean_predictions.tolist() == model(**inputs).logits_per_image.argmax(dim=1).tolist()
    with pytest.raises(ValueError, match="--class_names holds 2 names, the data have 3 classes"):
        recipe.main([*options, "--class_names", "cat", "dog", "--output_dir", str(tmp_path / "new")])


def test_class_names_in_another_order_than_the_data_are_refused(clip, image_dir, tmp_path):
    """The folders are called bright, dark and middle."""
    options = ["--model_name_or_path", clip, "--image_dir", image_dir, "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=r"has 'dark' where the data have 'bright'; .*\['bright', 'dark', 'mid"):
        recipe.main([*options, "--class_names", "dark", "bright", "middle"])


def test_class_names_for_labels_that_are_text(clip):
    data = datasets.Dataset.from_dict({"label": ["dog", "cat", "dog"]})
    assert recipe.with_numbers_of(["cat", "dog"], data, "label")["label"][:] == [1, 0, 1]
    with pytest.raises(ValueError, match="has 'dog' where the data have 'cat'"):
        recipe.with_numbers_of(["dog", "cat"], data, "label")


def test_zero_shot_model_without_class_names_is_refused_with_the_remedy(clip, image_dir, tmp_path):
    options = ["--model_name_or_path", clip, "--image_dir", image_dir, "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="One that compares images with text needs `--class_names`"):
        recipe.main(options)


# --- What is refused ---


def test_images_without_class_folders_are_refused(model, image_dir, tmp_path):
    with pytest.raises(ValueError, match=r"--label_column_name 'label' is not a column .* \['image'\]"):
        recipe.main(["--model_name_or_path", model, "--image_dir", f"{image_dir}/dark", "--output_dir", str(tmp_path)])


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_info:
        recipe.main(["--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    for word in (
        "--model_name_or_path",
        "--epsilons",
        "--tier",
        "{fast,lean,standard,full}",
        "robustness.json",
        "cache/",
    ):
        assert word in printed
