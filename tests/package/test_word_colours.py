"""The colours of words can be told apart, measured in CIELAB."""

import numpy as np
import pytest
from pacl.segment.draw import _cielab, word_colours


def test_many_word_colours_differ():
    for count, least in ((30, 30), (64, 20)):  # 2.3 is a just noticeable difference
        places = _cielab(word_colours(count))
        apart = np.linalg.norm(places[:, None] - places, axis=-1) + 1000 * np.eye(count)
        assert apart.min() > least


def test_the_first_colours_stay():
    """Pictures of earlier versions with few words keep their colours, and more words do not change the first."""
    first = [[255, 64, 38], [38, 75, 255], [138, 255, 38], [255, 38, 201], [38, 255, 244], [204, 145, 30]]
    assert word_colours(6).tolist() == first
    assert word_colours(0).shape == (0, 3) and len(np.unique(word_colours(1358), axis=0)) == 1358
    assert (word_colours(2000)[:12] == word_colours(12)).all()


def test_cielab_has_the_published_values():
    found = _cielab(np.array([[255, 255, 255], [255, 0, 0], [0, 0, 0]]))
    assert found == pytest.approx(np.array([[100, 0, 0], [53.24, 80.09, 67.20], [0, 0, 0]]), abs=0.05)
