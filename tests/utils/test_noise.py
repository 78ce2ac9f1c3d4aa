import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from hf_rft.utils.noise import example_generators, mix_seed, rand, randn


@pytest.mark.parametrize("draw", [rand, randn])
@given(cuts=st.sets(st.integers(1, 6), max_size=4), seed=st.integers(0, 2**40), step=st.integers(0, 10**6))
@settings(deadline=None, max_examples=20)
def test_same_noise_however_the_batch_is_divided(draw, cuts, seed, step):
    images = torch.zeros(7, 3, 4, 5)
    whole = draw(images, example_generators("cpu", range(7), seed, step))
    bounds = [0, *sorted(cuts), 7]
    parts = [
        draw(images[a:b], example_generators("cpu", range(a, b), seed, step))
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("draw", [rand, randn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_dtype_and_global_generator(draw, dtype):
    images = torch.zeros((2, 3, 4, 5), dtype=dtype)
    state = torch.get_rng_state()
    for generator in (None, torch.Generator().manual_seed(1), example_generators("cpu", range(2), 1)):
        noise = draw(images, generator)
        assert noise.shape == images.shape and noise.dtype == dtype and noise.std() > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("draw", "distribution"), [(rand, "uniform"), (randn, "norm")])
def test_distribution(draw, distribution):
    images = torch.zeros(50, 1, 8, 8, dtype=torch.float64)
    noise = draw(images, example_generators("cpu", range(50), 0, 3))
    assert kstest(noise.flatten().numpy(), distribution).pvalue > 1e-3


@pytest.mark.parametrize("draw", [rand, randn])
def test_without_a_generator_the_noise_is_fixed(draw):
    images = torch.zeros(2, 1, 3, 3)
    first = draw(images)
    torch.rand(5)
    assert torch.equal(draw(images), first)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_generators(count):
    with pytest.raises(ValueError, match=f"`generator` holds {count} generators for a batch of 2 images"):
        rand(torch.zeros(2, 1, 3, 3), example_generators("cpu", range(count), 0))


def test_empty_batch():
    assert rand(torch.zeros(0, 1, 3, 3), []).shape == (0, 1, 3, 3)


@given(st.lists(st.tuples(*[st.integers(0, 2**31)] * 3), min_size=2, max_size=20, unique=True))
@settings(deadline=None)
def test_mix_seed_tells_keys_apart(keys):
    seeds = [mix_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [mix_seed(*key) for key in keys]
