"""Loading and pushing, with a real client against the Hub of hub_server.py."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import Images
from datasets import Dataset
from hub_server import READ_TOKEN, WRITE_TOKEN
from huggingface_hub import CommitInfo, constants
from PIL import Image
from published import publish, save_model

from hf_rft import RobustnessReport, ThreatModel, load_robust_model
from hf_rft.hub import upload_process
from hf_rft.hub.pushing import PushError, create_repo, push_folder


REPO = "user/robust"
FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "robustness.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    save_model(folder)
    publish(folder)
    return folder


@pytest.fixture
def impatient(monkeypatch, tmp_path):
    """The client waits up to 23 seconds between its attempts; here not at all."""
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "patches"))


def run(hub, home, code, *arguments, token=WRITE_TOKEN):
    """Run Python in a new process with an empty cache; what it prints last, as JSON."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=hub.environment(home, token), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- Loading from a folder ---


def test_model_processor_and_report(folder):
    model, processor, report = load_robust_model(folder)
    assert not model.training
    assert list(processor.image_mean) == [0.5] * 3
    assert report.to_dict() == RobustnessReport.load(folder / "robustness.json").to_dict()


def test_what_is_required_is_met(folder):
    report = load_robust_model(folder, threat_model=ThreatModel("linf", "2/255")).report
    assert [str(epsilon) for epsilon in report.epsilons] == ["0", "2/255", "8/255"]
    load_robust_model(folder, min_expected_robustness=report.expected_robustness)


@pytest.mark.parametrize("required", [("l2", "8/255"), ("linf", "4/255"), ("linf", "16/255")])
def test_another_threat_model_is_refused_naming_both(folder, required):
    norm, epsilon = required
    message = f"required threat model {norm} {epsilon}: it was evaluated against linf at 0, 2/255, 8/255"
    with pytest.raises(ValueError, match=message):
        load_robust_model(folder, threat_model=ThreatModel(norm, epsilon))


def test_too_little_robustness_is_refused_naming_both(folder):
    found = load_robust_model(folder).report
    with pytest.raises(ValueError, match=rf"of {found.expected_robustness:.4f} \(linf up to 8/255\), below .*=0\.99"):
        load_robust_model(folder, min_expected_robustness=0.99)
    up_to_two = found.up_to(found.epsilons[1])
    with pytest.raises(ValueError, match=rf"of {up_to_two.expected_robustness:.4f} \(linf up to 2/255\)"):
        load_robust_model(folder, threat_model=ThreatModel("linf", "2/255"), min_expected_robustness=0.99)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no such folder",), "neither a folder nor the name of a repository"),
        (("x", {"min_expected_robustness": 57}), r"`min_expected_robustness=57` must lie in \[0, 1\]"),
    ],
)
def test_bad_arguments(arguments, message):
    name, options = (*arguments, {})[:2]
    with pytest.raises(ValueError, match=message):
        load_robust_model(name, **options)


def test_a_folder_has_no_revisions(folder):
    with pytest.raises(ValueError, match="`revision='v1'` needs a repository"):
        load_robust_model(folder, revision="v1")


# --- There and back ---

PLAIN = """
import json, sys
sys.modules["hf_rft"] = None  # importing it is an error
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
repo = sys.argv[1]
model = AutoModelForImageClassification.from_pretrained(repo).eval()
AutoImageProcessor.from_pretrained(repo)
pixels = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(pixels).logits, sys.argv[3])
from PIL import Image
print(json.dumps(len(pipeline(model=repo)(Image.new("RGB", (20, 20))))))
"""

ROBUST = """
import json, sys
import torch
from hf_rft import load_robust_model
revision = sys.argv[4] if len(sys.argv) > 4 else None
model, processor, report = load_robust_model(sys.argv[1], revision=revision)
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
print(json.dumps(report.to_dict()))
"""


def test_pushed_and_loaded_in_new_processes(hub, folder, tmp_path):
    commit = push_folder(folder, REPO, progress_bar=False)
    assert isinstance(commit, CommitInfo)
    assert FILES <= set(hub.repo("models", REPO).files(revision=commit.oid))
    model, _, report = load_robust_model(folder)
    pixels = torch.stack([Images(4)[i]["pixel_values"] for i in range(4)])
    torch.save(pixels, tmp_path / "pixels.pt")
    with torch.no_grad():
        logits = model(pixels).logits
    found = run(hub, tmp_path / "one", PLAIN, REPO, tmp_path / "pixels.pt", tmp_path / "plain.pt", token=None)
    assert found == 4
    assert torch.equal(torch.load(tmp_path / "plain.pt"), logits)
    again = run(hub, tmp_path / "two", ROBUST, REPO, tmp_path / "pixels.pt", tmp_path / "robust.pt", commit.oid)
    assert again == json.loads(json.dumps(report.to_dict()))
    assert torch.equal(torch.load(tmp_path / "robust.pt"), logits)


ADAPTED = """
import json, sys, torch
from datasets import load_from_disk
from hf_rft import evaluate_robustness, load_robust_model
from hf_rft.hub import attach_report, push_folder
from hf_rft.hub.pretrained import ModelArguments, load_model, load_model_and_processor
from hf_rft.models.adapters import saved_with_config
processor, model = load_model(ModelArguments("user/base", model_revision="v1", lora_r=2), list("abcd"))
with saved_with_config(model, sys.argv[1]):
    model.save_pretrained(sys.argv[1])
processor.save_pretrained(sys.argv[1])
images = load_from_disk(sys.argv[2])
grid = {"norm": "linf", "epsilons": ["0", "8/255"], "tier": [("pgd", 1)], "progress_bar": False}
attach_report(sys.argv[1], evaluate_robustness(model.eval(), images, processor, **grid))
push_folder(sys.argv[1], "user/adapter", progress_bar=False)
loaded = load_robust_model("user/adapter")
evaluated, _ = load_model_and_processor("--model", "user/adapter")  # as `hf-rft evaluate` does
pixels = torch.randn(2, 3, 16, 16)
expected, *found = (one.eval()(pixels).logits for one in (model, loaded.model, evaluated))
print(json.dumps([loaded.report.settings["model"]["base"], [torch.equal(one, expected) for one in found]]))
"""


def test_an_adapter_names_the_commit_of_its_base_model(hub, tmp_path):
    """That of a branch, which has other weights than `main`."""
    commits = {}
    for seed, revision in ((0, "main"), (1, "v1")):
        save_model(tmp_path / revision, seed=seed)
        commits[revision] = push_folder(tmp_path / revision, "user/base", revision=revision, progress_bar=False).oid
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    Dataset.from_dict({"image": [Image.fromarray(image)] * 4, "label": [0, 1, 2, 3]}).save_to_disk(tmp_path / "images")
    base, are_equal = run(hub, tmp_path, ADAPTED, tmp_path / "adapter", tmp_path / "images")
    assert (base["name"], base["revision"]) == ("user/base", commits["v1"]) and are_equal == [True, True]


REFUSED = """
import json, sys
from hf_rft import load_robust_model
try:
    load_robust_model(sys.argv[1], revision=sys.argv[2] or None)
    print(json.dumps("loaded"))
except Exception as error:
    print(json.dumps(type(error).__name__ + ": " + str(error)))
"""


def test_private_gated_and_missing_repositories(hub, folder, tmp_path):
    push_folder(folder, REPO, private=True, progress_bar=False)
    assert hub.repo("models", REPO).private
    assert run(hub, tmp_path / "1", REFUSED, REPO, "") == "loaded"
    assert "RepositoryNotFoundError" in run(hub, tmp_path / "2", REFUSED, REPO, "", token=None)
    hub.repo("models", REPO).gated = "manual"
    hub.repo("models", REPO).private = False
    assert run(hub, tmp_path / "4", REFUSED, REPO, "", token=None).startswith("GatedRepoError")
    assert "RevisionNotFoundError" in run(hub, tmp_path / "3", REFUSED, REPO, "v9")


TYPO = "^outputs/typo is not a folder .looked for in .*correct the path"


def test_a_mistyped_path_is_called_one_by_a_hub_that_lacks_it(hub, tmp_path):
    assert re.match(f"ValueError: {TYPO[1:]}.*RepositoryNotFound", run(hub, tmp_path, REFUSED, "outputs/typo", ""))


def test_a_mistyped_path_is_called_one_without_a_hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=TYPO):
        load_robust_model("outputs/typo")


# --- What is pushed ---


def test_private_files_stay_here(hub, folder, tmp_path):
    import shutil

    source = shutil.copytree(folder, tmp_path / "out")
    for name in ("training_args.bin", "trainer_state.json", "runs/events.out.tfevents.1.host", "checkpoint-4/a.bin"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("/home/somebody")
    (source / "sub").mkdir()
    (source / "sub" / "training_args.bin").write_text("/home/somebody")
    push_folder(source, REPO, progress_bar=False)
    pushed = set(hub.repo("models", REPO).files())
    assert pushed == {*FILES, ".gitattributes", "robustness_curve.png"}


def test_a_branch_is_made_and_main_left_alone(hub, folder):
    push_folder(folder, REPO, revision="v1", progress_bar=False)
    assert set(hub.repo("models", REPO).files(revision="main")) == {".gitattributes"}
    assert FILES <= set(hub.repo("models", REPO).files(revision="v1"))


@pytest.mark.parametrize(
    ("source", "repo_id", "message"),
    [("nowhere", REPO, "not a folder"), ("empty", REPO, "nothing to upload"), (".", "a/b/c", "Repo id")],
)
def test_bad_arguments_of_push(tmp_path, source, repo_id, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=message):
        push_folder(tmp_path / source, repo_id)


# --- Pushes that fail ---

STAGES = ["create", "validate", "preupload", "lfs_batch", "lfs_put", "commit"]
HINTS = {
    401: "hf auth login",
    403: "no write access",
    409: "changed the repository at the same time",
    429: "rate limit",
    500: "problem is on the Hub's side",
}


def fails_and_is_repeated(hub, folder, *expected):
    """The push fails with a message that holds these; afterwards it works."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(PushError) as raised:
        push_folder(folder, REPO, progress_bar=False)
    message = str(raised.value)
    for text in (*expected, f"all files are in {folder}", "To try again: hf_rft.hub.push_folder("):
        assert text in message
    assert WRITE_TOKEN not in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    hub.heal()
    push_folder(folder, REPO, progress_bar=False)
    files = hub.repo("models", REPO).files()
    assert all(files[name] == content for name, content in before.items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_lost_connection_at_each_stage(hub, folder, impatient, stage):
    hub.fail(stage, drop=True)
    fails_and_is_repeated(hub, folder, f"The push to {REPO} failed", "Check the connection")


@pytest.mark.parametrize(
    ("stage", "status"),
    # 409 at "create" means that the repository is there.
    [(stage, status) for stage in STAGES for status in HINTS if (stage, status) != ("create", 409)],
)
def test_each_refusal(hub, folder, impatient, stage, status):
    hub.fail(stage, status=status)
    fails_and_is_repeated(hub, folder, f"the Hub answered {status}", HINTS[status])


def test_the_hub_is_full(hub, folder, impatient):
    hub.fail("lfs_put", status=507)
    fails_and_is_repeated(hub, folder, "the Hub answered 507", "no space left")


def test_after_a_lost_answer_the_push_can_be_repeated(hub, folder, impatient):
    create_repo(REPO)
    hub.fail("commit", drop="answer", times=1)
    fails_and_is_repeated(hub, folder, f"The push to {REPO} failed")


def test_a_read_only_token(hub, folder, impatient):
    with pytest.raises(PushError, match="403"):
        push_folder(folder, REPO, token=READ_TOKEN, progress_bar=False)


def test_a_short_interruption_is_nothing_to_report(hub, folder, impatient):
    hub.fail("lfs_put", status=500, times=2)
    push_folder(folder, REPO, progress_bar=False)


def test_a_stalled_transfer_is_given_up(hub, folder):
    hub.fail("lfs_put", stall=True)
    with pytest.raises(PushError, match="it had not finished after 3 seconds. The connection is slow or stalled"):
        push_folder(folder, REPO, timeout=3, progress_bar=False)


def test_no_request_waits_for_ever():
    assert upload_process.impatient_client().timeout.read == upload_process.STALL_SECONDS


def test_a_repository_that_cannot_be_made(hub, impatient):
    hub.fail("create", status=401)
    with pytest.raises(PushError, match="user/robust could not be created: the Hub answered 401.*hf auth login"):
        create_repo(REPO)


def test_the_process_that_uploads_needs_only_huggingface_hub():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print({'torch', 'hf_rft'} & set(sys.modules))"
    command = [sys.executable, "-c", code, upload_process.__file__]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "set()"
