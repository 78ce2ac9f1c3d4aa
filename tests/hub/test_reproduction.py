import ast

import pytest
from evaluation.test_report import make_report

from hf_rft.hub.reproduction import code_to_reproduce, quoted
from hub.test_model_card import settings


def code(**dataset):
    changed = {**settings()["dataset"], **dataset}
    text = code_to_reproduce(make_report(settings=settings(dataset=changed)), "user/robust")
    compile(text, "card", "exec")
    return text


def test_data_from_the_hub_are_loaded_by_name_and_revision():
    text = code()
    loading = 'load_dataset("ethz/food101", "default", revision="e06ac", split="validation")'
    assert f"dataset = {loading}\n" in text
    assert 'load_robust_model("user/robust")' in text and 'tier="fast"' in text and "seed=3" in text


def test_a_random_part_is_drawn_again():
    options = {"test_size": 0.1, "seed": 3, "stratify_by_column": "label"}
    assert 'split="validation").shuffle(seed=4).select(range(5))\n' in code(shuffle_seed=4)
    text = code(split_off=options)
    assert 'split="train").train_test_split(test_size=0.1, seed=3, stratify_by_column="label")["test"]\n' in text


def test_data_that_are_not_on_the_hub_are_called_so():
    assert 'load_dataset("mine", split="validation")  # a folder of this name' in code(name="mine", revision=None)
    for name in ("fashion_mnist_5k", "emoji"):
        text = code(name=name, revision=None)
        assert f'load_dataset(bundled.resolve("bundled:{name}"), split="validation")\n' in text
    assert "no public name" in code(name=None) and "load_dataset" not in code(name=None)


def test_other_settings_are_repeated():
    changes = {"tier": "custom", "autocast_dtype": "bfloat16"}
    text = code_to_reproduce(make_report(settings=settings(**changes)), "m")
    assert 'tier=[("apgd", 100, 1)]' in text and "autocast_dtype=torch.bfloat16" in text and "import torch\n" in text
    assert "autocast" not in code()
    assert 'label_column="fine_label"' in code(label_column="fine_label")


@pytest.mark.parametrize("value", ['a"b\n```', ["0", "2/255"], [("apgd", 10, 1)], 3, 0.1, None])
def test_quoted_values_are_python_in_one_line(value):
    assert ast.literal_eval(quoted(value)) == value and "\n" not in quoted(value)
