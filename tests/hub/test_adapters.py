"""Adapters in folders: the base model that they name, and the evidence about both."""

import json
import shutil

import pytest
from conftest import Images, make_adapted, make_model
from published import save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTImageProcessor

from hf_rft import evaluate_robustness, load_robust_model
from hf_rft.cli import leaderboard
from hf_rft.hub import attach_report, push_folder
from hf_rft.hub.pretrained import ModelArguments, load_model, load_model_and_processor
from hf_rft.hub.safe_loading import base_of, load_classifier, load_config
from hf_rft.models.adapters import add_lora, saved_with_config


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A base model, and an adapter of it with its evidence, in two folders."""
    folder = tmp_path_factory.mktemp("adapter")
    save_model(folder / "base")
    base = AutoModelForImageClassification.from_pretrained(folder / "base")
    model = add_lora(base, r=2)
    with saved_with_config(model, folder / "adapter"):
        model.save_pretrained(folder / "adapter")
    processor = ViTImageProcessor.from_pretrained(folder / "base")
    processor.save_pretrained(folder / "adapter")
    grid = {"norm": "linf", "epsilons": ["0", "8/255"], "tier": [("pgd", 2)]}
    report = evaluate_robustness(model.eval(), Images(8), processor, **grid, progress_bar=False)
    attach_report(folder / "adapter", report)
    return folder


@pytest.fixture
def adapter(original, tmp_path):
    """A copy that may be damaged, like that of the base model beside it."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    attach_report(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_the_evidence_names_adapter_and_base(original):
    model = load_robust_model(original / "adapter").report.settings["model"]
    assert list(model["files"]) == ["adapter_model.safetensors", "adapter_config.json"]
    assert model["base"]["name"] == "base" and list(model["base"]["files"]) == ["model.safetensors"]
    assert str(original) not in json.dumps(model)


def test_another_base_model_is_refused(adapter):
    make_model("vit", seed=1).save_pretrained(adapter.parent / "base")
    with pytest.raises(
        ValueError, match="The base model base of the adapter .* has weights with the SHA-256 .* changed"
    ):
        load_robust_model(adapter)


def test_another_adapter_is_refused(adapter):
    make_adapted("vit", seed=5).save_pretrained(adapter)
    with pytest.raises(ValueError, match="adapter_model.safetensors of .* has the SHA-256"):
        load_robust_model(adapter)


def test_a_changed_strength_of_the_adapter_is_refused(adapter):
    """It changes the logits, though no weight."""
    edit(adapter / "adapter_config.json", lora_alpha=400)
    with pytest.raises(ValueError, match="adapter_config.json of .* has the SHA-256"):
        load_robust_model(adapter)
    with pytest.raises(ValueError, match="The report is about the model"):
        attach_report(adapter)


def test_evidence_without_a_base_model_is_refused(adapter):
    report = json.loads((adapter / "robustness.json").read_text())
    del report["settings"]["model"]["base"]
    (adapter / "robustness.json").write_text(json.dumps(report))
    with pytest.raises(
        ValueError, match="does not say which base model was evaluated with it. `hf_rft.hub.attach_report`"
    ):
        load_robust_model(adapter)
    attach_report(adapter)
    load_robust_model(adapter)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"base_model_name_or_path": "no/such"},
            "The base model 'no/such' of the adapter .* cannot be loaded: no/such is not a",
        ),
        ({"base_model_name_or_path": None}, "has no `base_model_name_or_path`; write there which model"),
        ({"peft_type": "SHADOW"}, r"adapter of the kind 'SHADOW'; only \['IA3', 'LORA'\] are loaded. Merge it"),
        ({"peft_type": None}, "adapter of the kind None"),
        ({"r": 3}, "cannot be loaded; save it again, .*RuntimeError: .*size mismatch"),
        ({"base_model_name_or_path": "."}, "is an adapter itself; merge it first"),
    ],
)
def test_a_base_model_that_cannot_be_used(adapter, monkeypatch, entries, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(adapter)
    edit(adapter / "adapter_config.json", **entries)
    with pytest.raises(ValueError, match=message):
        load_classifier(adapter, load_config(adapter))


def test_a_damaged_configuration(adapter):
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is damaged .JSONDecodeError"):
        base_of(adapter)


def test_an_adapter_in_a_pickle_is_not_loaded(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="has no adapter_model.safetensors; weights in pickles are not loaded"):
        load_classifier(adapter, load_config(adapter))


def test_a_head_that_nobody_trained_is_not_made_up(adapter):
    """The adapter was saved without its head, and the base model has other classes."""
    base = AutoModelForImageClassification.from_pretrained(
        adapter.parent / "base", num_labels=7, ignore_mismatched_sizes=True
    )
    base.save_pretrained(adapter.parent / "base")
    edit(adapter / "adapter_config.json", modules_to_save=None)
    with pytest.raises(ValueError, match=r"the weights \['.*classifier.*'\] would be random .*with its head"):
        load_classifier(adapter, load_config(adapter))


@pytest.mark.parametrize("part", ["lora_A", "classifier"])
def test_an_adapter_that_lacks_weights_is_refused(adapter, part):
    path = adapter / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if part not in name}, path)
    with pytest.raises(ValueError, match=rf"would be random or left out|cannot be loaded; save.*\(KeyError: .*{part}"):
        load_classifier(adapter, load_config(adapter))


def test_two_models_in_one_folder_are_refused(adapter):
    make_model("vit").save_pretrained(adapter)
    with pytest.raises(ValueError, match="holds both a whole model .*and an adapter"):
        load_robust_model(adapter)


def test_a_base_model_with_other_classes_gets_those_of_the_adapter(adapter):
    base = AutoModelForImageClassification.from_pretrained(
        adapter.parent / "base", num_labels=7, ignore_mismatched_sizes=True
    )
    base.save_pretrained(adapter.parent / "base")
    model, found = load_classifier(adapter, load_config(adapter), output_loading_info=True)
    assert model.config.num_labels == 4 and not found["missing_keys"]


def test_an_adapter_of_a_local_model_is_not_pushed(adapter):
    with pytest.raises(ValueError, match="an adapter of the base model .*, which is not on the Hub; push the merged"):
        push_folder(adapter, "user/x")


def test_a_base_model_in_a_folder_is_found_from_anywhere(adapter, monkeypatch):
    monkeypatch.chdir(adapter.parent)
    _, model = load_model(ModelArguments(model_name_or_path="base", lora_r=2), list("abcd"))
    assert model.peft_config["default"].base_model_name_or_path == str(adapter.parent / "base")


def test_fine_tuning_starts_from_whole_models_only(adapter):
    with pytest.raises(ValueError, match="is an adapter; merge it into its base model"):
        load_model(ModelArguments(model_name_or_path=str(adapter)), list("abcdefg"))


def test_the_card_and_the_name_are_the_adapters(adapter):
    """Also when the report is attached again, by somebody who knows nothing of the training."""
    card = (adapter / "README.md").read_text()
    assert "load_robust_model(" in card and "pipeline(" not in card and str(adapter.parent) not in card
    model, processor = load_model_and_processor("--model", str(adapter), revision="main")
    report = evaluate_robustness(model, Images(4), processor, norm="linf", epsilons=["0", "8/255"], tier=[("pgd", 1)])
    assert report.settings["model"]["name"] == "adapter"


def test_a_leaderboard_looks_at_the_base_model(adapter, tmp_path, capsys):
    entries = [str(adapter), "--output_dir", str(tmp_path / "board")]
    leaderboard.main(entries)
    assert "adapter" in capsys.readouterr().out
    make_model("vit", seed=1).save_pretrained(adapter.parent / "base")
    with pytest.raises(SystemExit, match="The base model base of the adapter .* changed since"):
        leaderboard.main(entries)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora_alpha": 4.0}, "--lora_alpha 4.0 has no effect without --lora_r; set it"),
        ({"lora_target_modules": ["a"]}, "--lora_target_modules .* has no effect without --lora_r"),
        ({"lora_r": 0}, "--lora_r 0 must be"),
        ({"lora_r": 2, "lora_dropout": 1.5}, "--lora_dropout 1.5 must"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments(**arguments)
