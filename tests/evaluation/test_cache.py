import json
import logging
import os

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from torch import nn

from hf_rft.evaluation import cache as module
from hf_rft.evaluation.cache import (
    ResultCache,
    group_key,
    hash_examples,
    hash_json,
    hash_levels,
    hash_model,
    hash_tensors,
)


LOGITS = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
RECORD = {"broken_at": torch.tensor([0, 3]), "distances": torch.tensor([0.0, torch.inf])}


def hash_one(tensor, name="x"):
    return hash_tensors({name: tensor})


# --- Hashes ---


def test_hash_sees_names_types_shapes_and_values():
    tensor = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    others = [
        hash_one(tensor, "y"),
        hash_one(tensor.float()),
        hash_one(tensor.reshape(4, 1)),
        hash_one(tensor.view(torch.float32)),  # the same bytes
        hash_one(tensor.T),
        hash_one(tensor + torch.tensor([[0, 0], [0, 1]], dtype=torch.int32)),
        hash_tensors({}),
        hash_tensors({"x": tensor, "y": tensor}),
    ]
    assert len({hash_one(tensor), *others}) == len(others) + 1


def test_hash_does_not_see_order_layout_and_gradients():
    first, second = torch.rand(2, 3, 4, 5), torch.arange(3)
    expected = hash_tensors({"a": first, "b": second})
    assert hash_tensors({"b": second, "a": first.clone().requires_grad_()}) == expected
    assert hash_tensors({"a": first.to(memory_format=torch.channels_last), "b": second}) == expected
    assert hash_tensors({"a": first.transpose(1, 3).contiguous().transpose(1, 3), "b": second}) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.int64, torch.uint8])
def test_every_type_can_be_hashed(dtype):
    ones, zeros = torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)
    assert hash_one(ones) == hash_one(torch.ones(3, dtype=dtype)) != hash_one(zeros)
    assert hash_one(ones[0]) != hash_one(zeros[0])
    assert hash_one(ones[:0]) != hash_one(torch.ones(0, 2, dtype=dtype))


def test_hash_of_a_model_sees_weights_buffers_and_structure():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    expected = hash_model(model())
    changed = model()
    changed[0].weight.data[0, 0] += 1e-6
    assert hash_model(changed) != expected
    changed = model()
    changed[1].running_mean[0] = 1e-6
    assert hash_model(changed) != expected
    assert hash_model(nn.Sequential(*model(), nn.Dropout())) != expected
    assert hash_model(model().double()) != expected
    assert hash_model(model().eval().requires_grad_(False)) == expected
    assert hash_model(make_model("vit", seed=0)) == hash_model(make_model("vit", seed=0))
    assert hash_model(make_model("vit", seed=0)) != hash_model(make_model("vit", seed=1))
    assert hash_model(nn.Flatten()) != hash_model(nn.Identity())  # without any weight


def test_hash_of_json_does_not_see_the_order_of_keys():
    assert hash_json({"a": 1, "b": [2]}) == hash_json({"b": [2], "a": 1}) != hash_json({"a": 1, "b": ["2"]})


def test_key_of_a_batch_sees_evaluation_places_images_and_labels():
    pixels, labels = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])

    def key(evaluated, positions, pixels, labels):
        return group_key(evaluated, positions, hash_examples(pixels, labels))

    keys = {
        key({"seed": 0}, range(2), pixels, labels),
        key({"seed": 1}, range(2), pixels, labels),
        key({"seed": 0}, range(2, 4), pixels, labels),
        key({"seed": 0}, range(2), pixels.flip(0), labels),
        key({"seed": 0}, range(2), pixels, labels.flip(0)),
        key({"seed": 0}, range(2), pixels.double(), labels),
    }
    assert len(keys) == 6
    assert key({"seed": 0}, [0, 1], pixels.clone(), labels.clone()) in keys


# --- Records ---


def check_equal(record, expected):
    assert set(record) == set(expected)
    for name, tensor in expected.items():
        assert record[name].dtype == tensor.dtype and torch.equal(record[name], tensor), name


def test_hash_of_levels_does_not_see_rounding_and_types():
    levels, labels = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8), torch.arange(4)
    pixels = levels.double() / 255
    hashes = hash_levels(pixels, labels)
    assert len(set(hashes)) == 4
    assert hashes == hash_levels((pixels + 1e-3 * (0.5 - pixels)).float(), labels.int())
    changed = pixels.clone()
    changed[1, 0, 0, 0] += 1 / 255
    assert [one == other for one, other in zip(hashes, hash_levels(changed, labels), strict=True)] == [1, 0, 1, 1]


def test_record_comes_back(tmp_path):
    cache = ResultCache(tmp_path / "not" / "there")
    assert cache.load("key", LOGITS) is None
    record = {**RECORD, "images": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    cache.save("key", record, LOGITS)
    check_equal(cache.load("key", LOGITS), record)
    check_equal(ResultCache(str(tmp_path / "not" / "there")).load("key", LOGITS), record)
    assert cache.load("other", LOGITS) is None
    assert [path.name for path in (tmp_path / "not" / "there").iterdir()] == ["key.safetensors"]


def test_saving_again_replaces(tmp_path):
    cache = ResultCache(tmp_path)
    cache.save("key", {"broken_at": torch.tensor([1, 1])}, LOGITS)
    cache.save("key", RECORD, LOGITS)
    check_equal(cache.load("key", LOGITS), RECORD)


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = ResultCache(None)
    cache.save("key", RECORD, LOGITS)
    assert cache.load("key", LOGITS) is None and list(tmp_path.iterdir()) == []


def test_rounding_in_the_logits_is_allowed_and_another_model_is_not(tmp_path, caplog):
    cache = ResultCache(tmp_path)
    cache.save("key", RECORD, LOGITS)
    assert cache.load("key", LOGITS * (1 + 1e-6)) is not None and not caplog.records
    assert cache.load("key", LOGITS + 0.1) is None
    assert "key.safetensors is from a model with other predictions; its batch is evaluated again" in caplog.text


@pytest.mark.parametrize("logits", [LOGITS[:, :1].repeat(1, 3), LOGITS[:1].repeat(3, 1), LOGITS.double()])
def test_logits_of_another_shape_or_type_are_another_model(tmp_path, caplog, logits):
    cache = ResultCache(tmp_path)
    cache.save("key", RECORD, LOGITS)
    assert cache.load("key", logits) is None
    assert "its batch is evaluated again" in caplog.text


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64, None], ids=["empty", "text", "bytes", "torn"])
def test_unreadable_file_is_no_record(tmp_path, caplog, content):
    cache, path = ResultCache(tmp_path), tmp_path / "key.safetensors"
    cache.save("key", RECORD, LOGITS)
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    with caplog.at_level(logging.WARNING):
        assert cache.load("key", LOGITS) is None
    assert f"{path} cannot be read" in caplog.text
    cache.save("key", RECORD, LOGITS)
    check_equal(cache.load("key", LOGITS), RECORD)


def test_tensors_of_another_program_are_no_record(tmp_path, caplog):
    save_file({"weight": torch.ones(2)}, tmp_path / "key.safetensors")
    assert ResultCache(tmp_path).load("key", LOGITS) is None
    assert "cannot be read ('clean_logits')" in caplog.text


@pytest.mark.parametrize("fails", ["save_file", "replace"])
def test_save_that_fails_leaves_the_old_record_and_nothing_else(tmp_path, monkeypatch, fails):
    cache = ResultCache(tmp_path)
    cache.save("key", RECORD, LOGITS)

    def fail(tensors, path, *args):
        if fails == "save_file":
            path.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(module if fails == "save_file" else os, fails, fail)
    with pytest.raises(OSError, match="No space left"):
        cache.save("key", {"broken_at": torch.tensor([2, 2])}, LOGITS)
    assert [path.name for path in tmp_path.iterdir()] == ["key.safetensors"]
    check_equal(cache.load("key", LOGITS), RECORD)


def test_files_are_plain_safetensors(tmp_path):
    ResultCache(tmp_path).save("key", RECORD, LOGITS)
    content = (tmp_path / "key.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert set(header) - {"__metadata__"} == {*RECORD, "clean_logits"}
    assert torch.equal(load_file(tmp_path / "key.safetensors")["clean_logits"], LOGITS)
