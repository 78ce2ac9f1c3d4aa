import datasets
import numpy as np
import pytest
from PIL import Image

from hf_rft.data.examples import Examples
from hf_rft.data.images import check_images, to_mode


def test_16_bit_grey_is_scaled_and_not_clipped():
    levels = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    assert np.asarray(to_mode(Image.fromarray(levels), "L")).tolist() == [[0, 0, 1, 128, 255]]
    colour = np.asarray(to_mode(Image.fromarray(levels), "RGB"))
    assert colour.shape == (1, 5, 3) and colour[0, 3].tolist() == [128, 128, 128]


def test_transparent_pixels_are_white_and_hidden_colours_do_not_show():
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 0))  # red, but nobody sees it
    image.putpixel((1, 0), (0, 0, 255, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))
    assert np.asarray(to_mode(image, "RGB"))[0].tolist() == [[255] * 3, [0, 0, 255], [204] * 3]
    assert np.asarray(to_mode(image, "L"))[0].tolist() == [255, 29, 204]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([255, 0, 0])
    assert to_mode(palette, "RGB").getpixel((0, 0)) == (255, 0, 0)
    palette.info["transparency"] = 0
    assert to_mode(palette, "RGB").getpixel((0, 0)) == (255, 255, 255)
    grey = Image.new("LA", (1, 1), (0, 0))
    assert to_mode(grey, "L").getpixel((0, 0)) == 255


def test_printers_colours_and_bits_are_converted():
    assert to_mode(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "RGB").getpixel((0, 0)) == (255, 0, 0)
    assert to_mode(Image.new("1", (1, 1), 1), "RGB").getpixel((0, 0)) == (255, 255, 255)
    plain = Image.new("RGB", (1, 1), (1, 2, 3))
    assert to_mode(plain, "RGB") is plain


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_without_a_known_white_are_refused(mode, processor):
    with pytest.raises(ValueError, match=f"Example 1 of `dataset`, column 'image': its .*mode '{mode}'.*; save it"):
        examples = [{"image": Image.new(one, (4, 4)), "label": 0} for one in ("RGB", mode)]
        Examples(examples, processor).batch([0, 1])


def animation(tmp_path) -> str:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    return str(tmp_path / "animated.gif")


def test_of_an_animation_the_first_frame_counts_and_a_warning_says_so(tmp_path, processor, caplog):
    dataset = datasets.Dataset.from_dict({"image": [animation(tmp_path)] * 3, "label": [0, 1, 0]})
    dataset = dataset.cast_column("image", datasets.Image())
    check_images("Split 'train'", dataset, "image", range(1, 3))
    assert "Split 'train': 2 images have several frames (example 1 first); only their first" in caplog.text
    caplog.clear()
    pixel_values, _ = Examples(dataset, processor).batch([0, 1, 2])
    assert pixel_values[0, :, 0, 0].tolist() == [1, -1, -1]  # red
    assert caplog.text.count("has 2 frames") == 1
