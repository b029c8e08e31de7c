"""Weights on their way from the stages to the acting rank: real ranks, real learners."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mpdqn.dqn.agents import make_agent
from mpdqn.learner import Learner
from mpdqn.mesh import Mesh, World
from mpdqn.plan import Parallelism, Partition, Plan
from mpdqn.weights import WeightDelivery
from tests.distributed import run_ranks
from tests.transparency import tiny_network

FRAMES = (2, 12, 12)


def deliver(acting: list[int]) -> dict[str, Tensor] | None:
    """Two replicas of two stages on ranks 0 to 3; each rank scales its weights, and ``acting`` ranks get them."""
    with World.open(timeout_s=60) as world:
        partition = Partition(boundaries=(0, 5, 18))
        plan = Plan.rectangular(partition, Parallelism(data=2, pipeline=2, schedule="1f1b"))
        network = tiny_network(FRAMES)
        mesh = Mesh(world, plan, "T")
        delivery = WeightDelivery(world, plan, tiny_network(FRAMES), acting)
        learner = None
        if mesh.member:
            learner = Learner(network, mesh=mesh, agent=make_agent("dqn"), batch_size=8, observation_shape=FRAMES)
            with torch.no_grad():
                for p in learner.parameters():
                    p.mul_(2.0 + learner.mesh.replica)
        weights = None
        for _ in range(2):  # a second delivery finds the first one gone
            if learner is not None:
                delivery.send(learner)
            if world.rank in acting:
                local = {}
                if learner is not None:
                    local = {n: t for stage in learner.stages for n, t in stage.online.state_dict().items()}
                weights = delivery.receive(acting.index(world.rank), local)
        delivery.wait()
        return weights


def check(weights: dict[str, Tensor] | None, replica: int) -> None:
    assert weights is not None
    expected = tiny_network(FRAMES).state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor * (2.0 + replica)), name
    copy: nn.Module = tiny_network(FRAMES)
    copy.load_state_dict(weights)


@pytest.mark.pool
def test_ranks_of_their_own_get_every_stage_of_their_replica():
    found = run_ranks(deliver, [4, 5], num_ranks=6)
    assert found[:4] == [None] * 4
    check(found[4], 0)
    check(found[5], 1)


@pytest.mark.pool
def test_the_rank_of_a_first_stage_gets_the_stages_that_it_does_not_hold():
    found = run_ranks(deliver, [0, 2], num_ranks=4)
    assert found[1] is None
    assert found[3] is None
    check(found[0], 0)
    check(found[2], 1)
