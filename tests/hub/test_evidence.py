import errno
import hashlib
import json
import os
import re
import shutil
import struct

import pytest
from published import evaluate, publish, save_model
from transformers import ViTImageProcessor

import hf_rft.hub
from hf_rft import load_robust_model
from hf_rft.hub.evidence import attach_report, hash_weight_files, read_evidence, read_report, write_evidence
from hf_rft.utils import files


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    save_model(folder)
    publish(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(original, tmp_path / "model")


def change_report(folder, change):
    path = folder / "robustness.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# --- Writing and reading ---


def test_what_is_written_is_read(folder):
    written, again = publish(folder), read_evidence(folder)
    assert again.to_dict() == written.to_dict()
    assert again.settings["model"]["name"] == "user/robust"
    assert (folder / "robustness_curve.png").read_bytes().startswith(b"\x89PNG")


def test_hashes_are_those_that_sha256sum_prints(folder):
    content = (folder / "model.safetensors").read_bytes()
    expected = {"model.safetensors": hashlib.sha256(content).hexdigest()}
    assert hash_weight_files(folder) == read_report(folder / "robustness.json").settings["model"]["files"] == expected


@pytest.mark.parametrize("family", ["swin", "convnext", "resnet", "dinov2", "timm"])
def test_all_families(tmp_path, family):
    save_model(tmp_path, family)
    publish(tmp_path)
    read_evidence(tmp_path)


def test_weights_in_several_files(tmp_path):
    save_model(tmp_path, max_shard_size="20KB")
    report = publish(tmp_path)
    assert len(report.settings["model"]["files"]) > 1
    read_evidence(tmp_path)
    os.remove(tmp_path / max(report.settings["model"]["files"]))
    with pytest.raises(ValueError, match="lacks the weights"):
        read_evidence(tmp_path)


def test_a_report_without_a_name_is_called_like_the_folder(folder):
    report = write_evidence(folder, read_report(folder / "robustness.json"))
    assert report.settings["model"]["name"] == "model"


def test_no_path_of_this_machine_is_written(folder):
    for name in ("robustness.json", "README.md"):
        assert str(folder.parent) not in (folder / name).read_text()


# --- What is refused before anything is written ---


def test_a_report_about_other_weights_is_not_attached(folder, tmp_path):
    save_model(tmp_path / "other", seed=1)
    before = (folder / "robustness.json").read_bytes()
    with pytest.raises(ValueError, match=r"The report is about the model \w{12}, but .* holds \w{12}"):
        write_evidence(folder, evaluate(tmp_path / "other"))
    assert (folder / "robustness.json").read_bytes() == before


def test_a_report_with_another_processor_is_not_attached(folder):
    report = read_report(folder / "robustness.json")
    report.settings["processor"] = {"mean": [0.1], "std": [0.5], "source": "image_mean=0.1"}
    with pytest.raises(ValueError, match="evaluated with the processor values image_mean=0.1, but now has"):
        write_evidence(folder, report)


@pytest.mark.parametrize(("lost", "message"), [("model.safetensors", "no weights"), ("config.json", "no config.json")])
def test_an_incomplete_folder(folder, lost, message):
    report = read_report(folder / "robustness.json")
    (folder / lost).unlink()
    with pytest.raises(ValueError, match=message):
        write_evidence(folder, report)


def test_a_full_disk_leaves_the_old_evidence(folder, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = (folder / "robustness.json").read_bytes()
    report = read_report(folder / "robustness.json")
    report.settings["seed"] = 5
    with monkeypatch.context() as disk:
        disk.setattr(files.os, "replace", no_space)
        with pytest.raises(OSError, match="No space left"):
            write_evidence(folder, report)
    assert (folder / "robustness.json").read_bytes() == before
    assert not list(folder.glob(".*"))
    assert write_evidence(folder, report).settings["seed"] == 5


def test_a_report_saved_by_hand_is_accepted_after_the_call_that_the_refusal_names(tmp_path):
    save_model(tmp_path)
    report = evaluate(tmp_path)
    report.save(tmp_path / "robustness.json")
    with pytest.raises(ValueError) as refusal:
        load_robust_model(tmp_path)
    call = re.search("`(hf_rft.*?)` checks", str(refusal.value))
    eval(call[1], {"hf_rft": hf_rft})
    assert load_robust_model(tmp_path).report.accuracies == report.accuracies


def test_a_report_saved_by_hand_beside_other_weights_stays_refused(tmp_path):
    save_model(tmp_path / "other", seed=1)
    save_model(tmp_path / "model")
    evaluate(tmp_path / "other").save(tmp_path / "model" / "robustness.json")
    with pytest.raises(ValueError, match=r"The report is about the model \w{12}, but .* holds \w{12}"):
        attach_report(tmp_path / "model")
    assert not (tmp_path / "model" / "README.md").exists()


# --- What is refused when read ---


def tampered_weights(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", content[:8])[0]
    content[start] ^= 1
    path.write_bytes(content)


def report_of_another_model(folder):
    save_model(folder / "other", seed=1)
    publish(folder / "other")
    shutil.copy(folder / "other" / "robustness.json", folder)


def report_without_hashes(folder):
    change_report(folder, lambda values: values["settings"]["model"].pop("files"))


def truncated_report(folder):
    path = folder / "robustness.json"
    path.write_bytes(path.read_bytes()[:500])


def old_schema(folder):
    change_report(folder, lambda values: values.update(schema_version=0))


def report_without_a_norm(folder):
    change_report(folder, lambda values: values.pop("norm"))


def report_without_attacks(folder):
    change_report(folder, lambda values: values["settings"].pop("attacks"))


def no_report(folder):
    (folder / "robustness.json").unlink()


def no_card(folder):
    (folder / "README.md").unlink()


def card_without_a_threat_model(folder):
    path = folder / "README.md"
    path.write_text(path.read_text().replace("        norm: linf\n", ""))


def other_processor(folder):
    size = {"height": 16, "width": 16}
    ViTImageProcessor(size=size, image_mean=[0.4] * 3, image_std=[0.5] * 3).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tampered_weights, r"model\.safetensors of here has the SHA-256 \w{12}, but robustness\.json is about \w{12}"),
        (report_of_another_model, "the weights have changed since, or the report is another model's"),
        (report_without_hashes, r"does not hold the SHA-256 of .*`hf_rft\.hub\.attach_report` checks"),
        (truncated_report, "not a robustness report"),
        (old_schema, "schema"),
        (report_without_a_norm, "norm"),
        (report_without_attacks, r"`settings` lacks \['attacks'\]"),
        (no_report, r"here has no robustness\.json, so nothing is known about its robustness"),
        (
            no_card,
            r"here has no model card \(README\.md\) that states the threat model .*`hf_rft\.hub\.attach_report",
        ),
        (card_without_a_threat_model, "without a threat model"),
        (other_processor, "here was evaluated with the processor values"),
    ],
)
def test_damage_is_refused_with_its_reason(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        read_evidence(folder, name="here")
