import pytest
import torch
from conftest import make_model
from peft import IA3Config, get_peft_model
from torch import nn

from hf_rft.evaluation.cache import hash_model
from hf_rft.models.adapters import add_lora, describe_adapter, is_adapted
from hf_rft.models.parts import head_parameters


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["vit", "swin", "convnext", "resnet", "dinov2", "timm"])
def test_adapters_and_the_head_learn_and_nothing_else(family):
    model = make_model(family)
    head, logits = head_parameters(model), model.eval()(torch.zeros(2, 3, 16, 16)).logits
    adapted = add_lora(model, r=2).eval()
    names = trained_names(adapted)
    assert is_adapted(adapted) and not is_adapted(make_model(family))
    assert all(".lora_A." in name or ".lora_B." in name or ".modules_to_save." in name for name in names)
    learning = {
        tuple(parameter.shape) for name, parameter in adapted.named_parameters() if ".modules_to_save." in name
    }
    assert learning == {tuple(parameter.shape) for parameter in head}
    # As peft starts them, adapters change nothing.
    torch.testing.assert_close(adapted(torch.zeros(2, 3, 16, 16)).logits, logits)


def test_an_adapted_layer_is_the_layer_and_a_low_rank_change():
    """W + alpha / r B A, with A and B of rank r, against the formula of the paper."""
    model = make_model("vit")
    adapted = add_lora(model, r=2, alpha=6, target_modules=["q_proj"])
    layer = next(module for name, module in adapted.named_modules() if name.endswith("q_proj"))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b)
    inputs, base = torch.randn(3, layer.in_features), layer.base_layer
    expected = inputs @ (base.weight + 3 * b @ a).T + base.bias
    torch.testing.assert_close(layer(inputs), expected)


def test_by_default_layers_that_peft_cannot_adapt_are_left_out():
    """Convolutions with groups, and subclasses that compute something else than their class."""

    class Same(nn.Conv2d):
        pass

    model = make_model("timm")
    model.timm_model.conv1 = Same(3, 8, 3, padding=1)
    convolutions = {name for name, module in model.named_modules() if type(module) is nn.Conv2d}
    model.timm_model.extra = nn.Conv2d(8, 8, 3, groups=2)
    add_lora(model, r=2)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == convolutions


def test_the_head_of_an_adapted_model_is_found():
    adapted = add_lora(make_model("vit"), r=2)
    names = {name for name, parameter in adapted.named_parameters() if parameter in head_parameters(adapted)}
    assert {name.split(".")[-3] for name in trained_names(adapted) & names} == {"modules_to_save"}
    assert len(trained_names(adapted) & names) == 2


def test_the_hash_of_an_adapted_model_does_not_see_the_head_that_was_replaced():
    adapted = add_lora(make_model("vit"), r=2)
    before = hash_model(adapted)
    head = adapted.get_base_model().classifier
    nn.init.normal_(head.original_module.weight)
    assert hash_model(adapted) == before
    nn.init.normal_(head.modules_to_save["default"].weight)
    assert hash_model(adapted) != before


def test_adapters_in_words():
    model = make_model("vit")
    assert describe_adapter(model) is None
    adapted = add_lora(model, r=4)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    share = 100 * trained / sum(parameter.numel() for parameter in adapted.parameters())
    assert (
        describe_adapter(adapted)
        == f"an adapter of the kind LORA, rank 4, alpha 8, with {share:.1f} % of all parameters"
    )


def test_the_name_of_the_base_model_is_the_given_one():
    assert add_lora(make_model("vit"), r=2, base_model="a/b").peft_config["default"].base_model_name_or_path == "a/b"


def test_no_module_of_the_name():
    with pytest.raises(ValueError, match="No modules were targeted"):
        add_lora(make_model("vit"), r=2, target_modules=["nothing"])


def test_other_adapters_are_named_by_their_kind():
    adapted = get_peft_model(make_model("vit"), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    assert describe_adapter(adapted).startswith("an adapter of the kind IA3, with ")
