"""The adversary by itself: no trainer anywhere."""

import pytest
import torch
from accelerate import Accelerator
from conftest import Images, make_model

from hf_rft.attacks import pgd
from hf_rft.attacks.base import KLDivergence
from hf_rft.models.classifier import PixelClassifier
from hf_rft.models.pixel_space import PixelNormalization
from hf_rft.schedules import scaled_steps
from hf_rft.threat_model import NORMS, ThreatModel
from hf_rft.training.adversary import AdversarialAccuracy, Adversary


NORMALIZATION = PixelNormalization((0.5,) * 3, (0.5,) * 3)
TARGET = ThreatModel("linf", "8/255")


def make_adversary(family="resnet", attack=pgd, *, threat_model=TARGET, steps=2, **options):
    classifier = PixelClassifier(make_model(family), NORMALIZATION)
    return Adversary(classifier, attack, threat_model=threat_model, steps=steps, **options)


def make_batch(count=4, dtype=torch.float32):
    images = Images(count, dtype=dtype)
    return images.pixels, images.labels


class Recorder:
    """An attack that returns the clean images, and keeps what it was called with and what `look` returned then."""

    def __init__(self, look=lambda: None):
        self.look, self.calls, self.seen = look, [], []

    def __call__(self, forward, pixels, labels, **options):
        self.calls.append({"forward": forward, **options})
        self.seen.append(self.look())
        return pixels


def modes_and_flags(model):
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


# --- Strength ---


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", "8/255"), ("l2", "0.5"), ("l1", "12")])
def test_examples_lie_in_the_ball_of_their_share_and_in_the_box(norm, epsilon, share):
    pixels, labels = make_batch()
    adversarial = make_adversary(threat_model=ThreatModel(norm, epsilon))(pixels, labels, share)
    radius = share * float(ThreatModel(norm, epsilon).epsilon)
    distances = ThreatModel(norm, epsilon).distance(adversarial, pixels)
    assert (distances <= radius * (1 + 1e-4)).all() and (distances > radius / 2).all()
    assert adversarial.min() >= 0 and adversarial.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_strength_is_a_share_of_epsilon_with_all_steps(norm):
    adversary = make_adversary(threat_model=ThreatModel(norm, "1/2"), steps=7)
    threat_model, steps = adversary.strength(0.25)
    assert (threat_model.norm, float(threat_model.epsilon), steps) == (norm, 0.125, 7)


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_steps_follow_epsilon_where_asked_for(share):
    adversary = make_adversary(steps=10, scale_steps=True)
    assert adversary.strength(share)[1] == scaled_steps(10, share)
    assert scaled_steps(10, 0.01) == 1 and scaled_steps(10, 0.5) == 5


@pytest.mark.parametrize("scale_steps", [False, True])
def test_nothing_is_to_be_done_at_share_0(scale_steps):
    threat_model, steps = make_adversary(scale_steps=scale_steps).strength(0.0)
    assert threat_model.is_trivial and steps == 0


def test_the_attack_is_called_with_that_strength_and_counted():
    adversary = make_adversary(attack=Recorder(), steps=4, scale_steps=True)
    for number, share in enumerate([0.5, 1.0], start=1):
        adversary(*make_batch(), share)
        call, (threat_model, steps) = adversary.attack.calls[-1], adversary.strength(share)
        assert (call["threat_model"].epsilon, call["steps"]) == (threat_model.epsilon, steps)
        assert adversary.attacks == number


# --- Noise ---


def test_noise_belongs_to_the_example_whatever_batch_it_is_in():
    """In float64: a step by the sign of the gradient makes a whole step out of a rounding error."""
    pixels, labels = make_batch(6, torch.float64)
    adversary = make_adversary(seed=3)
    adversary.classifier.model.double()
    attacked = adversary(pixels, labels, optimizer_step=5)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    apart = [adversary(pixels[part], labels[part], optimizer_step=5, first=part.start) for part in parts]
    torch.testing.assert_close(torch.cat(apart), attacked)


@pytest.mark.parametrize("change", [{"optimizer_step": 6}, {"first": 1}, {"seed": 4}], ids=str)
def test_another_step_position_or_seed_brings_another_noise(change):
    def noise(seed=3, **place):
        adversary = make_adversary(seed=seed)
        return adversary(*make_batch(), **{"optimizer_step": 5, "first": 0, **place})

    assert torch.equal(noise(), noise())
    assert not torch.equal(noise(), noise(**change))


def test_the_global_generator_is_left_alone():
    adversary = make_adversary("vit", training_mode=True)
    before = torch.get_rng_state()
    adversary(*make_batch())
    assert torch.equal(torch.get_rng_state(), before)


# --- The model meanwhile ---


def test_kl_is_the_divergence_from_the_clean_prediction():
    recorder = Recorder()
    adversary = make_adversary("vit", attack=recorder, objective="kl")
    pixels, labels = make_batch()
    adversary(pixels, labels)
    objective = recorder.calls[0]["objective"]
    assert isinstance(objective, KLDivergence)
    clean = adversary.classifier.model.eval()(pixel_values=2 * pixels - 1).logits.detach()
    other = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(objective(other, labels), KLDivergence(clean)(other, labels))
    torch.testing.assert_close(objective(clean, labels), torch.zeros(len(labels)))


def test_without_kl_the_attack_keeps_its_own_objective():
    recorder = Recorder()
    make_adversary(attack=recorder)(*make_batch())
    assert "objective" not in recorder.calls[0]


@pytest.mark.parametrize("training_mode", [False, True])
@pytest.mark.parametrize("interrupted", [False, True])
def test_mode_is_the_one_asked_for_with_batch_norm_frozen_and_all_given_back(training_mode, interrupted):
    def look():
        batch_norms = [m.training for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        others = [m.training for m in model.modules() if not isinstance(m, torch.nn.BatchNorm2d)]
        assert batch_norms and not any(batch_norms)
        assert others and all(mode == training_mode for mode in others)
        assert not any(p.requires_grad for p in model.parameters())
        if interrupted:
            raise KeyboardInterrupt

    adversary = make_adversary(attack=Recorder(look), training_mode=training_mode)
    model = adversary.classifier.model
    model.train(not training_mode)
    next(model.parameters()).requires_grad = False
    before, tensors = modes_and_flags(model), {name: value.clone() for name, value in model.state_dict().items()}
    try:
        adversary(*make_batch())
    except KeyboardInterrupt:
        assert interrupted
    assert modes_and_flags(model) == before
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


def test_bfloat16_passes_give_float32_examples_inside_the_ball():
    recorder = Recorder(lambda: recorder.calls[-1]["forward"](make_batch()[0]).dtype)
    for dtype in (None, torch.bfloat16):
        make_adversary("vit", attack=recorder, dtype=dtype)(*make_batch())
    assert recorder.seen == [torch.float32, torch.bfloat16]

    pixels, labels = make_batch()
    adversarial = make_adversary("vit", dtype=torch.bfloat16)(pixels, labels)
    assert adversarial.dtype == torch.float32 and adversarial.min() >= 0 and adversarial.max() <= 1
    assert TARGET.distance(adversarial, pixels).max() <= float(TARGET.epsilon) * (1 + 1e-4)


def test_further_inputs_reach_the_model():
    class Scaled(torch.nn.Module):
        def forward(self, pixel_values, scale):
            return scale * pixel_values.flatten(1)[:, :2]

    recorder = Recorder(lambda: recorder.calls[-1]["forward"](torch.ones(1, 3, 2, 2)).tolist())
    classifier = PixelClassifier(Scaled(), NORMALIZATION)
    Adversary(classifier, recorder, threat_model=TARGET, steps=1)(*make_batch(), scale=3.0)
    assert recorder.seen == [[[3.0, 3.0]]]


# --- Accuracy on its examples ---


def test_adversarial_accuracy_is_the_share_since_it_was_last_asked_for():
    accelerator, accuracy = Accelerator(cpu=True), AdversarialAccuracy()
    assert accuracy.pop(accelerator) == {}
    logits = torch.eye(4)
    accuracy.add(logits, torch.tensor([0, 1, 2, 0]))
    accuracy.add(logits[:1], torch.tensor([1]))
    assert accuracy.pop(accelerator) == {"adversarial_accuracy": 0.6}
    assert accuracy.pop(accelerator) == {}
    accuracy.add(logits, torch.arange(4))
    assert accuracy.pop(accelerator) == {"adversarial_accuracy": 1.0}
