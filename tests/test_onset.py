import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_rft.onset import adaptation_onset


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
    assert adaptation_onset(accuracies, num_classes) == expected


@given(st.lists(st.floats(0, 1), max_size=8), st.integers(3, 300))
def test_definition(accuracies, num_classes):
    above = [epoch for epoch, accuracy in enumerate(accuracies, 1) if accuracy > max(0.05, 2 / num_classes)]
    assert adaptation_onset(accuracies, num_classes) == (above[0] if above else None)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 40, 200])
def test_a_solved_task_is_no_transfer_failure(num_classes):
    assert adaptation_onset([1 / num_classes, 1.0], num_classes) == 2
