"""`torch_compile`: the same results, from few graphs, none of which depends on epsilon."""

import pytest
import torch
from conftest import Images, make_model, without_dropout
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from hf_rft.attacks import TRAINING_ATTACKS


class CountGraphs(TrainerCallback):
    """How many graphs have been compiled by the end of each step."""

    def __init__(self):
        self.before = counters["stats"]["unique_graphs"]
        self.graphs = []

    def on_step_end(self, args, state, control, **kwargs):
        self.graphs.append(counters["stats"]["unique_graphs"] - self.before)


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "timm"])
@pytest.mark.parametrize(("robust_loss", "attack"), [("at", "apgd"), ("trades", "pgd")])
def test_results_stay_the_same(make_trainer, family, robust_loss, attack):
    results = []
    for backend in (None, "aot_eager"):
        options = {"max_steps": 2, "robust_loss": robust_loss, "attack": attack, "torch_compile_backend": backend}
        trainer = make_trainer(without_dropout(make_model(family)), **options)
        trainer.train()
        results.append((weights(trainer.model), trainer.evaluate()["eval_expected_robustness"]))
    for name, tensor in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], tensor, msg=lambda text, name=name: f"{name}: {text}")
    assert results[0][1] == results[1][1]


@pytest.mark.slow
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"attack_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("family", ["vit", "timm"])
def test_nothing_is_compiled_again_as_epsilon_moves(make_trainer, family, precision):
    """Two graphs, of the attack's pass and of the update; as many again for the smaller last batch of the epoch."""
    count_graphs = CountGraphs()
    trainer = make_trainer(
        family,
        count=21,
        trainer_options={"callbacks": [count_graphs]},
        torch_compile_backend="aot_eager",
        epsilon_schedule_type="linear",
        attack_steps=4,
        attack_steps_schedule="epsilon",
        num_train_epochs=4,
        **precision,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "epsilon" in entry]
    assert len(logs) == 12 and len({entry["epsilon"] for entry in logs}) == 10  # the ramp ends before the run
    assert {entry["attack_steps"] for entry in logs} == {0, 1, 2, 3, 4}
    assert count_graphs.graphs[1] == 2  # the first step has epsilon 0
    assert count_graphs.graphs[2:] == [4] * 10


class Overwritten(torch.autograd.Function):
    """The identity, whose gradient and output are overwritten when told."""

    made: list[torch.Tensor] = []

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        Overwritten.made.append(gradient)
        return gradient


@pytest.mark.parametrize(
    ("attack", "loss"), [*((attack, "at") for attack in TRAINING_ATTACKS), ("pgd", "trades"), ("apgd", "trades")]
)
def test_attacks_keep_nothing_that_the_next_run_of_a_cuda_graph_overwrites(make_trainer, attack, loss):
    """Neither logits nor gradients: here, each pass destroys those of the pass before."""
    options = {"attack": attack, "robust_loss": loss, "attack_steps": 1 if attack == "fgsm" else 12}
    trainer = make_trainer(without_dropout(make_model("vit")), **options)
    inputs = trainer.data_collator([Images(8)[i] for i in range(8)])
    arguments = inputs["pixel_values"], inputs["labels"], {}
    expected = trainer._adversarial_pixel_values(*arguments)

    def logits(pixel_values, **extra_inputs):
        with torch.no_grad():
            for tensor in Overwritten.made:
                tensor.data.fill_(torch.nan)
        Overwritten.made.clear()
        found = Overwritten.apply(trainer._logits(Overwritten.apply(pixel_values), **extra_inputs))
        Overwritten.made.append(found)
        return found

    trainer._training_attack_logits = logits
    assert torch.equal(trainer._adversarial_pixel_values(*arguments), expected)
    assert Overwritten.made
