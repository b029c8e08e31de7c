"""Actions as text, and what an action waits for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdqn.schedule.actions import Action, dependencies

actions = st.builds(Action, st.integers(0, 200), st.sampled_from("FBTD"), st.integers(0, 2000))


@settings(deadline=None, derandomize=True, database=None)
@given(actions)
def test_an_action_survives_its_text(action: Action):
    assert Action.parse(str(action)) == action


def test_the_text_of_an_action():
    assert str(Action(2, "F", 0)) == "2F0"
    assert Action.parse("10B31") == (10, "B", 31)


@pytest.mark.parametrize("text", ["", "F0", "2F", "2f0", "2FB0", "2F0 ", "-1F0", "2F0,2F1"])
def test_other_text_is_refused(text: str):
    with pytest.raises(ValueError, match="is no action; write stage, kind and micro-batch like 2F0"):
        Action.parse(text)


@pytest.mark.parametrize(
    ("action", "needed"),
    [
        ("0F1", ""),
        ("1F1", "0F1"),
        ("2F1", "1F1 2T1 2D1"),  # the loss needs the values of the passes
        ("0T1", ""),
        ("2D1", "1D1"),
        ("2B1", "2F1"),
        ("1B1", "1F1 2B1"),
        ("0B1", "0F1 1B1"),
    ],
)
def test_what_an_action_waits_for(action: str, needed: str):
    assert [str(a) for a in dependencies(Action.parse(action), 3, "TD")] == needed.split()
