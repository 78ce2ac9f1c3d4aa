"""CLIP and SigLIP with random weights; those of the Hub have the same code."""

import numpy as np
import pytest
import torch
from conftest import SIZE
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    ViTImageProcessor,
    pipeline,
)

from hf_rft import evaluate_robustness
from hf_rft.evaluation import flags
from hf_rft.models.zero_shot import TEMPLATE, zero_shot_classifier


NAMES = ["cat", "dog", "red fox"]
WORDS = ["<pad>", "<unk>", "<end>", "this", "is", "a", "photo", "of", "drawing", "cat", "dog", "red", "fox", "."]
TEXT = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 64}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": SIZE, "patch_size": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make_model(family):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "clip":
            model = CLIPModel(CLIPConfig(text_config={**TEXT, **SPECIAL}, vision_config=VISION, projection_dim=12))
        else:
            model = SiglipModel(SiglipConfig(text_config={**TEXT, **SPECIAL}, vision_config=VISION))
            model.logit_bias.data.fill_(-1.5)
        for parameter in model.parameters():  # so that images and names are told apart
            if parameter.dim() > 1:
                parameter.data.mul_(8)
    return model.eval()


def make_processor():
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )
    size = {"height": SIZE, "width": SIZE}
    return CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), tokenizer)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)) for _ in range(6)]


both = pytest.mark.parametrize("family", ["clip", "siglip"])


@both
def test_logits_are_those_of_the_model_and_scores_those_of_the_pipeline(family, processor, images):
    model = make_model(family)
    classifier = zero_shot_classifier(model, processor, NAMES)
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    logits = classifier(pixel_values).logits
    padding = {"padding": "max_length", "max_length": 64} if family == "siglip" else {"padding": True}
    text = processor.tokenizer([TEMPLATE.format(name) for name in NAMES], return_tensors="pt", **padding)
    with torch.no_grad():
        expected = model(pixel_values=pixel_values, **text).logits_per_image
    torch.testing.assert_close(logits, expected)
    assert len(logits.argmax(dim=1).unique()) > 1
    alone = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    scores = logits.sigmoid() if family == "siglip" else logits.softmax(dim=1)
    for image, row in zip(images, scores, strict=True):
        found = {one["label"]: one["score"] for one in alone(image, candidate_labels=NAMES)}
        assert [found[name] for name in NAMES] == pytest.approx(row.tolist(), abs=1e-5)


@both
def test_several_templates_are_averaged_as_directions(family, processor):
    model = make_model(family)
    templates = [TEMPLATE, "a drawing of a {} ."]
    one, other, mean = (
        zero_shot_classifier(model, processor, NAMES, given).text_features for given in (*templates, templates)
    )
    middle = (one + other) / 2
    torch.testing.assert_close(mean, middle / middle.norm(dim=1, keepdim=True))
    assert not torch.allclose(one, other)


@both
def test_the_image_tower_is_attacked_and_the_head_is_frozen(family, processor, images, monkeypatch):
    monkeypatch.setattr(flags, "SQUARE_STEPS", 10)
    classifier = zero_shot_classifier(make_model(family), processor, NAMES)
    before = classifier.text_features.clone()
    with torch.no_grad():
        pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        labels = classifier(pixel_values).logits.argmax(dim=1)
    dataset = [{"image": image, "label": label} for image, label in zip(images, labels.tolist(), strict=True)]
    report = evaluate_robustness(
        classifier,
        dataset,
        processor.image_processor,
        norm="linf",
        epsilons=["0", "4/255", "32/255"],
        tier=[("apgd", 10)],
        progress_bar=False,
    )
    assert report.clean_accuracy == 1 > report.robust_accuracy
    assert report.settings["model"]["num_classes"] == 3
    assert report.examples.names == dict(enumerate(NAMES))
    assert torch.equal(classifier.text_features, before) and "text_features" in classifier.state_dict()


def siglip2():
    vision = {**VISION, "num_patches": 4}
    return Siglip2Model(Siglip2Config(text_config={**TEXT, **SPECIAL}, vision_config=vision))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": torch.nn.Linear(2, 2)}, "`model` is Linear; only CLIP, SigLIP and models that are built alike"),
        ({"model": siglip2()}, "`model` is Siglip2Model; only CLIP, SigLIP"),
        ({"class_names": "cat"}, r"`class_names=\['cat'\]` must hold at least two names"),
        ({"class_names": ["cat"]}, r"`class_names=\['cat'\]` must hold at least two names, each once"),
        ({"class_names": ["cat", "dog", "cat"]}, "each once"),
        ({"templates": []}, r"`templates=\[\]` must hold sentences with \{\}"),
        ({"templates": ["a photo"]}, r"`templates=\['a photo'\]` must hold sentences with \{\}"),
        ({"processor": ViTImageProcessor()}, "without a tokenizer; load it by `AutoProcessor`"),
    ],
)
def test_what_is_refused(processor, change, message):
    options = {"model": make_model("clip"), "processor": processor, "class_names": NAMES, **change}
    with pytest.raises(ValueError, match=message):
        zero_shot_classifier(**options)
