import pytest
import torch
from conftest import make_model, weights
from transformers import TrainerCallback

from hf_rft.models.parts import head_parameters


class Steps(TrainerCallback):
    def __init__(self):
        self.weights, self.trainable = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model))
        self.trainable.append([name for name, parameter in model.named_parameters() if parameter.requires_grad])


def moved(before, after):
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize(
    ("steps", "options"), [(2, {}), (0.5, {}), (2, {"gradient_accumulation_steps": 2}), (2, {"awp_gamma": 0.01})]
)
@pytest.mark.parametrize("family", ["vit", "timm"])
def test_only_the_head_moves_at_first_and_then_everything(make_trainer, family, steps, options):
    callback = Steps()
    trainer = make_trainer(
        family, trainer_options={"callbacks": [callback]}, max_steps=4, head_warmup_steps=steps, **options
    )
    attacks, head = trainer.adversary.attacks, head_parameters(trainer.model)
    names = {name for name, parameter in trainer.model.named_parameters() if parameter in head}
    start = weights(trainer.model)
    trainer.train()
    assert moved(start, callback.weights[1]) == names
    assert [set(trainable) == names for trainable in callback.trainable] == [True, True, False, False]
    assert len(moved(start, callback.weights[2])) > 0.8 * len(list(trainer.model.parameters()))
    assert trainer.adversary.attacks - attacks == 4 * options.get("gradient_accumulation_steps", 1)
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_parameters_that_the_user_froze_stay_frozen(make_trainer):
    model = make_model("vit")
    model.vit.embeddings.requires_grad_(False)
    trainer = make_trainer(model, max_steps=2, head_warmup_steps=1)
    trainer.train()
    assert not any(parameter.requires_grad for parameter in model.vit.embeddings.parameters())
    assert all(parameter.requires_grad for parameter in model.classifier.parameters())


@pytest.mark.parametrize("number", [1, 3])
def test_resuming_is_exact_during_the_warm_up_and_after_it(make_trainer, tmp_path, number):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "head_warmup_steps": 2}
    whole = make_trainer(**options)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "other"), **options)
    resumed.train(str(tmp_path / "output" / f"checkpoint-{number}"))
    assert not moved(weights(whole.model), weights(resumed.model))


def test_an_interrupted_warm_up_leaves_nothing_frozen_for_the_next_training(make_trainer):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    stop = Stop()
    trainer = make_trainer(trainer_options={"callbacks": [stop]}, max_steps=4, head_warmup_steps=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.train()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
