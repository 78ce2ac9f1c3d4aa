import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from hf_rft.attacks.objectives import KLDivergence, at_least_float32, dlr, log_odds, margin


OBJECTIVES = {"log_odds": log_odds, "margin": margin, "dlr": dlr}


def random_logits(classes, seed, count=6):
    logits = 4 * torch.randn((count, classes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits, torch.arange(count) % classes


@given(st.integers(2, 6), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_closed_forms(classes, seed):
    logits, labels = random_logits(classes, seed)
    z, rows = logits.numpy(), np.arange(6)
    true = z[rows, labels]
    others = z.copy()
    others[rows, labels] = -np.inf
    margins = others.max(axis=1) - true
    np.testing.assert_allclose(margin(logits, labels), margins)
    odds = np.exp(log_odds(logits, labels).numpy())
    np.testing.assert_allclose(np.log1p(odds), -log_softmax(z, axis=1)[rows, labels])
    ordered = np.sort(z, axis=1)[:, ::-1]
    expected = margins / (ordered[:, 0] - ordered[:, 2]) if classes > 2 else margins
    np.testing.assert_allclose(dlr(logits, labels), expected)
    wrong = logits.argmax(dim=1) != labels
    assert torch.equal(margin(logits, labels) > 0, wrong) and torch.equal(dlr(logits, labels) > 0, wrong)


def test_dlr_does_not_see_the_scale_of_the_logits():
    logits, labels = random_logits(5, 0)
    torch.testing.assert_close(dlr(1000 * logits + 7, labels), dlr(logits, labels))


def test_kl_divergence():
    (clean, labels), (logits, _) = random_logits(4, 0), random_logits(4, 1)
    log_p, log_q = log_softmax(clean.numpy(), axis=1), log_softmax(logits.numpy(), axis=1)
    objective = KLDivergence(clean)
    np.testing.assert_allclose(objective(logits, labels), (np.exp(log_p) * (log_p - log_q)).sum(axis=1))
    np.testing.assert_allclose(objective(clean, labels), 0, atol=1e-12)


def test_kl_divergence_holds_no_graph_of_the_clean_logits():
    clean = torch.randn(2, 3, requires_grad=True)
    objective = KLDivergence(clean)
    other = torch.randn(2, 3, requires_grad=True)
    objective(other, torch.zeros(2, dtype=torch.long)).sum().backward()
    assert clean.grad is None and other.grad is not None


@pytest.mark.parametrize("name", [*OBJECTIVES, "kl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_half_precision_logits(name, dtype, classes):
    """Computed in float32: large or equal logits give finite values and gradients."""
    logits = torch.zeros(4, classes, dtype=dtype)
    logits[0, 0], logits[1, 1], logits[2] = 3e4, -3e4, 100.0
    logits.requires_grad_()
    objective = KLDivergence(logits.flip(1)) if name == "kl" else OBJECTIVES[name]
    values = objective(logits, torch.zeros(4, dtype=torch.long))
    assert values.dtype == torch.float32 and values.shape == (4,) and values.isfinite().all()
    assert torch.autograd.grad(values.sum(), logits)[0].isfinite().all()


def test_at_least_float32():
    dtypes = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
    for given_dtype, expected in dtypes.items():
        assert at_least_float32(torch.zeros(1, dtype=given_dtype)).dtype == expected


@pytest.mark.parametrize("confidence", [5.0, 20.0, 1000.0])
def test_log_odds_of_a_confident_model_keep_their_gradient(confidence):
    """In float32 the true class's probability rounds to 1 and cross-entropy is flat; the log-odds never are."""
    logits = torch.tensor([[confidence, 0.0, -1.0]], requires_grad=True)
    values = log_odds(logits, torch.tensor([0]))
    np.testing.assert_allclose(values.detach(), np.log(1 + np.exp(-1)) - confidence, rtol=1e-6)
    gradient = torch.autograd.grad(values.sum(), logits)[0]
    others = np.array([1, np.exp(-1)]) / (1 + np.exp(-1))
    np.testing.assert_allclose(gradient[0], [-1, *others], rtol=1e-6)
