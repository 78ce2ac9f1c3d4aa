import dataclasses
import re
from fractions import Fraction

import pytest

from hf_rft import RobustTrainingArguments
from hf_rft.attacks import ATTACKS, pgd
from hf_rft.cli.parsing import Parser
from hf_rft.losses import LOSSES, RobustLoss, at_loss
from hf_rft.schedules import SCHEDULES
from hf_rft.threat_model import NORMS
from hf_rft.training.argument_checks import check_supported


@pytest.fixture
def make_args(tmp_path):
    return lambda **options: RobustTrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, **options
    )


def test_defaults_are_those_of_the_contract(make_args):
    args = make_args()
    assert (args.norm, args.epsilon) == ("linf", "4/255")
    assert (args.attack, args.attack_steps, args.attack_step_size) == ("apgd", 7, None)
    assert (args.attack_random_start, args.attack_model_mode, args.freeze_batch_norm) == (True, "eval", True)
    assert (args.robust_loss, args.robust_loss_weight) == ("at", None)
    assert (args.epsilon_schedule_type, args.epsilon_schedule_kwargs) == ("hinge", None)
    assert args.epsilon_schedule_interval == "step"
    assert (args.eval_attack, args.eval_attack_steps, args.eval_epsilons) == ("apgd", 10, None)
    assert [args.make_epsilon_schedule()(progress) for progress in (0.25, 0.5, 0.75)] == [0.0, 0.5, 1.0]


def test_default_grid_is_exact_quarters_of_epsilon(make_args):
    args = make_args(epsilon="8/255")
    assert args.epsilon_grid == [Fraction(2 * k, 255) for k in range(5)]


def test_own_grid(make_args):
    args = make_args(epsilon="8/255", eval_epsilons=["0", "1/255", "8/255", "16/255"])
    assert args.epsilon_grid == [Fraction(k, 255) for k in (0, 1, 8, 16)]


def test_numbers_are_accepted_where_yaml_gives_them(make_args):
    args = make_args(norm="l2", epsilon=0.5, eval_epsilons=[0, 0.25, 0.5])
    assert args.epsilon_grid == [0, Fraction(1, 4), Fraction(1, 2)]
    assert args.to_dict()["epsilon"] == "0.5"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": "8"}, "`epsilon='8'` is above 1, but pixels lie in .* did you mean '8/255'"),
        ({"epsilon": "-1/255"}, "`epsilon='-1/255'` is negative"),
        ({"epsilon": "abc"}, "`epsilon='abc'` is not a number; write a fraction such as '8/255'"),
        ({"epsilon": "nan"}, "`epsilon='nan'` is not a number"),
        (
            {"epsilon": "0"},
            "`epsilon='0'` means no attack; for plain fine-tuning set `robust_loss='standard'`",
        ),
        ({"epsilon": "1/0"}, "`epsilon='1/0'` divides by zero"),
        ({"norm": "linfinity"}, r"`norm='linfinity'` is unknown; choose one of \['linf', 'l2', 'l1'\]"),
        (
            {"attack_steps": 0},
            "`attack_steps=0` must be a whole number from 1 .*without an attack set `robust_loss='st",
        ),
        ({"eval_attack_steps": 0}, "`eval_attack_steps=0` must be a whole number from 1 "),
        ({"attack_step_size": 0.0}, "`attack_step_size=0.0` must be a number above 0 .*relative to epsilon"),
        (
            {"attack": "pdg"},
            r"`attack='pdg'` is unknown; choose one of \['fgsm', 'pgd', 'apgd', .*'nfgsm'\]",
        ),
        ({"eval_attack": "none"}, "`eval_attack='none'` is unknown; choose one of"),
        (
            {"mixup_alpha": 0.2, "robust_loss": "mart"},
            "`mixup_alpha=0.2` makes soft labels, which `robust_loss='mart'`",
        ),
        ({"cutmix_alpha": 1.0, "attack": "apgd_dlr"}, "`cutmix_alpha=1.0` makes soft labels, which"),
        ({"attack": "nfgsm"}, "`attack='nfgsm'` takes exactly one step, got `attack_steps=7`; set `attack_steps=1`"),
        (
            {"attack": "nfgsm", "attack_steps": 1, "norm": "l2"},
            "defined for `norm='linf'`, got 'l2'",
        ),
        (
            {"attack": "nfgsm", "attack_steps": 1, "attack_random_start": False},
            "`attack='nfgsm'` starts from noise, which `attack_random_start=False` would leave out",
        ),
        ({"eval_attack": "nfgsm", "eval_attack_steps": 1}, "`eval_attack='nfgsm'` is unknown"),
        ({"attack": "fgsm"}, "`attack='fgsm'` takes exactly one step, got `attack_steps=7`; set `attack_steps=1`"),
        (
            {"attack": "fgsm", "attack_steps": 1, "attack_steps_schedule": "epsilon"},
            "`attack_steps_schedule='epsilon'` has no effect: `attack='fgsm'`.* Leave it 'constant'",
        ),
        ({"attack_steps_schedule": "linear"}, r"`attack_steps_schedule='linear'` is unknown; choose one of \['const"),
        ({"attack_dtype": "float16"}, r"`attack_dtype='float16'` is unknown; choose one of \[None, 'bfloat16'\]"),
        (
            {"attack_dtype": "bfloat16", "fp16": True},
            "`attack_dtype='bfloat16'` has no effect with `fp16=True`.* set `b",
        ),
        ({"attack_model_mode": "test"}, r"`attack_model_mode='test'` is unknown; choose one of \['eval', 'train'\]"),
        ({"robust_loss": "tardes"}, r"`robust_loss='tardes'` is unknown; choose one of \['standard', 'at', 'trades'"),
        ({"robust_loss": "trades", "robust_loss_weight": -1.0}, "`robust_loss_weight=-1.0` must be a number from 0 "),
        ({"robust_loss": "mart", "label_smoothing_factor": 0.1}, "does not define `label_smoothing_factor=0.1`"),
        ({"robust_loss": "trades", "attack_random_start": False}, "needs `attack_random_start=True`"),
        ({"robust_loss": "trades", "attack": "apgd_dlr"}, "`attack='apgd_dlr'` has its own objective"),
        ({"epsilon_schedule_type": "ramp"}, r"`epsilon_schedule_type='ramp'` is unknown; choose one of \['constant'"),
        ({"epsilon_schedule_kwargs": {"start": 0.8, "end": 0.2}}, "`start=0.8` is after `end=0.2`"),
        ({"epsilon_schedule_kwargs": {"start": -0.1}}, "`start=-0.1` is not a share of training"),
        ({"epsilon_schedule_kwargs": {"end": 1.5}}, "`end=1.5` is not a share of training"),
        ({"epsilon_schedule_kwargs": {"begin": 0.1}}, r"takes \['start', 'end'\], got \['begin'\]"),
        ({"epsilon_schedule_kwargs": "start=0.1"}, "`epsilon_schedule_kwargs='start=0.1'` is not a JSON object"),
        (
            {"epsilon_schedule_interval": "batch"},
            r"`epsilon_schedule_interval='batch'` is unknown; choose one of \['step', 'epoch'\]",
        ),
        ({"eval_epsilons": ["1/255", "4/255"]}, "`eval_epsilons=.* must start with 0 and increase strictly"),
        ({"eval_epsilons": ["0", "4/255", "2/255"]}, "`eval_epsilons=.* must start with 0 and increase strictly"),
        ({"eval_epsilons": ["0", "2/255"]}, "lacks `epsilon='4/255'`"),
        ({"eval_epsilons": ["0", "4/255", "8"]}, "`epsilon=.*` is above 1"),
        ({"eval_epsilons": "0,4/255"}, "`eval_epsilons='0,4/255'` must be a list"),
        ({"eval_do_concat_batches": False}, "`eval_do_concat_batches=False` is not supported"),
        ({"eval_epsilons": []}, "`eval_epsilons=.* must start with 0 and increase strictly"),
        (
            {"eval_attack_during_training": False, "metric_for_best_model": "eval_robust_accuracy"},
            "`metric_for_best_model='eval_robust_accuracy'` is not measured",
        ),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "`use_reentrant=True` does not support `torch.autograd.grad`.*Set `use_reentrant` to False",
        ),
        ({"batch_eval_metrics": True}, "`batch_eval_metrics=True` is not supported"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(make_args, options, message):
    with pytest.raises(ValueError, match=message):
        make_args(**options)


def test_a_new_schedule_loss_or_attack_is_one_entry_of_its_table(tmp_path, monkeypatch):
    """Command line, Python, help and messages all read the table."""
    monkeypatch.setitem(SCHEDULES, "square", lambda *, power=2: lambda progress: progress**power)
    monkeypatch.setitem(LOSSES, "mine", RobustLoss(at_loss, needs_clean=False))
    monkeypatch.setitem(ATTACKS, "my_pgd", pgd)
    words = "--epsilon_schedule_type square --robust_loss mine --eval_attack my_pgd --use_cpu True".split()
    parser = Parser([RobustTrainingArguments])
    (args,) = parser.parse_args_into_dataclasses([*words, "--output_dir", str(tmp_path)], look_for_args_file=False)
    assert (args.make_epsilon_schedule()(0.5), args.robust_loss, args.eval_attack) == (0.25, "mine", "my_pgd")
    described = parser.format_help()
    for choices in (NORMS, LOSSES, SCHEDULES, ATTACKS):
        assert "{" + ",".join(choices) + "}" in described
    for name, choices in (("epsilon_schedule_type", SCHEDULES), ("robust_loss", LOSSES), ("eval_attack", ATTACKS)):
        with pytest.raises(ValueError, match=f"`{name}='x'` is unknown; choose one of " + re.escape(f"{[*choices]}")):
            RobustTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: "x"})


def test_every_field_has_help():
    from transformers import TrainingArguments

    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = [field for field in dataclasses.fields(RobustTrainingArguments) if field.name not in inherited]
    assert len(own) == 32
    for field in own:
        assert field.metadata["help"], field.name
        assert f"{field.name} (`" in RobustTrainingArguments.__doc__, field.name


@pytest.mark.parametrize(
    ("options", "metric", "greater"),
    [
        ({}, None, None),
        ({"load_best_model_at_end": True}, "robust_accuracy", True),
        ({"load_best_model_at_end": True, "metric_for_best_model": "loss"}, "loss", False),
        ({"load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy"}, "eval_accuracy", True),
        ({"load_best_model_at_end": True, "eval_attack_during_training": False}, "loss", False),
        # It would take a rising accuracy for a reason to lower the learning rate.
        ({"load_best_model_at_end": True, "lr_scheduler_type": "reduce_lr_on_plateau"}, "loss", False),
    ],
)
def test_the_best_model_is_the_most_robust_one(make_args, options, metric, greater):
    args = make_args(eval_strategy="epoch", save_strategy="epoch", **options)
    assert (args.metric_for_best_model, args.greater_is_better) == (metric, greater)
    again = RobustTrainingArguments(**{**args.to_dict(), "output_dir": args.output_dir})
    assert (again.metric_for_best_model, again.greater_is_better) == (metric, greater)


def test_processes_that_do_not_find_each_other_are_refused(make_args, monkeypatch):
    """As `torchrun` starts them; on a machine without an accelerator each would be alone."""
    args = make_args()
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="2 processes were started, but each would train by itself.*`use_cpu=True`"):
        check_supported(args)
