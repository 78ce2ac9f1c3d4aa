import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax

from hf_rft.losses import LOSSES, at_loss, mart_loss, standard_loss, trades_loss


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    clean = 3 * torch.randn((6, 5), generator=generator, dtype=torch.float64)
    adversarial = 3 * torch.randn((6, 5), generator=generator, dtype=torch.float64)
    return clean, adversarial, torch.tensor([0, 1, 2, 3, 4, 0])


def log_p(logits):
    return log_softmax(logits.detach().double().numpy(), axis=1)


def cross_entropy(logits, labels, smoothing=0.0):
    target = np.eye(logits.shape[1])[labels.numpy()] * (1 - smoothing) + smoothing / logits.shape[1]
    return -(target * log_p(logits)).sum(axis=1)


def divergence(clean, adversarial):
    return (np.exp(log_p(clean)) * (log_p(clean) - log_p(adversarial))).sum(axis=1)


def trades(clean, adversarial, labels, weight=6.0):
    return cross_entropy(clean, labels) + weight * divergence(clean, adversarial)


def mart(clean, adversarial, labels, weight=6.0):
    values = []
    for p, q, y in zip(np.exp(log_p(clean)), np.exp(log_p(adversarial)), labels.tolist(), strict=True):
        boosted = -np.log(q[y]) - np.log(1.0001 - np.delete(q, y).max())
        values.append(boosted + weight * (p * np.log(p / q)).sum() * (1 - p[y]))
    return np.array(values)


FORMULAS = {
    "standard": lambda clean, adversarial, labels: cross_entropy(clean, labels),
    "at": lambda clean, adversarial, labels: cross_entropy(adversarial, labels),
    "trades": trades,
    "mart": mart,
}


def test_every_loss_has_a_formula():
    assert set(FORMULAS) == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 2e-5)]
)
def test_formula_per_example(name, dtype, tolerance, batch):
    clean, adversarial, labels = (tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in batch)
    options = {} if LOSSES[name].weight is None else {"weight": LOSSES[name].weight}
    values = LOSSES[name].function(clean, adversarial, labels, **options)
    assert values.shape == (6,) and values.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(values, FORMULAS[name](clean, adversarial, labels), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_weight(name, batch):
    for weight in (0.0, 1.0, 2.5):
        np.testing.assert_allclose(
            LOSSES[name].function(*batch, weight=weight), FORMULAS[name](*batch, weight=weight), rtol=1e-10
        )
    assert LOSSES[name].weight == 6.0
    assert torch.equal(LOSSES[name].function(*batch), LOSSES[name].function(*batch, weight=6.0))


def test_what_the_losses_look_at(batch):
    clean, adversarial, labels = batch
    for name, loss in LOSSES.items():
        options = {} if loss.weight is None else {"weight": loss.weight}
        value = loss.function(clean, adversarial, labels, **options)
        other_clean = loss.function(clean.flip(1), adversarial, labels, **options)
        other_adversarial = loss.function(clean, adversarial.flip(1), labels, **options)
        assert torch.equal(value, other_clean) != loss.needs_clean, name
        assert torch.equal(value, other_adversarial) != loss.needs_adversarial, name
    assert LOSSES["trades"].attack_objective == "kl"
    assert all(LOSSES[name].attack_objective == "cross_entropy" for name in ("standard", "at", "mart"))


def test_trades_without_a_perturbation_is_cross_entropy(batch):
    clean, _, labels = batch
    torch.testing.assert_close(trades_loss(clean, clean, labels), F.cross_entropy(clean, labels, reduction="none"))


def test_divergence_of_trades_is_never_negative(batch):
    clean, adversarial, labels = batch
    assert (trades_loss(clean, adversarial, labels) >= standard_loss(clean, None, labels)).all()


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing(smoothing, batch):
    clean, adversarial, labels = batch
    options = {"label_smoothing": smoothing}
    smooth_clean = cross_entropy(clean, labels, smoothing)
    np.testing.assert_allclose(standard_loss(clean, None, labels, **options), smooth_clean)
    np.testing.assert_allclose(
        at_loss(None, adversarial, labels, **options), cross_entropy(adversarial, labels, smoothing)
    )
    np.testing.assert_allclose(
        trades_loss(clean, adversarial, labels, weight=2.0, **options),
        smooth_clean + 2 * divergence(clean, adversarial),
    )


def test_mart_refuses_label_smoothing(batch):
    with pytest.raises(
        ValueError, match="`robust_loss='mart'` does not define `label_smoothing_factor=0.1`; set it to 0"
    ):
        mart_loss(*batch, label_smoothing=0.1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_huge_logits_give_finite_values_and_gradients(name, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0], [1e4, 1e4, -1e4]], dtype=dtype)
    options = {} if LOSSES[name].weight is None else {"weight": LOSSES[name].weight}
    for labels in ([0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2]):
        clean, adversarial = logits.clone().requires_grad_(), logits.flip(1).clone().requires_grad_()
        values = LOSSES[name].function(clean, adversarial, torch.tensor(labels), **options)
        assert values.isfinite().all() and values.dtype == torch.float32
        values.sum().backward()
        assert all(x.grad is None or x.grad.isfinite().all() for x in (clean, adversarial))


@pytest.mark.parametrize("name", LOSSES)
def test_two_classes(name):
    clean, adversarial = torch.tensor([[2.0, -1.0]]).double(), torch.tensor([[0.5, 1.0]]).double()
    labels = torch.tensor([1])
    options = {} if LOSSES[name].weight is None else {"weight": LOSSES[name].weight}
    np.testing.assert_allclose(
        LOSSES[name].function(clean, adversarial, labels, **options), FORMULAS[name](clean, adversarial, labels)
    )
