from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, weights, without_dropout

from hf_rft.attacks import apgd_dlr, pgd
from hf_rft.attacks.base import log_odds, margin
from hf_rft.losses import at_loss, mart_loss, standard_loss, trades_loss
from hf_rft.models.classifier import check_batch
from hf_rft.threat_model import ThreatModel
from hf_rft.training.mixing import mixed


LABELS = torch.tensor([0, 1, 2, 3])


def mix(images=None, labels=LABELS, mixup=0.0, cutmix=0.0, key=(0, 0, 0)):
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) if images is None else images
    return images, *mixed(images, labels, SimpleNamespace(mixup_alpha=mixup, cutmix_alpha=cutmix), 4, key)


# --- Mixing ---


def test_mixup_mixes_images_and_labels_alike():
    images, found, labels = mix(mixup=0.5)
    share = labels[0, 0]
    assert 0 < share < 1
    torch.testing.assert_close(found, share * images + (1 - share) * images.roll(1, 0))
    one_hot = F.one_hot(LABELS, 4).float()
    torch.testing.assert_close(labels, share * one_hot + (1 - share) * one_hot.roll(1, 0))


def test_cutmix_pastes_a_box_whose_share_is_that_of_the_labels():
    images, found, labels = mix(cutmix=1.0, key=(0, 0, 1))
    pasted = (found == images.roll(1, 0)).all(dim=1) & (found != images).any(dim=1)
    kept = (found == images).all(dim=1)
    assert (pasted | kept).all() and pasted.any()
    torch.testing.assert_close(labels[0, 0], kept[0].float().mean())


def test_bytes_are_not_rounded():
    images, found, _ = mix(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), mixup=0.5)
    assert found.is_floating_point() and (found != found.round()).any() and found.max() <= 255


def test_random_numbers_are_those_of_the_key():
    state = torch.random.get_rng_state()
    assert torch.equal(mix(mixup=0.5)[1], mix(mixup=0.5)[1])
    assert not torch.equal(mix(mixup=0.5)[1], mix(mixup=0.5, key=(0, 1, 0))[1])
    assert torch.equal(state, torch.random.get_rng_state())


def test_both_methods_take_turns():
    def is_mixup(step):
        images, found, _ = mix(mixup=1.0, cutmix=1.0, key=(0, step, 0))
        return not (found == images).any()

    assert 0 < sum(map(is_mixup, range(20))) < 20


# --- Soft labels in attacks and losses ---


def test_gradient_for_a_mixed_label_is_the_mixture_of_the_gradients():
    logits = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    soft = torch.tensor([[0.3, 0.0, 0.7, 0.0]], dtype=torch.float64)

    def gradient(loss):
        return torch.autograd.grad(loss.sum(), logits)[0]

    first, second = (gradient(F.cross_entropy(logits, torch.tensor([label]))) for label in (0, 2))
    expected = 0.3 * first + 0.7 * second
    torch.testing.assert_close(gradient(log_odds(logits, soft)), expected)
    torch.testing.assert_close(gradient(at_loss(None, logits, soft)), expected)
    torch.testing.assert_close(gradient(standard_loss(logits, None, soft)), expected)


def test_one_hot_labels_are_the_classes_themselves():
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    one_hot = F.one_hot(LABELS, 4).float()
    for loss in (standard_loss, at_loss, trades_loss):
        for smoothing in (0.0, 0.1):
            options = {"label_smoothing": smoothing}
            found = loss(logits, logits + 0.1 * logits**2, one_hot, **options)
            torch.testing.assert_close(found, loss(logits, logits + 0.1 * logits**2, LABELS, **options))


def test_attack_increases_the_loss_of_the_soft_label():
    model = without_dropout(make_model("vit")).eval()
    images, soft = torch.rand(4, 3, 16, 16), torch.full((4, 4), 0.25)
    soft[:, 0] += 0.25
    soft[:, 1] -= 0.25

    def loss(pixels):
        return F.cross_entropy(model(pixel_values=pixels).logits, soft, reduction="none")

    def forward(pixels):
        return model(pixel_values=pixels).logits

    adversarial = pgd(forward, images, soft, threat_model=ThreatModel("linf", "8/255"), steps=5)
    assert (loss(adversarial) > loss(images)).all()


def test_objectives_that_compare_two_classes_refuse_soft_labels():
    logits, soft = torch.zeros(2, 3), torch.full((2, 3), 1 / 3)
    with pytest.raises(ValueError, match="Soft labels are defined for the cross-entropy .*; set `attack='pgd'`"):
        margin(logits, soft)
    with pytest.raises(ValueError, match="Soft labels are defined"):
        apgd_dlr(
            lambda x: x.flatten(1)[:, :3],
            torch.rand(2, 3, 2, 2),
            soft,
            threat_model=ThreatModel("linf", 0.1),
            steps=3,
        )
    with pytest.raises(ValueError, match="`robust_loss='mart'` does not define soft labels"):
        mart_loss(logits, logits, soft)


# --- In training ---


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((2, 3), 0.25), "Soft `labels` must hold 4 probabilities per image.* shape .2, 3."),
        (torch.full((2, 4), 0.3), "sums from 1.2 to 1.2"),
        (torch.tensor([[1.5, -0.5, 0, 0]] * 2), "values from -0.5"),
    ],
)
def test_labels_that_are_no_probabilities_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        check_batch({"pixel_values": torch.zeros(2, 3, 4, 4), "labels": labels}, 4, may_be_soft=True)


def test_evaluation_takes_classes_only():
    batch = {"pixel_values": torch.zeros(2, 3, 4, 4), "labels": torch.full((2, 4), 0.25)}
    check_batch(batch, 4, may_be_soft=True)
    with pytest.raises(ValueError, match="`labels` must hold one class index per image"):
        check_batch(batch, 4)


@pytest.mark.parametrize(
    "options", [{"mixup_alpha": 0.5}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 1.0, "awp_gamma": 0.01}]
)
@pytest.mark.parametrize("loss", ["standard", "at", "trades"])
def test_training_mixes_and_evaluation_does_not(make_trainer, loss, options):
    trainer = make_trainer("timm", max_steps=2, robust_loss=loss, **options)
    before = trainer.evaluate()
    plain = make_trainer("timm", robust_loss=loss)
    assert before["eval_loss"] == plain.evaluate()["eval_loss"]
    trainer.train()
    plain = make_trainer("timm", max_steps=2, robust_loss=loss)
    plain.train()
    assert any(not torch.equal(value, weights(plain.model)[name]) for name, value in weights(trainer.model).items())


def test_resuming_is_exact(make_trainer, tmp_path):
    options = {"mixup_alpha": 0.5, "cutmix_alpha": 1.0, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make_trainer(**options)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "other"), **options)
    resumed.train(str(tmp_path / "output" / "checkpoint-2"))
    assert all(torch.equal(value, weights(resumed.model)[name]) for name, value in weights(whole.model).items())


def test_soft_labels_of_the_users_collator(make_trainer):
    def collate(examples):
        batch = {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}
        labels = torch.tensor([example["labels"] for example in examples])
        return batch | {"labels": 0.8 * F.one_hot(labels, 4) + 0.05}

    trainer = make_trainer(max_steps=2, trainer_options={"data_collator": collate})
    trainer.train()
    assert trainer.state.global_step == 2
