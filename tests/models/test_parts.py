import pytest
from conftest import make_model
from torch import nn

from hf_rft.models.parts import depths, head_parameters


def names_by_depth(model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for parameter, depth in depths(model).items():
        found.setdefault(depth, []).append(names[parameter])
    return found


@pytest.mark.parametrize(
    ("family", "prefix"), [("vit", "classifier"), ("dinov2", "classifier"), ("timm", "timm_model.fc")]
)
def test_head(family, prefix):
    model = make_model(family)
    head = head_parameters(model)
    assert {name for name, parameter in model.named_parameters() if parameter in head} == {
        f"{prefix}.weight",
        f"{prefix}.bias",
    }


def test_depths_of_a_vit_are_embeddings_layers_and_the_rest():
    found = names_by_depth(make_model("vit"))
    assert sorted(found) == [0, 1, 2, 3]
    assert all("embeddings" in name for name in found[0])
    for depth in (1, 2):
        assert all(f".{depth - 1}." in name for name in found[depth])
    assert {"classifier.weight", "classifier.bias"} < set(found[3])
    assert all("layernorm" in name or "classifier" in name for name in found[3])


@pytest.mark.parametrize("family", ["vit", "swin", "convnext", "resnet", "dinov2", "timm"])
def test_every_parameter_has_a_depth_and_the_head_the_largest(family):
    model = make_model(family)
    found = depths(model)
    assert set(found) == set(model.parameters())
    assert {found[parameter] for parameter in head_parameters(model)} == {max(found.values())}
    assert min(found.values()) == 0 and len(set(found.values())) >= 3


def test_a_model_without_layers_is_refused():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="`layer_decay` needs a model of equal layers, which a Flat does not have"):
        depths(Flat())
