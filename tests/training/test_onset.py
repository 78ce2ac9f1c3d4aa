import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_rft.training.onset import evaluations, find_onset, onset_threshold


def log(*accuracies, every=1.0, prefix="eval"):
    return [{f"{prefix}_accuracy": value, "epoch": every * i} for i, value in enumerate(accuracies, start=1)]


@pytest.mark.parametrize(
    ("accuracies", "num_classes", "expected"),
    [
        ([0.02, 0.05, 0.051, 0.9], 100, 3),
        ([0.06], 100, 1),
        ([0.01, 0.02, 0.05], 196, None),
        ([], 100, None),
        ([0.10, 0.20, 0.21], 10, 3),
        ([0.10, 0.15, 0.19], 10, None),
        ([0.04, 0.06, 0.01], 100, 2),
    ],
)
def test_first_epoch_above_the_threshold(accuracies, num_classes, expected):
    assert find_onset(log(*accuracies), num_classes) == expected


@given(st.lists(st.floats(0, 1), max_size=8), st.integers(3, 300))
def test_definition(accuracies, num_classes):
    above = [epoch for epoch, accuracy in enumerate(accuracies, 1) if accuracy > max(0.05, 2 / num_classes)]
    assert find_onset(log(*accuracies), num_classes) == (above[0] if above else None)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 40, 200])
def test_a_solved_task_is_no_transfer_failure(num_classes):
    assert find_onset(log(1 / num_classes, 1.0), num_classes) == 2


@given(st.integers(2, 300))
def test_threshold_lies_between_chance_and_certainty(num_classes):
    assert 1 / num_classes < onset_threshold(num_classes) < 1


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
