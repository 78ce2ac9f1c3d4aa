"""The page of a robust model: its parts on models whose weak spot is known, and the whole in a real browser."""

import importlib
import io
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SIZE, make_model
from datasets import load_dataset
from PIL import Image
from transformers import ViTImageProcessor

from hf_rft import RobustnessReport, ThreatModel
from hf_rft.attacks.base import Passes, log_odds
from hf_rft.cli import app_page
from hf_rft.cli.app_attack import (
    MAX_FILE_BYTES,
    AttackResult,
    Classifier,
    EpsilonScale,
    attack_image,
    attack_passes,
    distinct_names,
    epsilon_scale,
    fooling_first,
    read_image,
    run_in_background,
    to_image,
)
from hf_rft.cli.app_page import Panel, describe_result, describe_threat, show_result, status_line, top_classes
from hf_rft.data import bundled
from hf_rft.hub.loading import RobustModel


FULL_ATTACK = [
    {"attack": "apgd", "steps": 100, "restarts": 1},
    {"attack": "apgd_targeted", "steps": 100, "restarts": 1},
]


class Brightness(torch.nn.Module):
    """Tells dark from bright at a mean of 0.5: a grey image of brightness b is fooled from L-inf |b - 0.5| on."""

    def __init__(self, seconds=0.0, classes=("dark", "bright")):
        super().__init__()
        self.config = SimpleNamespace(id2label=dict(enumerate(classes)), num_channels=3)
        self.weight = torch.nn.Parameter(torch.tensor([-20.0, 20.0]))
        self.seconds, self.calls = seconds, 0

    def forward(self, pixel_values):
        self.calls += 1
        time.sleep(self.seconds)
        return pixel_values.mean(dim=(1, 2, 3)).unsqueeze(1) * self.weight  # pixel values lie in [-1, 1]


def make_processor(size=SIZE):
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def make_classifier(**options):
    return Classifier("a model", Brightness(**options), make_processor())


def make_report(norm="linf", epsilons=("0", "2/255", "4/255", "8/255"), accuracies=(0.9, 0.8, 0.6, 0.5), flags=None):
    """Of ten examples, all of class 1."""
    predictions = np.stack([np.arange(10) < round(10 * accuracy) for accuracy in accuracies], axis=1).astype(int)
    report = RobustnessReport.from_predictions(
        predictions,
        np.ones(10, dtype=int),
        np.zeros(10),
        norm=norm,
        epsilons=[Fraction(epsilon) for epsilon in epsilons],
        passes=Passes(1, 1),
        settings={
            "model": {"name": "user/model"},
            "dataset": {"name": "greys", "split": "test"},
            "tier": "standard",
            "attacks": FULL_ATTACK,
            "seed": 0,
        },
    )
    report.flags = flags
    return report


def grey(level, size=(SIZE, SIZE)):
    return Image.new("RGB", size, (level,) * 3)


# --- Images from strangers ---


def png_that_claims(width, height):
    """A PNG of a few bytes whose header promises an image of that size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def truncated_png():
    noise, stream = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(noise).save(stream, "png")
    return stream.getvalue()[:2000]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"this is text", "not an image"),
        (lambda: b"", "not an image"),
        (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (truncated_png, "damaged"),
        (lambda: png_that_claims(7000, 7000), "7000 x 7000 pixels; at most 40 million"),
        (lambda: png_that_claims(60000, 60000), "far more pixels than the 40 million"),
        (lambda: png_that_claims(100000, 1), "100000 x 1 pixels; its long side may be at most 20 times"),
        (lambda: b"\0" * (MAX_FILE_BYTES + 1), "10.0 MB; at most 10 MB"),
    ],
    ids=["text", "empty", "svg", "eps", "truncated", "large", "bomb", "narrow", "bytes"],
)
def test_read_image_refuses(tmp_path, content, message):
    path = tmp_path / "image.png"
    path.write_bytes(content())
    with pytest.raises(ValueError, match=message):
        read_image(path)


def test_read_image_refuses_pixels_without_a_known_white(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5]], dtype=np.float32)).save(tmp_path / "image.tiff")
    with pytest.raises(ValueError, match="mode 'F' .32 bits., which does not say which value is white"):
        read_image(tmp_path / "image.tiff")


@pytest.mark.parametrize(
    ("image", "ending", "color"),
    [
        (Image.new("RGB", (3, 2), (10, 20, 30)), "png", (10, 20, 30)),
        (Image.new("L", (3, 2), 70), "png", (70, 70, 70)),
        (Image.new("1", (3, 2), 1), "png", (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 51)), "png", (255, 204, 204)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 255)), "png", (255, 0, 0)),
        (Image.new("LA", (3, 2), (0, 0)), "png", (255, 255, 255)),
        (Image.fromarray(np.full((2, 3), 40000, dtype=np.uint16)), "png", (156, 156, 156)),
        (Image.new("CMYK", (3, 2), (0, 255, 255, 0)), "tiff", (255, 0, 0)),
    ],
    ids=["rgb", "grey", "bits", "alpha", "opaque", "transparent", "16-bit", "cmyk"],
)
def test_read_image_converts(tmp_path, image, ending, color):
    path = tmp_path / f"image.{ending}"
    image.save(path)
    picture = read_image(path)
    assert picture.mode == "RGB" and picture.size == image.size
    assert np.asarray(picture).reshape(-1, 3) == pytest.approx(np.tile(color, (6, 1)), abs=1)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "gif", "bmp", "tiff"])
def test_read_image_knows_the_format(tmp_path, ending):
    grey(100).save(tmp_path / f"image.{ending}")
    assert read_image(tmp_path / f"image.{ending}").size == (SIZE, SIZE)


def test_read_image_turns_photographs_upright(tmp_path):
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held turned: left is up
    image.save(tmp_path / "image.png", exif=exif)
    upright = read_image(tmp_path / "image.png")
    assert upright.size == (1, 2) and upright.getpixel((0, 0)) == (255, 0, 0)


def test_read_image_takes_the_first_frame(tmp_path):
    grey(0).save(tmp_path / "image.gif", save_all=True, append_images=[grey(255)])
    assert read_image(tmp_path / "image.gif").getpixel((0, 0)) == (0, 0, 0)


def test_to_image_and_back():
    levels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    pixels = torch.from_numpy(levels).movedim(2, 0) / 255
    assert (np.asarray(to_image(pixels)) == levels).all()
    assert to_image(pixels[:1]).mode == "L"


# --- Epsilon ---


@pytest.mark.parametrize(
    ("norm", "epsilons", "step", "highest"),
    [
        ("linf", ["0", "2/255", "4/255", "8/255"], "1/255", "16/255"),
        ("linf", ["0", "1/255"], "0.25/255", "2/255"),
        ("linf", ["0", "0.5/255", "8/255"], "0.5/255", "16/255"),
        ("linf", ["0", "0.8"], "1/255", "1"),
        ("l2", ["0", "0.25", "1"], "0.25", "2"),
        ("l1", ["0", "12"], "1", "24"),
    ],
)
def test_epsilon_scale_of_the_report(norm, epsilons, step, highest):
    parsed = [Fraction(numerator) / Fraction(*rest or [1]) for numerator, *rest in (e.split("/") for e in epsilons)]
    numerator, *rest = step.split("/")
    scale = epsilon_scale(norm, SimpleNamespace(norm=norm, epsilons=parsed), 3 * 32 * 32)
    assert scale.step * scale.count == Fraction(highest) and scale.step == Fraction(numerator) / Fraction(*rest or [1])
    assert all(scale.epsilon(scale.position(epsilon)) == epsilon for epsilon in parsed)


@pytest.mark.parametrize(
    ("norm", "num_values", "highest"),
    [("l2", 3 * 32 * 32, "1"), ("l1", 3 * 32 * 32, "20"), ("l2", 3 * 64 * 64, "2"), ("l1", 3 * 224 * 224, "1200")],
)
def test_epsilon_scale_of_another_norm(norm, num_values, highest):
    scale = epsilon_scale(norm, make_report(), num_values)
    assert scale.step * scale.count == Fraction(highest) and scale.count == 20
    assert epsilon_scale("linf", make_report("l2"), num_values) == EpsilonScale(Fraction(1, 255), 16, Fraction(1, 255))


def test_epsilon_of_a_position_is_exact_and_stays_on_the_slider():
    scale = EpsilonScale(Fraction(1, 10), 20, Fraction(1))
    assert scale.epsilon(0.1 + 0.2) == Fraction(3, 10)
    assert scale.epsilon(-1) == 0 and scale.epsilon(99) == 2


# --- The attack ---


def test_distinct_names():
    assert distinct_names(["crane", "cat", "crane"]) == ["crane (0)", "cat", "crane (2)"]


def test_classifier_is_frozen_and_sees_what_the_processor_makes():
    model = make_model("vit").train()
    classifier = Classifier("vit", model, make_processor())
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    pixels = classifier.pixels(grey(51, size=(100, 60)))
    assert pixels.shape == (1, 3, SIZE, SIZE) and pixels == pytest.approx(torch.full_like(pixels, 0.2), abs=1e-6)
    expected = model(2 * pixels - 1).logits[0]
    assert torch.allclose(classifier.logits(pixels), expected, atol=1e-6)


@pytest.mark.parametrize(("epsilon", "is_fooled"), [("0.09", False), ("0.11", True)])
def test_attack_finds_the_weak_spot(epsilon, is_fooled):
    result = attack_image(make_classifier(), grey(153), None, ThreatModel("linf", epsilon), steps=10)
    assert result.label == 1 and not result.errs_already and result.is_fooled == is_fooled


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", "8/255"), ("l2", "0.5"), ("l1", "12")])
@pytest.mark.parametrize("family", ["vit", "timm"])
def test_attack_stays_inside_the_ball(norm, epsilon, family):
    classifier = Classifier(family, make_model(family), make_processor())
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    threat_model, calls = ThreatModel(norm, epsilon), []
    result, again = (
        attack_image(classifier, Image.fromarray(noise), None, threat_model, 10, lambda: calls.append(1))
        for _ in range(2)
    )
    assert 0 < result.distance <= float(threat_model.epsilon) * (1 + 1e-4)
    assert result.adversarial.min() >= 0 and result.adversarial.max() <= 1
    assert torch.equal(result.adversarial, again.adversarial)
    assert len(calls) == 2 * attack_passes(10, norm)
    logits = classifier.logits(result.adversarial.unsqueeze(0))
    assert torch.allclose(result.adversarial_logits, logits, atol=1e-5)


def test_epsilon_zero_is_the_clean_image():
    result = attack_image(make_classifier(), grey(153), None, ThreatModel("linf", 0), steps=10)
    assert torch.equal(result.adversarial, result.pixels) and result.distance == 0 and not result.is_fooled


def test_a_wrong_prediction_is_not_attacked():
    calls = []
    result = attack_image(
        make_classifier(), grey(153), 0, ThreatModel("linf", "0.3"), steps=10, tick=lambda: calls.append(1)
    )
    assert result.errs_already and result.is_fooled and result.distance == 0 and len(calls) == 3


def test_fooling_first_keeps_the_direction_and_puts_fooled_images_ahead():
    labels = torch.tensor([0, 0])
    logits = torch.tensor([[1.0, 0.9, 0.9], [1.0, 1.1, -9.0]], requires_grad=True)
    # By log-odds alone, the first looks worse for the model; but only the second is misclassified.
    assert log_odds(logits, labels).argmax() == 0 and fooling_first(logits, labels).argmax() == 1
    gradients = [
        torch.autograd.grad(objective(logits, labels).sum(), logits)[0] for objective in (log_odds, fooling_first)
    ]
    assert torch.equal(*gradients)


# --- In the background ---


def attack_threads():
    return [thread for thread in threading.enumerate() if thread.name == "attack"]


def test_background_reports_progress_and_result():
    def work(tick):
        for _ in range(20):
            tick()
            time.sleep(0.005)
        return "done"

    *meanwhile, last = run_in_background(work, interval=0.01)
    ticks = [count for count, _ in meanwhile]
    assert len(ticks) > 3 and ticks == sorted(ticks) and all(result is None for _, result in meanwhile)
    assert last == (20, "done") and not attack_threads()


def test_background_raises_the_error_of_the_work():
    def work(tick):
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        list(run_in_background(work))
    assert not attack_threads()


def test_closing_stops_the_attack():
    classifier = make_classifier(seconds=0.01)
    progress = run_in_background(
        lambda tick: attack_image(classifier, grey(153), None, ThreatModel("linf", "0.01"), 1000, tick), interval=0.05
    )
    assert next(progress)[0] > 0 and attack_threads()
    progress.close()
    calls = classifier.pixels_to_logits.model.calls
    time.sleep(0.1)
    assert classifier.pixels_to_logits.model.calls == calls < 100 and not attack_threads()


@pytest.mark.slow
def test_an_attack_ends_with_the_program():
    code = """
import threading, time
from hf_rft.cli import app_attack

def work(tick):
    try:
        while True:
            tick()
            time.sleep(0.01)
    finally:
        print("ended")

progress = app_attack.run_in_background(work)
visit = threading.Thread(target=next, args=(progress,), daemon=True)  # as gradio's are
visit.start()
visit.join()
print("visited")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0 and process.stdout == "visited\nended\n", process.stderr


# --- Text and pictures ---


def test_top_classes():
    top = top_classes(torch.tensor([0.0, 3.0, 1.0]), ["a", "b", "c"], count=2)
    assert list(top) == ["b", "c"] and top["b"] == pytest.approx(0.8438, abs=1e-4)


@pytest.mark.parametrize(
    ("norm", "epsilon", "words"),
    [
        ("linf", Fraction(4, 255), "epsilon = 4/255** (L∞): accuracy 60.0% in the report (26.2% to 87.8%)"),
        ("linf", Fraction(6, 255), "not measured itself; the report has 4/255 and 8/255"),
        ("linf", Fraction(9, 255), "outside what was measured, which ends at 8/255"),
        ("l2", Fraction(1, 2), "outside what was measured. The report is about L∞ and says nothing about L2"),
    ],
)
def test_describe_threat(norm, epsilon, words):
    assert words in describe_threat(make_report(), norm, epsilon)


def make_result(clean, adversarial, rounded=None, epsilon="0.1", label=1):
    logits = [torch.tensor(values) for values in (clean, adversarial, rounded or adversarial)]
    pixels = torch.full((3, 2, 2), 0.5)
    return AttackResult(ThreatModel("linf", epsilon), 10, label, pixels, pixels + 0.1, *logits)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (make_result([0.0, 2.0], [2.0, 0.0]), r"\*\*Fooled\*\*.*0.1 \(10 steps\): \*b\* .* becomes \*a\*.*25.5/255"),
        (make_result([0.0, 2.0], [0.0, 1.0]), r"\*\*Withstands\*\*.*still \*b\* \(88.1%\), now 73.1%"),
        (make_result([2.0, 0.0], [2.0, 0.0]), r"Wrong without any.*\*a\*.*the true class is \*b\*"),
        (make_result([0.0, 2.0], [0.0, 2.0], epsilon="0"), r"\*\*Epsilon is 0\*\*"),
        (make_result([0.0, 2.0], [2.0, 0.0], [0.0, 2.0]), r"becomes \*a\*.*rounded to 8 bits.*taken for \*b\*"),
    ],
    ids=["fooled", "withstands", "wrong", "zero", "rounded"],
)
def test_describe_result(result, words):
    assert re.search(words, describe_result(result, ["a", "b"]))


def test_the_perturbation_is_magnified_around_grey_to_black_or_white():
    result = make_result([0.0, 2.0], [2.0, 0.0])
    change = torch.tensor([0.0, 0.02, -0.01, 0.0]).reshape(1, 2, 2)
    panel = Panel(SimpleNamespace(classes=["a", "b"]), *Panel._fields[1:])  # names stand for the components
    shown = show_result(panel, result._replace(adversarial=result.pixels[:1] + change, pixels=result.pixels[:1]))
    assert list(shown["perturbation"].tobytes()) == [128, 255, 64, 128]
    assert "magnified ×25." in shown["note"]
    shown = show_result(panel, result._replace(adversarial=result.pixels))
    assert set(shown["perturbation"].tobytes()) == {128} and "magnified" not in shown["note"]


def test_status_line_escapes():
    assert "<b>" not in status_line("<b>") and 'class="status busy"' in status_line("", "busy", share=0.5)


# --- The page, its methods called directly ---


@pytest.fixture
def app(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    return importlib.import_module("hf_rft.cli.app")


@pytest.fixture
def page(app):
    other = Brightness(classes=("night", "bright"))
    robust = RobustModel(Brightness(), make_processor(), make_report(flags={}))
    return app.Page(robust, (other, make_processor(32)), names=("one", "other"), max_steps=20)


def test_the_page_shows_the_report_and_opens_it_if_its_numbers_are_doubtful(page):
    for flags, is_open in (({}, False), ({"zero_gradients": "There are none."}, True), (None, True)):
        robust = RobustModel(Brightness(), make_processor(), make_report(flags=flags))
        config = app_page.Page(robust).blocks.get_config_file()["components"]
        (accordion,) = (one for one in config if one["type"] == "accordion")
        assert accordion["props"]["open"] == is_open
        texts = " ".join(one["props"].get("value") or "" for one in config if one["type"] == "markdown")
        for words in (
            "robustness **66.2%**, L∞ up to 8/255",
            "10 images",
            "greys",
            "apgd_targeted",
            "8/255",
        ):
            assert words in texts
        assert ("zero_gradients" in texts) == bool(flags)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    grey(153, size=(30, 20)).save(path)
    return {"path": str(path)}


def test_missing_gradio_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "hf_rft.cli.app_page", raising=False)
    with pytest.raises(ImportError, match=r"pip install \"hf_rft\[app\]\""):
        importlib.import_module("hf_rft.cli.app_page")


def test_choosing_an_image_shows_clean_predictions(page, image):
    shown = page.choose_image(image)
    assert "Press Attack" in shown[page.status]
    for panel, size in zip(page.panels, (SIZE, 32), strict=True):
        assert shown[panel.clean].size == (size, size) and next(iter(shown[panel.clean_classes])) == "bright"
        assert shown[panel.adversarial] is None and f"{size} x {size} pixels" in shown[panel.note]
    Path(image["path"]).write_bytes(truncated_png())
    shown = page.choose_image(image)
    assert "damaged" in shown[page.status] and "error" in shown[page.status]
    assert all(shown[panel.clean] is None for panel in page.panels)
    assert "Drop an image" in page.choose_image(None)[page.status]


def test_choosing_norm_and_epsilon(page):
    shown = page.choose_epsilon("linf", 4)
    assert "epsilon = 4/255" in shown
    shown = page.choose_norm("l2")
    assert shown[page.epsilon].maximum > shown[page.epsilon].value > 0 and "outside" in shown[page.threat]
    assert page.choose_norm("linf")[page.epsilon].value == 8


def test_attack_shows_progress_and_results(page, image):
    page.classifiers[0].pixels_to_logits.model.seconds = page.classifiers[1].pixels_to_logits.model.seconds = 0.02
    *meanwhile, shown = page.attack(image, -1, "linf", 16, 20)
    done = [int(re.search(r"(\d+) of 48", update[page.status])[1]) for update in meanwhile]
    assert len(done) > 1 and done == sorted(done)
    assert "Done" in shown[page.status]
    for panel in page.panels:  # 16/255 is less than the 0.1 that it takes
        assert shown[panel.verdict].startswith("🟢 **Withstands** this attack at L∞ 16/255 (20 steps)")
        assert "×" in shown[panel.note] and shown[panel.adversarial].getpixel((0, 0)) < (153,) * 3
        assert next(iter(shown[panel.adversarial_classes])) == "bright"


def test_attack_on_the_true_class(page, image):
    *_, shown = page.attack(image, 0, "linf", 8, 5)  # "dark", of which the other model knows nothing
    mine, others = (shown[panel.verdict] for panel in page.panels)
    assert mine.startswith("**Wrong without any perturbation**") and others.startswith("🟢 **Withstands**")
    assert "no class *dark*" in shown[page.panels[1].note]


def test_attack_at_epsilon_zero(page, image):
    *_, shown = page.attack(image, -1, "linf", 0, 5)
    for panel in page.panels:
        assert "Epsilon is 0" in shown[panel.verdict] and "×" not in shown[panel.note]
        assert shown[panel.clean].tobytes() == shown[panel.adversarial].tobytes()


def test_attack_names_what_is_missing_or_wrong(page, image, monkeypatch, capsys):
    (shown,) = page.attack(None, -1, "linf", 8, 5)
    assert "Give an image" in shown[page.status]
    (shown,) = page.attack(image, -1, "linf", float("nan"), 5)
    assert "error" in shown[page.status]
    monkeypatch.setattr(page.classifiers[0].pixels_to_logits.model, "weight", None)  # something nobody foresaw
    *_, shown = page.attack(image, -1, "linf", 8, 5)
    assert "The attack failed" in shown[page.status] and "TypeError" in capsys.readouterr().err


def test_leaving_stops_the_attack(page, image):
    model = page.classifiers[0].pixels_to_logits.model
    model.seconds = 0.05
    attack = page.attack(image, -1, "linf", 8, 20)
    next(attack)
    attack.close()
    calls = model.calls
    time.sleep(0.2)
    assert model.calls == calls and not attack_threads()


# --- The command line ---


def test_variables_of_a_space_are_flags(app):
    environment = {"MODEL": "user/model", "MAX_STEPS": "7", "COMPARE_WITH": "", "HOME": "somewhere"}
    assert app.flags_from_environment(environment) == ["--model_name_or_path=user/model", "--max_steps=7"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "variable MODEL"),
        (["--model_name_or_path", "x", "--example_dir", "nowhere"], "nowhere is not a folder"),
        (["--model_name_or_path", "x", "--max_steps", "0"], "--max_steps 0 must be a whole number from 1 to 10000"),
    ],
)
def test_bad_flags(app, monkeypatch, capsys, flags, message):
    monkeypatch.delenv("MODEL", raising=False)
    with pytest.raises(SystemExit):
        app.main(flags)
    assert message in capsys.readouterr().err


def test_main_loads_what_it_is_told(app, tmp_path, monkeypatch, image):
    make_model("vit").save_pretrained(tmp_path / "other")
    make_processor().save_pretrained(tmp_path / "other")
    asked, served = [], {}

    def load_robust_model(name, **options):
        asked.append((name, options))
        return RobustModel(Brightness(), make_processor(), make_report())

    monkeypatch.setattr(app, "load_robust_model", load_robust_model)
    monkeypatch.setattr(app, "launch", lambda page, **options: served.update(options, page=page))
    monkeypatch.setenv("MODEL", "user/model")
    monkeypatch.setenv("REVISION", "v1")
    app.main(["--compare_with", str(tmp_path / "other"), "--example_dir", str(tmp_path), "--max_steps", "9"])
    assert asked == [("user/model", {"revision": "v1", "token": None})]
    page = served.pop("page")
    assert [classifier.name for classifier in page.classifiers] == ["user/model", "other"]
    assert served == {} and page.max_steps == 9


def test_examples(app, tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.PNG", "sub/a.jpg", "notes.txt"):
        grey(0).save(tmp_path / name, format="png")
    assert [path.name for path in app.find_examples(tmp_path)] == ["b.PNG", "a.jpg"]
    assert app.bundled_examples(["dark", "bright"], tmp_path) == []
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    paths = app.bundled_examples(names, tmp_path / "sub")
    assert len(paths) == 8 and read_image(paths[0]).size == (28, 28)
    names = load_dataset(bundled.resolve("bundled:emoji"), split="test").features["label"].names
    assert read_image(app.bundled_examples(reversed(names), tmp_path / "sub")[0]).size == (64, 64)


# --- The whole, in a browser ---


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1280,1300",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Visitor:
    """Somebody who looks at the page, and waits for what shall appear there."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        self.wait("Drop an image")

    @property
    def text(self):
        return self.browser.find_element("tag name", "body").text.replace("\xa0", " ")

    def wait(self, *words, seconds=60):
        deadline = time.monotonic() + seconds
        while not all(word in self.text for word in words):
            assert time.monotonic() < deadline, f"{words} do not appear in:\n{self.text}"
            time.sleep(0.1)

    def upload(self, path):
        for clear in self.browser.find_elements("css selector", "button[aria-label='Clear']"):
            clear.click()
            self.wait("Drop an image")
        self.browser.find_element("css selector", "input[type=file]").send_keys(str(path))

    def click(self, name):
        deadline = time.monotonic() + 20
        while True:
            (button,) = (b for b in self.browser.find_elements("tag name", "button") if b.text == name)
            if button.is_enabled():
                return button.click()
            assert time.monotonic() < deadline, f"{name} stays disabled"
            time.sleep(0.1)

    def set_epsilon(self, position):
        number = self.browser.find_element("css selector", "input[type=number]")
        number.clear()
        number.send_keys(position, "\t")


@pytest.mark.slow
def test_in_a_browser(app, browser, tmp_path):
    model, other = Brightness(seconds=0.01), Brightness()
    report = make_report(epsilons=("0", "8/255", "16/255", "32/255"), flags={})
    page = app.Page(RobustModel(model, make_processor(), report), (other, make_processor()), max_steps=20)
    grey(153).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(truncated_png())
    (tmp_path / "big.png").write_bytes(b"\0" * (MAX_FILE_BYTES + 1))
    address = app.launch(page, prevent_thread_lock=True, quiet=True)
    try:
        visitor = Visitor(browser, address)

        visitor.upload(tmp_path / "good.png")
        visitor.wait("Press Attack", "The model sees 16 x 16 pixels")
        visitor.click("Attack")  # at the report's largest epsilon: 32/255 is more than the 0.1 that it takes
        visitor.wait("Done in", "Fooled at L∞ 32/255 (20 steps): bright", "becomes dark")
        visitor.set_epsilon("12")
        visitor.wait("epsilon = 12/255", "not measured itself")
        visitor.click("Attack")
        visitor.wait("Done in", "Withstands this attack at L∞ 12/255 (20 steps)")
        visitor.set_epsilon("40")
        visitor.wait("epsilon = 40/255", "outside what was measured")
        (l2,) = (label for label in browser.find_elements("tag name", "label") if label.text == "L2")
        l2.click()
        visitor.wait("says nothing about L2")

        model.seconds = 0.3
        visitor.click("Attack")
        visitor.wait("passes through the model")
        visitor.click("Cancel")
        visitor.wait("Cancelled")
        deadline = time.monotonic() + 5
        while attack_threads() and time.monotonic() < deadline:
            time.sleep(0.05)
        calls = model.calls
        time.sleep(0.7)
        assert model.calls == calls and not attack_threads() and "Cancelled" in visitor.text

        visitor.click("Attack")
        visitor.wait("passes through the model")
        browser.get("about:blank")  # leaves
        deadline = time.monotonic() + 15
        while attack_threads() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not attack_threads()

        visitor = Visitor(browser, address)
        visitor.upload(tmp_path / "broken.png")
        visitor.wait("The image is damaged or cannot be shown")
        visitor.upload(tmp_path / "big.png")
        visitor.wait("exceed the maximum allowed size")

        # "Uncaught" is what JavaScript errors are logged with; a refused upload is logged as well.
        errors = [entry["message"] for entry in browser.get_log("browser") if "Uncaught" in entry["message"]]
        assert errors == []
    finally:
        page.blocks.close()
