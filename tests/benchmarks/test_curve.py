"""The benchmark of a curve on a linear classifier: both sides agree, and what it says of their cost is measured."""

import argparse

import pytest
import torch


@pytest.fixture
def curve(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import curve

    return curve


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(tier="fast", seed=0, memory_format="contiguous", batch_size=3, output_dir=tmp_path)


@pytest.fixture
def case(curve):
    """Six images of ten classes, at different distances from the boundary."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 10)).requires_grad_(False)
    pixels = torch.rand(6, 3, 4, 4)
    return curve.Case(model, pixels, model(pixels).argmax(dim=1))


def test_cases(curve, case):
    assert [str(epsilon) for epsilon in case._replace(num_epsilons=2).epsilons] == ["0", "4/255", "8/255"]
    batches = list(case.batches(4))
    assert [(first, len(batch.labels)) for first, batch in batches] == [(0, 4), (4, 2)]
    fewer = case.with_classes(int(case.labels.max()))
    assert len(fewer.pixels) < 6
    assert fewer.forward(fewer.pixels).shape == (len(fewer.pixels), fewer.num_classes)


def test_operations_of_a_linear_classifier(curve, case):
    assert curve.operations_per_image(case) == (2 * 48 * 10, 2 * 48 * 10)


def test_both_sides_agree(curve, args, case, capsys):
    curve.compare(args, case)
    printed = capsys.readouterr().out
    assert "the same for 100.0 % of images and epsilons" in printed
    files = sorted(args.output_dir.iterdir())
    assert len(files) == 4
    before = [file.stat().st_mtime_ns for file in files]
    curve.compare(args, case)  # from disk
    assert [file.stat().st_mtime_ns for file in files] == before


def test_growth(curve, args, case, capsys):
    curve.growth(args, case)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line[:3].strip("| ").isdigit()]
    assert [row[0].strip("| ") for row in rows][:5] == ["8", "1", "2", "4", "16"]
    cost, of_single_runs = ([float(row[place].strip("| ")) for row in rows] for place in (4, 6))
    assert of_single_runs[4] > 1.5 * of_single_runs[0] > cost[0]  # 16 epsilons; one run each costs twice as much as 8


def test_grouping(curve, args, case, capsys):
    args.rounds = 1
    curve.grouping(args, case)
    printed = capsys.readouterr().out
    assert "6 images, 3 at a time; the same for 100.0 % of them" in printed
    calls = [int(line.split("|")[2]) for line in printed.splitlines() if line.startswith(("| alone", "| together"))]
    assert len(calls) == 2 and calls[1] <= calls[0]
