"""The benchmark of training options at toy size."""


def test_every_option_trains_and_is_measured(monkeypatch, pytestconfig, capsys):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import methods

    toy = ["--model", "test_resnet", "--image_size", "32", "--batch_size", "2"]
    rows = methods.main([*toy, "--steps", "1", "--rounds", "1"])
    assert [row["name"] for row in rows] == list(methods.METHODS)
    assert rows[0]["time"] == rows[0]["peak"] == 1
    peaks = {row["name"]: row["peak"] for row in rows}
    assert peaks["`robust_loss: trades`"] > 1 > peaks["head only (`head_warmup_steps`)"]
    assert "| time of a step |" in capsys.readouterr().out
