from fractions import Fraction

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from hf_rft import ThreatModel
from hf_rft.evaluation import plots
from hf_rft.evaluation.report import AdversarialExamples


PNG = b"\x89PNG\r\n\x1a\n"
CURVES = {
    "fixed": ([Fraction(0), Fraction(2, 255), Fraction(4, 255)], [0.5, 0.4, 0.3]),
    "scheduled": ([Fraction(0), Fraction(1, 255), Fraction(4, 255)], [0.9, 0.7, 0.2]),
}


def test_draw_curves():
    axes = Figure().subplots()
    plots.draw_curves(axes, CURVES, "linf")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1/255", "2/255", "4/255"]
    assert axes.get_xticks().tolist() == pytest.approx([0, 1 / 255, 2 / 255, 4 / 255])
    assert axes.get_ylim() == (0, 100) and "L∞" in axes.get_xlabel()
    for line, (name, (epsilons, accuracies)) in zip(axes.lines, CURVES.items(), strict=True):
        assert line.get_label() == name
        assert list(line.get_xdata()) == pytest.approx([float(epsilon) for epsilon in epsilons])
        assert list(line.get_ydata()) == pytest.approx([100 * accuracy for accuracy in accuracies])
    looks = {(line.get_color(), line.get_marker()) for line in axes.lines}
    assert len(looks) == len({color for color, _ in looks}) == len({marker for _, marker in looks}) == 2


def test_crowded_epsilons_leave_out_labels_but_not_the_first_and_the_last():
    grid = [Fraction(level, 255) for level in (0, 1, 2, 4, 8, 32)]
    axes = Figure().subplots()
    plots.draw_curves(axes, {"one": (grid, [0.5] * 6)}, "linf")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "", "", "4/255", "8/255", "32/255"]


def stated(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_robustness_curve_is_written(tmp_path):
    path = tmp_path / "curve.png"
    figure = plots.plot_robustness_curve(CURVES, "linf", path, title="a title")
    assert path.read_bytes().startswith(PNG)
    assert figure.axes[0].get_title() == "a title"
    vector = tmp_path / "curve.svg"
    plots.plot_robustness_curve(CURVES, "linf", str(vector))
    assert "<svg" in vector.read_text()


def test_legends_hide_no_line():
    schedule = [0, 1], [0, 0.1], ThreatModel("linf", "8/255")
    figures = [
        plots.plot_robustness_curve(CURVES, "linf"),
        plots.plot_epsilon_schedule(*schedule, kept=(1, 0.1), epochs=1),
    ]
    for figure in figures:
        figure.draw_without_rendering()
        (legend,) = figure.legends
        for axes in figure.axes:
            assert axes.get_legend() is None
            assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert stated(figures[0]) == list(CURVES)


def test_names_are_no_formulas_and_long_titles_are_broken(tmp_path):
    curves = {r"$\frac{": CURVES["fixed"]}
    figure = plots.plot_robustness_curve(curves, "linf", tmp_path / "a.png", title=r"$\frac " + 40 * "word ")
    assert stated(figure) == [r"$\frac{"]
    assert max(map(len, figure.axes[0].get_title().splitlines())) <= 72


def test_figures_are_opaque_and_white(tmp_path):
    plots.plot_robustness_curve(CURVES, "linf", tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_chance_is_drawn_where_the_number_of_classes_is_known():
    figure = plots.plot_robustness_curve(CURVES, "linf", num_classes=4)
    assert "chance (1 in 4 classes)" in stated(figure)
    assert list(figure.axes[0].lines[-1].get_ydata()) == [25, 25]
    assert not any("chance" in text for text in stated(plots.plot_robustness_curve(CURVES, "linf")))


def test_figures_make_the_folder_they_go_to(tmp_path):
    draw = {
        "curve": lambda path: plots.plot_robustness_curve(CURVES, "linf", path),
        "schedule": lambda path: plots.plot_epsilon_schedule([0, 1], [0, 0.1], ThreatModel("linf", "8/255"), path),
        "examples": lambda path: plots.plot_adversarial_examples(adversarial_examples(), 5 * [0], {}, path),
    }
    for name, plot in draw.items():
        path = tmp_path / name / "new" / "figure.png"
        plot(str(path))
        assert path.read_bytes().startswith(PNG), name


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    return figures


def test_nothing_is_left_in_the_global_state_of_pyplot(tmp_path):
    from matplotlib import pyplot

    plots.plot_robustness_curve(CURVES, "linf", tmp_path / "curve.png")
    assert pyplot.get_fignums() == []


def test_intervals_are_shaded(tmp_path, drawn):
    bounds = [(0.85, 0.95), (0.6, 0.8), (0.1, 0.3)]
    plots.plot_robustness_curve(CURVES, "linf", tmp_path / "curve.png", intervals={"scheduled": bounds})
    axes = drawn[0].axes[0]
    (shade,) = axes.collections
    corners = shade.get_paths()[0].vertices
    for epsilon, (low, high) in zip(CURVES["scheduled"][0], bounds, strict=True):
        there = np.isclose(corners[:, 0], float(epsilon))
        assert (corners[there, 1].min(), corners[there, 1].max()) == pytest.approx((100 * low, 100 * high))
    assert tuple(shade.get_facecolor()[0][:3]) == to_rgb(axes.lines[1].get_color())
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("intervals", [None, {}, {"another": [(0, 1)]}])
def test_without_intervals_nothing_is_shaded(tmp_path, drawn, intervals):
    plots.plot_robustness_curve(CURVES, "linf", tmp_path / "curve.png", intervals=intervals)
    assert len(drawn[0].axes[0].collections) == 0


def adversarial_examples(channels=3, size=(6, 5), epsilon=2 / 255):
    """Two examples, numbers 4 and 1 of a dataset: class 0 taken for 2, class 1 taken for 0."""
    pixels = torch.rand((2, channels, *size), generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    sign = torch.where(torch.arange(size[1]) % 2 == 0, 1.0, -1.0)
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    return AdversarialExamples([4, 1], pixels, pixels + epsilon * sign, logits, torch.tensor([[0.0, 0, 9], [9, 0, 0]]))


@pytest.mark.parametrize("channels", [3, 1])
def test_adversarial_examples_are_shown(tmp_path, drawn, channels):
    path = tmp_path / "examples.png"
    examples = adversarial_examples(channels)
    plots.plot_adversarial_examples(examples, [0, 1, 2, 0, 0], {0: "cat", 1: "dog"}, path)
    assert path.read_bytes().startswith(PNG)

    axes = drawn[0].axes
    assert len(axes) == 6
    titles = [one.get_title() for one in axes]
    assert titles[0] == "image 4: cat\npredicted: cat (100%)" and titles[3] == "image 1: dog\npredicted: dog (100%)"
    assert titles[1] == titles[4] == "perturbation × 64\nlargest 2/255"
    assert titles[2] == "adversarial\npredicted: 2 (100%)" and titles[5] == "adversarial\npredicted: cat (100%)"
    for row in range(2):
        shown = [np.asarray(one.images[0].get_array()).reshape(6, 5, channels) for one in axes[3 * row : 3 * row + 3]]
        np.testing.assert_allclose(shown[0], examples.pixels[row].movedim(0, -1), atol=1e-6)
        np.testing.assert_allclose(shown[2], examples.adversarial[row].movedim(0, -1), atol=1e-6)
        # The largest change is white or black, no change is grey.
        np.testing.assert_allclose(np.unique(shown[1].round(3)), [0, 1])
    assert axes[0].images[0].get_clim() == (0, 1)


def test_one_adversarial_example_in_half_precision(tmp_path):
    one = AdversarialExamples([0], *(part[:1].bfloat16() for part in adversarial_examples()[1:5]))
    plots.plot_adversarial_examples(one, np.array([0]), {}, tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(PNG)


def test_perturbation_of_zero_is_shown_grey(tmp_path, drawn):
    plots.plot_adversarial_examples(adversarial_examples(epsilon=0.0), [0, 1, 2, 0, 0], {}, tmp_path / "examples.png")
    shown = np.asarray(drawn[0].axes[1].images[0].get_array())
    np.testing.assert_allclose(shown, 0.5)


def test_epsilon_schedule(tmp_path):
    plots.plot_epsilon_schedule([0, 5, 10], [0.0, 2 / 255, 8 / 255], ThreatModel("linf", "8/255"), tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_epsilon_schedule_marks_where_training_stopped_and_which_weights_were_kept(tmp_path, drawn):
    arguments = [0, 2, 4, 6, 8], [0.0, 0.0, 0.01, 0.02, 0.02], ThreatModel("l2", "0.02"), tmp_path / "s.png"
    plots.plot_epsilon_schedule(*arguments, done=(6, 0.02), kept=(2, 0.00333333))
    lines = {line.get_label(): list(line.get_xdata()) for line in drawn[0].axes[0].lines}
    assert {label: at for label, at in lines.items() if not label.startswith("target")} == {
        "trained": [0, 2, 4, 6],
        "planned, not trained": [6, 8],
        "stopped: step 6, epsilon 0.02": [6, 6],
        "weights kept: step 2, trained up to epsilon 0.00333": [2],
    }
    assert set(stated(drawn[0])) == set(lines) and "target: 0.02" in lines
    plots.plot_epsilon_schedule(*arguments, done=(8, 0.02), kept=(8, 0.02))
    labels = ["trained", "target: 0.02", "weights kept: step 8, trained up to epsilon 0.02"]
    assert stated(drawn[1]) == labels


def test_epochs_are_shown_below_the_steps():
    figure = plots.plot_epsilon_schedule([0, 50, 100], [0, 0.1, 0.1], ThreatModel("l2", "0.1"), epochs=4)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (below,) = axes.child_axes
    assert (axes.get_xlabel(), below.get_xlabel()) == ("optimizer step", "epoch")
    assert (axes.get_xlim(), below.get_xlim()) == ((0, 100), (0, 4))
