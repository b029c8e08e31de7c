"""Seconds and bytes of stages, by hand."""

import pytest

from mpdqn.plan import Partition
from mpdqn.planner.costs import action_times, activation_bytes, message_bytes, stages_run_again
from mpdqn.schedule import Action
from tests.planner.profiles import layer, profile_of

#                    F ms  I ms  W ms  keeps  sends
PROFILE = profile_of(
    layer(1000, 2000, 4000, 100, 10),
    layer(500, 1000, 1500, 200, 20),
    layer(250, 300, 450, 400, 40),
)
CUT = Partition(boundaries=(0, 1, 3))


@pytest.mark.parametrize(
    ("mode", "seconds"),
    [
        ("none", {"F": (1, 0.75), "B": (6, 3.25), "I": (0, 1.3), "W": (6, 1.95)}),
        ("all", {"F": (1, 0.0), "R": (1, 0.75), "B": (6, 3.25), "I": (0, 1.3), "W": (6, 1.95)}),
        ("boundaries", {"F": (1, 0.75), "B": (7, 4), "I": (0, 2.05), "W": (7, 2.7)}),
    ],
)
def test_seconds_of_actions(mode: str, seconds: dict[str, tuple[float, float]]):
    times = action_times(PROFILE, CUT, "TX", (mode, mode))
    for kind, by_stage in (seconds | {"T": (1, 0.75), "X": (1, 0.75)}).items():
        assert times.seconds[kind] == pytest.approx(by_stage)


def test_nothing_is_recomputed_unless_told():
    assert action_times(PROFILE, CUT, "T") == action_times(PROFILE, CUT, "T", ("none", "none"))
    assert activation_bytes(PROFILE, CUT) == activation_bytes(PROFILE, CUT, ("none", "none"))


def test_each_stage_recomputes_its_own_way():
    times = action_times(PROFILE, CUT, "", ("boundaries", "none"))
    assert (times.of(Action(0, "B", 0)), times.of(Action(1, "B", 0))) == pytest.approx((7.0, 3.25))
    assert stages_run_again(("all", "none", "boundaries", "all")) == (0, 3)


@pytest.mark.parametrize(
    ("mode", "kept", "rebuilt"),
    [
        ("none", (100, 10 + 200 + 400), (0, 0)),
        ("boundaries", (0, 10 + 20), (100, 400)),  # one layer at a time is built again
        ("all", (0, 10), (100, 600)),
    ],
)
def test_bytes_of_activations(mode: str, kept: tuple[float, ...], rebuilt: tuple[float, ...]):
    assert activation_bytes(PROFILE, CUT, (mode, mode)) == (kept, rebuilt)


def test_bytes_of_messages():
    assert message_bytes(PROFILE, CUT) == (10.0,)
    assert message_bytes(PROFILE, Partition(boundaries=(0, 1, 2, 3))) == (10.0, 20.0)
    assert message_bytes(PROFILE, Partition(boundaries=(0, 3))) == ()


@pytest.mark.parametrize("boundaries", [(0, 2), (0, 2, 4)])
def test_a_profile_of_another_network(boundaries: tuple[int, ...]):
    other = Partition(boundaries=boundaries)
    with pytest.raises(ValueError, match=f"has 3 layers but the partition cuts {boundaries[-1]}; profile the network"):
        action_times(PROFILE, other, "")
    with pytest.raises(ValueError, match="has 3 layers but"):
        message_bytes(PROFILE, other)


@pytest.mark.parametrize("modes", [("all",), ("all", "some")])
def test_recomputation_that_does_not_fit(modes: tuple[str, ...]):
    with pytest.raises(ValueError, match=r"must name one of none, boundaries, all for each of 2 stages"):
        activation_bytes(PROFILE, CUT, modes)
