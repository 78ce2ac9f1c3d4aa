import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    MobileNetV2ImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hf_rft import PixelNormalization


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
AS_IT_IS = {"do_resize": False}
AS_IT_IS_UNCROPPED = {"do_resize": False, "do_center_crop": False}

PROCESSORS = {
    "vit": lambda: ViTImageProcessor(**AS_IT_IS),
    "vit, ImageNet": lambda: ViTImageProcessor(**AS_IT_IS, **IMAGENET),
    "vit, no normalisation": lambda: ViTImageProcessor(**AS_IT_IS, do_normalize=False),
    "vit, no rescaling": lambda: ViTImageProcessor(
        **AS_IT_IS, do_rescale=False, image_mean=[127.5] * 3, image_std=[127.5, 64.0, 255.0]
    ),
    "vit, neither": lambda: ViTImageProcessor(**AS_IT_IS, do_rescale=False, do_normalize=False),
    "vit, other factor": lambda: ViTImageProcessor(**AS_IT_IS, rescale_factor=1 / 127.5, **IMAGENET),
    "vit, other factor, no normalisation": lambda: ViTImageProcessor(
        **AS_IT_IS, rescale_factor=1 / 127.5, do_normalize=False
    ),
    "convnext": lambda: ConvNextImageProcessor(**AS_IT_IS),
    "bit": lambda: BitImageProcessor(**AS_IT_IS_UNCROPPED),
    "clip": lambda: CLIPImageProcessor(**AS_IT_IS_UNCROPPED),
    "siglip": lambda: SiglipImageProcessor(**AS_IT_IS),
    "mobilenet": lambda: MobileNetV2ImageProcessor(**AS_IT_IS_UNCROPPED),
    **{
        f"efficientnet {options}": lambda options=options: EfficientNetImageProcessor(
            **AS_IT_IS, **IMAGENET, **options
        )
        for options in (
            {"include_top": True},
            {"include_top": False},
            {"include_top": True, "rescale_factor": 1 / 127.5, "rescale_offset": True},
            {"include_top": False, "rescale_factor": 1 / 127.5, "rescale_offset": True},
            {"include_top": False, "rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False},
            {"include_top": True, "do_normalize": False},
            {"include_top": True, "do_rescale": False},
        )
    },
    "timm": lambda: TimmWrapperImageProcessor(
        pretrained_cfg={
            "input_size": [3, 12, 10],
            "mean": IMAGENET["image_mean"],
            "std": IMAGENET["image_std"],
            "crop_pct": 1.0,
        }
    ),
}


def random_image(seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    values[0], values[1] = 0, 255
    return values


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_the_image_over_255(name):
    image = random_image()
    processor = PROCESSORS[name]()
    pixel_values = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    normalization = PixelNormalization.from_processor(processor)
    pixels = normalization.to_pixels(pixel_values)
    expected = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0) / 255
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(normalization.from_pixels(pixels), pixel_values.float(), rtol=1e-5, atol=1e-5)


@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 1), (1, 3), (3, 1), (3, 3)]),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=30)
def test_from_pixels_is_the_inverse(seed, sizes, dtype):
    rng = np.random.default_rng(seed)
    mean, std = (tuple(rng.uniform(0.05, 1, size)) for size in sizes)
    normalization = PixelNormalization(mean, std)
    pixels = torch.from_numpy(rng.uniform(0, 1, (2, 3, 4, 5))).to(dtype)
    values = normalization.from_pixels(pixels)
    assert values.dtype == dtype
    torch.testing.assert_close(normalization.to_pixels(values), pixels, rtol=0, atol=1e-5)


def test_one_channel():
    processor = ViTImageProcessor(**AS_IT_IS, image_mean=[0.1307], image_std=[0.3081])
    normalization = PixelNormalization.from_processor(processor)
    pixels = torch.rand((2, 1, 6, 5), generator=torch.Generator().manual_seed(0))
    values = normalization.from_pixels(pixels)
    torch.testing.assert_close(values, (pixels - 0.1307) / 0.3081)
    torch.testing.assert_close(normalization.to_pixels(values), pixels)


@pytest.mark.parametrize("value", [0.5, (0.5,), [0.5, 0.5, 0.5]], ids=str)
def test_mean_and_std_in_any_form(value):
    processor = ViTImageProcessor(**AS_IT_IS)
    processor.image_mean = processor.image_std = value
    normalization = PixelNormalization.from_processor(processor)
    pixels = normalization.to_pixels(torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1))
    assert pixels.flatten().tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit", "vit, ImageNet", "clip", "timm"])
def test_half_precision_input(name, dtype):
    """Black and white images lie in [0, 1] still, though half precision rounds their values."""
    normalization = PixelNormalization.from_processor(PROCESSORS[name]())
    pixels = torch.tensor([0.0, 1.0, 0.3]).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
    rounded = normalization.to_pixels(normalization.from_pixels(pixels).to(dtype))
    assert rounded.dtype == torch.float32 and rounded.min() >= 0 and rounded.max() <= 1
    torch.testing.assert_close(rounded, pixels, rtol=0, atol=1e-2)


def test_rounding_is_tolerated_and_clipped():
    normalization = PixelNormalization((0.0,), (1.0,))
    values = torch.tensor([-0.0009, 1.0009]).reshape(1, 1, 1, 2)
    assert normalization.to_pixels(values).flatten().tolist() == [0.0, 1.0]
    for value in (-0.0011, 1.0011):
        with pytest.raises(ValueError, match=r"pixels must lie in \[0, 1\]"):
            normalization.to_pixels(torch.full((1, 1, 1, 1), value))


def test_values_do_not_depend_on_where_the_map_was_used_first():
    normalization = PixelNormalization((0.5,), (0.25,))
    pixels = torch.rand(1, 3, 2, 2)
    with torch.inference_mode():
        normalization.from_pixels(pixels)
    pixels.requires_grad_()
    normalization.from_pixels(pixels).sum().backward()
    torch.testing.assert_close(pixels.grad, torch.full_like(pixels, 4.0))


def error_of(processor, pixel_values):
    with pytest.raises(ValueError, match=r"`pixel_values` in .* become pixels in .* must lie in \[0, 1\]") as error:
        PixelNormalization.from_processor(processor).to_pixels(pixel_values)
    return str(error.value)


@pytest.mark.parametrize("name", ["vit", "vit, ImageNet", "vit, no normalisation", "timm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_bytes_are_refused(name, dtype):
    pixel_values = torch.from_numpy(random_image()).permute(2, 0, 1).unsqueeze(0).to(dtype)
    message = error_of(PROCESSORS[name](), pixel_values)
    assert "in [0, 255] become" in message
    assert "look like bytes 0..255: the processor's `do_rescale` or `rescale_factor` was not applied" in message


@pytest.mark.parametrize("name", ["vit, no rescaling", "vit, neither"])
def test_pixels_in_0_1_are_refused_where_bytes_are_expected(name):
    """`do_rescale=False` with images that `ToTensor` scaled already: a perturbation would be 255 times too strong."""
    pixels = torch.from_numpy(random_image()).permute(2, 0, 1).unsqueeze(0) / 255
    processor = PROCESSORS[name]()
    pixel_values = processor(pixels[0], return_tensors="pt")["pixel_values"]
    with pytest.raises(ValueError, match="do_rescale"):
        PixelNormalization.from_processor(processor).to_pixels(pixel_values)


def test_unnormalised_pixels_are_refused_where_they_leave_the_range():
    processor = ViTImageProcessor(**AS_IT_IS, image_mean=[0.5] * 3, image_std=[0.7] * 3)
    message = error_of(processor, torch.linspace(0, 1, 12).reshape(1, 3, 2, 2))
    assert "look like pixels in [0, 1] already" in message and "do_normalize=False" in message


def test_values_of_another_processor_are_refused():
    pixel_values = PROCESSORS["vit, ImageNet"]()(Image.fromarray(random_image()), return_tensors="pt")["pixel_values"]
    message = error_of(PROCESSORS["vit"](), pixel_values)
    assert "normalised with another `image_mean`, `image_std` or `rescale_factor`" in message
    assert "image_mean=[0.5, 0.5, 0.5]" in message


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(value):
    pixel_values = torch.zeros(1, 3, 2, 2)
    pixel_values[0, 1, 1, 1] = value
    message = error_of(PROCESSORS["vit"](), pixel_values)
    assert ("NaN" in message) == (value is torch.nan)


@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_processor_without_mean_or_std(name):
    processor = ViTImageProcessor(**AS_IT_IS)
    setattr(processor, name, None)
    with pytest.raises(
        ValueError, match=f"ViTImageProcessor normalises images but its `{name}` is None; set `{name}`"
    ):
        PixelNormalization.from_processor(processor)
    processor.do_normalize = False
    PixelNormalization.from_processor(processor)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_timm_processor_without_mean_or_std(name):
    processor = SimpleNamespace(data_config={"mean": (0.5,), "std": (0.5,)} | {name: None})
    with pytest.raises(ValueError, match=f"`{name}` is None"):
        PixelNormalization.from_processor(processor)


@pytest.mark.parametrize("std", [0.0, [0.5, 0.0, 0.5], [0.5, -0.5, 0.5]], ids=str)
def test_std_must_be_positive(std):
    processor = ViTImageProcessor(**AS_IT_IS)
    processor.image_std = std
    with pytest.raises(ValueError, match=rf"`image_std={re.escape(str(std))}`; standard deviations must be positive"):
        PixelNormalization.from_processor(processor)


def test_what_is_no_image_processor():
    with pytest.raises(ValueError, match="`processing_class=SimpleNamespace` is not an image processor"):
        PixelNormalization.from_processor(SimpleNamespace(vocab_size=3))


@pytest.mark.parametrize("std", [[0.5, 0.25], (0.5, 0.25), np.array([0.5, 0.25]), torch.tensor([0.5, 0.25])])
def test_made_directly_from_mean_and_std(std):
    normalization = PixelNormalization(0.25, std)
    assert normalization.mean == (0.25,) and normalization.std == (0.5, 0.25)
    assert repr(normalization) == "PixelNormalization(mean=(0.25,), std=(0.5, 0.25))"
    with pytest.raises(ValueError, match=r"\(mean=\[0.25\], std=\[0.5, 0.25\]\) is undone"):
        normalization.to_pixels(torch.full((1, 2, 1, 1), 9.0))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (0.5, 0, "PixelNormalization has `std=0`; standard deviations must be positive"),
        (float("nan"), 1, "PixelNormalization has `mean=nan`; give one finite number per channel"),
        ("grey", 1, "PixelNormalization has `mean=grey`; give one number per channel"),
    ],
)
def test_made_directly_from_other_values(mean, std, message):
    with pytest.raises(ValueError, match=message):
        PixelNormalization(mean, std)


def test_is_a_processor_that_does_not_resize():
    """The same image in four forms: of PIL, an array, a tensor of bytes and one of floats."""
    array = random_image()
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    normalization = PixelNormalization((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    images = [Image.fromarray(array), array, tensor, tensor / 255]
    values = normalization(images, return_tensors="pt")["pixel_values"]
    assert values.dtype == torch.float32 and values.shape == (4, 3, 12, 10)
    torch.testing.assert_close(normalization.to_pixels(values), (tensor / 255).expand(4, -1, -1, -1))
    with pytest.raises(ValueError, match=r"have the shapes \[\(3, 2, 2\), \(3, 12, 10\)\]; resize them to one size"):
        normalization([array, tensor[:, :2, :2]])


def test_wrong_number_of_channels():
    normalization = PixelNormalization.from_processor(ViTImageProcessor(**AS_IT_IS))
    for method in (normalization.to_pixels, normalization.from_pixels):
        with pytest.raises(ValueError, match=r"Images have 1 channel\(s\), the processor normalises 3 .*convert"):
            method(torch.zeros(2, 1, 4, 4))
