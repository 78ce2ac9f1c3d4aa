from fractions import Fraction

import numpy as np
import pytest
import yaml
from evaluation.test_report import make_report
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from hf_rft.evaluation.report import ExternalEvaluation, Profile
from hf_rft.evaluation.tiers import TIERS
from hf_rft.hub.model_card import (
    TAGS,
    Progress,
    Training,
    check_card,
    describe_robustness,
    eval_results,
    make_card,
)
from hf_rft.training.onset import describe_onset


ARGUMENTS = {
    "norm": "linf",
    "epsilon": "8/255",
    "attack": "apgd",
    "attack_steps": 7,
    "robust_loss": "at",
    "epsilon_schedule_type": "hinge",
}

FOREIGN = """---
license: mit
tags:
- vision
model-index:
- name: elsewhere
  results:
  - task:
      type: image-classification
    dataset:
      name: ImageNet
      type: imagenet-1k
    metrics:
    - type: accuracy
      value: 0.8
---
# My model

Trained elsewhere, with *care*.

## Contact

me
"""


def settings(**changes):
    return {
        "model": {"name": "user/robust", "revision": None, "sha256": "0" * 64},
        "dataset": {
            "name": "ethz/food101",
            "revision": "e06ac",
            "config": "default",
            "split": "validation",
            "fingerprint": "f",
            "sha256": "1" * 64,
        },
        "processor": "values",
        **TIERS["fast"]["linf"].describe(),
        "seed": 3,
        "versions": {"torch": "2.15.0"},
        **changes,
    }


WHOLE = Progress(100, 100, 8 / 255, 100, 8 / 255)


def describe_training(arguments=ARGUMENTS, progress=WHOLE, **facts):
    return make_card(name="m", training=Training(arguments, progress, **facts)).text


@pytest.fixture
def report():
    return make_report(settings=settings())


def loaded(card):
    """What the Hub, or the next reader, sees."""
    return ModelCard(str(card))


# --- For machines ---


def test_one_entry_an_epsilon_and_one_for_expected_robustness(report):
    *accuracies, expected = eval_results(report)
    assert [result.metric_value for result in accuracies] == report.accuracies
    assert [result.metric_args["epsilon"] for result in accuracies] == ["0", "2/255", "85/255", "0.5"]
    for result in (*accuracies, expected):
        assert result.dataset_type == "ethz/food101"
        assert (result.dataset_config, result.dataset_split) == ("default", "validation")
        assert result.dataset_revision == "e06ac"
        conditions = {"norm": "linf", "attack": "apgd", "steps": 100, "restarts": 1, "tier": "fast"}
        assert conditions.items() <= result.metric_args.items()
        assert {"num_examples": len(report), "seed": 3}.items() <= result.metric_args.items()
    assert expected.metric_type == "expected_robustness"
    assert expected.metric_value == report.expected_robustness
    assert expected.metric_args["epsilons"] == ["0", "2/255", "85/255", "0.5"]
    assert expected.metric_args["confidence_interval"] == list(report.confidence_interval)
    assert expected.metric_args["bounds"] == list(report.bracket)


def with_profile(report):
    norms = {"l2": make_report([0, 2, 4, 4, 1], norm="l2", settings=settings(seed=7))}
    report.profile = Profile(norms, {"fog": [4, 4, 4, 2, 1], "snow": [0, 0, 0, 0, 0]})
    return report


def test_a_profile_has_entries_of_its_own(report):
    own, everything = eval_results(report), eval_results(with_profile(report))
    assert everything[: len(own)] == own
    others = everything[len(own) :]
    assert {result.metric_args["norm"] for result in others} == {"l2"} and len(others) == 5
    assert others[-2].metric_value == 0.4 and others[-2].metric_args["seed"] == 7
    card = make_card(name="m", report=report)
    check_card(loaded(card), report, name="m")
    assert make_card(card, name="m", report=report).data.eval_results == card.data.eval_results


def test_several_attacks_are_lists():
    report = make_report(settings=settings(**TIERS["full"]["linf"].describe()))
    arguments = eval_results(report)[0].metric_args
    assert arguments["attack"] == ["apgd", "apgd_targeted", "fmn", "square"]
    assert arguments["steps"] == [100, 100, 100, 5000]


def test_model_index_parses_back_into_equal_results(report):
    results = eval_results(report)
    name, again = model_index_to_eval_results(eval_results_to_model_index("robust", results))
    assert (name, again) == ("robust", results)


def test_the_card_as_text_parses_back_into_equal_results(report):
    card = make_card(name="m", report=report)
    assert loaded(card).data.eval_results == eval_results(report)
    # and YAML keeps what it was given: fractions are text, numbers are numbers
    front = yaml.safe_load(str(card).split("---")[1])
    assert loaded(card).data.to_dict() == front


# --- For people ---


def test_the_section_states_threat_model_results_and_limits(report):
    text = describe_robustness(report, "curve.png")
    for stated in ("L∞", "| 2/255 |", "](curve.png)", "fast", "seed 3", "upper bounds"):
        assert stated in text
    assert f"{100 * report.expected_robustness:.1f} %" in text


def test_an_external_evaluation_takes_the_place_of_higher_numbers(report):
    assert "external" not in describe_robustness(report).lower()
    report.external = [ExternalEvaluation(Fraction(1, 3), 0.1, "an <adaptive> attack", "https://example.org")]
    card = make_card(name="m", report=report)
    rows = [line for line in card.text.splitlines() if line.startswith("| ")]
    assert "| 2/255 | 60.0 % | 14.7 to 94.7 % |" in rows
    assert "| 85/255 | 10.0 % | external; 40.0 % here |" in rows and "| 0.5 | 10.0 % | external; 40.0 % here |" in rows
    assert "is **27.2 %** (with an external evaluation, see below)" in card.text
    assert "attack found 10.0 % at 85/255 (https://example.org)." in card.text and "<adaptive>" not in card.text
    check_card(loaded(card), report, name="m")
    *accuracies, expected = card.data.eval_results
    assert [result.metric_value for result in accuracies] == [0.8, 0.6, 0.1, 0.1]
    assert expected.metric_value == report.claimed_expected_robustness
    assert expected.metric_args["external"] == ["an <adaptive> attack (https://example.org)"]
    assert "confidence_interval" not in expected.metric_args and "bounds" not in expected.metric_args
    assert ["confidence_interval" in result.metric_args for result in accuracies] == [True, True, False, False]
    assert "![Accuracy over epsilon (L∞), as measured here: 80.0 %" in describe_robustness(report, "curve.png")


def test_a_profile_is_stated_apart(report):
    before = describe_robustness(report)
    assert "Beyond the threat model" not in before and "patches, weather)" in before
    text = describe_robustness(with_profile(report))
    section = text.split("### Beyond the threat model")[1].split("### Trust checks")[0]
    assert "| L2 0.5 | 40.0 % | 5.3 to 85.3 % |" in section
    assert "| all norms at once | 20.0 % |" in section and "| common corruptions, mean | 30.0 % |" in section
    assert "The radii are comparable to 0.5 in the L∞ norm" in section
    assert "which cost 62.5 % of the clean accuracy." in section
    assert "weather)" not in text and "(rotations, patches)" in text
    assert "profile=True" in make_card(name="m", report=report).text


def test_the_worst_class_is_named():
    model = {"name": "m", "class_names": {"0": "cat", "1": "<dog>"}}
    report = make_report([1] * 4 + [4] * 8, labels=np.repeat([1, 0], 6), settings=settings(model=model))
    text = describe_robustness(report)
    assert "The classes differ; worst class: " in text and "33.3 % of 6 at 0.5 [" in text
    assert "<dog>" not in text, "a name is not HTML"
    assert "worst class" not in describe_robustness(make_report(settings=settings()))


def test_failed_checks_of_the_other_norms_are_stated(report):
    report = with_profile(report)
    assert "Passed: no sign of masked gradients" in describe_robustness(report)
    report.profile.norms["l2"].flags = {"flat_loss": "look at it"}
    text = describe_robustness(report)
    assert "- **flat_loss (L2)**: look at it" in text and "Passed" not in text
    assert "WARNING flat_loss (L2): look at it" in report.table()


def test_accuracies_are_stated_once(report):
    text = make_card(name="m", report=report, training=Training(ARGUMENTS, WHOLE)).text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[2] == "| 0 (clean images) | 80.0 % | 28.4 to 99.5 % |"
    assert len([row for row in rows if "expected robustness" in row]) == 1
    assert "80.0 %" not in text.split("## Robustness")[0]


def test_pictures_have_texts_that_say_what_they_show(report):
    text = make_card(
        name="m", report=report, curve="c.png", training=Training(ARGUMENTS, WHOLE, schedule_plot="s.png")
    ).text
    assert "![Accuracy over epsilon (L∞): 80.0 % on clean images, 40.0 % at 0.5](c.png)" in text
    shown = "schedule hinge up to 8/255; the weights are those after step 100"
    assert f"![Training epsilon over optimizer steps, {shown}](s.png)" in text


def test_the_code_loads_the_repository_once_it_is_known(report):
    text = make_card(name="robust", report=report).text
    assert 'pipeline("image-classification", model="user/robust")' in text
    assert text.count('load_robust_model("user/robust")') == 2
    assert "is the folder that holds this card" not in text
    local = make_card(name="robust", training=Training(ARGUMENTS, WHOLE)).text
    assert 'model="robust")' in local and "`robust` is the folder that holds this card." in local


@pytest.mark.parametrize(("is_held_out", "is_stated"), [(None, False), (True, False), (False, True)])
def test_numbers_from_validation_images_are_called_so(is_held_out, is_stated):
    dataset = {"name": "mine", "split": "validation"} | ({} if is_held_out is None else {"is_held_out": is_held_out})
    text = describe_robustness(make_report(settings=settings(dataset=dataset)))
    assert ("the numbers are from the validation images" in text) == is_stated


def test_weak_tiers_are_called_optimistic():
    assert "optimistic" in describe_robustness(make_report(settings=settings(tier="custom")))
    strong = settings(**TIERS["standard"]["linf"].describe())
    assert "optimistic" not in describe_robustness(make_report(settings=strong))


@pytest.mark.parametrize(
    ("flags", "text"),
    [(None, "Not made"), ({}, "Passed"), ({"train_mode": "Was in train mode."}, "- **train_mode**: Was in train")],
)
def test_trust_checks(flags, text):
    assert text in describe_robustness(make_report(settings=settings(), flags=flags))


def test_training_section():
    text = describe_training(command="accelerate launch x.py", schedule_plot="schedule.png")
    for stated in ("7-step `apgd`", "`hinge`", "accelerate launch x.py", "(schedule.png)"):
        assert stated in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == ARGUMENTS
    assert "Onset" not in text and "Alarms" not in text


def test_steps_that_follow_epsilon_are_stated():
    arguments = {**ARGUMENTS, "attack_steps_schedule": "epsilon"}
    text = describe_training(arguments)
    assert "7-step (fewer while epsilon was smaller) `apgd`" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == arguments
    assert "(fewer" not in describe_training({**ARGUMENTS, "attack_steps_schedule": "constant"})


@pytest.mark.parametrize(
    ("progress", "stated"),
    [
        (Progress(100, 100, 8 / 255, 100, 8 / 255), ["L∞ perturbations up to 8/255: 7-step `apgd`"]),
        (
            Progress(100, 40, 2.5 / 255, 40, 2.5 / 255),
            ["up to **2.5/255** (target: 8/255)", "stopped after 40 of 100 steps, with epsilon at 2.5/255."],
        ),
        (
            Progress(100, 100, 8 / 255, 20, 0.0),
            ["**without any attack**", "those after step 20 of 100, the best checkpoint by `robust_accuracy`; until"],
        ),
        (
            Progress(100, 60, 8 / 255, 50, 4 / 255 / 3),
            ["up to **1.33/255** (target", "with epsilon at 8/255. The weights are those after step 50 of 100, the"],
        ),
        (Progress(0, 0, 0.0, 0, 0.0), ["took no training step: the weights are those it started from."]),
    ],
    ids=["whole", "stopped early", "kept before the ramp", "both", "none"],
)
def test_the_training_section_states_what_the_kept_weights_have_seen(progress, stated):
    text = " ".join(describe_training(progress=progress, best_by="robust_accuracy").split())
    for words in stated:
        assert words in text
    assert ("perturbations up to 8/255" in text) == (progress.kept_epsilon == 8 / 255)
    assert ("The weights are those" in text) == (progress.kept_step < progress.steps)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], "not measured"),
        ([{"eval_accuracy": 0.02, "epoch": 1.0}], "never (transfer failure)"),
        ([{"eval_accuracy": 0.02, "epoch": 1.0}, {"eval_accuracy": 0.9, "epoch": 2.0}], "epoch 2"),
        ([{"train_runtime": 1.0}, {"eval_accuracy": 0.9, "epoch": 2.0}], "not measured"),
    ],
)
def test_onset_in_the_training_section(history, expected):
    text = describe_training(onset=describe_onset(history, num_classes=100))
    assert f"shows first learning): {expected}." in text


def test_alarms_in_the_training_section():
    assert "Alarms in training: none." in describe_training(alarms={})
    text = describe_training(alarms={"transfer_failure": "Nothing was learnt."})
    assert "Alarms in training:\n\n- **transfer_failure**: Nothing was learnt." in text


# --- Both ---


def test_writing_twice_changes_nothing(report):
    facts = {"name": "m", "report": report, "training": Training(ARGUMENTS, WHOLE), "curve": "curve.png"}
    for existing in (None, ModelCard(FOREIGN)):
        card = make_card(existing, **facts)
        assert str(make_card(loaded(card), **facts)) == str(card)


def test_a_card_from_elsewhere_keeps_its_text_tags_and_results(report):
    card = make_card(ModelCard(FOREIGN), name="ours", report=report)
    again = loaded(card)
    assert again.text.startswith(ModelCard(FOREIGN).text.rstrip())
    assert "hf_rft: summary" not in again.text
    assert again.data.license == "mit"
    assert again.data.pipeline_tag == "image-classification"
    assert again.data.tags == ["vision", *TAGS]
    foreign = EvalResult("image-classification", "imagenet-1k", "ImageNet", "accuracy", 0.8)
    assert again.data.eval_results == [foreign, *eval_results(report)]
    assert again.data.to_dict()["model-index"][0]["name"] == "elsewhere"


def test_what_the_author_wrote_between_our_parts_stays(report):
    card = make_card(name="m", report=report, training=Training(ARGUMENTS, WHOLE))
    card.text = card.text.replace("# m\n", "# My own title\n\nMy words.\n").replace("## Training", "## Changed")
    better = make_report(broken_at=(3, 3, 4, 4, 4), settings=settings(seed=77))
    again = make_card(loaded(card), name="m", report=better, training=Training(ARGUMENTS, WHOLE))
    assert again.text.lstrip().startswith("# My own title\n\nMy words.\n\n<!-- hf_rft: summary -->")
    assert "## Changed" not in again.text
    assert "seed 77" in again.text


def test_another_report_takes_the_place_of_the_first_and_training_stays(report):
    card = make_card(ModelCard(FOREIGN), name="m", report=report, training=Training(ARGUMENTS, WHOLE))
    better = make_report(broken_at=(3, 3, 4, 4, 4), settings=settings(seed=77))
    card = make_card(card, name="m", report=better)
    results = loaded(card).data.eval_results
    assert results[1:] == eval_results(better)
    assert card.text.count("## Robustness\n") == card.text.count("## Training") == 1
    assert "seed 77" in card.text
    assert "seed 3." not in card.text


def test_a_card_without_a_report_claims_nothing_any_more(report):
    card = make_card(name="m", report=report)
    assert f"is **{100 * report.expected_robustness:.1f} %** (95 % interval" in card.text
    card = make_card(card, name="m", training=Training(ARGUMENTS, WHOLE))
    assert loaded(card).data.eval_results is None
    assert "## Robustness" not in card.text
    assert "%" not in card.text.split("## Training")[0]


def test_the_summary_says_where_the_model_comes_from():
    facts = {"name": "m", "base_model": "google/vit", "dataset": "cats", "training": Training(ARGUMENTS, WHOLE)}
    card = make_card(**facts, metadata={"license": "mit", "tags": ["mine"], "language": None})
    origin = "robustly fine-tuned with hf_rft from [google/vit](https://huggingface.co/google/vit) on cats."
    assert f"An image classifier, {origin}" in card.text
    assert (card.data.base_model, card.data.license, card.data.tags) == ("google/vit", "mit", ["mine", *TAGS])
    assert "language" not in card.data.to_dict()
    untrained = make_card(name="m", training=Training(ARGUMENTS, Progress(9, 9, 0.0, 9, 0.0)))
    assert "An image classifier, fine-tuned with hf_rft." in untrained.text


def test_another_report_leaves_the_words_about_training(report):
    card = make_card(name="m", report=report, base_model="google/vit", training=Training(ARGUMENTS, WHOLE))
    again = make_card(loaded(card), name="m", report=make_report(broken_at=(4, 4), settings=settings()))
    assert "robustly fine-tuned with hf_rft from [google/vit]" in again.text
    assert "is **100.0 %** (95 % interval" in again.text


@pytest.mark.parametrize(
    "template",
    [
        "# Model Card for Model ID\n\n[More Information Needed]\n",
        "<!-- This model card has been generated automatically according to the information the Trainer had access "
        "to. -->\n\n# m\n\n## Intended uses\n\nMore information needed\n",
    ],
    ids=["huggingface_hub", "Trainer"],
)
def test_a_template_that_nobody_filled_in_is_replaced(report, template):
    card = make_card(ModelCard(f"---\nlicense: mit\n---\n{template}"), name="mine", report=report)
    assert card.text.startswith("# mine\n") and "nformation needed" not in card.text.lower()
    assert card.data.license == "mit"


# --- Checks ---


def changed_card(report, change):
    card = make_card(name="m", report=report)
    results = card.data.eval_results
    card.data.eval_results = change(results) or results
    return card


def test_a_card_with_its_report_passes(report):
    check_card(changed_card(report, lambda results: None), report, name="m")


@pytest.mark.parametrize("lost", ["norm", "epsilon"])
def test_a_number_without_its_threat_model_is_refused(report, lost):
    card = changed_card(report, lambda results: results[-1].metric_args.pop(lost) and None)
    with pytest.raises(ValueError, match=r"card of m states expected_robustness 0\.\d+ without a threat model"):
        check_card(card, report, name="m")


def test_a_card_without_results_is_refused(report):
    card = changed_card(report, lambda results: None)
    card.data.eval_results = None
    with pytest.raises(ValueError, match="card of m lacks the threat model and the number of its report: accuracy"):
        check_card(card, report, name="m")


def test_a_card_that_states_other_numbers_is_refused(report):
    better = make_report(broken_at=np.full(5, 4), settings=settings())
    card = changed_card(better, lambda results: None)
    with pytest.raises(ValueError, match=r"states accuracy linf 0: 1\.0, its report 0\.8"):
        check_card(card, report, name="m")


def test_a_card_with_an_entry_less_is_refused(report):
    with pytest.raises(ValueError, match="lacks the threat model and the number of its report: expected_robustness"):
        check_card(changed_card(report, lambda results: results[:-1]), report, name="m")
