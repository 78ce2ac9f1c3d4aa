import itertools

import numpy as np
import pytest
import torch

from hf_rft.evaluation import corruptions
from hf_rft.evaluation.corruptions import KINDS, SEVERITIES, corrupt


ALL = [kind for kinds in KINDS.values() for kind in kinds]


@pytest.fixture(scope="module")
def images():
    """Smooth, since noise hides in noise: three waves of colour, 36 x 40."""
    rows, columns = torch.linspace(0, 3, 36)[:, None], torch.linspace(0, 3, 40)
    waves = [torch.sin(rows * k + columns).mul(0.4).add(0.5).expand(36, 40) for k in (1, 2, 3)]
    return torch.stack([torch.stack(waves), torch.stack(waves[::-1])])


def test_kinds_are_those_of_the_paper():
    imagecorruptions = pytest.importorskip("imagecorruptions")
    assert imagecorruptions.get_corruption_names("common") == ALL and len(ALL) == 15
    for group, kinds in KINDS.items():
        assert imagecorruptions.get_corruption_names(group) == list(kinds)


@pytest.mark.parametrize("kind", ALL)
def test_an_image_is_corrupted_alone_as_in_a_batch_and_numpy_is_left_alone(images, kind):
    np.random.seed(3)
    expected = np.random.random(3)
    np.random.seed(3)
    both = corrupt(images, kind, 3, seed=1, positions=[7, 9])
    assert np.array_equal(np.random.random(3), expected)
    assert torch.equal(corrupt(images[1:], kind, 3, seed=1, positions=[9]), both[1:])
    assert both.shape == images.shape and both.dtype == images.dtype
    assert both.min() >= 0 and both.max() <= 1
    assert torch.allclose(both * 255, (both * 255).round(), atol=1e-3)
    assert (both - images).abs().mean() > 0.005


@pytest.mark.parametrize("kind", ["gaussian_noise", "impulse_noise", "glass_blur", "motion_blur", "frost", "fog"])
def test_seed_and_position_change_the_noise(images, kind):
    one = images[:1]
    first = corrupt(one, kind, 3, seed=0, positions=[0])
    assert not torch.equal(corrupt(one, kind, 3, seed=1, positions=[0]), first)
    assert not torch.equal(corrupt(one, kind, 3, seed=0, positions=[1]), first)


@pytest.mark.parametrize("kind", ["gaussian_noise", "defocus_blur", "contrast", "pixelate", "jpeg_compression"])
def test_severity_makes_it_worse(images, kind):
    changes = [(corrupt(images, kind, s, seed=0, positions=[0, 1]) - images).abs().mean() for s in SEVERITIES]
    assert changes == sorted(changes)


def test_contrast_is_the_published_formula(images):
    """The pixels approach each channel's mean: to a share of 0.4 at severity 1, of 0.05 at severity 5."""
    levels = (255 * images).round() / 255
    means = levels.mean(dim=(2, 3), keepdim=True)
    for severity, share in ((1, 0.4), (5, 0.05)):
        found = corrupt(images, "contrast", severity, seed=0, positions=[0, 1])
        assert (found - (means + share * (levels - means))).abs().max() <= 1 / 255


@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (14, 50)), (1, (64, 33)), (3, (97, 45))])
def test_any_size_and_grey_images(channels, size):
    images = torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(0))
    for kind, severity in itertools.product(ALL, (1, 5)):
        found = corrupt(images, kind, severity, seed=0, positions=[0])
        assert found.shape == images.shape and found.isfinite().all()


def test_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(corruptions, "PACKAGE", "a-package-that-is-missing")
    with pytest.raises(ImportError, match=r'pip install "hf_rft\[corruptions\]"'):
        corruptions.check_installed()
