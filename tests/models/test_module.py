import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_rft import ModuleForImageClassification


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_plain_module_becomes_an_image_classifier(as_dict):
    class Plain(nn.Linear):
        def forward(self, images):
            logits = super().forward(images.flatten(1))
            return {"logits": logits} if as_dict else logits

    plain = Plain(12, 3)
    model = ModuleForImageClassification(plain, ["cat", "dog", "owl"])
    assert model.config.num_labels == 3 and model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert model.config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    pixel_values, labels = torch.rand(2, 3, 2, 2), torch.tensor([0, 2])
    expected = F.linear(pixel_values.flatten(1), plain.weight, plain.bias)
    outputs = model(pixel_values=pixel_values, labels=labels)
    torch.testing.assert_close(outputs.logits, expected)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(expected, labels))
    assert model(pixel_values).loss is None
