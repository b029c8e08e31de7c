"""Actions as text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdqn.schedule import Action

actions = st.builds(Action, st.integers(0, 200), st.sampled_from("FRBIWTDX"), st.integers(0, 2000))


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
