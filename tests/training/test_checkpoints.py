import pytest
import torch
from conftest import make_model

from hf_rft.training.checkpoints import restore_weights


@pytest.mark.parametrize("family", ["vit", "swin", "convnext", "resnet", "dinov2", "timm"])
def test_every_tensor_is_restored(tmp_path, family):
    saved, model = make_model(family, seed=0), make_model(family, seed=1)
    saved.save_pretrained(tmp_path)
    assert any(
        not torch.equal(a, b) for a, b in zip(saved.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert restore_weights(model, tmp_path)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_other_folders_are_left_to_the_trainer(tmp_path):
    assert not restore_weights(make_model("vit"), tmp_path)


def test_memory_format_and_sharing_stay(tmp_path):
    model = make_model("resnet").to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    parameter = next(parameter for parameter in model.parameters() if parameter.dim() == 4 and parameter.shape[1] > 1)
    assert restore_weights(model, tmp_path)
    assert parameter.is_contiguous(memory_format=torch.channels_last)
    assert any(parameter is other for other in model.parameters())


def test_missing_and_mismatched_weights_are_refused(tmp_path):
    model = make_model("vit")
    state = model.state_dict()
    del state["classifier.weight"]
    state["classifier.bias"] = torch.zeros(7)
    model.save_pretrained(tmp_path, state_dict=state)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not hold the weights of this ViTForImageClassification.*classifier"):
        restore_weights(model, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
