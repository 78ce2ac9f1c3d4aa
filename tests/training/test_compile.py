"""`torch_compile`: the same results, from few graphs, none of which depends on epsilon."""

import pytest
import torch
from conftest import Images, make_model, weights, without_dropout
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from hf_rft.attacks import SINGLE_STEP, TRAINING_ATTACKS


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


@pytest.mark.slow
@pytest.mark.parametrize(("family", "robust_loss", "attack"), [("timm", "at", "apgd"), ("vit", "trades", "pgd")])
def test_results_stay_the_same(make_trainer, family, robust_loss, attack):
    results = []
    for backend in (None, "aot_eager"):
        options = {"max_steps": 2, "robust_loss": robust_loss, "attack": attack, "torch_compile_backend": backend}
        trainer = make_trainer(without_dropout(make_model(family)).double(), **options)
        trainer.train()
        results.append((weights(trainer.model), trainer.evaluate()["eval_expected_robustness"]))
    for name, tensor in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], tensor, msg=lambda text, name=name: f"{name}: {text}")
    assert results[0][1] == results[1][1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options", "graphs"),
    [
        ("vit", {}, (2, 4)),
        ("timm", {"attack_dtype": "bfloat16"}, (2, 4)),
        # APGD looks at its last iterate, TRADES at the clean images, without a gradient.
        ("vit", {"attack": "apgd"}, (3, 6)),
        # The first step, at epsilon 0, passes half as many images through the model.
        ("vit", {"robust_loss": "trades"}, (4, 7)),
    ],
    ids=str,
)
def test_nothing_is_compiled_again_as_epsilon_moves(make_trainer, family, options, graphs):
    """One graph each of the attack's pass and of the update; and again for the smaller last batch of an epoch."""
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
        **{"attack": "pgd", **options},
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "epsilon" in entry]
    assert len(logs) == 12 and len({entry["epsilon"] for entry in logs}) == 10  # the ramp ends before the run
    assert {entry["attack_steps"] for entry in logs} == {0, 1, 2, 3, 4}
    of_full_batches, of_both = graphs
    assert count_graphs.graphs[1] == of_full_batches  # the first step has epsilon 0
    assert count_graphs.graphs[2:] == [of_both] * 10


@pytest.mark.slow
def test_later_trainers_of_a_process_are_compiled_as_well(make_trainer):
    """torch compiles a function a limited number of times; beyond that it silently does not."""
    for size in range(2, 7):
        count_graphs = CountGraphs()
        options = {"torch_compile_backend": "aot_eager", "max_steps": 2, "attack": "apgd"}
        options |= {"per_device_train_batch_size": size, "trainer_options": {"callbacks": [count_graphs]}}
        make_trainer(**options).train()
        assert count_graphs.graphs[-1] == 3


class Identity(torch.autograd.Function):
    """Remembers its output and its gradient, so that they can be overwritten."""

    made: list[torch.Tensor] = []

    @staticmethod
    def forward(ctx, values):
        output = values.clone()
        Identity.made.append(output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        Identity.made.append(gradient)
        return gradient


@pytest.fixture
def cuda_graphs(monkeypatch):
    """Lets a trainer's pass overwrite, each time, what it returned the time before, as a CUDA graph does."""

    def overwriting(trainer):
        Identity.made.clear()

        def logits(pixel_values, **extra_inputs):
            for tensor in Identity.made:
                tensor.data.fill_(torch.nan)
            Identity.made.clear()
            return Identity.apply(trainer.classifier.logits(Identity.apply(pixel_values), **extra_inputs))

        monkeypatch.setattr(trainer.adversary, "_compiled_logits", logits)

    return overwriting


def test_logits_and_gradients_outlive_the_next_run_of_a_cuda_graph(make_trainer, cuda_graphs):
    trainer = make_trainer(without_dropout(make_model("vit")))
    cuda_graphs(trainer)
    trainer.model.eval()
    pixels, kept = torch.stack([image["pixel_values"] for image in Images(4)]) / 2 + 0.5, []
    for forward in (trainer.adversary.forward, trainer.classifier):
        of_forward = []
        for shift in (0.0, 0.1, 0.2):
            shifted = (pixels + shift).requires_grad_()
            logits = forward(shifted)
            of_forward += [logits, *torch.autograd.grad(logits.logsumexp(dim=1).sum(), shifted)]
        kept.append(of_forward)
    for tensor, expected in zip(*kept, strict=True):
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize(
    ("attack", "loss"), [*((attack, "at") for attack in TRAINING_ATTACKS), ("pgd", "trades"), ("apgd", "trades")]
)
def test_attacks_are_the_same_with_cuda_graphs(make_trainer, cuda_graphs, attack, loss):
    options = {"attack": attack, "robust_loss": loss, "attack_steps": 1 if attack in SINGLE_STEP else 12}
    trainer = make_trainer(without_dropout(make_model("vit")), **options)
    inputs = trainer.data_collator([Images(8)[i] for i in range(8)])
    arguments = trainer.classifier.normalization.to_pixels(inputs["pixel_values"]), inputs["labels"]
    expected = trainer.adversary(*arguments)
    cuda_graphs(trainer)
    assert torch.equal(trainer.adversary(*arguments), expected)
