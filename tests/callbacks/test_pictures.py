"""What pictures share: they are shown without pyplot, and their ticks are numbers."""

from __future__ import annotations

import pickle

import pytest
from matplotlib import pyplot as plt

from lightning_fed.callbacks import History
from lightning_fed.callbacks.pictures import as_number, new_figure


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12000, "12,000"), (0.1 + 0.2, "0.3"), (-1.5, "-1.5"), (123456.5, "123,456.5"), (2e-8, "2e-08")],
)
def test_a_tick_is_a_number_by_itself(value, text):
    assert as_number(value) == text


@pytest.mark.parametrize("values", [[123456.1, 123456.4], [2e6, 3e6], [1e-7, 3e-7]])
def test_an_axis_has_neither_an_offset_nor_a_factor(values):
    history = History()
    history.rows = [{"round": i, "loss": value} for i, value in enumerate(values, 1)]
    figure = history.plot()
    figure.canvas.draw()
    assert figure.axes[0].yaxis.get_offset_text().get_text() == ""
    assert values[0] == pytest.approx(float(figure.axes[0].get_yticklabels()[1].get_text().replace(",", "")), rel=0.6)


def test_a_notebook_asks_the_figure_for_its_picture_and_it_can_be_sent_elsewhere():
    figure = new_figure(2, 1)
    again = pickle.loads(pickle.dumps(figure))
    assert figure._repr_png_()[:4] == again._repr_png_()[:4] == b"\x89PNG"


def test_a_picture_takes_the_colours_of_a_style():
    with plt.style.context("dark_background"):
        assert new_figure(2, 1).get_facecolor() == (0, 0, 0, 1)
