import pytest
import torch
from conftest import Images, make_adapted, make_model, weights, without_dropout
from transformers import TrainerCallback

from hf_rft.losses import LOSSES, at_loss
from hf_rft.training.distributed import NonFiniteError
from hf_rft.training.weight_perturbation import WeightPerturbation, ascent


SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
AWP = {"awp_gamma": 0.02, "awp_warmup_steps": 0}


def exact_model(family):
    """In float64, without dropout: what is computed in two ways is the same."""
    return without_dropout(make_model(family)).double()


def trained(make_trainer, family="vit", **options):
    trainer = make_trainer(exact_model(family), **{"max_steps": 2, **SGD, **options})
    trainer.train()
    return trainer


def assert_same(one, other, exactly=True):
    for name, value in one.items():
        if exactly:
            assert torch.equal(value, other[name]), name
        else:
            torch.testing.assert_close(value, other[name], rtol=0, atol=1e-9, msg=name)


def test_perturbation_has_the_direction_of_the_gradient_and_a_share_of_the_weights_length():
    weight, gradient = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 6.0], [8.0, 0.0]])
    torch.testing.assert_close(ascent(weight, gradient, 0.1), torch.tensor([[0.0, 0.3], [0.4, 0.0]]))
    assert torch.equal(ascent(weight, torch.zeros(2, 2), 0.1), torch.zeros(2, 2))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("family", ["vit", "timm"])
def test_one_step_by_hand(make_trainer, family, loss):
    """x' is made at w; the gradient is taken at w + v; the update starts from w."""
    trainer = make_trainer(exact_model(family), max_steps=1, count=8, robust_loss=loss, **SGD, **AWP)
    order = next(iter(trainer.get_train_dataloader()))
    trainer.train()

    other = make_trainer(exact_model(family), count=8, robust_loss=loss)
    model, images = other.model.eval(), Images(8, dtype=torch.float64)
    batch = other.data_collator([images[i] for i in range(8)])
    assert sorted(batch["labels"].tolist()) == sorted(order["labels"].tolist())
    pixel_values, labels = order["pixel_values"], order["labels"]
    values = None
    if other.robust_loss.needs_adversarial:
        adversarial = other.adversary(other.classifier.normalization.to_pixels(pixel_values), labels)
        values = other.classifier.normalization.from_pixels(adversarial)

    def gradients():
        _, *logits = other.robust_loss.logits(model, pixel_values, values)
        mean = other.robust_loss(*logits, labels).mean()
        return torch.autograd.grad(mean, list(model.parameters()), allow_unused=True)

    start = [parameter.detach().clone() for parameter in model.parameters()]
    at_start = gradients()
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), at_start, strict=True):
            if parameter.dim() > 1:
                parameter += 0.02 * parameter.norm() / gradient.norm() * gradient
    at_perturbed = gradients()
    for value, gradient, found in zip(start, at_perturbed, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(found, value - 0.1 * gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["vit", "timm"])
def test_accumulation_perturbs_by_the_gradient_of_the_whole_batch(make_trainer, family):
    whole = trained(make_trainer, family, per_device_train_batch_size=16, **AWP)
    parts = trained(make_trainer, family, per_device_train_batch_size=4, gradient_accumulation_steps=4, **AWP)
    assert_same(weights(whole.model), weights(parts.model), exactly=False)
    plain = trained(make_trainer, family, per_device_train_batch_size=16)
    difference = max((v - weights(plain.model)[name]).abs().max() for name, v in weights(whole.model).items())
    assert difference > 1e-4


def test_each_example_is_attacked_once(make_trainer):
    trainer = trained(make_trainer, per_device_train_batch_size=4, gradient_accumulation_steps=2, **AWP)
    assert trainer.adversary.attacks == 2 * 2
    assert [entry["adversarial_accuracy"] for entry in trainer.state.log_history if "loss" in entry]


def test_weights_are_restored_to_the_bit(make_trainer):
    trainer = trained(make_trainer, **{**AWP, "learning_rate": 0.0})
    assert_same(weights(exact_model("vit")), weights(trainer.model))


def test_weights_are_restored_when_a_step_fails(make_trainer):
    """In the second step, after the weights were perturbed."""

    def loss(clean, adversarial, labels, **_):
        losses.append(at_loss(clean, adversarial, labels))
        return losses[-1] * (float("nan") if len(losses) == 4 else 1.0)

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            kept.append(weights(model))

    losses, kept = [], []
    options = {"callbacks": [Keep()], "robust_loss": loss}
    trainer = make_trainer(exact_model("vit"), trainer_options=options, max_steps=3, **SGD, **AWP)
    with pytest.raises(NonFiniteError, match="optimizer step 2"):
        trainer.train()
    (after_one,) = kept
    assert_same(after_one, weights(trainer.model))


@pytest.mark.parametrize("warmup", [2, 0.5])
def test_warm_up_is_plain_training(make_trainer, warmup):
    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.steps.append(weights(model))

    runs = []
    for options in ({}, {"awp_gamma": 0.02, "awp_warmup_steps": warmup}):
        callback = Steps()
        callback.steps = []
        runs.append(callback.steps)
        make_trainer(trainer_options={"callbacks": [callback]}, max_steps=4, **SGD, **options).train()
    for plain, perturbed in zip(runs[0][:2], runs[1][:2], strict=True):
        assert_same(plain, perturbed)
    assert any(not torch.equal(value, runs[1][2][name]) for name, value in runs[0][2].items())


def test_batch_norm_counts_images_once(make_trainer):
    trainer = trained(make_trainer, "timm", freeze_batch_norm=False, **AWP)
    counts = {int(value) for name, value in weights(trainer.model).items() if name.endswith("num_batches_tracked")}
    assert counts == {2}


def test_resuming_is_exact(make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **AWP}
    whole = make_trainer(**options)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "other"), **options)
    resumed.train(str(tmp_path / "output" / "checkpoint-2"))
    assert_same(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize("options", [{"bf16": True}, {"weight_averaging": "ema"}, {"gradient_checkpointing": True}])
def test_together_with(make_trainer, options):
    trainer = make_trainer(max_steps=2, **AWP, **options)
    trainer.train()
    assert all(value.isfinite().all() for value in weights(trainer.model).values() if value.is_floating_point())


def test_activation_checkpointing_changes_nothing(make_trainer):
    plain = trained(make_trainer, **AWP)
    saving = trained(make_trainer, gradient_checkpointing=True, **AWP)
    assert_same(weights(plain.model), weights(saving.model), exactly=False)


def test_of_an_adapted_model_only_what_learns_is_perturbed(make_trainer):
    class Perturbed(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append({name for name, value in model.state_dict().items() if not torch.equal(value, at_begin[name])})

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            at_begin.update(weights(model))

    seen, at_begin = [], {}
    trainer = make_trainer(without_dropout(make_adapted("vit")).double(), max_steps=2, **SGD, **AWP)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, WeightPerturbation):
            place = trainer.callback_handler.callbacks.index(callback)
    trainer.callback_handler.callbacks.insert(place, Perturbed())
    trainer.train()
    learns = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    matrices = {name for name in learns if trainer.model.get_parameter(name).dim() > 1}
    # lora_B begins at 0: its perturbation is relative to its length, and lora_A has no gradient yet.
    assert seen == [{name for name in matrices if ".lora_" not in name}, matrices]
