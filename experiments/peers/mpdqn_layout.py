"""mpdqn's own update in a layout, over as many ranks as the layout has."""

from __future__ import annotations

from torch import Tensor

from experiments.peers.task import FRAMES, Step, Task
from mpdqn.allocator import keep_freed_memory
from mpdqn.dqn.agents import dqn
from mpdqn.layouts import Layout
from mpdqn.learner import Learner, LearnerConfig
from mpdqn.mesh import Mesh, World
from mpdqn.networks import set_memory_format
from mpdqn.plan import Partition


def mpdqn_layout(name: str, task: Task) -> Step:
    """One DQN update per call in the layout ``name``, such as pp2-1f1b/m8, as the workers of `mpdqn compare` make it.

    Gradients are not clipped, since no other contender clips them. Batches are announced one update early, so that
    td1f1b has target passes for its gaps.
    """
    keep_freed_memory()
    world, agent, network = World.open(), dqn(), task.make_network()
    layout = Layout.parse(name, cores=world.size)
    cuts = [task.cut] if layout.pipeline == 2 else []
    (plan,) = layout.plans(Partition(boundaries=(0, *cuts, len(network))))
    mesh = Mesh(world, plan, agent.letters)
    set_memory_format(network, task.memory_format)
    learner = Learner(
        network,
        mesh=mesh,
        agent=agent,
        batch_size=task.batch_size,
        observation_shape=FRAMES,
        config=LearnerConfig(max_grad_norm=float("inf"), lookahead=1),
    )
    share = task.batch_size // layout.data
    rows = task.make_batch().rows(mesh.replica * share, (mesh.replica + 1) * share)
    batch = rows if learner.owns_shards else None

    def step() -> Tensor | None:
        loss = learner.learn(batch, upcoming=batch).loss  # that of the whole batch, the same on every rank
        return loss if world.rank == 0 else None

    return step
