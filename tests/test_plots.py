from fractions import Fraction

import pytest
from matplotlib.figure import Figure

from hf_rft import plots


PNG = b"\x89PNG\r\n\x1a\n"
CURVES = {
    "fixed": ([Fraction(0), Fraction(2, 255), Fraction(4, 255)], [0.5, 0.4, 0.3]),
    "scheduled": ([Fraction(0), Fraction(1, 255), Fraction(4, 255)], [0.9, 0.7, 0.2]),
}


def make_run(onset=2, epsilon=((1, 0.0), (2, 0.01), (3, 0.02))):
    return {
        "accuracies": {"0": 0.8, "2/255": 0.6, "4/255": 0.4},
        "validation": [(1, 0.1), (2, 0.5), (3, 0.8)],
        "epsilon": list(epsilon),
        "onset": onset,
    }


def test_draw_curves():
    axes = Figure().subplots()
    plots.draw_curves(axes, CURVES, "linf")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1/255", "2/255", "4/255"]
    assert axes.get_xticks().tolist() == pytest.approx([0, 1 / 255, 2 / 255, 4 / 255])
    assert axes.get_ylim() == (0, 100) and "linf" in axes.get_xlabel()
    for line, (name, (epsilons, accuracies)) in zip(axes.lines, CURVES.items(), strict=True):
        assert line.get_label() == name
        assert list(line.get_xdata()) == pytest.approx([float(epsilon) for epsilon in epsilons])
        assert list(line.get_ydata()) == pytest.approx([100 * accuracy for accuracy in accuracies])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(CURVES)


def test_one_curve_needs_no_legend():
    axes = Figure().subplots()
    plots.draw_curves(axes, {"only": CURVES["fixed"]}, "l2")
    assert axes.get_legend() is None


def test_robustness_curve_is_written(tmp_path):
    path = tmp_path / "curve.png"
    plots.plot_robustness_curve(CURVES, "linf", path, title="a title")
    assert path.read_bytes().startswith(PNG)
    vector = tmp_path / "curve.svg"
    plots.plot_robustness_curve(CURVES, "linf", str(vector))
    assert "<svg" in vector.read_text()


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    return figures


def test_comparison_is_written(tmp_path, drawn):
    path = tmp_path / "comparison.png"
    second = make_run(onset=None) | {"accuracies": {"0": 0.6, "2/255": 0.4, "4/255": 0.2}}
    plots.plot_comparison({"fixed": [make_run(epsilon=())], "hinge": [make_run(), second]}, path, "linf")
    assert path.read_bytes().startswith(PNG)
    curves, validation, epsilons = drawn[0].axes
    assert [line.get_label() for line in curves.lines] == ["fixed", "hinge"]
    assert list(curves.lines[1].get_ydata()) == pytest.approx([70, 50, 30])
    stars = [line for line in validation.lines if line.get_marker() == "*"]
    assert len(validation.lines) - len(stars) == 3
    assert [(star.get_xdata()[0], star.get_ydata()[0]) for star in stars] == [(2, 50.0), (2, 50.0)]
    assert list(epsilons.lines[0].get_ydata()) == pytest.approx([0, 0.01, 0.02])


def test_comparison_shows_every_recipe(tmp_path, drawn):
    plots.plot_comparison({f"recipe {number}": [make_run()] for number in range(12)}, tmp_path / "many.png", "linf")
    assert len(drawn[0].axes[0].lines) == 12


def test_nothing_is_left_in_the_global_state_of_pyplot(tmp_path):
    from matplotlib import pyplot

    plots.plot_robustness_curve(CURVES, "linf", tmp_path / "curve.png")
    assert pyplot.get_fignums() == []
