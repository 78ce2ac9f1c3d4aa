"""Two processes against one with the same global batch: noise, gradients and evaluation must not tell them apart.

And a process that is killed against one that is not.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import evaluation_worker
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from conftest import CONFIGS, SIZE, make_model
from distributed_worker import FSDP_CASES, TRAINING_CASES
from safetensors.torch import load_file
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

from hf_rft import RobustTrainingArguments
from hf_rft.evaluation import evaluator, flags, subject
from hf_rft.evaluation.provenance import describe_model
from hf_rft.models.classifier import WholeCopy
from hf_rft.training.distributed import (
    filled_up,
    first_examples,
    may_have_unused_parameters,
    own_real_examples,
    set_ddp_options,
    training_remainder,
)


WORKER = Path(__file__).parents[1] / "distributed_worker.py"
EVALUATION_WORKER = Path(evaluation_worker.__file__)
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
NUMBERS = tuple(f"gloo:all_reduce [{size}]" for size in ("[]", "[2]", "[4]"))
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("family", CONFIGS)
def test_unused_parameters_are_found(family):
    model = make_model(family)
    before = [module.training for module in model.modules()]
    assert may_have_unused_parameters(model) == (family == "dinov2")
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_need_no_gradient_and_odd_models_are_taken_to_need_a_search():
    model = make_model("dinov2")
    model.dinov2.embeddings.mask_token.requires_grad_(False)
    assert not may_have_unused_parameters(model)
    model.requires_grad_(False)
    assert not may_have_unused_parameters(model)
    vit = make_model("vit")
    vit.config.image_size = 24  # the model itself takes 16 only
    assert may_have_unused_parameters(vit)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (False, False)),
        ({"freeze_batch_norm": False}, (False, None)),
        ({"ddp_find_unused_parameters": True, "ddp_broadcast_buffers": True}, (None, None)),
    ],
)
def test_ddp_options_follow_the_model_unless_they_are_given(tmp_path, options, expected):
    args = RobustTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)
    ddp = SimpleNamespace(find_unused_parameters=None, broadcast_buffers=None)
    set_ddp_options(ddp, args, make_model("vit"))
    assert (ddp.find_unused_parameters, ddp.broadcast_buffers) == expected


@pytest.mark.parametrize("family", CONFIGS)
def test_whole_copy_has_weights_only_while_it_holds_them(family):
    model = make_model(family).eval()
    images = torch.rand(2, 3, SIZE, SIZE)
    whole_copy = WholeCopy(model)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)  # as a step of training does
        assert all(parameter.is_meta for parameter in whole_copy.model.parameters())
        with whole_copy.holding(model) as borrowed:
            assert borrowed is not model and not any(parameter.requires_grad for parameter in borrowed.parameters())
            with torch.no_grad():
                assert torch.equal(borrowed(pixel_values=images).logits, model(pixel_values=images).logits)
            assert describe_model(borrowed) == describe_model(model)
    assert all(parameter.is_meta for parameter in whole_copy.model.parameters())
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All cases of the worker, in one process and in two: its folder, and what each process wrote."""
    folder = tmp_path_factory.mktemp("distributed")
    worker = [str(WORKER), str(folder)]
    subprocess.run([sys.executable, *worker], check=True, env=ONE_THREAD)
    subprocess.run([*TWO_PROCESSES, *worker], check=True, env=ONE_THREAD)
    one, first, second = (json.loads((folder / f"result-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert [result["world_size"] for result in (one, first, second)] == [1, 2, 2]
    return folder, one, first, second


def check_training(results, name, name_of_two):
    """Every gradient to 1e-6, and the metrics afterwards."""
    folder, one, *both = results
    expected = one["training"][name]
    for rank, result in enumerate(both):
        found = result["training"][name_of_two]
        assert found["steps"] == expected["steps"] >= 2
        assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)
        for step in range(expected["steps"]):
            gradients = load_file(folder / f"{name}-{step}-1-0.safetensors")
            assert max(gradient.abs().max() for gradient in gradients.values()) > 0.01
            of_two = load_file(folder / f"{name_of_two}-{step}-2-{rank}.safetensors")
            for parameter, gradient in gradients.items():
                torch.testing.assert_close(
                    of_two[parameter],
                    gradient,
                    atol=1e-6,
                    rtol=0,
                    msg=lambda text, where=(step, parameter): f"{where}: {text}",
                )


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAINING_CASES, ids=lambda case: case[0])
def test_two_processes_train_like_one(results, case):
    name, _, _, count, batch_size, *_ = case
    assert count % batch_size != 0
    check_training(results, name, name)
    for result in results[2:]:
        looks = name in ("unused parameters", "head first")  # a frozen part has no gradient
        assert result["training"][name]["looks for unused parameters"] == looks


@pytest.mark.slow
@pytest.mark.parametrize("name", FSDP_CASES)
def test_two_processes_with_divided_weights_train_like_one(results, name):
    check_training(results, name, f"{name}, fsdp")


@pytest.mark.slow
def test_attack_on_divided_weights_gathers_them_once(results):
    """However many steps it takes; and no gradient is exchanged for it."""
    for result in results[2:]:
        few, many = result["exchanges, fsdp"]
        assert few == many and sum(few.values()) > 100


@pytest.mark.slow
def test_two_processes_evaluate_like_one(results):
    """The whole report of `evaluate`, number of passes and hash of the weights included."""
    _, one, first, second = results
    assert first["evaluation"] == second["evaluation"] == one["evaluation"]
    assert first["evaluation, fsdp"] == second["evaluation, fsdp"] == one["evaluation"][:2]
    accuracies = [len(set(result["report"]["accuracies"])) for result in one["evaluation"]]
    assert min(accuracies) > 2 and len(accuracies) == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exchanges", "exchanges, accumulated"])
def test_gradients_are_exchanged_as_often_as_in_plain_training(results, kind):
    """In three steps, by size: nothing is exchanged that a plain `Trainer` does not, but for a few numbers (how many
    examples there are, whether all losses are finite, whether to stop, what a probe found), and none of it more often
    for a longer attack.
    """
    for result in results[2:]:
        plain, *robust = result[kind].values()
        buckets = [count for name, count in plain.items() if name.startswith("gloo:all_reduce")]
        assert len(buckets) > 3 and sum(buckets) > 15
        assert all(exchanged == robust[0] for exchanged in robust)
        assert {name: count for name, count in robust[0].items() if name not in NUMBERS} == plain
        assert sum(robust[0].get(name, 0) for name in NUMBERS) <= 20


@pytest.fixture
def one_thread(monkeypatch):
    """What the worker changes, when it is called here, is changed back."""
    monkeypatch.setattr(flags, "SQUARE_STEPS", flags.SQUARE_STEPS)
    monkeypatch.setattr(subject, "KINDS", subject.KINDS)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_two_processes_return_the_report_of_one(tmp_path, one_thread):
    evaluation_worker.main(str(tmp_path))
    subprocess.run([*TWO_PROCESSES, str(EVALUATION_WORKER), str(tmp_path)], check=True, env=ONE_THREAD)

    one, first, second = (
        json.loads((tmp_path / f"evaluation-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert [result.pop("world_size") for result in (one, first, second)] == [1, 2, 2]
    assert list(one) == ["plain", "empty cache", "full cache", "one batch", "profile"]
    for name, report in one.items():
        assert first[name] == second[name] == report, name
    assert one["plain"] == one["empty cache"] == one["full cache"]
    assert set(one["profile"]["profile"]["norms"]) == {"l2", "l1"}
    assert one["plain"]["num_examples"] == 13 and len(set(one["plain"]["accuracies"])) > 2
    caches = [sorted(path.name for path in (tmp_path / f"cache-{count}").iterdir()) for count in (1, 2)]
    assert caches[0] == caches[1] and len(caches[0]) == 5


@pytest.mark.slow
def test_evaluation_that_is_killed_goes_on(tmp_path, monkeypatch, one_thread):
    examples, batch_size = evaluation_worker.EXAMPLES, evaluation_worker.BATCH_SIZE
    cache_dir, batches = tmp_path / "cache", examples // batch_size
    process = subprocess.Popen(
        [sys.executable, str(EVALUATION_WORKER), "--to_be_killed", str(cache_dir)], env=ONE_THREAD
    )
    try:
        deadline = time.monotonic() + 120
        while not list(cache_dir.glob("*.safetensors")):
            assert process.poll() is None and time.monotonic() < deadline, "no batch was finished"
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    finished = {path: path.read_bytes() for path in cache_dir.glob("*.safetensors")}
    assert 1 <= len(finished) < batches

    attacked, find = [], evaluator.find_breaking_points

    def counted(*args, **kwargs):
        attacked.append(kwargs["positions"])
        return find(*args, **kwargs)

    monkeypatch.setattr(evaluator, "find_breaking_points", counted)
    resumed = evaluation_worker.evaluate(examples, batch_size, cache_dir)
    assert len(attacked) == batches - len(finished)
    undisturbed = evaluation_worker.evaluate(examples, batch_size)
    assert resumed.table() == undisturbed.table()
    assert resumed.to_dict() == undisturbed.to_dict()
    assert {path: path.read_bytes() for path in finished} == finished
    assert len(list(cache_dir.glob("*.safetensors"))) == batches


@pytest.mark.parametrize(
    ("remainder", "expected"),
    [
        (11, [4, 4, 3]),
        (9, [4, 4, 1]),
        (8, [4, 4, 0]),
        (1, [1, 0, 0]),
        (0, [4, 4, 4]),  # it divides evenly
        (-1, [4, 4, 4]),  # nobody knows
    ],
)
def test_each_process_holds_one_piece_of_the_real_examples(remainder, expected):
    assert [own_real_examples(remainder, 4, index) for index in range(3)] == expected


def prepared(loader, index=0, processes=2, **options):
    return prepare_data_loader(loader, num_processes=processes, process_index=index, put_on_device=False, **options)


@pytest.mark.parametrize("count", range(1, 21))
@pytest.mark.parametrize(("processes", "split"), [(1, False), (2, False), (3, False), (2, True)])
@pytest.mark.parametrize("skipped", [0, 1])
def test_real_examples_are_each_seen_once(count, processes, split, skipped):
    """What is counted, over all processes, against the dataset; also after resuming within the epoch."""
    batch_size = 6 if split else 3
    seen = []
    for index in range(processes):
        loader = prepared(DataLoader(range(count), batch_size), index, processes, split_batches=split)
        if skipped and len(loader) > 1:
            loader = skip_first_batches(loader, 1)
        for batch in loader:
            real = len(batch)
            if loader.end_of_dataloader:
                real = own_real_examples(training_remainder(loader, processes), len(batch), index)
            seen += batch[:real].tolist()
    first = batch_size * (1 if split else processes)
    assert sorted(seen) == list(range(first if skipped and count > first else 0, count))


def test_remainder_follows_the_sampler():
    data = torch.arange(10)
    weighted = DataLoader(data, 4, sampler=WeightedRandomSampler(torch.ones(10), 13))
    assert training_remainder(prepared(weighted), 2) == 13 % 8
    assert training_remainder(prepared(DataLoader(data, 4, sampler=RandomSampler(data))), 2) == 10 % 8
    assert training_remainder(prepared(DataLoader(data, 4, drop_last=True)), 2) == 0
    assert training_remainder(prepared(DataLoader(data, 5)), 2) == 0


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(10))


def test_parts_of_unknown_length_are_taken_to_be_real():
    loader = prepared(DataLoader(Stream(), 4), dispatch_batches=False)
    assert len(list(loader)) == 2
    assert training_remainder(loader, 2) <= 0


def test_batches_are_cut_and_filled_up():
    batch = {
        "pixel_values": torch.ones(3, 2),
        "labels": torch.arange(3),
        "temperature": torch.tensor(1.0),
        "flag": True,
    }
    cut = first_examples(batch, 2)
    assert [len(cut[name]) for name in ("pixel_values", "labels")] == [2, 2]
    assert cut["temperature"] == 1 and cut["flag"] is True and len(batch["labels"]) == 3
    assert filled_up(cut["labels"], 4).tolist() == [0, 1, 0, 0]
    assert filled_up(torch.ones(0, 2, 5), 3).shape == (3, 2, 5)
    assert filled_up(cut["labels"], 2) is cut["labels"]
