"""The benchmark of a training step at toy size: every contender does the passes that its row says."""

import json
import re

import pytest
import torch


@pytest.fixture
def train_step(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import train_step

    return train_step


@pytest.fixture
def run(train_step, tmp_path):
    def run(*argv):
        toy = ["--model", "test_resnet", "--image_size", "32", "--batch_size", "2", "--attack_steps", "2"]
        result = train_step.main([*toy, "--rounds", "2", "--output_dir", str(tmp_path), *argv])
        (written,) = tmp_path.glob("*.json")
        assert json.loads(written.read_text())["rows"] == result["rows"]
        return {row["name"]: row for row in result["rows"]}

    return run


def passes(rows):
    return {name: (row["forward"], row["backward"]) for name, row in rows.items()}


def test_adversarial_training_with_pgd(run):
    rows = run("--attack", "pgd")
    assert passes(rows) == {
        "RobustTrainer": (3, 3),
        "Trainer, no attack": (1, 1),
        "ideal": (3, 3),
        "torchattacks *": (3, 3),
        "loss.backward() *": (3, 3),
        "Foolbox *": (4, 3),
        "ART *": (3, 3),
        "Madry reference *": (3, 3),
        "ideal, contiguous": (3, 3),
    }
    assert rows["ideal"]["ratio"] == 1
    # Parameter gradients that nobody uses are work as well; what `RobustTrainer` computes is what there is to compute.
    assert rows["RobustTrainer"]["flops"] == rows["ideal"]["flops"]
    assert rows["loss.backward() *"]["flops"] > 1.1 * rows["ideal"]["flops"]


def test_adversarial_training_with_apgd(run, capsys):
    rows = run("--attack", "apgd", "--profile")
    assert re.search(r"RobustTrainer: [\d.]+ images/s", output := capsys.readouterr().out)
    assert "aten::convolution_backward" in output
    assert passes(rows) == {
        "RobustTrainer": (4, 3),
        "Trainer, no attack": (1, 1),
        "ideal": (3, 3),
        "ideal, one forward more": (4, 3),
        "pyautoattack APGD": (4, 4),
    }


def test_trades(run):
    rows = run("--attack", "pgd", "--loss", "trades")
    assert passes(rows) == {
        "RobustTrainer": (5, 4),
        "Trainer, no attack": (1, 1),
        "ideal": (5, 4),
        "TRADES reference *": (7, 5),
    }


def test_memory_is_that_of_the_largest_moment(train_step):
    instruments, reading = train_step.instruments, {}
    kept = torch.zeros(1000)
    with instruments.peak_memory(torch.device("cpu"), reading):
        large = torch.zeros(5000)
        del large
        kept = kept + torch.zeros(2000)[:1000]
    assert 4 * 5000 <= reading["peak_bytes"] < 4 * 5000 + 1000


def test_operations_of_a_depthwise_convolution(train_step):
    """Its weight gradient costs what its forward pass costs."""
    convolution = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16)
    images, readings = torch.randn(2, 16, 8, 8, requires_grad=True), []
    for backward in (False, True):
        reading = {}
        with train_step.instruments.work(torch.device("cpu"), reading, num_labels=10):
            output = convolution(images)
            if backward:
                output.sum().backward()
        readings.append(reading["flops"])
    assert readings == [2 * 2 * 16 * 8 * 8 * 9, 3 * 2 * 2 * 16 * 8 * 8 * 9]


def test_roofline_of_operations_that_can_be_counted_by_hand(train_step):
    """A matrix product that computes longer than it moves, and a sum of two matrices that moves only."""
    instruments, reading = train_step.instruments, {}
    a, b = torch.ones(20, 30), torch.ones(30, 40)
    with instruments.roofline(torch.device("cpu"), reading, roofs=instruments.Roofs(flops=100.0, bandwidth=1e4)):
        c = a @ b.view(30, 40)
        c + c.T.T
    computing, moving = 2 * 20 * 30 * 40 / 100, 3 * 4 * 20 * 40 / 1e4
    assert computing > 4 * (20 * 30 + 30 * 40 + 20 * 40) / 1e4
    assert reading["roofline_seconds"] == pytest.approx(computing + moving)
    assert reading["moving_seconds"] == pytest.approx(moving)


def test_roofline_counts_what_must_be_read(train_step):
    """Where the weights need no gradient, backward does not read the images; a copy does not read its target."""
    instruments, roofs = train_step.instruments, train_step.instruments.Roofs(flops=1e12, bandwidth=4.0)
    images, weight = torch.ones(1, 2, 6, 6, requires_grad=True), torch.ones(3, 2, 3, 3)
    output, ones = torch.nn.functional.conv2d(images, weight), torch.ones(1, 3, 4, 4)
    for operation, numbers in (
        (lambda: torch.autograd.grad(output, images, ones), 3 * 16 + 54 + 72),
        (lambda: torch.empty(5, 4).copy_(images.detach()[0, 0, :5, :4]), 20 + 20),
    ):
        reading = {}
        with instruments.roofline(torch.device("cpu"), reading, roofs=roofs):
            operation()
        assert reading["moving_seconds"] == pytest.approx(numbers)


def test_what_was_compiled_is_told_apart(train_step):
    assert train_step.parse_args(["--torch_compile_mode", "reduce-overhead"]).torch_compile
    names = {train_step.file_name(train_step.parse_args(flags)) for flags in ([], ["--torch_compile"])}
    names |= {train_step.file_name(train_step.parse_args(["--torch_compile_mode", "reduce-overhead"]))}
    assert len(names) == 3
