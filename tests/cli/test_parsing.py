import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from hf_rft import RobustTrainingArguments
from hf_rft.cli.exits import run_program
from hf_rft.cli.parsing import parse_with_config, published_command


@dataclass
class Options:
    rate: float = 1.0
    count: int = 3
    name: str = "default"
    names: list[str] = field(default_factory=lambda: ["a"])
    numbers: list[float] | None = None
    frozen: bool = True
    norm: str = field(default="linf", metadata={"choices": ["linf", "l2"]})
    optional: float | None = 0.5


@dataclass
class Others:
    seed: int = 0

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"`seed={self.seed}` is negative.")


@pytest.fixture
def parse(tmp_path):
    def run(yaml: str | None, *flags: str, types=(Options, Others), **options):
        arguments = list(flags)
        if yaml is not None:
            config = tmp_path / "config.yaml"
            config.write_text(yaml, encoding="utf-8")
            arguments += ["--config", str(config)]
        return parse_with_config(types, arguments, **options)

    return run


@pytest.fixture
def fails(parse, capsys):
    """Bad input ends the program with status 2 and a message on standard error, without a traceback."""

    def run(*arguments, **options) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(*arguments, **options)
        assert stop.value.code == 2
        return capsys.readouterr().err

    return run


def test_defaults(parse):
    assert parse(None) == (Options(), Others())


def test_values_of_the_file(parse):
    options, others = parse(
        "rate: 2e-5\ncount: 7\nname: 8/255\nnames: [x, y]\nnumbers: [0, 0.5, 1e-3]\nfrozen: false\nnorm: l2\nseed: 4\n"
    )
    assert options == Options(2e-5, 7, "8/255", ["x", "y"], [0.0, 0.5, 1e-3], False, "l2")
    assert isinstance(options.rate, float) and others == Others(4)


def test_null_leaves_the_default(parse):
    options, _ = parse("optional:\nname: null\ncount: 5\n")
    assert options == Options(count=5)


@pytest.mark.parametrize(
    "flags", [["--rate", "0.1", "--names", "z", "--no_frozen"], ["--rate=0.1", "--names=z", "--frozen=false"]]
)
def test_flags_win_over_the_file(parse, flags):
    options, others = parse("rate: 2e-5\ncount: 7\nnames: [x, y]\nfrozen: true\nseed: 4\n", *flags)
    assert options == Options(0.1, 7, names=["z"], frozen=False) and others == Others(4)


@pytest.mark.parametrize("text", ["-1", "-1e-5", "-dash", "--rate", "two words", "a=b", "ünï"])
def test_strings_of_the_file_are_values_whatever_they_look_like(parse, text):
    options, _ = parse(f'name: "{text}"\n')
    assert options.name == text


def test_negative_numbers_in_scientific_notation(parse):
    options, _ = parse("rate: -2e-5\n")
    assert options.rate == -2e-5


def test_dictionaries(parse, tmp_path):
    yaml = f"""
output_dir: {tmp_path}
epsilon: 8/255
learning_rate: 2e-5
epsilon_schedule_type: piecewise
epsilon_schedule_kwargs: {{points: [[0.0, 0.0], [1.0, 1.0]]}}
eval_epsilons: [0, 4/255, 8/255]
"""
    (args,) = parse(yaml, "--attack_steps", "3", types=(RobustTrainingArguments,))
    assert args.epsilon_schedule_kwargs == {"points": [[0.0, 0.0], [1.0, 1.0]]}
    assert (args.learning_rate, args.epsilon, args.attack_steps) == (2e-5, "8/255", 3)
    assert args.eval_epsilons == ["0", "4/255", "8/255"]


def test_config_in_one_word_and_default_config(parse, tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text("count: 9\n")
    assert parse(None, f"--config={path}")[0].count == 9

    seen: list[Any] = []

    def default_config(given):
        seen.append(given)
        return path

    assert parse(None, "--rate", "2", "--no_frozen", default_config=default_config)[0].count == 9
    assert seen == [{"rate", "no_frozen"}]
    assert parse("count: 4\n", default_config=default_config)[0].count == 4


@pytest.mark.parametrize(
    ("yaml", "flags", "message"),
    [
        ("rat: 1\n", [], "config.yaml: unknown key 'rat'. Did you mean rate?"),
        ("zzzzz: 1\n", [], "unknown key 'zzzzz'. See --help for the valid names."),
        ("1: 2\n", [], "unknown key 1"),
        ("config: x\n", [], "unknown key 'config'"),
        (None, ["--coutn", "3"], "Unknown flag --coutn. Did you mean --count?"),
        (None, ["--coutn=1234567890123"], "Did you mean --count?"),
        (None, ["--zzzzz"], "Unknown flag --zzzzz. See --help for the valid names."),
        (None, ["stray"], "Values ['stray'] belong to no flag."),
        ("count: many\n", [], "invalid int value: 'many'"),
        ("count: 1.5\n", [], "invalid int value: '1.5'"),
        ("rate: fast\n", [], "invalid float value: 'fast'"),
        ("norm: l3\n", [], "invalid choice: 'l3'"),
        ("frozen: maybe\n", [], "maybe"),
        ("seed: -1\n", [], "`seed=-1` is negative."),
        ("- a\n- b\n", [], "must hold `name: value` lines, got list"),
        ("", [], "must hold `name: value` lines, got NoneType"),
        ("rate: [1, 2]\n", [], "`rate: [1, 2]` is a list, but `rate` takes one value"),
        ("seed: 1\nrate: 2\nseed: 3\n", [], "config.yaml is not valid YAML: the key 'seed' stands in it twice."),
        ("a: [1\n", [], "is not valid YAML"),
        (
            None,
            ["--config", "missing.yaml"],
            "--config missing.yaml is neither a file nor the name of one. The package comes with ",
        ),
        (None, ["--config"], "argument --config: expected one argument"),
    ],
)
def test_bad_input(fails, yaml, flags, message):
    assert message in fails(yaml, *flags)


def test_errors_of_the_arguments_end_the_program(fails, tmp_path):
    message = fails(f"output_dir: {tmp_path}\nepsilon: 8\n", types=(RobustTrainingArguments,))
    assert "did you mean '8/255'?" in message
    message = fails(
        f"output_dir: {tmp_path}\nepsilon_schedule_kwargs: {{start: early}}\n", types=(RobustTrainingArguments,)
    )
    assert "start" in message and "early" in message


@pytest.mark.parametrize(
    ("arguments", "published"),
    [
        ([], "run"),
        (["--seed", "1", "--epsilon=4/255"], "run --seed 1 --epsilon=4/255"),
        (["--token", "hf_secret", "--seed", "1", "--hub-token=hf_secret"], "run --seed 1"),
        (["--output_dir", "/home/me/out", "--train_dir", "/home/me/images/"], "run --train_dir images"),
        (["--config=/home/me/x.yaml", "--resume_from_checkpoint", "/a"], "run --config=x.yaml"),
        (["--epsilon_schedule_kwargs", '{"start": 0.1}'], "run --epsilon_schedule_kwargs '{\"start\": 0.1}'"),
    ],
)
def test_published_command_has_no_secrets_and_no_paths(arguments, published):
    assert published_command("run", arguments) == published


def test_errors_of_the_program_keep_their_traceback(monkeypatch):
    def broken():
        return torch.zeros(2).reshape(3)

    with pytest.raises(RuntimeError):
        run_program(broken)
    with pytest.raises(ValueError):  # of a library, or of this test: nobody's refusal
        run_program(lambda: int("x"))
    with pytest.raises(KeyError):
        run_program(lambda: {}["missing"])


@pytest.mark.parametrize("status", [None, 75, 2])
def test_a_program_leaves_its_process_group(tmp_path, status):
    """Also one that ends with a message or an exit status: else the launcher may find it aborted instead."""

    def main():
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        if status == 2:
            raise OSError("no such folder")
        if status is not None:
            sys.exit(status)

    with pytest.raises(SystemExit) if status else nullcontext() as ended:
        run_program(main)
    assert not torch.distributed.is_initialized()
    assert status is None or ended.value.code == status
