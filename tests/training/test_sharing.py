"""The model card of `RobustTrainer`, and its pushes to the Hub of hub_server.py."""

import errno
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Images, weights
from datasets import DatasetInfo
from hub_server import WRITE_TOKEN
from huggingface_hub import ModelCard, snapshot_download
from peft import PeftModel
from published import save_model
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback

from hf_rft import RobustTrainer, evaluate_robustness, load_robust_model
from hf_rft.hub.evidence import attach_report, read_evidence
from hf_rft.hub.model_card import eval_results
from hf_rft.hub.pushing import PushError
from hf_rft.models.adapters import add_lora
from hf_rft.utils import files


REPO = "user/robust"


@pytest.fixture
def trained(make_trainer, tmp_path):
    """A trained and evaluated trainer. `options` are its arguments."""

    def make(**options):
        trainer = make_trainer(num_train_epochs=1, **options)
        trainer.train()
        trainer.evaluate()
        return trainer

    return make


def output(trainer) -> Path:
    return Path(trainer.args.output_dir)


# --- Model card ---


@pytest.mark.parametrize("method", ["create_model_card", "push_to_hub", "init_hf_repo", "save_model"])
def test_signatures_are_the_parents(method):
    ours, parents = (inspect.signature(getattr(cls, method)) for cls in (RobustTrainer, Trainer))
    assert list(ours.parameters.items()) == list(parents.parameters.items()) or [
        (p.name, p.kind, p.default) for p in ours.parameters.values()
    ] == [(p.name, p.kind, p.default) for p in parents.parameters.values()]


def test_the_card_states_the_last_evaluation(trained):
    trainer = trained()
    trainer.save_model()
    trainer.create_model_card(tags="mine", dataset="some images", license="mit")
    card = ModelCard.load(output(trainer) / "README.md")
    assert card.data.license == "mit"
    assert {"mine", "generated_from_trainer", "adversarial-robustness", "robust-fine-tuning"} <= set(card.data.tags)
    report = read_evidence(output(trainer))
    assert card.data.eval_results == eval_results(report)
    assert report.accuracies[-1] == pytest.approx(trainer.evaluate()["eval_robust_accuracy"])
    assert report.flags is None
    assert report.passes.backward > 0
    for stated in ("some images", "2-step `pgd`", "(epsilon_schedule.png)", "## Citation", "Not made"):
        assert stated in card.text
    assert (output(trainer) / "epsilon_schedule.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "bf16"])
@pytest.mark.parametrize("family", ["swin", "convnext", "resnet", "dinov2", "timm"])
def test_the_model_in_memory_is_the_saved_one(make_trainer, family, options):
    trainer = make_trainer(family, max_steps=1, **options)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    read_evidence(output(trainer))


def test_nothing_of_the_parents_card_is_left(trained):
    trainer = trained(warmup_steps=0.1)
    trainer.save_model()
    Trainer.create_model_card(trainer, dataset="imagefolder", dataset_tags="imagefolder")  # from an earlier run, say
    assert "More information needed" in (output(trainer) / "README.md").read_text()
    trainer.create_model_card()
    card = ModelCard.load(output(trainer) / "README.md")
    assert "nformation needed" not in card.text and "generated automatically" not in card.text
    assert card.data.eval_results == eval_results(read_evidence(output(trainer)))  # the parent's have no threat model
    assert card.text.count("| 0 (clean images) |") == 1 and "eval_accuracy" not in card.text
    assert "warmup: 10 % of the steps" in card.text and "warmup_steps" not in card.text


def test_the_datasets_name_is_that_of_the_data_or_none(trained):
    trainer = trained()
    trainer.save_model()
    trainer.create_model_card()
    assert "fine-tuned with hf_rft." in (output(trainer) / "README.md").read_text()
    files = {"hf://datasets/ethz/food101@e06ac/data/train.parquet": {"num_bytes": 1}}
    trainer.train_dataset.info = DatasetInfo(dataset_name="food101", download_checksums=files)
    trainer.create_model_card()
    card = ModelCard.load(output(trainer) / "README.md")
    assert "fine-tuned with hf_rft on ethz/food101." in card.text
    assert card.data.datasets == ["ethz/food101"]


def test_the_license_is_that_of_the_base_model_unless_another_is_given(trained, tmp_path):
    trainer = trained()
    trainer.save_model()
    base = tmp_path / "base"
    base.mkdir()
    trainer.model.config._name_or_path = str(base)
    trainer.create_model_card()
    assert ModelCard.load(output(trainer) / "README.md").data.license is None
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    trainer.create_model_card()
    assert ModelCard.load(output(trainer) / "README.md").data.license == "apache-2.0"
    trainer.create_model_card(license="mit")
    assert ModelCard.load(output(trainer) / "README.md").data.license == "mit"


def test_a_folder_is_no_base_model_on_the_hub(trained, tmp_path, monkeypatch):
    trainer = trained()
    trainer.save_model()
    monkeypatch.chdir(tmp_path)
    Path("user", "local").mkdir(parents=True)
    trainer.create_model_card(finetuned_from="user/local")
    card = ModelCard.load(output(trainer) / "README.md")
    assert card.data.base_model is None and "user/local" not in card.text
    trainer.create_model_card(finetuned_from="user/elsewhere")
    card = ModelCard.load(output(trainer) / "README.md")
    assert card.data.base_model == "user/elsewhere"


def test_a_reloaded_checkpoint_is_not_called_trained_here(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "first"))
    trainer.train()
    checkpoint = str(tmp_path / "first" / "checkpoint-2")
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    again = make_trainer(model, max_steps=4, output_dir=str(tmp_path / "again"))
    again.evaluate()
    again.save_model()
    again.create_model_card()
    text = (output(again) / "README.md").read_text()
    assert (
        "took no training step: the weights are those it started from, a checkpoint of an earlier training (step 2)"
        in text
    )
    assert "fine-tuned" not in text.split("## How to use")[0] and "epsilon_schedule.png" not in text
    assert str(tmp_path) not in text
    again.train()
    again.create_model_card()
    summary = (output(again) / "README.md").read_text().split("<!-- hf_rft: end of summary")[0]
    assert "robustly fine-tuned with hf_rft from a checkpoint of an earlier training (step 2)" in summary


def test_evaluating_the_saved_model_again_leaves_what_the_card_says_about_its_training(trained, make_trainer):
    trainer = trained()
    trainer.save_model()
    trainer.create_model_card(dataset="some images")
    before = ModelCard.load(output(trainer) / "README.md").text
    again = make_trainer(AutoModelForImageClassification.from_pretrained(output(trainer)), seed=5)
    again.evaluate()
    again.create_model_card()
    after = ModelCard.load(output(trainer) / "README.md").text
    assert "seed 5." in after and "seed 5." not in before
    for part in ("summary", "training"):
        text = before.split(f"<!-- hf_rft: {part} -->")[1].split(f"<!-- hf_rft: end of {part} -->")[0]
        assert text.strip() and text in after


@pytest.fixture
def adapted(make_trainer, tmp_path):
    """A trained adapter of a model in a folder, saved and evaluated."""
    base = tmp_path / "base"
    save_model(base)
    model = add_lora(AutoModelForImageClassification.from_pretrained(base), r=2)
    trainer = make_trainer(model, max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    return trainer


def test_the_card_of_an_adapter(adapted, tmp_path):
    """Without a report: what peft and transformers need. With one: as any model, checked against adapter and base."""
    folder = output(adapted)
    assert not (folder / "README.md").exists()  # peft's, with the path of the base model
    adapted.create_model_card()
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert str(tmp_path) not in card.content and "Information Needed" not in card.text
    assert "with hf_rft (an adapter of the kind LORA, rank 2, alpha 4, with " in card.text
    assert "PeftModel.from_pretrained(" in card.text and "pipeline(" not in card.text

    adapted.evaluate()
    adapted.create_model_card(finetuned_from="someone/base")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "someone/base"
    before = card.content
    adapted.save_model()
    assert (folder / "README.md").read_text() == before
    assert "load_robust_model(" in card.text and "PeftModel.from_pretrained(" not in card.text


def test_a_card_that_peft_wrote_loses_its_paths_and_its_template(adapted, tmp_path):
    folder = output(adapted)
    adapted.model.save_pretrained(folder)
    assert str(tmp_path) in (folder / "README.md").read_text()
    adapted.evaluate()
    attach_report(folder, adapted.robustness_report)
    card = ModelCard.load(folder / "README.md")
    assert str(tmp_path) not in card.content and "Information Needed" not in card.text
    assert card.data.library_name == "peft" and "pipeline(" not in card.text


def test_a_saved_adapter_is_loaded_with_its_evidence(adapted):
    metrics = adapted.evaluate()
    adapted.create_model_card()
    folder = output(adapted)
    model, _, report = load_robust_model(folder)
    assert report.expected_robustness == pytest.approx(metrics["eval_expected_robustness"])
    merged = load_robust_model(folder, merge=True).model
    assert isinstance(model, PeftModel) and isinstance(merged, type(adapted.model.get_base_model()))
    images = torch.randn(3, 3, 16, 16)
    expected = adapted.model.eval()(images).logits
    assert torch.equal(model(images).logits, expected)
    torch.testing.assert_close(merged(images).logits, expected)
    assert not any("lora" in name for name in merged.state_dict())


def test_writing_the_card_twice_changes_nothing(trained):
    trainer = trained()
    trainer.save_model()
    texts = []
    for _ in range(2):
        trainer.create_model_card(tags=["mine"], dataset="some images")
        texts.append((output(trainer) / "README.md").read_text())
    assert texts[0] == texts[1]


def test_words_added_to_the_card_by_hand_stay(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.create_model_card(license="mit")
    path = output(trainer) / "README.md"
    path.write_text(
        path.read_text().replace("<!-- hf_rft: robustness -->", "Made with care.\n\n<!-- hf_rft: robustness -->")
    )
    trainer.command = "python train.py"
    trainer.create_model_card()
    card = ModelCard.load(path)
    assert "Made with care." in card.text and "python train.py" in card.text
    assert card.data.license == "mit"
    assert card.text.count("## Training") == 1


def test_a_report_of_your_own_takes_the_place_of_the_last_evaluation(trained, processor):
    trainer = trained()
    trainer.save_model()
    trainer.robustness_report = evaluate_robustness(
        trainer.model, Images(9), processor, norm="linf", epsilons=[0, "8/255"], tier=[("pgd", 3)], progress_bar=False
    )
    trainer.create_model_card()
    assert len(read_evidence(output(trainer))) == 9


def test_a_model_trained_further_is_not_given_its_old_numbers(trained, caplog):
    trainer = trained()
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert "The model card states no robustness: The report is about the model" in caplog.text
    assert ModelCard.load(output(trainer) / "README.md").data.eval_results is None
    assert not (output(trainer) / "robustness.json").exists()


def test_without_an_evaluation_the_card_claims_nothing(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    text = (output(trainer) / "README.md").read_text()
    assert "model-index" not in text or "results: []" in text
    assert "## Training" in text


@pytest.mark.parametrize("robust_loss", ["at", "standard"])
def test_weights_kept_from_before_the_ramp_are_not_called_robust(make_trainer, robust_loss):
    options = {"epsilon_schedule": lambda progress: max(0.0, 2 * progress - 1)}
    trainer = make_trainer(max_steps=8, robust_loss=robust_loss, trainer_options=options)
    trainer.train()
    # As `load_best_model_at_end` leaves it.
    trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = True, "accuracy"
    trainer.state.best_global_step, trainer.state.best_model_checkpoint = 2, "checkpoint-2"
    trainer.create_model_card()
    text = " ".join((output(trainer) / "README.md").read_text().split())
    assert "**without any attack**: epsilon was 0 all along" in text
    assert "The weights are those after step 2 of 8, the best checkpoint by `accuracy`" in text
    assert "perturbations up to 8/255" not in text
    assert (output(trainer) / "epsilon_schedule.png").exists() == (robust_loss == "at")


def test_the_epsilon_reached_by_a_run_that_stopped_early_is_stated(make_trainer):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    options = {"epsilon_schedule": lambda progress: progress, "callbacks": [Stop()]}
    trainer = make_trainer(max_steps=8, trainer_options=options)
    trainer.train()
    trainer.create_model_card()
    text = (output(trainer) / "README.md").read_text()
    assert "perturbations up to **4/255** (target: 8/255)" in text  # 4 of 8 steps were over before the fifth
    assert "Training stopped after 5 of 8 steps, with epsilon at 4/255." in text


def test_functions_of_your_own_are_named(make_trainer):
    def my_loss(clean_logits, adversarial_logits, labels, *, weight, label_smoothing):
        return torch.nn.functional.cross_entropy(adversarial_logits, labels, reduction="none")

    options = {"robust_loss": my_loss, "epsilon_schedule": lambda progress: progress}
    trainer = make_trainer(max_steps=1, trainer_options=options)
    trainer.train()
    trainer.create_model_card()
    text = (output(trainer) / "README.md").read_text()
    assert "robust_loss: my_loss" in text
    assert "epsilon_schedule_type: custom" in text


def test_a_base_model_in_a_folder_is_not_named_by_its_path(trained, tmp_path):
    trainer = trained()
    for name in ("", str(tmp_path / "gone")):
        trainer.model.config._name_or_path = name
        trainer.create_model_card()
        text = (output(trainer) / "README.md").read_text()
        assert "An image classifier, robustly fine-tuned with hf_rft." in text
        assert str(tmp_path) not in text


# --- Pushing ---

LOAD = """
import json, sys
import torch
from hf_rft import load_robust_model
model, processor, report = load_robust_model(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
print(json.dumps(report.to_dict()))
"""


def test_train_push_and_load_elsewhere(hub, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("LOGNAME", "somebody")
    trainer = trained(hub_model_id=REPO, hub_token=WRITE_TOKEN)
    (output(trainer) / "events.out.tfevents.1.my-host").write_text("events")
    trainer.save_state()
    commit = trainer.push_to_hub()
    pushed = hub.repo("models", REPO).files(commit.oid)
    assert set(pushed) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "epsilon_schedule.png",
        "model.safetensors",
        "preprocessor_config.json",
        "robustness.json",
        "robustness_curve.png",
    }
    for name, content in pushed.items():
        for secret in (str(tmp_path), str(Path.home()) + "/", os.getcwd(), WRITE_TOKEN, "somebody", "my-host"):
            assert secret.encode() not in content, (name, secret)

    pixels = torch.stack([Images(4)[i]["pixel_values"] for i in range(4)])
    torch.save(pixels, tmp_path / "pixels.pt")
    command = [sys.executable, "-c", LOAD, REPO, str(tmp_path / "pixels.pt"), str(tmp_path / "logits.pt")]
    environment = hub.environment(tmp_path / "elsewhere", WRITE_TOKEN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), trainer.model.eval()(pixels).logits)
    report = load_robust_model(output(trainer)).report
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(json.dumps(report.to_dict()))
    assert report.settings["model"]["name"] == REPO


def test_a_push_in_the_background_returns_a_future(hub, trained):
    upload = trained(hub_model_id=REPO).push_to_hub(blocking=False)
    assert upload.result().oid in hub.repo("models", REPO).commits


@pytest.mark.parametrize(
    ("strategy", "folder"), [("checkpoint", "last-checkpoint"), ("all_checkpoints", "checkpoint-4")]
)
def test_pushes_during_training_can_be_resumed_from(hub, make_trainer, tmp_path, strategy, folder):
    options = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": strategy, "hub_always_push": True}
    options |= {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    whole = make_trainer(max_steps=8, **options, output_dir=str(tmp_path / "whole"))
    whole.train()
    assert not list((tmp_path / "whole").glob("_push-*"))
    titles = [commit.title for commit in hub.repo("models", REPO).commits.values()]
    assert "Training in progress, step 4" in titles
    assert "Training in progress, step 8, checkpoint" in titles
    pushed = hub.repo("models", REPO).files()
    assert not [name for name in pushed if "training_args" in name or "tfevents" in name]
    assert {"model.safetensors", f"{folder}/optimizer.pt", f"{folder}/trainer_state.json"} <= set(pushed)
    assert "optimizer.pt" not in pushed
    if strategy == "all_checkpoints":
        local = snapshot_download(REPO, endpoint=hub.endpoint, token=WRITE_TOKEN, local_dir=tmp_path / "down")
        resumed = make_trainer(max_steps=8, output_dir=str(tmp_path / "resumed"))
        resumed.train(resume_from_checkpoint=str(Path(local) / folder))
        for name, tensor in weights(whole.model).items():
            assert torch.equal(tensor, weights(resumed.model)[name])


def test_the_path_of_the_best_checkpoint_is_not_pushed(hub, make_trainer, tmp_path):
    options = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": "checkpoint", "load_best_model_at_end": True}
    options |= {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    trainer = make_trainer(max_steps=2, metric_for_best_model="robust_accuracy", **options)
    trainer.train()
    state = hub.repo("models", REPO).files()["last-checkpoint/trainer_state.json"]
    assert json.loads(state)["best_model_checkpoint"] == "checkpoint-2"
    assert str(tmp_path) not in state.decode()
    on_disk = json.loads((output(trainer) / "checkpoint-2" / "trainer_state.json").read_text())
    assert on_disk["best_model_checkpoint"].startswith(str(tmp_path))


# --- Pushes that fail ---


def test_training_goes_on_when_its_pushes_fail(hub, make_trainer, caplog, tmp_path):
    class HubGoesAway(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            hub.fail("commit", status=403)

    options = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": "every_save"}
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=2, **options)
    trainer.add_callback(HubGoesAway())
    trainer.train()
    assert trainer.state.global_step == 4
    assert {"checkpoint-2", "checkpoint-4"} <= {path.name for path in output(trainer).iterdir()}
    assert "the Hub answered 403" in caplog.text
    trainer.save_model()
    assert "The model is saved. The push to user/robust failed" in caplog.text
    assert (output(trainer) / "model.safetensors").is_file()
    with pytest.raises(PushError, match="no write access"):
        trainer.push_to_hub()
    hub.heal()
    assert trainer.push_to_hub().oid in hub.repo("models", REPO).commits


def test_a_hub_that_refuses_is_an_error_before_training(hub, make_trainer):
    hub.fail("create", status=401)
    with pytest.raises(PushError, match="could not be created: the Hub answered 401.*\n.*train without `push_to_hub`"):
        make_trainer(push_to_hub=True, hub_model_id=REPO)


def test_a_stalled_push_ends_after_hub_timeout(hub, trained):
    trainer = trained(hub_model_id=REPO, hub_timeout=4.0)
    hub.fail("lfs_put", stall=True)
    with pytest.raises(PushError, match="it had not finished after 4 seconds"):
        trainer.push_to_hub()


def test_a_full_disk_is_no_card_but_the_model_is_saved(hub, trained, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = trained(hub_model_id=REPO)
    with monkeypatch.context() as disk:
        disk.setattr(files.os, "replace", no_space)
        with pytest.raises(PushError, match="The model is saved in .* No space left on device.*Nothing was pushed"):
            trainer.push_to_hub()
    assert (output(trainer) / "model.safetensors").is_file()
    trainer.push_to_hub()
    read_evidence(output(trainer))
