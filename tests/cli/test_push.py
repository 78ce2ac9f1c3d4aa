import re

import pytest
from huggingface_hub import ModelCard
from published import evaluate, publish, save_model

from hf_rft import load_robust_model
from hf_rft.cli import push as push_robust_model


@pytest.fixture
def folder(tmp_path):
    """A model trained elsewhere, with its own card."""
    folder = tmp_path / "model"
    save_model(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nMy own words.\n")
    return folder


@pytest.fixture
def report(folder, tmp_path):
    evaluate(folder).save(tmp_path / "robustness.json")
    return tmp_path / "robustness.json"


def run(folder, *arguments):
    push_robust_model.main(["--model_dir", str(folder), *map(str, arguments)])


def test_evidence_and_card_are_written_and_pushed(hub, folder, report, capsys):
    run(folder, "--report", report, "--repo_id", "user/mine", "--private")
    out = capsys.readouterr().out
    assert "expected robustness" in out
    assert f"Pushed: {hub.endpoint}/user/mine/commit/" in out
    card = ModelCard(hub.repo("models", "user/mine").files()["README.md"].decode())
    assert card.data.license == "mit"
    assert "My own words." in card.text
    assert card.data.eval_results
    assert hub.repo("models", "user/mine").private
    assert load_robust_model(folder).report.settings["model"]["name"] == "user/mine"


def test_again_changes_nothing(folder, report):
    run(folder, "--report", report)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".png"}
    run(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".png"} == before


def test_a_folder_without_a_card_gets_one(folder, report):
    (folder / "README.md").unlink()
    run(folder, "--report", report, "--license", "apache-2.0", "--base_model", "google/vit")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "google/vit")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-classification")
    assert card.text.startswith("# model")


def test_a_failed_push_ends_with_a_message_and_keeps_what_was_written(hub, folder, report):
    hub.fail("commit", status=403)
    with pytest.raises(
        SystemExit, match=r"(?s)The push to user/mine failed.*no write access.*Or run this command again"
    ):
        run(folder, "--report", report, "--repo_id", "user/mine")
    load_robust_model(folder)


def test_a_report_about_another_model_is_refused(folder, report, tmp_path, capsys):
    save_model(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "other", "--report", report)
    assert ": The report is about the model" in capsys.readouterr().err
    assert not (tmp_path / "other" / "README.md").exists()


def test_a_folder_without_evidence_says_how_to_get_it(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(folder)
    assert re.search("has no robustness.json.*hf-rft evaluate", capsys.readouterr().err)


def test_evidence_that_is_there_needs_no_report(folder):
    publish(folder)
    run(folder)
