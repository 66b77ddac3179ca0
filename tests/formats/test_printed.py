"""Numbers as text, many at once: what ``%`` gives, to the letter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryo_svae.formats.printed import printed

FORMS = ["%.0f", "%.4f", "%.6f", "%.15f", "%.20f", "%.1g", "%.8g", "%.15g", "%.17g", "%.3e", "%8.2f"]


def texts(values, form):
    return [bytes(text[text != 0]).decode() for text in printed(np.asarray(values), form).T]


def near_halves():
    """Numbers whose last decimal written hangs on the last bits."""
    wholes, places = st.integers(0, 10**9), st.integers(0, 9)
    halves = st.builds(lambda whole, n_places: (whole + 0.5) / 10**n_places, wholes, places)
    beside = st.builds(lambda half, towards: float(np.nextafter(half, towards)), halves, st.floats(0, 1e9))
    return halves | beside


@given(
    st.lists(st.floats() | st.floats(-1e6, 1e6) | near_halves(), min_size=1, max_size=30),
    st.sampled_from(FORMS),
)
def test_texts_are_those_of_percent(values, form):
    assert texts(values, form) == [form % value for value in values]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 180.0, 1e6])
def test_texts_of_many_numbers_are_those_of_percent(form, scale):
    values = np.random.default_rng(0).standard_normal(5000) * scale
    single = values.astype(np.float32)
    assert texts(values, form) == [form % value for value in values.tolist()]
    assert texts(single, form) == [form % value for value in single.tolist()]


@given(st.lists(st.integers(-(2**62), 2**62) | st.floats(-1e9, 1e9), min_size=1))
def test_whole_numbers_are_those_of_percent(values):
    array = np.asarray(values)
    assert texts(array, "%d") == ["%d" % value for value in array.tolist()]  # noqa: UP031


def test_no_numbers_have_no_texts():
    assert texts(np.empty(0), "%.6f") == []
