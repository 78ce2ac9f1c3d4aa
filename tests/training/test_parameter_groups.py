import pytest
import torch
from conftest import make_model

from hf_rft import ModuleForImageClassification
from hf_rft.models.parts import depths, head_parameters
from hf_rft.training.parameter_groups import set_learning_rates


def rates_of(optimizer):
    return {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}


@pytest.mark.parametrize("family", ["vit", "timm"])
def test_the_head_has_its_own_learning_rate(make_trainer, family):
    trainer = make_trainer(family, learning_rate=0.25, head_learning_rate=0.5, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    rates, head = rates_of(optimizer), head_parameters(trainer.model)
    assert {rates[parameter] for parameter in head} == {0.5}
    assert {rates[parameter] for parameter in set(trainer.model.parameters()) - head} == {0.25}
    decays = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    plain = make_trainer(family, weight_decay=0.1)
    plain_groups = plain.create_optimizer().param_groups
    expected = {parameter: group["weight_decay"] for group in plain_groups for parameter in group["params"]}
    assert list(map(decays.get, trainer.model.parameters())) == list(map(expected.get, plain.model.parameters()))


@pytest.mark.parametrize("family", ["vit", "swin", "timm"])
def test_layers_learn_the_slower_the_earlier_they_are(family):
    model = make_model(family)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    set_learning_rates(optimizer, model, head_learning_rate=None, layer_decay=0.5)
    depth, rates = depths(model), rates_of(optimizer)
    assert all(rates[parameter] == 0.5 ** (max(depth.values()) - depth[parameter]) for parameter in model.parameters())
    set_learning_rates(optimizer, model, head_learning_rate=3.0, layer_decay=None)
    assert {rates_of(optimizer)[parameter] for parameter in head_parameters(model)} == {3.0}


def test_the_schedule_scales_all_rates_and_resuming_is_exact(make_trainer, tmp_path):
    options = {"head_learning_rate": 0.02, "layer_decay": 0.5, "learning_rate": 0.01, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(**options)
    trainer.train()
    resumed = make_trainer(output_dir=str(tmp_path / "other"), **options)
    resumed.train(str(tmp_path / "output" / "checkpoint-2"))
    assert trainer.optimizer is not None and {group["lr"] for group in trainer.optimizer.param_groups} == {0.0}
    for one, other in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("option", [{"head_learning_rate": 0.1}, {"layer_decay": 0.5}])
def test_an_optimizer_of_the_users_is_not_touched(make_trainer, option):
    model = make_model("vit")
    optimizers = (torch.optim.SGD(model.parameters(), lr=0.1), None)
    with pytest.raises(ValueError, match=f"`{next(iter(option))}=.*` has no effect on an optimizer of your own"):
        make_trainer(model, trainer_options={"optimizers": optimizers}, **option)


@pytest.mark.parametrize("option", [{"head_learning_rate": 0.1}, {"head_warmup_steps": 2}])
def test_a_model_without_a_head_is_refused(make_trainer, option):
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 4))
    model = ModuleForImageClassification(module, class_names=list("abcd"))
    name = next(iter(option))
    with pytest.raises(
        ValueError, match=f"`{name}=.*` needs a model that tells its classification head from the rest"
    ):
        make_trainer(model, **option)
