import copy
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import SIZE, make_model
from datasets import load_dataset
from evaluation.test_report import GRID, make_report
from hub_server import WRITE_TOKEN, File, HubServer
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

from hf_rft import evaluate_robustness
from hf_rft.cli import evaluate, leaderboard
from hf_rft.cli.leaderboard import Candidate
from hf_rft.evaluation import flags
from hf_rft.evaluation.corruptions import KINDS
from hf_rft.evaluation.report import ExternalEvaluation, Profile
from hf_rft.hub.evidence import hash_weight_files


DATA = "a" * 64
SETTINGS = {
    "model": {"name": "model", "sha256": "0" * 64},
    "dataset": {"name": "digits", "sha256": DATA},
    "processor": {},
    "tier": "fast",
    "attacks": [{"attack": "apgd", "steps": 100, "restarts": 1}],
    "guess_steps": 20,
    "seed": 0,
}
STRONG, MIDDLE, WEAK = (0, 4, 4, 4, 4), (0, 1, 2, 4, 4), (0, 0, 1, 1, 2)


def described(broken_at=MIDDLE, name="model", *, changes=(), **options):
    """A report as `evaluate_robustness` describes it. `changes`: of its settings; None removes one."""
    values = {**copy.deepcopy(SETTINGS), **dict(changes)}
    values["model"]["name"] = name
    return make_report(broken_at, settings={key: one for key, one in values.items() if one is not None}, **options)


def candidates(**of_names):
    return [Candidate(f"outputs/{name}", name, report, True) for name, report in of_names.items()]


def saved(folder, *arguments, **options):
    described(*arguments, **options).save(folder / "robustness.json")
    return str(folder)


def run(tmp_path, *arguments):
    """What is written to leaderboard.json."""
    leaderboard.main([*map(str, arguments), "--output_dir", str(tmp_path / "board")])
    return json.loads((tmp_path / "board" / "leaderboard.json").read_text())


def names(board, table=0):
    return [row["name"] for row in board["groups"][table]["rows"]]


# --- Comparing ---


@pytest.mark.parametrize(
    "sort_by, order", [("expected_robustness", "abc"), ("robust_accuracy", "bac"), ("clean_accuracy", "cab")]
)
def test_sorting(sort_by, order):
    a, b, c = described((0, 3, 3, 3, 4)), described((0, 0, 0, 4, 4)), described((1, 1, 1, 1, 1))
    board = leaderboard.make_leaderboard(candidates(c=c, b=b, a=a), [], sort_by)
    assert "".join(names(board)) == order
    assert [row["rank"] for row in board["groups"][0]["rows"]] == [1, 2, 3]


def test_ties_are_broken_by_robust_accuracy_and_then_by_name():
    grid = [Fraction(0), Fraction(1, 4), Fraction(1, 2)]
    even, uneven = described((2, 2), epsilons=grid), described((1, 3), epsilons=grid)  # 0.75 twice; 0.25 and 1
    early = described((0, 3), epsilons=grid)
    assert even.clean_accuracy == uneven.clean_accuracy > early.clean_accuracy
    ranked = leaderboard.rank(candidates(a=even, c=uneven, b=uneven, d=early), "clean_accuracy")
    assert [one.name for one in ranked] == ["b", "c", "a", "d"]


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"norm": "l2"}, "norm: l2 here, linf in the first table"),
        ({"epsilons": [Fraction(0), *GRID[2:], Fraction(1)]}, 'epsilons: ["0", "85/255", "0.5", "1"] here, ["0", "2/'),
        ({"changes": {"dataset": {"sha256": "b" * 64}}}, f"data (SHA-256): {'b' * 12} here, {'a' * 12} in the"),
        ({"changes": {"dataset": {"sha256": None}}}, f"data (SHA-256): not known here, {'a' * 12} in the first"),
        ({"changes": {"dataset": "a folder"}}, "data (SHA-256): not known here"),
        (
            {"changes": {"dataset": {"sha256": "b" * 64, "image_shape": [3, 4, 4]}}},
            "image shape: [3, 4, 4] here, not known in the first table",
        ),
        ({"changes": {"tier": "standard"}}, "tier: standard here, fast in the first table"),
        ({"changes": {"attacks": []}}, 'attacks: [] here, [{"attack": "apgd", "steps": 100, "restarts": 1}] in the'),
        ({"changes": {"guess_steps": None}}, "guess_steps: not known here, 20 in the first table"),
        ({"broken_at": (1, 2, 3)}, "number of examples: 3 here, 5 in the first table"),
    ],
)
def test_what_is_not_comparable_is_listed_with_both_values(changed, reason):
    other = described(**changed)
    board = leaderboard.make_leaderboard(
        candidates(other=other, one=described(), two=described(WEAK)), [], "expected_robustness"
    )
    assert [names(board)] == [["one", "two"]] and len(board["groups"]) == 1
    [listed] = board["not_comparable"]
    assert listed["name"] == "other" and listed["reason"].startswith(reason)
    section = leaderboard.markdown(board).split("## Not comparable")[1]
    assert f"- other: {reason}" in section


def test_data_without_a_hash_are_not_known_to_be_the_same():
    unknown = {"dataset": {"sha256": None}}
    reports = candidates(one=described(changes=unknown), two=described(changes=unknown))
    board = leaderboard.make_leaderboard(reports, [], "expected_robustness")
    assert names(board) == ["one"]  # alone, for nothing has company
    assert board["not_comparable"][0]["reason"].startswith("data (SHA-256): not known here, not known in")


def test_every_group_has_a_table_the_largest_first():
    small = [described(broken_at, norm="l2") for broken_at in (WEAK, STRONG)]
    large = [described(broken_at) for broken_at in (WEAK, STRONG, MIDDLE)]
    given_as = candidates(a=small[0], b=large[0], c=large[1], d=small[1], e=large[2])
    board = leaderboard.make_leaderboard(given_as, [], "expected_robustness")
    assert (names(board), names(board, 1)) == (["c", "e", "b"], ["d", "a"])
    equally_large = leaderboard.make_leaderboard(given_as[:4], [], "expected_robustness")
    assert names(equally_large) == ["d", "a"]
    text = leaderboard.markdown(board)
    assert text.index("## L∞ up to 0.5, tier fast") < text.index("## L2 up to 0.5") and "Not comparable" not in text


# --- Reading and writing ---


def test_python_and_command_line_give_comparable_reports(tmp_path, monkeypatch):
    """Also of models whose processors normalise differently, with epsilons as floats and other batches."""
    monkeypatch.setattr(flags, "SQUARE_STEPS", 10)
    levels = np.random.default_rng(0).integers(0, 256, (8, 20, 18, 3)).astype(np.uint8)
    for number, image in enumerate(levels):
        folder = tmp_path / "images" / "test" / "abcd"[number % 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    for name, mean in (("one", 0.5), ("two", 0.3)):
        model = make_model("vit")
        model.config.id2label = dict(enumerate("abcd"))
        model.save_pretrained(tmp_path / name)
        processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[mean] * 3, image_std=[0.4] * 3)
        processor.save_pretrained(tmp_path / name)
        arguments = ["--model_name_or_path", str(tmp_path / name), "--image_dir", str(tmp_path / "images" / "test")]
        arguments += ["--epsilons", "0", "0.5/255", "8/255", "--tier", "fast"]
        evaluate.main([*arguments, "--output_dir", str(tmp_path / f"{name} from the command line")])
        report = evaluate_robustness(
            AutoModelForImageClassification.from_pretrained(tmp_path / name),
            load_dataset("imagefolder", data_dir=str(tmp_path / "images"), split="test"),
            AutoImageProcessor.from_pretrained(tmp_path / name),
            norm="linf",
            epsilons=[0, 0.5 / 255, 8 / 255],
            tier="fast",
            batch_size=3,
        )
        report.save(tmp_path / f"{name} from Python" / "robustness.json")
    board = run(tmp_path, *sorted(tmp_path.glob("* from *")))
    assert len(board["groups"]) == 1 and len(board["groups"][0]["rows"]) == 4 and not board["not_comparable"]
    assert board["groups"][0]["conditions"]["image shape"] == [3, SIZE, SIZE]


def test_files_are_written_and_the_table_is_printed(tmp_path, capsys):
    flags = {"flat_loss": "suspicious", "few_steps": "too"}
    entries = [
        saved(tmp_path / "weak", WEAK, "a|b\n$\\frac", flags=flags),
        saved(tmp_path / "strong", STRONG, "user/strong"),
        saved(tmp_path / "middle", MIDDLE, "user/middle", flags=None),
    ]
    board = run(tmp_path, *entries, tmp_path / "absent.json")
    assert sorted(path.name for path in (tmp_path / "board").iterdir()) == [
        f"leaderboard.{ending}" for ending in ("json", "md", "png")
    ]
    assert (tmp_path / "board" / "leaderboard.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "board" / "leaderboard.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0].startswith("| rank | model | clean | at 2/255 | at 85/255 | at 0.5 | expected robustness |")
    assert lines[2].startswith("| 1 | user/strong | 80.0 | 80.0 | 80.0 | 80.0 | 80.0 [") and "| none |" in lines[2]
    assert lines[3].startswith("| 2 | user/middle | 80.0 | 60.0 | 40.0 | 40.0 |") and "| not made |" in lines[3]
    assert lines[4].startswith("| 3 | a\\|b $\\frac | 60.0 |") and lines[4].endswith("|  | flat_loss, few_steps |")
    rows = board["groups"][0]["rows"]
    assert rows[0]["difference_to_next"] == pytest.approx(
        rows[0]["expected_robustness"] - rows[1]["expected_robustness"]
    )
    low, high = rows[0]["difference_interval"]
    assert low <= rows[0]["difference_to_next"] <= high and rows[2]["difference_to_next"] is None
    assert "the weights were not checked against it: user/strong, user/middle" in text
    assert board["not_read"][0]["entry"] == str(tmp_path / "absent.json") and "## Not read" in text


def test_an_external_evaluation_is_preferred_with_a_footnote(tmp_path):
    found = ExternalEvaluation(Fraction(1, 3), 0.1, "an adaptive attack", "https://example.org/attack")
    entries = [saved(tmp_path / "strong", STRONG, "strong", external=[found]), saved(tmp_path / "middle", MIDDLE, "m")]
    board = run(tmp_path, *entries)
    assert names(board) == ["m", "strong"]
    first, second = board["groups"][0]["rows"]
    assert second["accuracies"] == [0.8, 0.8, 0.1, 0.1] and second["robust_accuracy"] == 0.1
    assert first["difference_to_next"] is None, "nobody knows which examples"
    assert second["confidence_interval"] is None and first["confidence_interval"] is not None
    text = (tmp_path / "board" / "leaderboard.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| 2 |"))
    assert row.startswith("| 2 | strong * | 80.0 | 80.0 | 10.0 | 10.0 | ") and "[" not in row
    assert "\\* strong: with the lower accuracies of an adaptive attack (https://example.org/attack)." in text


def test_an_external_evaluation_that_is_not_lower_changes_nothing(tmp_path):
    found = ExternalEvaluation("0.5", 0.9, "PGD-20", "elsewhere")
    board = run(tmp_path, saved(tmp_path / "strong", STRONG, "strong", external=[found]))
    (row,) = board["groups"][0]["rows"]
    assert row["external"] == [] and row["confidence_interval"] is not None and names(board) == ["strong"]


def test_profiles_have_columns_that_do_not_count_for_the_rank(tmp_path):
    norms = {norm: described((0, 0, 1, 1, 1), norm=norm) for norm in ("l2", "l1")}
    norms["l1"].flags = {"flat_loss": "look at it"}
    profile = Profile(norms, {kind: [5, 4, 3, 2, 1] for kinds in KINDS.values() for kind in kinds})
    entries = [saved(tmp_path / "seen", STRONG, "seen"), saved(tmp_path / "both", WEAK, "both", profile=profile)]
    board = run(tmp_path, *entries)
    assert names(board) == ["seen", "both"]
    text = (tmp_path / "board" / "leaderboard.md").read_text()
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "| minus the next row's | all norms | corruptions | failed trust checks |" in header
    assert rows[0].endswith("|  |  | none |") and rows[1].endswith("| 0.0 | 60.0 | flat_loss (L1) |")
    assert "All norms: share that withstands" in text
    run(tmp_path, entries[0])
    assert "all norms" not in (tmp_path / "board" / "leaderboard.md").read_text()


def test_the_same_entry_counts_once_and_the_same_name_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "one", STRONG)
    saved(tmp_path / "two", WEAK)
    board = run(tmp_path, "one", "one/", "one/robustness.json", tmp_path / "one", "two")
    assert names(board) == ["model (one)", "model (two)"]
    assert names(run(tmp_path, "one", "one/")) == ["model"]


@pytest.mark.parametrize(
    "damage, message",
    [
        ("{", "is not a robustness report"),
        ({"schema_version": 99}, "has schema version 99"),
        ({"settings": None}, "NoneType"),
        ({"settings": {"seed": 0}}, "does not say what was attacked"),
        ({"epsilons": ["0", "2/255", "85/255", "0.5", "0.1"]}, "epsilons"),
        ({"norm": ["linf"]}, "norm"),
        ({"flags": 3}, "flags"),
    ],
)
def test_a_damaged_report_is_listed(tmp_path, damage, message):
    good, bad = saved(tmp_path / "good"), tmp_path / "bad" / "robustness.json"
    saved(bad.parent)
    bad.write_text(damage if isinstance(damage, str) else json.dumps({**json.loads(bad.read_text()), **damage}))
    board = run(tmp_path, bad.parent, good)
    assert names(board) == ["model"]
    assert board["not_read"][0]["entry"] == str(bad.parent) and message in board["not_read"][0]["reason"]


def test_a_report_beside_other_weights_is_refused(tmp_path):
    for name in ("kept", "changed", "unnamed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        model = {"sha256": "0" * 64, "files": hash_weight_files(tmp_path / name)}
        saved(tmp_path / name, name=name, changes={} if name == "unnamed" else {"model": model})
    (tmp_path / "changed" / "model.safetensors").write_bytes(b"others")
    board = run(tmp_path, tmp_path / "kept", tmp_path / "changed", tmp_path / "unnamed" / "robustness.json")
    assert names(board) == ["kept"] and board["groups"][0]["rows"][0]["weights_checked"]
    assert "not checked" not in (tmp_path / "board" / "leaderboard.md").read_text()
    assert all(one["reason"].startswith("refused: it is about the weights") for one in board["not_read"])
    assert [one["entry"].split("/")[-1] for one in board["not_read"]] == ["changed", "robustness.json"]


def test_status_is_1_only_if_no_report_could_be_read(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, tmp_path / "empty", tmp_path / "absent")
    message = str(stopped.value.code)  # a message, which Python prints before it ends with status 1
    assert message.startswith("No report could be read.") and "robustness.json" in message
    assert "absent is neither a folder nor" in message and not (tmp_path / "board").exists()


def test_repository_at_a_revision(tmp_path):
    """In a process of its own: a client knows one Hub, from its import on."""
    on_main, on_branch = saved(tmp_path / "main", WEAK, "user/robust"), saved(tmp_path / "branch", STRONG, "better")
    with HubServer() as hub:
        repository = hub.create("models", "user/robust", _files(on_main), private=True)
        files = {**_files(on_branch), "model.safetensors": b"not asked for"}
        repository.record("v1.2", "Better", {path: File(content) for path, content in files.items()})
        entries = ["user/robust@v1.2", "user/robust", "user/robust@main", "user/absent", saved(tmp_path / "local")]
        command = [sys.executable, "-m", "hf_rft", "leaderboard", *entries, "--output_dir", str(tmp_path / "board")]
        environment = hub.environment(tmp_path / "home", WRITE_TOKEN)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert not any("safetensors" in request.path for request in hub.requests)
    board = json.loads((tmp_path / "board" / "leaderboard.json").read_text())
    assert names(board) == ["better", "model", "user/robust"]
    assert [one["entry"] for one in board["not_read"]] == ["user/absent"]
    assert "weights were not checked against it: better, model, user/robust. `hf_rft.load_rob" in done.stdout


def _files(folder):
    return {"robustness.json": Path(folder, "robustness.json").read_bytes()}
