"""Agents: their passes, their names, and what an unknown name is answered."""

import pytest

from mpdqn.dqn.agents import make_agent


@pytest.mark.parametrize(
    ("name", "passes"),
    [("dqn", [("T", "target")]), ("double_dqn", [("T", "target"), ("D", "online")])],
)
def test_the_passes_that_an_agent_needs(name: str, passes: list[tuple[str, str]]):
    agent = make_agent(name)
    assert agent.name == name
    assert [(p.letter, p.network) for p in agent.passes] == passes
    assert agent.huber_delta == 1.0


@pytest.mark.parametrize(
    ("name", "nearest"), [("doubledqn", "double_dqn"), ("double-dqn", "double_dqn"), ("dqm", "dqn"), ("DQN", "dqn")]
)
def test_an_unknown_agent_is_answered_with_the_nearest_name(name: str, nearest: str):
    with pytest.raises(ValueError, match=f"unknown agent '{name}'; did you mean '{nearest}'"):
        make_agent(name)
