import pytest

from hf_rft.cli import exits
from hf_rft.cli.exits import exit_with, run_program


def test_ctrl_c_ends_with_one_line_and_a_shells_status(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_program(interrupted)
    assert stop.value.code == 130
    assert capsys.readouterr().err.endswith("error: interrupted.\n")


def test_the_first_of_several_processes_speaks_first(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(exits.time, "sleep", waited.append)
    for rank, expected in (("0", []), ("1", [exits.PATIENCE])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit):
            exit_with("wrong", "program")
        assert waited == expected and capsys.readouterr().err == "program: error: wrong\n"


def test_a_status_of_its_own():
    with pytest.raises(SystemExit) as stop:
        exit_with("wrong", status=7)
    assert stop.value.code == 7
