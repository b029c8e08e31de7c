"""What is checkpointed in `experiments.checkpoint_cost`: a double DQN learner and its replay, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpdqn.checkpoint.folder import CheckpointFolder
from mpdqn.checkpoint.learner import learner_state, learner_targets, shapes
from mpdqn.checkpoint.loader import choose, empty, load_frames, load_tensors
from mpdqn.checkpoint.manifest import Manifest
from mpdqn.checkpoint.saver import NotSaved, Saved, Saver
from mpdqn.dqn.agents import double_dqn
from mpdqn.learner import Learner
from mpdqn.mesh import Mesh, World
from mpdqn.networks import make_network, set_memory_format
from mpdqn.plan import Parallelism, Partition, Plan
from mpdqn.randomness import keyed_seed
from mpdqn.replay import VirtualShards

FRAMES, ACTIONS = (4, 84, 84), 6
SHARDS, ENVIRONMENTS = 4, 32
BATCH = 32
UPDATES_PER_STORE = 8
"""Updates for every step of all environments that is stored: one for every four transitions."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A checkpoint that was written while training went on: seconds of each update, and of all from the start on."""

    step_s: tuple[float, ...]
    total_s: float
    saved: Saved


class Task:
    """A learner with a filled replay in ``world``, which is one process.

    Args:
        world: of one rank.
        network: name of one of the zoo's.
        transitions: in replay after `rewind`.
        new: how many more can be stored before the oldest are overwritten, and some hundred besides.
        seed: of weights and frames.
    """

    def __init__(self, world: World, network: str, *, transitions: int, new: int, seed: int) -> None:
        self.world = world
        chain = make_network(network, FRAMES, ACTIONS, seed=seed)
        set_memory_format(chain, "channels_last")
        self._network, agent = shapes(chain.state_dict()), double_dqn()
        self.plan = Plan.rectangular(Partition(boundaries=(0, len(chain))), Parallelism())
        self.learner = Learner(
            chain, mesh=Mesh(world, self.plan, agent.letters), agent=agent, batch_size=BATCH, observation_shape=FRAMES
        )
        self.shards = VirtualShards(
            observation_shape=FRAMES,
            num_shards=SHARDS,
            capacity=transitions + new + 16 * ENVIRONMENTS,
            envs_per_shard=ENVIRONMENTS // SHARDS,
            seed=seed,
        )
        self._frames = torch.zeros((ENVIRONMENTS, *FRAMES), dtype=torch.uint8)
        self._draw = torch.Generator().manual_seed(keyed_seed("checkpoint cost", seed))
        self._updates = 0
        self.store(transitions)
        self._filled = {name: tensor.clone() for name, tensor in self.shards.state(frames=False).items()}

    def rewind(self) -> None:
        """Have replay hold what it held in the beginning; what came after is overwritten next."""
        for v in self.shards.owned:
            prefix = f"{v}."
            own = {n.removeprefix(prefix): t for n, t in self._filled.items() if n.startswith(prefix)}
            self.shards[v].load_tensors(own)

    def store(self, transitions: int) -> None:
        """Store so many transitions of random frames, a multiple of the environments."""
        never = torch.zeros(ENVIRONMENTS, dtype=torch.bool)
        for _ in range(transitions // ENVIRONMENTS):
            self._frames[:, -1].random_(256, generator=self._draw)
            self.shards.append(
                observation=self._frames,
                action=torch.zeros(ENVIRONMENTS, dtype=torch.int64),
                reward=torch.ones(ENVIRONMENTS),
                terminated=never,
                truncated=never,
                next_observation=self._frames,
            )

    def steps(self, more: Callable[[int], bool], before_storing: Callable[[int], None]) -> tuple[float, ...]:
        """Updates, as long as ``more`` says so of how many there were; seconds of each, with its sampling and storing.

        ``before_storing`` is called as the trainer does it, see `Saver.make_way`.
        """
        seconds: list[float] = []
        while more(len(seconds)):
            begin = time.perf_counter()
            self.learner.learn(self.shards.sample(BATCH, self._updates))
            self._updates += 1
            if self._updates % UPDATES_PER_STORE == 0:
                before_storing(1)
                self.store(ENVIRONMENTS)
            seconds.append(time.perf_counter() - begin)
        return tuple(seconds)

    def quiet(self, steps: int) -> tuple[float, ...]:
        """Seconds of ``steps`` updates with nothing beside them."""
        return self.steps(lambda done: done < steps, lambda _: None)

    def saver(self, folder: Path) -> Saver:
        """One that has written nothing yet, for the run in ``folder``."""
        return Saver(self.world, CheckpointFolder(folder), keep=2, shards=self.shards)

    def save_beside(self, saver: Saver, rounds: int) -> Beside:
        """Write the checkpoint of round ``rounds`` while updates go on, until it is written."""
        begin = time.perf_counter()
        saver.start(self.state(), self._manifest(rounds))
        step_s = self.steps(lambda done: saver.busy or done == 0, saver.make_way)
        total_s = time.perf_counter() - begin
        return Beside(step_s=step_s, total_s=total_s, saved=_saved(saver))

    def save(self, saver: Saver, rounds: int) -> tuple[float, Saved]:
        """Write the checkpoint of round ``rounds`` and wait for it; the seconds that took."""
        begin = time.perf_counter()
        saver.start(self.state(), self._manifest(rounds))
        saver.wait()
        return time.perf_counter() - begin, _saved(saver)

    def load(self, folder: Path) -> tuple[float, float]:
        """Load the newest checkpoint of the run in ``folder``: seconds of telling that it is whole, and of all.

        Raises:
            ValueError: if what was loaded is not what was there before, which the checkpoint holds.
        """
        before = self.fingerprint()
        self.spoil()
        begin = time.perf_counter()
        choice = choose(self.world, CheckpointFolder(folder), self.shards.owned, lambda manifest, path: None)
        checked_s = time.perf_counter() - begin
        assert choice is not None
        saved = choice.manifest.tensors
        replay = empty(choice, [name for name in saved if name.startswith("replay.")])
        load_tensors(self.world, choice, learner_targets(self.learner, saved) | replay)
        self.shards.load_state({name.removeprefix("replay."): tensor for name, tensor in replay.items()})
        load_frames(choice, self.shards)
        total_s = time.perf_counter() - begin
        self.check(before, folder)
        return checked_s, total_s

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint holds but the frames, by name."""
        replay = self.shards.state(frames=False)
        return learner_state(self.learner) | {f"replay.{name}": tensor for name, tensor in replay.items()}

    def fingerprint(self) -> tuple[float, ...]:
        """Sums over the weights, the optimizer and some of the frames, the same for the same content."""
        learned = sum(float(tensor.double().abs().sum()) for tensor in learner_state(self.learner).values())
        return learned, *(float(frames.sum(dtype="int64")) for frames in self._some_frames())

    def spoil(self) -> None:
        """Overwrite what `fingerprint` looks at."""
        for tensor in learner_state(self.learner).values():
            tensor.detach().zero_()
        for frames in self._some_frames():
            frames[:] = 0

    def check(self, fingerprint: tuple[float, ...], where: Path) -> None:
        """Raise ValueError unless this is what it was when it had ``fingerprint``."""
        if (now := self.fingerprint()) != fingerprint:
            raise ValueError(f"{where} gave {now} but {fingerprint} was saved; what was timed is not worth comparing")

    def _some_frames(self) -> Iterator[NDArray[np.uint8]]:
        """Views of every 97th of each environment's frames, as far as there are some."""
        for shard in map(self.shards.__getitem__, self.shards.owned):
            rings = shard.frames.reshape(shard.num_envs, shard.length, -1)
            yield from (ring[: min(int(n), shard.length) : 97] for ring, n in zip(rings, shard.written, strict=True))

    def _manifest(self, rounds: int) -> Manifest:
        return Manifest(
            run="checkpoint cost",
            round=rounds,
            frames=4 * self.shards.num_inserted,
            updates=self._updates,
            layout="single",
            plan={},
            parameters=self._network,
            files={},
            tensors={},
            rows={},
            counters={},
            written=time.time(),
            version="",
        )


def _saved(saver: Saver) -> Saved:
    saver.wait()
    outcome = saver.result()
    if isinstance(outcome, NotSaved):
        raise outcome
    assert outcome is not None
    return outcome
