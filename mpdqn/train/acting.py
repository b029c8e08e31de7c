"""Where chunks of experience come from: the three ways to act, with one meaning of ``actor_lag``.

Round r adds chunk r to replay and then makes its updates. Chunk r is played with the weights of after round r − 1 − L:

    L = 0   play 0 ─ learn 0 ─ play 1 ─ learn 1 ─ play 2 …
    L = 1   play 0 ┬ learn 0 ┬ learn 1 ┬ learn 2 …       a chunk is played while the round before it learns
                   └ play 1 ─┴ play 2 ─┴ play 3 …

`InlineActing` plays on the rank of a replica's first stage, for L ≥ 1 in a thread of it. `RemoteActing` is what that
rank sees of an acting rank, and `act_remotely` is the acting rank itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpdqn.actors import Actors, Chunk, Episode
from mpdqn.mesh import World
from mpdqn.weights import WeightDelivery

TRANSITIONS = "transitions"


def transitions_group(world: World) -> dist.ProcessGroup:
    """The process group of chunks on their way. Its first call is collective over all ranks, actors or not."""
    return world.message_group(TRANSITIONS, "gloo", patient=True)


class LaggedWeights:
    """The acting network, kept ``lag`` deliveries behind what is delivered to it.

    A delivery of None says that the weights did not change. The first ``max(lag, 1) − 1`` chunks are played with the
    initial weights, however many deliveries there were.
    """

    def __init__(self, network: nn.Module, lag: int) -> None:
        self._network, self._late = network, max(0, lag - 1)
        self._waiting: deque[Mapping[str, Tensor] | None] = deque()

    @torch.no_grad()
    def deliver(self, weights: Mapping[str, Tensor] | None) -> None:
        """Take what was delivered last, and act with what is due now."""
        self._waiting.append(weights)
        while len(self._waiting) > self._late:
            due = self._waiting.popleft()
            if due is not None:
                self._network.load_state_dict(due)


class InlineActing:
    """Actors on the learner's own rank; a context manager closes them.

    ``weights`` is None where the network shares its parameters with the learner, which needs no delivery.
    """

    def __init__(self, actors: Actors, weights: LaggedWeights | None) -> None:
        self._actors, self._weights = actors, weights
        # The thread has torch threads of its own; one leaves the learner its own.
        self._thread = ThreadPoolExecutor(1, "actors", initializer=torch.set_num_threads, initargs=(1,))
        self._chunk: Future[Chunk] | None = None

    @property
    def needs_weights(self) -> bool:
        """Whether the weights that are played have to be delivered."""
        return self._weights is not None

    def deliver(self, weights: Mapping[str, Tensor] | None) -> None:
        """Weights of the learner, or None if they did not change; not while a chunk is being played."""
        if self._weights is not None:
            self._weights.deliver(weights)

    def start(self) -> None:
        """Begin to play the next chunk in the background."""
        self._chunk = self._thread.submit(self._actors.play)

    def chunk(self) -> Chunk:
        """The chunk that was started, or else the next one, played now."""
        if self._chunk is None:
            return self._actors.play()
        chunk, self._chunk = self._chunk.result(), None
        return chunk

    def settle(self) -> None:
        """Wait until the chunk that was started is played, so that nothing else of this process runs beside it."""
        if self._chunk is not None:
            self._chunk.exception()

    def close(self) -> None:
        """Wait for the running chunk and stop the games."""
        self._thread.shutdown()
        self._actors.close()


class RemoteActing:
    """What the rank of a replica's first stage sees of its acting rank."""

    def __init__(self, world: World, source: int, example: Chunk, environments: range) -> None:
        self._world, self._source, self._example, self._environments = world, source, example, environments
        self._group = transitions_group(world)

    def deliver(self, weights: Mapping[str, Tensor] | None) -> None:
        """Nothing: each stage sends its own weights."""

    def start(self) -> None:
        """Nothing: the acting rank starts by itself."""

    def chunk(self) -> Chunk:
        """The next chunk, when it is here."""
        complaint = f"rank {self._world.rank} got no transitions from acting rank {self._source}"
        steps, n = self._example.reward.shape
        buffers = [torch.empty_like(t) for t in _tensors(self._example).values()]
        buffers += [torch.empty(steps, n, 2, dtype=torch.float64), torch.empty(2, dtype=torch.int64)]
        messages = [
            self._world.receive(buffer, self._source, self._group, complaint, patient=True) for buffer in buffers
        ]
        for message in messages:
            message.wait()
        *tensors, ended, counts = buffers
        return Chunk(
            **dict(zip(_tensors(self._example), tensors, strict=True)),
            episodes=_episodes(ended, int(counts[0]), self._environments),
            restarts=int(counts[1]),
        )

    def settle(self) -> None:
        """Nothing: the acting rank is another process."""

    def close(self) -> None:
        """Nothing: the acting rank closes its own."""


def act_remotely(
    world: World,
    actors: Actors,
    weights: LaggedWeights,
    delivery: WeightDelivery,
    *,
    replica: int,
    owner: int,
    num_rounds: int,
    lag: int,
    due: Callable[[int], bool],
    pauses: Callable[[int], bool],
    first_environment: int,
) -> None:
    """The acting rank of ``replica``: receive weights when they are ``due`` before a round, play, send to ``owner``.

    After a round that ``pauses``, for an evaluation, it waits with all ranks where there is time.
    """
    group = transitions_group(world)
    complaint = f"acting rank {world.rank} could not send transitions to rank {owner}"
    for r in range(num_rounds):
        # With a lag, chunk r is played while round r − 1 learns: what was due before that round is delivered first.
        before = r if lag == 0 else r - 1
        if r and pauses(r - 1) and not lag:
            world.barrier()
        if before >= 0:
            weights.deliver(delivery.receive(replica) if due(before) else None)
        first_step = actors.steps_played
        chunk = actors.play()
        ended = torch.zeros(*chunk.reward.shape, 2, dtype=torch.float64)
        for episode in chunk.episodes:
            place = episode.step - first_step, episode.environment - first_environment
            ended[place] = torch.tensor([episode.episode_return, episode.length], dtype=torch.float64)
        outgoing = [*_tensors(chunk).values(), ended, torch.tensor([first_step, chunk.restarts])]
        if r and pauses(r - 1) and lag:  # this chunk was asked for before the pause
            world.barrier()
        messages = [world.send(t.contiguous(), owner, group, complaint, patient=True) for t in outgoing]
        for message in messages:
            message.wait()
    if pauses(num_rounds - 1):
        world.barrier()


def _tensors(chunk: Chunk) -> dict[str, Tensor]:
    values = {field.name: getattr(chunk, field.name) for field in fields(chunk)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _episodes(ended: Tensor, first_step: int, environments: range) -> tuple[Episode, ...]:
    """The episodes that ``ended`` [T, N, 2] tells of: return and length, the length 0 where none ended."""
    return tuple(
        Episode(
            step=first_step + t,
            environment=environments[i],
            episode_return=float(ended[t, i, 0]),
            length=int(ended[t, i, 1]),
        )
        for t, i in ended[:, :, 1].nonzero().tolist()
    )
