import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_rft.training.onset import evaluations, find_onset, first_above_chance, onset_threshold


def log(*accuracies, every=1.0, prefix="eval", **common):
    log = [{f"{prefix}_accuracy": value, "epoch": every * i} for i, value in enumerate(accuracies, start=1)]
    return [entry | common for entry in log]


@pytest.mark.parametrize(
    ("accuracies", "num_classes", "expected"),
    [
        ([0.02, 0.05, 0.051, 0.9], 100, 3),
        ([0.06], 100, 1),
        ([0.01, 0.02, 0.05], 196, None),
        ([], 100, None),
        ([0.10, 0.15, 0.16], 10, 3),
        ([0.10, 0.15, 0.12], 10, None),
        ([0.04, 0.06, 0.01], 100, 2),
    ],
)
def test_first_epoch_above_the_threshold(accuracies, num_classes, expected):
    assert find_onset(log(*accuracies), num_classes) == expected


@pytest.mark.parametrize(
    ("chance", "threshold"),
    [(1 / 1000, 0.05), (1 / 40, 0.05), (0.04, 0.08), (0.1, 0.15), (0.5, 0.55), (0.9, 0.95), (0.98, 0.99)],
)
def test_threshold_is_the_papers_or_5_points_above_chance(chance, threshold):
    assert onset_threshold(chance) == pytest.approx(threshold)


@given(st.floats(1e-6, 1 - 1e-6))
def test_threshold_lies_between_chance_and_certainty(chance):
    assert chance < onset_threshold(chance) < 1


def test_naming_the_largest_class_is_not_learning():
    collapsed = log(0.3, 0.3, eval_majority_class_share=0.3)
    assert find_onset(collapsed, num_classes=50) is None
    assert find_onset([*collapsed, {"eval_accuracy": 0.36, "epoch": 2.5}], num_classes=50) == 3
    assert find_onset(log(0.3), num_classes=50) == 1  # a log of a version that did not count classes


def test_the_evaluation_that_passed_is_returned():
    history = log(0.01, 0.06, 0.9, every=0.5)
    assert first_above_chance(history, num_classes=100) is history[1]


@pytest.mark.parametrize("num_classes", [2, 3, 10, 40, 200])
def test_a_solved_task_is_no_transfer_failure(num_classes):
    assert find_onset(log(1 / num_classes, 1.0), num_classes) == 2


# --- Where evaluations are not one per epoch, or not made in training ---


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (log(0.01, 0.05, 0.06, 0.9), 3),
        (log(0.01, 0.06, every=0.4), 1),  # in the first epoch
        (log(0.01, 0.04, 0.06, every=0.4), 2),
        (log(0.01, 0.06, every=5.0), 10),
        (log(0.01, 0.02), None),
        ([], None),
        ([{"loss": 1.0, "epoch": 1.0}], None),
        ([{"eval_accuracy": 0.9, "epoch": 0}, *log(0.01, 0.9)], 2),  # before the first step
        ([*log(0.01), {"train_runtime": 1.0, "epoch": 1.0}, {"eval_accuracy": 0.9, "epoch": 1.0}], None),
    ],
)
def test_onset_in_a_log(history, expected):
    assert find_onset(history, num_classes=100) == expected


def test_one_of_several_evaluation_datasets():
    history = [*log(0.9, prefix="eval_easy"), *log(0.01, 0.9, prefix="eval_hard")]
    assert find_onset(history, 100, "eval_hard") == 2
    assert len(evaluations(history, "eval_easy")) == 1
    assert evaluations(history) == []
