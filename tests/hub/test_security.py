"""Files from elsewhere run nothing, reach nothing outside their folder, and what is secret stays so.

Each attack here would leave a trace: a folder that a payload makes, a file read, a token in a text.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from conftest import make_model
from huggingface_hub import ModelCard
from PIL import Image
from published import publish, save_model
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from hf_rft import RobustnessReport, load_robust_model
from hf_rft.cli import compare
from hf_rft.cli import push as push_robust_model
from hf_rft.cli.parsing import published_command
from hf_rft.cli.train import parse_arguments
from hf_rft.data import loading
from hf_rft.data.augmentation import SeededAugmentation
from hf_rft.data.examples import Examples
from hf_rft.evaluation.cache import ResultCache
from hf_rft.hub import upload_process
from hf_rft.hub.evidence import hash_weight_files, read_report, write_evidence
from hf_rft.hub.model_card import make_card
from hf_rft.hub.pretrained import ModelArguments, load_model
from hf_rft.hub.pushing import create_repo, push_folder
from hf_rft.hub.safe_loading import load_classifier, load_config
from hf_rft.training.checkpoints import MARKER_NAME, restore_weights
from hf_rft.utils.markdown import cell, code, plain


TOKEN = "hf_" + "S3cr3tS3cr3tS3cr3tS3cr3tS3cr3tS3cr"


class Payload:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path):
    """What a payload leaves behind; whatever the test found out, it must not be there."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


@pytest.fixture
def no_pickles(monkeypatch):
    """Opening any pickle in the unrestricted way is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was opened without restriction")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    load = torch.load

    def restricted(*args, **kwargs):
        assert kwargs.get("weights_only") is True, "torch.load without weights_only"
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", restricted)


def write_payload(path, trace, as_zip: bool) -> None:
    if as_zip:
        torch.save(Payload(trace), path)
    else:
        path.write_bytes(pickle.dumps(Payload(trace), protocol=2))


def test_the_payload_works(tmp_path):
    """Else none of the tests below could fail."""
    for number, as_zip in enumerate((True, False)):
        write_payload(tmp_path / "pickle", tmp_path / f"trace{number}", as_zip)
        with contextlib.suppress(pickle.UnpicklingError, RuntimeError):
            torch.load(tmp_path / "pickle", weights_only=False)
        assert (tmp_path / f"trace{number}").is_dir()


# --- Pickles: checkpoints ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint, trained with a token."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def checkpoint(trained, make_trainer, tmp_path):
    """A copy that may be damaged."""
    if not list(trained.iterdir()):
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "hub_token": TOKEN}
        make_trainer(output_dir=str(trained), **options).train()
    copy = Path(shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint"))
    (copy / MARKER_NAME).unlink()  # as in one from elsewhere; it would tell any change of size
    return copy


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "pytorch_model.bin"])
def test_a_pickle_that_runs_code_is_not_resumed_from(make_trainer, checkpoint, trace, name, as_zip):
    write_payload(checkpoint / name, trace, as_zip)
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    trainer = make_trainer(max_steps=3)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{name} is not loaded.*could run code.*[Rr]esume from") as refused:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "weights_only" not in str(refused.value)  # torch advises to switch the protection off
    assert all(torch.equal(before[key], value) for key, value in trainer.model.state_dict().items())


def test_resuming_opens_no_pickle_without_restriction(make_trainer, checkpoint, trace, no_pickles):
    """Nor the weights in that format, nor the arguments, while there are safetensors files."""
    for name in ("training_args.bin", "pytorch_model.bin"):
        write_payload(checkpoint / name, trace, as_zip=True)
    trainer = make_trainer(max_steps=3)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 3


def test_a_damaged_state_is_named(make_trainer, checkpoint):
    path = checkpoint / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"optimizer\.pt is not loaded .*damaged"):
        make_trainer(max_steps=3).train(resume_from_checkpoint=str(checkpoint))


def test_genuine_weights_as_a_pickle_are_not_half_restored(make_trainer, checkpoint):
    """`Trainer` itself restores a few layers of a ViT from them, and says so in a warning only."""
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not loaded: weights in a pickle could run code"):
        make_trainer(max_steps=3).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_whose_weights_lie_elsewhere(checkpoint):
    os.rename(checkpoint / "model.safetensors", checkpoint.parent / "outside.safetensors")
    redirect(checkpoint, "../outside.safetensors", load_file(checkpoint.parent / "outside.safetensors"))
    with pytest.raises(ValueError, match=r"index\.json names weights .*\.\./outside"):
        restore_weights(make_model("vit"), checkpoint)


def test_no_file_of_a_training_holds_the_token(checkpoint, trained):
    files = [path for path in trained.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert [path.name for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_the_trainer_keeps_its_token(make_trainer, tmp_path):
    trainer = make_trainer(hub_token=TOKEN)
    trainer.save_model(str(tmp_path / "saved"))
    assert trainer.args.hub_token == TOKEN
    saved = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert saved.hub_token is None and saved.epsilon == "8/255"


# --- Pickles and code: models ---


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folders = {}
    for family in ("vit", "timm"):
        folders[family] = tmp_path_factory.mktemp(family)
        save_model(folders[family], family)
        publish(folders[family])
    return folders


@pytest.fixture
def folder(published, tmp_path):
    return Path(shutil.copytree(published["vit"], tmp_path / "model"))


@pytest.fixture
def timm_folder(published, tmp_path):
    return Path(shutil.copytree(published["timm"], tmp_path / "timm"))


def edit(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def redirect(folder, place, weights):
    """An index that says all weights are in the file `place`."""
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, place)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def add_code(folder, trace):
    """Python files named in every way that transformers knows."""
    (folder / "custom.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    classes = {"AutoConfig": "custom.C", "AutoModelForImageClassification": "custom.M"}
    pipelines = {"mine": {"impl": "custom.P", "pt": ["AutoModelForImageClassification"]}}
    edit(folder / "config.json", auto_map=classes, custom_pipelines=pipelines)
    edit(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "custom.I"})


def test_pickles_and_code_beside_a_model_are_left_alone(folder, trace, no_pickles):
    add_code(folder, trace)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        write_payload(folder / name, trace, as_zip=True)
    model, processor, _ = load_robust_model(folder)
    assert (type(model).__name__, list(processor.image_mean)) == ("ViTForImageClassification", [0.5] * 3)


@pytest.mark.parametrize(
    ("file", "entry"),
    [("config.json", {"model_type": "mine"}), ("preprocessor_config.json", {"image_processor_type": "Mine"})],
)
def test_what_needs_code_of_its_own_is_refused(folder, trace, monkeypatch, file, entry):
    def ask(*_):
        raise AssertionError("transformers asked whether to run the code")

    monkeypatch.setattr("builtins.input", ask)
    add_code(folder, trace)
    edit(folder / file, **entry)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_robust_model(folder)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_model(ModelArguments(model_name_or_path=str(folder)), ["a", "b"])


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_from_a_repository_is_refused(folder, key):
    edit(folder / "config.json", **{key: "someone/kernel"})
    with pytest.raises(ValueError, match=r"takes its attention from 'someone/kernel', .*Remove the entry"):
        load_robust_model(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_args": {"checkpoint_path": "weights.pth"}}, r"takes weights from another place, by \['checkpoint_p"),
        ({"architecture": "local-dir:.."}, "architecture from another place, 'local-dir:..'"),
        ({"architecture": "hf-hub:someone/model"}, "architecture from another place, 'hf-hub:someone/model'"),
    ],
)
def test_timm_reads_no_other_files(timm_folder, trace, monkeypatch, entries, message):
    monkeypatch.chdir(timm_folder)
    write_payload(timm_folder / "weights.pth", trace, as_zip=True)
    edit(timm_folder / "config.json", **entries)
    with pytest.raises(ValueError, match=message):
        load_robust_model(timm_folder)


def test_recipes_open_no_weights_but_safetensors(folder, trace, monkeypatch):
    # pytest and CI switch the conversion off as well
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    (folder / "model.safetensors").unlink()
    write_payload(folder / "pytorch_model.bin", trace, as_zip=True)
    with pytest.raises(ValueError, match=r"no weights in the safetensors format.*pickles"):
        load_model(ModelArguments(model_name_or_path=str(folder)), ["a", "b"])
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "true"


def test_results_and_reports_are_no_pickles(folder, trace, tmp_path, no_pickles):
    cache = ResultCache(tmp_path / "cache")
    write_payload(tmp_path / "cache" / "key.safetensors", trace, as_zip=True)
    assert cache.load("key", torch.zeros(1, 2)) is None
    write_payload(folder / "robustness.json", trace, as_zip=False)
    with pytest.raises(ValueError, match="not a robustness report"):
        RobustnessReport.load(folder / "robustness.json")


def test_a_script_beside_a_dataset_is_not_run(tmp_path, trace):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "images.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    (tmp_path / "images" / "data.csv").write_text("label\n1\n")
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):
        datasets.load_dataset(str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))


# --- YAML ---


def test_yaml_runs_nothing(tmp_path, trace, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(f"seed: !!python/object/apply:os.mkdir ['{trace}']\n")
    with pytest.raises(SystemExit):
        parse_arguments(["--config", str(config)])
    assert "is not valid YAML" in capsys.readouterr().err


def test_yaml_of_a_card_runs_nothing(folder, trace):
    card = folder / "README.md"
    card.write_text(card.read_text().replace("---\n", f"---\nx: !!python/object/apply:os.mkdir ['{trace}']\n", 1))
    with pytest.raises(yaml.YAMLError):
        load_robust_model(folder)


# Ten lines that stand for 10^9 words.
LAUGHS = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 9)
)


def test_yaml_of_a_card_that_grows(folder):
    """Nothing is read of a card but its results."""
    card = folder / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\n" + LAUGHS, 1))
    tracemalloc.start()
    try:
        load_robust_model(folder)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


# --- Images ---


def huge_png(path, width=20_000, height=20_000):
    """A few bytes that claim to be 400 million pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(content)


@pytest.fixture(params=[(20_000, 20_000), (10_000, 10_000)], ids=["Pillow raises", "Pillow warns"])
def bombs(request, tmp_path):
    """A folder of images, the second of which is a bomb."""
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "images" / name / "0.png")
    huge_png(tmp_path / "images" / "a" / "1.png", *request.param)
    dataset = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "images"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [Path(one["path"]).name for one in dataset.cast_column("image", datasets.Image(decode=False))["image"]] == [
        "0.png",
        "1.png",
        "0.png",
    ]
    return dataset


def test_bombs_are_refused_before_they_are_decoded(bombs, processor):
    readers = [
        lambda: Examples(bombs, processor).batch([1]),
        lambda: Examples(bombs.select([1]), processor),
        lambda: SeededAugmentation(bombs, dict, seed=0)[1],
    ]
    tracemalloc.start()
    try:
        for read in readers:
            with pytest.raises(
                ValueError, match=r"Example \d of the dataset \(.*1\.png\) is not decoded: Image size .*Scale"
            ):
                read()
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert len(Examples(bombs, processor).batch([0, 2])[1]) == 2


def test_the_recipes_read_images_in_no_other_way():
    """`hf-rft train` decodes only in `SeededAugmentation`, so a transform of `datasets` would be a way around."""
    for path in (*Path(compare.__file__).parent.glob("*.py"), Path(loading.__file__)):
        assert not re.search(r"with_transform|set_transform", path.read_text()), path.name


def test_the_page_refuses_bombs(tmp_path):
    app_attack = pytest.importorskip("hf_rft.cli.app_attack")
    for size in ((20_000, 20_000), (10_000, 10_000)):
        huge_png(tmp_path / "bomb.png", *size)
        with pytest.raises(ValueError, match="million"):
            app_attack.read_image(tmp_path / "bomb.png")


# --- Paths ---


@pytest.mark.parametrize("place", ["../outside.safetensors", "/outside.safetensors", "a/b.safetensors", "decoy.bin"])
def test_the_evidence_is_about_the_weights_that_are_loaded(folder, place):
    """Weights of another place, with a file that nobody loads in the folder, so that all hashes fit."""
    os.rename(folder / "model.safetensors", folder / "decoy.safetensors")
    hashes = {"decoy.safetensors": hash_weight_files(folder)["decoy.safetensors"]}
    report = json.loads((folder / "robustness.json").read_text())
    report["settings"]["model"]["files"] = hashes
    (folder / "robustness.json").write_text(json.dumps(report))
    redirect(folder, place, load_file(folder / "decoy.safetensors"))
    with pytest.raises(ValueError, match=r"index\.json names weights that are not safetensors files in its folder"):
        load_robust_model(folder)


@pytest.mark.parametrize("name", ["README.md", "notes.md", "sub/key"])
def test_what_a_link_leads_to_is_not_published(folder, tmp_path, monkeypatch, capsys, name):
    """A cloned repository may hold links, say to the key of whoever publishes it again."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **options: pytest.fail("an upload was started"))
    (tmp_path / "key").write_text("private")
    link = folder / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "key")
    with pytest.raises(ValueError, match=rf"{name} is a link to .*key, outside the folder"):
        push_folder(folder, "user/x")
    with pytest.raises(SystemExit):
        push_robust_model.main(["--model_dir", str(folder)])
    assert "is a link to" in capsys.readouterr().err


def test_links_within_a_folder_are_no_trouble(folder):
    (folder / "again.md").symlink_to("README.md")
    push_robust_model.main(["--model_dir", str(folder)])


def test_nothing_is_written_through_a_link(folder, tmp_path):
    report = read_report(folder / "robustness.json")
    for name in ("robustness.json", "robustness_curve.png"):
        (folder / name).unlink()
        (tmp_path / name).write_text("mine")
        (folder / name).symlink_to(tmp_path / name)
    write_evidence(folder, report)
    for name in ("robustness.json", "robustness_curve.png"):
        assert (tmp_path / name).read_text() == "mine" and not (folder / name).is_symlink()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b/c", "a/../b", "x\0y", "x\ny", "a\\..\\b"])
def test_no_repository_has_the_name_of_a_path(name):
    with pytest.raises(ValueError):
        load_robust_model(name)


NAMES = ["../../escaped", "/escaped", "nul\0", "line\nend", "$\\frac{", "<script>alert(1)</script>"]


def test_class_names_are_no_paths(tmp_path, monkeypatch, processor):
    """All that is written stays in the output folder, whatever classes are called."""
    from hf_rft.cli import evaluate as recipe
    from hf_rft.evaluation import flags

    monkeypatch.setattr(flags, "SQUARE_STEPS", 5)
    model = make_model("vit")
    model.config.id2label = dict(enumerate(NAMES[:4]))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES[:4])})
    images = [Image.new("RGB", (16, 16), (60 * label,) * 3) for label in range(4)]
    dataset = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2, 3]}, features=features)
    monkeypatch.setattr(recipe, "load_dataset", lambda *args, **options: dataset)
    before = {path for path in tmp_path.rglob("*")}
    output = tmp_path / "a" / "b" / "output"
    options = ["--epsilons", "0", "64/255", "--tier", "fast", "--output_dir", str(output)]
    recipe.main(["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", "x", *options])
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert written and all(output in path.parents for path in written)


def test_class_names_are_no_formulas(tmp_path):
    from hf_rft.evaluation.plots import plot_adversarial_examples
    from hf_rft.evaluation.report import AdversarialExamples

    pixels, logits = torch.rand(1, 3, 4, 4), torch.eye(len(NAMES))[4:5]
    examples = AdversarialExamples([0], pixels, pixels, logits, logits)
    plot_adversarial_examples(examples, [4], dict(enumerate(NAMES)), tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 1000


# --- Markup ---

HOSTILE = (
    "x`|\n---\nlicense: mit\n---\n# Fake\n\n<script>alert(1)</script> ![](http://tracker/x.png) [a](javascript:b)"
    "\n<!-- hf_rft: end of robustness --> \\|"
)


def assert_harmless(text):
    """No HTML, no link, no picture and no line of its own, outside of code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    assert "<" not in text and "](http" not in text and "](javascript" not in text
    assert not any(line.startswith(("---", "# Fake", "license", "<!--")) for line in text.splitlines())


def test_markdown_of_names():
    assert_harmless(plain(HOSTILE))
    assert code("a`b\nc") == "`a'b c`"
    # Between two bars that are not escaped there is one cell.
    row = f"| {cell(HOSTILE)} | 1 |"
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3
    assert plain("T-shirt/top, $\\frac$ `code` (a_b) [1, 2]") == "T-shirt/top, $\\frac$ `code` (a_b) [1, 2]"


@pytest.fixture
def hostile_report(published):
    report = RobustnessReport.load(published["vit"] / "robustness.json")
    report.settings["dataset"] = dict.fromkeys(("name", "config", "split", "revision", "sha256"), HOSTILE)
    report.settings["model"]["name"] = report.settings["tier"] = report.settings["seed"] = HOSTILE
    report.settings["attacks"][0]["attack"] = HOSTILE
    report.settings["versions"] = {HOSTILE: HOSTILE}
    report.flags = {HOSTILE: HOSTILE}
    return report


def test_a_card_shows_names_as_text(hostile_report):
    card = ModelCard("---\nlicense: apache-2.0\n---\n\n# Mine\n")
    card = make_card(card, name=HOSTILE, report=hostile_report)
    again = ModelCard(card.content)
    assert again.data.license == "apache-2.0" and again.text == card.text
    assert make_card(card, name=HOSTILE, report=hostile_report).content == card.content  # the part is found again
    for text in (card.text, make_card(name=HOSTILE, report=hostile_report).text):
        assert_harmless(re.sub(r"<!-- hf_rft: [a-z ]+ -->", "", text))


def test_the_page_shows_names_as_text(hostile_report):
    app_page = pytest.importorskip("hf_rft.cli.app_page")
    logits = torch.tensor([3.0, 0.0])
    threat_model = SimpleNamespace(norm="linf", epsilon=0)
    result = SimpleNamespace(threat_model=threat_model, steps=1, label=0, errs_already=True, is_fooled=False)
    for name in ("logits", "adversarial_logits", "rounded_logits"):
        setattr(result, name, logits)
    text = app_page.describe_result(result, [HOSTILE, "other"])
    assert_harmless(text)
    assert "\n" not in text


# --- Tokens ---


@pytest.mark.parametrize(
    "flags",
    [
        ["--token", TOKEN],
        [f"--token={TOKEN}"],
        ["--hub-token", TOKEN],
        ["--hub_token", TOKEN],
        [f"--hub-token={TOKEN}"],
        ["--push_to_hub_token", TOKEN],
    ],
)
def test_no_token_in_a_published_command(flags):
    assert published_command("run", ["--seed", "1", *flags, "--norm", "l2"]) == "run --seed 1 --norm l2"


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (None, [TOKEN]),
        (None, ["--token", "x", TOKEN]),
        (None, ["--seed", TOKEN]),
        (f'token: "{TOKEN}\n', []),
        (f"token: [{TOKEN}, {TOKEN}]\n", []),
        (f"{TOKEN}: 1\n", []),
    ],
)
def test_no_token_in_an_error_of_the_command_line(tmp_path, capsys, text, flags):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
        flags = [*flags, "--config", str(tmp_path / "config.yaml")]
    with pytest.raises(SystemExit):
        parse_arguments(["--output_dir", str(tmp_path), *flags])
    captured = capsys.readouterr()
    assert "error:" in captured.err and TOKEN not in captured.err + captured.out


def test_a_comparison_takes_no_token(capsys, tmp_path):
    """A study keeps its flags in files."""
    config = "fashion_mnist/efficientnet_lite0_hinge"
    for flags in (["--token", TOKEN], [f"--hub-token={TOKEN}"], ["--hub_token", TOKEN]):
        with pytest.raises(ValueError, match="HF_TOKEN") as error:
            compare.main([config, "--output_dir", str(tmp_path / "out"), *flags])
        captured = capsys.readouterr()
        assert TOKEN not in captured.err + captured.out + str(error.value)
    assert not (tmp_path / "out").exists()


def test_no_token_on_the_command_line_of_the_upload(monkeypatch):
    """Which everybody on the machine can read."""
    seen = {}

    def run(command, **options):
        seen.update(command=command, **options)
        return SimpleNamespace(returncode=0, stdout='{"result": {"repo_id": "user/x"}}')

    monkeypatch.setattr(subprocess, "run", run)
    assert create_repo("user/x", token=TOKEN) == "user/x"
    assert TOKEN in seen.pop("input") and TOKEN not in repr(seen)


@pytest.mark.parametrize("token", [TOKEN + "\n", TOKEN + "é", TOKEN])
def test_no_token_in_an_error_of_an_upload(token, tmp_path):
    """A header that cannot be sent is quoted by the client."""
    request = {"repo_id": "user/x", "repo_type": "model", "revision": None, "private": None, "space_sdk": None}
    request |= {"folder": None, "token": token}
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, upload_process.__file__],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 1 and TOKEN not in done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["error"]["message"]


def test_the_token_is_cut_out_of_a_message():
    quoted = f"Illegal header value b'Bearer {TOKEN}\\n'"
    assert upload_process.describe(ValueError(quoted), TOKEN + "\n")["message"] == (
        "Illegal header value b'Bearer <token>'"
    )


def test_the_configuration_of_a_plain_model_is_accepted(folder, timm_folder):
    """What is refused above is refused for its entry, not altogether."""
    for place in (folder, timm_folder):
        assert load_classifier(place, load_config(place)).config.num_labels == 4
        AutoImageProcessor.from_pretrained(place)
