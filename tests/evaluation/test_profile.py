from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import SIZE, make_model

from hf_rft import RobustnessReport, evaluate_robustness
from hf_rft.evaluation import flags, subject
from hf_rft.evaluation.corruptions import KINDS
from hf_rft.evaluation.evaluator import Evaluator
from hf_rft.evaluation.profile import comparable_epsilon, comparable_evaluators
from hf_rft.evaluation.report import Profile
from hf_rft.evaluation.tiers import TIERS, make_tier

from .test_evaluate import numbers, picture_dataset
from .test_report import make_report


CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)


@pytest.mark.parametrize(
    ("image_shape", "linf", "l2", "l1"), [(CIFAR, Fraction(8, 255), 0.5, 12), (IMAGENET, Fraction(4, 255), 2, 255)]
)
def test_radii_are_near_the_published_ones(image_shape, linf, l2, l1):
    published = {"linf": linf, "l2": Fraction(l2), "l1": Fraction(l1)}
    for norm, other in [(norm, other) for norm in published for other in published]:
        found = comparable_epsilon(norm, published[norm], other, image_shape)
        assert float(found / published[other]) == pytest.approx(1, rel=0.25), (norm, other)


def test_linf_radius_is_written_in_levels_and_at_most_one():
    assert comparable_epsilon("linf", Fraction(8, 255), "l2", CIFAR) == Fraction("0.52")
    assert comparable_epsilon("l2", Fraction(1, 2), "linf", CIFAR) == Fraction("7.7") / 255
    assert comparable_epsilon("l2", Fraction(500), "linf", CIFAR) == 1


# --- What a profile says ---


def profiled():
    """Five examples: three withstand L-inf, of which two L2, of which one L1."""
    norms = {
        "l2": make_report([0, 2, 4, 4, 1], norm="l2"),
        "l1": make_report([0, 4, 1, 4, 4], norm="l1"),
    }
    corrupted = {kind: [4, 3, 2, 1, 0] for kinds in KINDS.values() for kind in kinds}
    return make_report([0, 1, 4, 4, 4], margins=np.arange(5.0), profile=Profile(norms, corrupted))


def test_union_is_per_example_and_corruptions_are_averaged_apart():
    report = profiled()
    assert report.robust_accuracy == 0.6 and report.union_accuracy == 0.2
    assert report.corruption_accuracy == pytest.approx(2 / 5)
    assert report.corruption_drop == pytest.approx(1 - 0.4 / 0.8)
    plain = make_report([0, 1, 4, 4, 4])
    assert report.expected_robustness == plain.expected_robustness, "the unseen is no part of it"
    assert plain.union_accuracy is plain.corruption_accuracy is plain.corruption_drop is None
    always_wrong = make_report([0, 0, 0, 0, 0], profile=report.profile)
    assert always_wrong.corruption_drop is None


def test_profile_survives_the_file(tmp_path):
    report = profiled()
    report.save(tmp_path / "report.json")
    loaded = RobustnessReport.load(tmp_path / "report.json")
    assert loaded.to_dict() == report.to_dict() and loaded.table() == report.table()
    assert list(loaded.profile.norms) == ["l2", "l1"] and loaded.union_accuracy == 0.2


def test_table_sets_the_profile_apart():
    *_, heading, l2, l1, union, corrupted, lost = profiled().table().splitlines()
    assert heading == "Beyond that threat model:"
    assert l2.split("%")[0].split() == ["L2", "0.5", "40.0"] and l1.split("%")[0].split() == ["L1", "0.5", "60.0"]
    assert "all norms at once" in union and " 20.0 %" in union
    assert "common corruptions, mean" in corrupted and " 40.0 %" in corrupted
    assert lost.strip() == "corruptions cost 50.0 % of the clean accuracy"


def test_cut_off_report_has_no_profile():
    assert profiled().up_to(Fraction(1, 3)).profile is None


def test_figure_shows_each_norm_the_union_and_every_corruption(tmp_path):
    figure = profiled().plot_profile(tmp_path / "profile.png")
    left, right = figure.axes
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == ["L∞, up to 0.5", "L2, up to 0.5", "L1, up to 0.5", "all norms: 20.0 %"]
    assert [line.get_ydata()[-1] for line in left.lines] == pytest.approx([60, 40, 60, 20])
    assert [text.get_text() for text in right.texts] == ["80", "60", "40", "20", "0"] * 15
    assert right.get_yticklabels()[0].get_text() == "gaussian noise"
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_figure_without_a_profile_is_refused():
    with pytest.raises(ValueError, match="has no profile; evaluate with `profile=True`"):
        make_report().plot_profile()


# --- Measured ---


def test_what_cannot_be_corrupted_is_refused_before_any_attack(monkeypatch, processor):
    monkeypatch.setattr(subject.Subject, "attack", lambda *_: pytest.fail("attacked"))
    images = [{"pixel_values": torch.zeros(2, 8, 8), "label": 0}]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(128, 2))
    with pytest.raises(ValueError, match="`profile=True` needs images with 1 or 3 channels, .* these have 2"):
        evaluate_robustness(model, images, (0.5, 0.5), norm="linf", epsilons=["0", "0.1"], profile=True)


def test_the_tier_of_each_norm_is_that_of_its_name_or_the_same_list():
    grid = [Fraction(0), Fraction(8, 255)]
    for tier in ("fast", TIERS["fast"]["linf"]):
        found = comparable_evaluators(Evaluator("linf", grid, make_tier(tier, "linf"), 0), CIFAR)
        assert {each.norm: each.tier for each in found} == {norm: TIERS["fast"][norm] for norm in ("l2", "l1")}
    own = make_tier(iter([("pgd", 3)]))
    assert [each.tier for each in comparable_evaluators(Evaluator("linf", grid, own, 0), CIFAR)] == [own, own]


@pytest.fixture
def quick(monkeypatch):
    """Two kinds of corruption, whose results are known."""
    monkeypatch.setattr(flags, "SQUARE_STEPS", 10)
    monkeypatch.setattr(subject, "KINDS", {"digital": ("nothing", "darkness")})
    monkeypatch.setattr(subject, "corrupt", lambda pixels, kind, *_, **options: pixels * (kind == "nothing"))


def test_profile_is_what_each_norm_gives_alone(processor, quick, tmp_path, monkeypatch):
    model = make_model("resnet").eval()
    dataset = picture_dataset(model, processor)
    options = {"tier": [("apgd", 5)], "progress_bar": False, "batch_size": 3, "cache_dir": tmp_path}
    grid = {"norm": "linf", "epsilons": ["0", "2/255", "8/255"]}
    report = evaluate_robustness(model, dataset, processor, profile=True, **grid, **options)
    assert numbers(report) == numbers(evaluate_robustness(model, dataset, processor, **grid, **options))
    assert set(report.profile.norms) == {"l2", "l1"}
    for norm, other in report.profile.norms.items():
        assert [epsilon / other.epsilons[-1] for epsilon in other.epsilons] == [0, Fraction(1, 4), 1]
        alone = evaluate_robustness(
            model, dataset, processor, norm=norm, epsilons=other.epsilons, **{**options, "cache_dir": None}
        )
        assert numbers(other) == numbers(alone) and other.settings["attacks"] == alone.settings["attacks"]
    right = round(report.clean_accuracy * len(report))
    assert report.profile.corruptions["nothing"] == [right] * 5
    in_darkness = model(-torch.ones(1, 3, SIZE, SIZE)).logits.argmax().item()
    assert report.profile.corruptions["darkness"] == [(report.labels == in_darkness).sum()] * 5
    assert report.settings["versions"]["imagecorruptions-imaug"]

    def fail(*args, **options):
        raise AssertionError("what is in the cache is not made again")

    monkeypatch.setattr(subject, "corrupt", fail)
    again = evaluate_robustness(model, dataset, processor, profile=True, **grid, **options)
    assert again.to_dict()["profile"]["corruptions"] == report.to_dict()["profile"]["corruptions"]
