import json
import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from hf_rft import RobustnessReport
from hf_rft.attacks.base import Passes
from hf_rft.evaluation.corruptions import KINDS
from hf_rft.evaluation.report import AdversarialExamples, ExternalEvaluation


PNG = b"\x89PNG\r\n\x1a\n"
GRID = [Fraction(0), Fraction(2, 255), Fraction(1, 3), Fraction(1, 2)]
SETTINGS = {
    "model": {"name": "a model", "revision": None, "sha256": "0" * 64},
    "tier": "custom",
    "attacks": [{"attack": "apgd", "steps": 7, "restarts": 1}, {"attack": "square", "steps": 50, "restarts": 3}],
    "seed": 11,
}


def make_report(broken_at=(0, 1, 2, 4, 4), epsilons=GRID, distances=None, **options):
    broken_at = np.array(broken_at)
    upper = np.array([*map(float, epsilons), np.inf])
    return RobustnessReport(
        **{
            "norm": "linf",
            "epsilons": list(epsilons),
            "labels": np.full(len(broken_at), 2),
            "clean_predictions": np.where(broken_at == 0, 1, 2),
            "adversarial_predictions": np.where(broken_at < len(epsilons), 1, 2),
            "broken_at": broken_at,
            "distances": upper[broken_at] if distances is None else np.array(distances, dtype=float),
            "flags": {},
            "passes": Passes(120, 40),
            "settings": SETTINGS,
            **options,
        }
    )


@st.composite
def reports(draw):
    grid = sorted(draw(st.sets(st.integers(1, 255), min_size=1, max_size=5)))
    epsilons = [Fraction(0), *(Fraction(level, 255) for level in grid)]
    broken_at = draw(st.lists(st.integers(0, len(epsilons)), min_size=1, max_size=20))
    return make_report(broken_at, epsilons)


# --- Numbers ---


def test_numbers_of_a_small_report():
    report = make_report()
    assert len(report) == 5
    assert report.accuracies == [0.8, 0.6, 0.4, 0.4]
    assert (report.clean_accuracy, report.robust_accuracy) == (0.8, 0.4)
    assert report.per_example == [0, Fraction(2, 255), Fraction(1, 3), None, None]
    points = [float(epsilon) for epsilon in GRID]
    lower = (points[1] * 0.6 + (points[2] - points[1]) * 0.4 + (points[3] - points[2]) * 0.4) / 0.5
    upper = (points[1] * 0.8 + (points[2] - points[1]) * 0.6 + (points[3] - points[2]) * 0.4) / 0.5
    assert report.bracket == pytest.approx((lower, upper))
    assert report.expected_robustness == pytest.approx((lower + upper) / 2)


@given(reports())
@hypothesis_settings(deadline=None, max_examples=30)
def test_numbers_agree_with_each_other(report):
    counts = [sum(index > place for index in report.broken_at) for place in range(len(report.epsilons))]
    assert report.accuracies == pytest.approx([count / len(report) for count in counts])
    assert report.accuracies == sorted(report.accuracies, reverse=True)
    lower, upper = report.bracket
    assert report.robust_accuracy <= lower + 1e-12 and upper <= report.clean_accuracy + 1e-12
    assert report.expected_robustness == pytest.approx((lower + upper) / 2)
    low, high = report.confidence_interval
    assert 0 <= low <= report.expected_robustness + 1e-12 and report.expected_robustness - 1e-12 <= high <= 1
    # The distances are the grid points that break: a curve that falls there, as late as it can.
    assert report.expected_robustness_from_distances == pytest.approx(upper)


def test_confidence_interval_is_that_of_a_mean():
    """Of many examples, half of which break at once: plus and minus 1.96 standard errors."""
    report = make_report([0, 2] * 200, GRID[:2])
    assert report.confidence_interval == pytest.approx((0.5 - 0.049, 0.5 + 0.049), abs=0.006)
    assert make_report([0, 2] * 200, GRID[:2]).confidence_interval == report.confidence_interval
    # Two of two: only a model that withstands more than sqrt(0.025) does that more often than 2.5 % of the time.
    assert make_report([2, 2], GRID[:2]).confidence_interval == pytest.approx((0.025**0.5, 1))


def exact(count, total):
    return tuple(binomtest(count, total).proportion_ci(method="exact"))


def test_intervals_of_the_accuracies_are_the_exact_binomial_ones():
    report = make_report([0] * 3 + [1] * 5 + [2] * 4 + [4] * 9)
    np.testing.assert_allclose(report.accuracy_intervals, [exact(count, 21) for count in (18, 13, 9, 9)], rtol=1e-9)
    # All of them right: a smaller share than this shows that in fewer than 2.5 % of the draws.
    assert make_report([4] * 21).accuracy_intervals[0] == pytest.approx((0.025 ** (1 / 21), 1))


def test_expected_robustness_from_distances():
    report = make_report([0, 1, 3, 4, 4], distances=[0, 0.005, 0.4, 0.7, np.inf])
    assert report.expected_robustness_from_distances == pytest.approx((0 + 0.01 + 0.8 + 1 + 1) / 5)


def test_summary_takes_a_weight():
    report = make_report()
    uniform = report.summary()
    assert uniform["expected_robustness"] == report.expected_robustness
    assert uniform["accuracies"] == report.accuracies
    linear = report.summary(weight=lambda epsilon: epsilon)
    # The integral of epsilon times a line from (s, a) to (e, b) is (e - s) (a (2 s + e) + b (s + 2 e)) / 6.
    grid, accuracies = np.array([float(epsilon) for epsilon in GRID]), np.array(report.accuracies)
    start, end = grid[:-1], grid[1:]
    integrals = (end - start) * (accuracies[:-1] * (2 * start + end) + accuracies[1:] * (start + 2 * end)) / 6
    assert linear["expected_robustness"] == pytest.approx(integrals.sum() / (grid[-1] ** 2 / 2))
    assert report.summary(weight=lambda epsilon: 3.0)["expected_robustness"] == pytest.approx(
        0.5 * sum(report.bracket)
    )
    with pytest.raises(ValueError, match="`weight` returned -1 at epsilon"):
        report.summary(weight=lambda epsilon: -1)


def test_an_external_evaluation_caps_the_claim_at_its_epsilon_and_beyond(tmp_path):
    report = make_report()
    assert report.claimed_accuracies == report.accuracies
    assert report.claimed_expected_robustness == report.expected_robustness
    found = ExternalEvaluation(Fraction(1, 3), 0.1, "an adaptive attack", "https://example.org")
    weaker = ExternalEvaluation(Fraction(2, 255), 0.7, "PGD-20", "elsewhere")
    report.external = [found, weaker]
    assert report.claimed_accuracies == [0.8, 0.6, 0.1, 0.1] and report.accuracies == [0.8, 0.6, 0.4, 0.4]
    widths = np.diff([float(epsilon) for epsilon in GRID])
    expected = (widths * [0.7, 0.35, 0.1]).sum() / 0.5
    assert report.claimed_expected_robustness == pytest.approx(expected)
    assert report.up_to(Fraction(2, 255)).external == [weaker]
    report.save(tmp_path / "report.json")
    assert RobustnessReport.load(tmp_path / "report.json").external == [found, weaker]
    assert ExternalEvaluation("1/3", 0.1, found.attack, found.source) == found, "text and numbers are epsilons too"
    assert "  external evaluation: an adaptive attack found 10.0 % at 85/255 (https://example.org)" in report.table()


# --- Files ---


def examples():
    return AdversarialExamples([1], *torch.rand(2, 1, 3, 4, 4), *torch.rand(2, 1, 3))


def test_saved_report_is_loaded_as_it_was(tmp_path):
    report = make_report(
        distances=[0, 1 / 3, 0.1 + 0.2, np.inf, np.inf],
        flags={"flat_loss": "é is no ascii"},
        margins=np.array([0.1, 1 / 3, 2, 3, 4]),
        examples=examples(),
    )
    report.save(tmp_path / "new" / "folder" / "report.json")
    loaded = RobustnessReport.load(str(tmp_path / "new" / "folder" / "report.json"))
    assert loaded.to_dict() == report.to_dict()
    for name in ("labels", "clean_predictions", "adversarial_predictions", "broken_at", "distances", "margins"):
        ours, theirs = getattr(loaded, name), getattr(report, name)
        assert ours.dtype.kind == theirs.dtype.kind and np.array_equal(ours, theirs), name
    assert (loaded.norm, loaded.epsilons, loaded.per_example) == (report.norm, report.epsilons, report.per_example)
    assert (loaded.flags, loaded.settings) == (report.flags, report.settings)
    assert loaded.passes == report.passes and isinstance(loaded.passes, Passes)
    assert loaded.examples is None and loaded.table() == report.table()


@given(reports())
@hypothesis_settings(deadline=None, max_examples=20)
def test_any_report_survives(tmp_path_factory, report):
    path = tmp_path_factory.mktemp("report") / "report.json"
    report.save(path)
    assert RobustnessReport.load(path).to_dict() == report.to_dict()


def test_file_is_json_that_others_can_read(tmp_path):
    path = tmp_path / "report.json"
    make_report(examples=examples()).save(path)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    values = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert values["schema_version"] == 2 and values["num_examples"] == 5
    assert values["epsilons"] == ["0", "2/255", "85/255", "0.5"]
    assert values["per_example"]["broken_at"] == ["0", "2/255", "85/255", None, None]
    assert values["per_example"]["distances"][-2:] == [None, None]
    assert values["per_example"]["labels"] == [2] * 5
    assert values["passes"] == {"forward": 120, "backward": 40}
    expected = {"accuracies", "clean_accuracy", "robust_accuracy", "expected_robustness", "bracket", "flags", "norm"}
    expected |= {"confidence_interval", "expected_robustness_from_distances", "accuracy_intervals", "settings"}
    assert expected <= set(values)
    assert json.loads(json.dumps(make_report().to_dict())) == values


def test_file_of_the_first_version_is_read(tmp_path):
    """It had neither margins nor a profile."""
    values = json.loads(json.dumps(make_report(margins=np.ones(5)).to_dict()))
    values["schema_version"] = 1
    del values["per_example"]["margins"]
    (tmp_path / "report.json").write_text(json.dumps(values))
    loaded = RobustnessReport.load(tmp_path / "report.json")
    assert loaded.margins is None and loaded.profile is None
    assert loaded.to_dict() == make_report().to_dict()


def test_numbers_come_from_the_examples_not_from_the_file(tmp_path):
    path = tmp_path / "report.json"
    make_report().save(path)
    values = json.loads(path.read_text())
    values["accuracies"], values["expected_robustness"] = [1.0] * 4, 1.0
    path.write_text(json.dumps(values))
    assert RobustnessReport.load(path).to_dict() == make_report().to_dict()


@pytest.mark.parametrize("fails", ["write", "replace"])
def test_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch, fails):
    path = tmp_path / "report.json"
    make_report().save(path)
    old = path.read_bytes()
    if fails == "write":
        report = make_report(settings={**SETTINGS, "not JSON": {1, 2}})
    else:
        report = make_report([4, 4])

        def fail(*args):
            raise OSError("No space left on device")

        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(TypeError if fails == "write" else OSError):
        report.save(path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def saved_values():
    return json.loads(json.dumps(make_report().to_dict()))


def without(*keys):
    values = saved_values()
    part = values
    for key in keys[:-1]:
        part = part[key]
    del part[keys[-1]]
    return json.dumps(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no JSON", "is not a robustness report .JSONDecodeError"),
        (b"", "is not a robustness report .JSONDecodeError"),
        (PNG, "is not a robustness report .UnicodeDecodeError"),
        (b"[1, 2]", "is not a robustness report .TypeError"),
        (b"3", "is not a robustness report .TypeError"),
        (b'{"eval_accuracy": 0.5}', "is not a robustness report .KeyError: 'schema_version'"),
        (b'{"schema_version": 3}', "has schema version 3, this hf_rft reads versions 1 and 2; update hf_rft"),
        (b'{"schema_version": 0}', "has schema version 0, this hf_rft reads versions 1 and 2; update hf_rft"),
        (without("norm"), "is not a complete robustness report: 'norm' is missing"),
        (without("settings"), "'settings' is missing"),
        (without("per_example"), "'per_example' is missing"),
        (without("per_example", "distances"), "'distances' is missing"),
        (without("passes", "backward"), "'?backward'? is missing"),
        (json.dumps({**saved_values(), "per_example": None}), "is not a complete robustness report"),
        (
            json.dumps({**saved_values(), "external": [{"epsilon": "1/255"}]}),
            "is not a complete robustness report: .*missing",
        ),
        (json.dumps({**saved_values(), "epsilons": ["0", "1/255"]}), "is not a complete robustness report: '2/255'"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "other.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        RobustnessReport.load(path)
    assert str(path) in str(error.value)


def test_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        RobustnessReport.load("nowhere.json")


def with_profile(**changes):
    norms = {norm: make_report(norm=norm).to_dict() for norm in ("l2", "l1")}
    corruptions = {kind: [4, 3, 2, 1, 0] for kinds in KINDS.values() for kind in kinds}
    return {"profile": {"norms": norms, "corruptions": corruptions, **changes}}


def norms_with(place, /, **changes):
    return with_profile(norms={**with_profile()["profile"]["norms"], place: make_report(**changes).to_dict()})


def corruptions_with(**changes):
    return with_profile(corruptions={**with_profile()["profile"]["corruptions"], **changes})


def external(**changes):
    found = {"epsilon": "0.5", "robust_accuracy": 0.1, "attack": "an attack", "source": "somewhere", **changes}
    return {"external": [{key: value for key, value in found.items() if value != "left out"}]}


def per_example(**changes):
    return {"per_example": {**saved_values()["per_example"], **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (external(robust_accuracy="0.1"), r"`robust_accuracy='0.1'` must be a number from 0 to 1"),
        (external(robust_accuracy=7), r"`robust_accuracy=7` must be a number from 0 to 1"),
        (external(robust_accuracy=float("nan")), r"`robust_accuracy=nan` must be"),
        (external(robust_accuracy=False), r"`robust_accuracy=False` must be"),
        (external(epsilon="zz"), "`epsilon='zz'` is not a number"),
        (external(attack=3), "`attack=3` and `source='somewhere'` must be text"),
        (external(source="left out"), "'source' is missing or wrong"),
        (with_profile(norms={}), r"'profile' holds the norms \[\], not all others than linf"),
        (with_profile(norms={"l2": {}, "<b>x": {}}), "has schema|schema_version"),
        (norms_with("l1", norm="l2"), "'profile' holds for l1 a report of another norm"),
        (norms_with("l2", broken_at=(4, 4, 4), norm="l2"), "'profile' holds for l2 a report .* of other examples"),
        (with_profile(corruptions={}), "'corruptions' does not hold each kind at each severity"),
        (with_profile(corruptions=[1]), "is missing or wrong"),
        (corruptions_with(fog=[1]), "'corruptions' does not hold each kind at each severity"),
        (corruptions_with(fog="abcde"), "'corruptions' holds other values than numbers of examples up to 5"),
        (corruptions_with(fog=[500] * 5), "'corruptions' holds other values than numbers of examples up to 5"),
        (corruptions_with(fog=[-1] * 5), "'corruptions' holds other values"),
        (corruptions_with(fog=[float("nan")] * 5), "'corruptions' holds other values"),
        (per_example(margins=[[1.0]] * 5), "its columns have different lengths"),
        (per_example(margins=["a"] * 5), "could not convert string to float"),
        (per_example(labels=["a"] * 5), "'labels' does not hold whole numbers"),
        ({"settings": {**SETTINGS, "model": {"class_names": ["cat"]}}}, "'class_names' does not hold a name for each"),
        (
            {"settings": {**SETTINGS, "model": {"class_names": {"0": 1}}}},
            "'class_names' does not hold a name for each",
        ),
        ({"schema_version": True}, "has schema version True"),
    ],
)
def test_values_from_elsewhere_are_checked(tmp_path, changes, message):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**saved_values(), **changes}))
    with pytest.raises(ValueError, match=message) as error:
        RobustnessReport.load(path)
    assert str(error.value).startswith(str(path))


def test_profile_that_is_right_is_read(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**saved_values(), **with_profile()}))
    assert RobustnessReport.load(path).corruption_accuracy == pytest.approx(0.4)


def test_file_that_is_nested_too_deeply_is_refused(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not a robustness report .RecursionError"):
        RobustnessReport.load(path)


@pytest.mark.parametrize("accuracy", [31, -0.1, float("nan"), "0.3"])
def test_external_accuracy_is_a_share(accuracy):
    with pytest.raises(ValueError, match="must be a number from 0 to 1"):
        ExternalEvaluation("1/3", accuracy, "an attack", "somewhere")


@pytest.mark.parametrize(
    "column", ["labels", "clean_predictions", "adversarial_predictions", "broken_at", "distances", "margins"]
)
def test_columns_of_different_lengths_are_refused(tmp_path, column):
    values = json.loads(json.dumps(make_report(margins=np.ones(5)).to_dict()))
    values["per_example"][column].pop()
    (tmp_path / "report.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="robustness report"):
        RobustnessReport.load(tmp_path / "report.json")


# --- To be looked at ---


def test_table_holds_everything():
    lines = make_report(flags={"flat_loss": "look at it", "train_mode": "call eval"}).table().splitlines()
    assert lines[0] == ("5 examples, linf, tier custom: apgd (7 steps), square (50 steps, 3 restarts); seed 11")
    for line, written, accuracy in zip(
        lines[1:5], ["0 ", "2/255 ", "85/255 ", "0.5 "], ["80.0 %", "60.0 %", "40.0 %", "40.0 %"], strict=True
    ):
        assert f"accuracy at {written}" in line and accuracy in line
    low, high = exact(4, 5)
    assert f"[{100 * low:.1f}, {100 * high:.1f}]" in lines[1]
    report = make_report()
    lower, upper = report.bracket
    assert f"expected robustness   {100 * report.expected_robustness:.1f} %" in lines[5]
    assert f"{100 * lower:.1f} to {100 * upper:.1f}" in lines[5]
    low, high = report.confidence_interval
    assert f"[{100 * low:.1f}, {100 * high:.1f}]" in lines[5]
    assert [line.strip() for line in lines[-2:]] == ["WARNING flat_loss: look at it", "WARNING train_mode: call eval"]
    assert "WARNING" not in report.table()


def test_shown_in_a_line():
    assert repr(make_report(flags={"flat_loss": "look", "train_mode": "call eval"})) == (
        "RobustnessReport(5 examples, linf up to 0.5, tier custom: clean accuracy 80.0 %, robust accuracy 40.0 %, "
        f"expected robustness {100 * make_report().expected_robustness:.1f} %, flags flat_loss, train_mode)"
    )
    assert "tier None: clean" in repr(make_report(settings={})) and "flags" not in repr(make_report())
    assert repr(examples()) == "AdversarialExamples(positions=[1], images of shape (3, 4, 4))"


@pytest.mark.parametrize("settings", [SETTINGS, {}])
def test_plot_is_written(tmp_path, settings):
    path = tmp_path / "new" / "folder" / "curve.png"  # as `save`, it makes the folder
    make_report(settings=settings).plot(path)
    assert path.read_bytes().startswith(PNG)


def test_plot_returns_the_figure_and_needs_no_path():
    report = make_report(settings={**SETTINGS, "model": {"name": "a model", "num_classes": 10}})
    figure = report.plot()
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.lines] == ["a model", "chance (1 in 10 classes)"]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([100 * accuracy for accuracy in report.accuracies])
    assert len(axes.collections) == 1  # the intervals
    title = " ".join(axes.get_title().split())
    for words in (f"expected robustness {100 * report.expected_robustness:.1f} %", "5 examples, L∞", "apgd (7 steps)"):
        assert words in title
    assert report.plot(title="mine").axes[0].get_title() == "mine"
    assert report.plot(title="").axes[0].get_title() == ""


@pytest.mark.parametrize("num_classes", [None, "10", 0])
def test_without_a_number_of_classes_there_is_no_chance_line(num_classes):
    report = make_report(settings={**SETTINGS, "model": {"name": "a model", "num_classes": num_classes}})
    assert len(report.plot().axes[0].lines) == 1


def test_gallery_shows_the_images_with_the_names_of_their_classes(tmp_path):
    shown = examples()._replace(names={2: "cat"})
    figure = make_report(examples=shown).gallery(tmp_path / "new" / "page.png")
    assert (tmp_path / "new" / "page.png").read_bytes().startswith(PNG)
    assert len(figure.axes) == 3
    assert figure.axes[0].get_title().startswith("image 1: cat\n")
    assert make_report(examples=shown).gallery(names={2: "dog"}).axes[0].get_title().startswith("image 1: dog\n")


def test_without_images_there_is_no_gallery():
    with pytest.raises(ValueError, match=r"holds no adversarial examples: .* read from a file\. Call `gallery` on"):
        make_report().gallery()


# --- Other reports ---


@given(reports(), st.data())
@hypothesis_settings(deadline=None, max_examples=30)
def test_up_to_is_the_report_of_the_shorter_grid(report, data):
    epsilon = data.draw(st.sampled_from(report.epsilons[1:]))
    cut = report.up_to(epsilon)
    count = report.epsilons.index(epsilon) + 1
    assert cut.epsilons == report.epsilons[:count]
    assert cut.accuracies == report.accuracies[:count]
    assert (cut.predictions == report.predictions[:, :count]).all()


@pytest.mark.parametrize("epsilon", [Fraction(0), Fraction(1, 7)])
def test_up_to_needs_an_epsilon_of_the_grid(epsilon):
    with pytest.raises(ValueError, match="was not evaluated at epsilon"):
        make_report().up_to(epsilon)


@given(reports())
@hypothesis_settings(deadline=None, max_examples=30)
def test_a_report_from_its_own_predictions_is_equal(report):
    options = {"norm": report.norm, "epsilons": report.epsilons, "passes": report.passes, "settings": report.settings}
    again = RobustnessReport.from_predictions(report.predictions, report.labels, report.distances, **options)
    assert {**again.to_dict(), "flags": {}} == report.to_dict()
    assert again.flags is None
