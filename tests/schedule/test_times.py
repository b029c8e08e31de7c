"""`play`: orders against each other."""

import pytest

from mpdqn.schedule import Action, ActionTimes
from mpdqn.schedule.times import play

NEEDS = {"b": [("a", 0.0)], "d": [("b", 0.5)], "c": []}


def test_items_start_as_early_as_they_can():
    when = play(["ac", "bd"], lambda item: NEEDS.get(item, []), {"a": 2.0, "b": 1.0, "c": 5.0, "d": 1.0}.__getitem__)
    assert when == {"a": (0.0, 2.0), "c": (2.0, 7.0), "b": (2.0, 3.0), "d": (3.5, 4.5)}
    order = list(when)
    assert order.index("a") < order.index("b") < order.index("d")  # each item comes after what it waits for


def test_orders_that_wait_for_one_another_are_named():
    with pytest.raises(ValueError, match=r"deadlock: .*b waits for a"):
        play(["xa", "b"], lambda item: {"b": [("a", 0.0)], "x": [("b", 0.0)]}.get(item, []), lambda item: 1.0)


def test_nothing_to_play():
    assert play([], lambda item: [], lambda item: 1.0) == {}
    assert play([[]], lambda item: [], lambda item: 1.0) == {}


def test_units():
    times = ActionTimes.units(3, B=4, X=0.5)
    assert [times.of(Action(2, kind, 0)) for kind in "FRIWTDBX"] == [1, 1, 1, 1, 1, 1, 4, 0.5]
