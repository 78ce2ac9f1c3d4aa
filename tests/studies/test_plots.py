from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from hf_rft.studies import plots
from hf_rft.studies.results import curves
from hf_rft.studies.statistics import differences, over_pairs, prepared, summary
from studies.test_statistics import ROWS, table


RUNS = prepared(table(ROWS, validation_accuracy="0.25:0.1 0.5:0.4 1:0.6", run=list("abcdef")), "schedule")
FOUND = differences(RUNS, "constant")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self))
    return figures


def draw(name: str, path: Path = Path("figure.png")) -> None:
    {
        "levels": lambda: plots.plot_levels(RUNS, path),
        "differences": lambda: plots.plot_differences(RUNS, FOUND, over_pairs(FOUND), "constant", path),
        "curves": lambda: plots.plot_curves(RUNS, curves(RUNS, ["data", "schedule"]), path),
        "adaptation": lambda: plots.plot_adaptation(RUNS, path),
        "onset": lambda: plots.plot_onset(summary(RUNS), FOUND, "constant", path),
    }[name]()


@pytest.mark.parametrize("name", ["levels", "differences", "curves", "adaptation", "onset"])
def test_legends_name_each_option_once_and_hide_nothing(drawn, name):
    draw(name)
    (figure,) = drawn
    figure.draw_without_rendering()
    (legend,) = figure.legends
    expected = ["hinge"] if name in ("differences", "onset") else ["constant", "hinge"]
    assert [text.get_text() for text in legend.get_texts()] == expected
    for axes in figure.axes:
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def colors(axes) -> dict[str, str]:
    handles, labels = axes.get_legend_handles_labels()
    lines = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
    return {label: line.get_color() for label, line in zip(labels, lines, strict=True)}


def test_an_option_has_one_color_in_all_pictures(drawn):
    for name in ("levels", "differences", "curves", "adaptation", "onset"):
        draw(name)
    assert len({colors(figure.axes[0])["hinge"] for figure in drawn}) == 1


def test_levels_show_every_seed_and_the_means(drawn):
    draw("levels")
    seeds, means, *_ = drawn[0].axes[0].lines
    assert sorted(seeds.get_xdata()) == [0, 50, 75] and sorted(means.get_xdata()) == [0, 62.5]


def test_differences_have_a_row_per_pair_and_one_for_the_mean(drawn):
    draw("differences")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["easy", "hard", "mean over pairs"]
    assert list(axes.lines[0].get_xdata()) == [25, 25, 25]
    assert axes.get_xlim()[0] >= -100 and axes.get_xlim()[1] <= 100


def test_curves_are_means_over_seeds(drawn):
    draw("curves")
    easy, hard = drawn[0].axes
    assert (easy.get_title(), hard.get_title()) == ("easy", "hard")
    assert list(easy.lines[0].get_ydata()) == pytest.approx([62.5, 62.5])
    assert list(hard.lines[1].get_ydata()) == pytest.approx([50, 0])


def test_adaptation_marks_the_onset(drawn):
    draw("adaptation")
    line, star, *_ = drawn[0].axes[0].lines
    np.testing.assert_allclose(line.get_xdata(), [25, 50, 100])
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (50, pytest.approx(40))


def test_names_are_no_formulas(tmp_path):
    odd = table([(r"$\frac{", r"$\sqrt{", 0, "02"), ("b", "c", 0, "12")], run=["a", "b"])
    plots.plot_levels(prepared(odd, "schedule"), tmp_path / "levels.png")
    plots.plot_curves(prepared(odd, "schedule"), curves(odd, ["data", "schedule"]), tmp_path / "curves.png")
    assert len(list(tmp_path.iterdir())) == 2
