"""Where chunks of experience come from: the three ways to act, with one meaning of ``actor_lag``.

Round r adds chunk r to replay and then makes its updates. Chunk r is played with the weights of after round r − 1 − L:

    L = 0   play 0 ─ learn 0 ─ play 1 ─ learn 1 ─ play 2 …
    L = 1   play 0 ┬ learn 0 ┬ learn 1 ┬ learn 2 …       a chunk is played while the round before it learns
                   └ play 1 ─┴ play 2 ─┴ play 3 …

`Acting` plays on the rank of a replica's first stage, or on an acting rank; for L ≥ 1 in a thread of it. `RemoteActing`
is what a first stage sees of its acting rank, and `act_remotely` is that rank's loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    return world.message_group(TRANSITIONS, "gloo")


class LaggedWeights:
    """The acting network, kept ``lag`` deliveries behind what is delivered to it.

    A delivery of None says that the weights did not change. The first ``max(lag, 1) − 1`` chunks are played with the
    initial weights, however many deliveries there were.
    """

    def __init__(self, network: nn.Module, lag: int) -> None:
        self.network, self.lag = network, lag
        self.waiting: deque[Mapping[str, Tensor] | None] = deque()

    @torch.no_grad()
    def deliver(self, weights: Mapping[str, Tensor] | None) -> None:
        """Take what was delivered last, and act with what is due now."""
        self.waiting.append(weights)
        while len(self.waiting) > max(0, self.lag - 1):
            due = self.waiting.popleft()
            if due is not None:
                self.network.load_state_dict(due)


class Acting:
    """Actors and the weights that they play with, on a learner's own rank or an acting one.

    ``weights`` is None where the network shares its parameters with the learner, which needs no delivery.
    """

    def __init__(self, actors: Actors, weights: LaggedWeights | None) -> None:
        self.actors, self.weights = actors, weights
        # The thread has torch threads of its own; one leaves the learner its own.
        self._thread = ThreadPoolExecutor(1, "actors", initializer=torch.set_num_threads, initargs=(1,))
        self._chunk: Future[Chunk] | None = None

    @property
    def needs_weights(self) -> bool:
        """Whether the weights that are played have to be delivered."""
        return self.weights is not None

    def deliver(self, weights: Mapping[str, Tensor] | None) -> None:
        """Weights of the learner, or None if they did not change; not while a chunk is being played."""
        if self.weights is not None:
            self.weights.deliver(weights)

    def start(self) -> None:
        """Begin to play the next chunk in the background, unless it is there already."""
        if self._chunk is None:
            self._chunk = self._thread.submit(self.actors.play)

    def chunk(self) -> Chunk:
        """The chunk that was started, or else the next one, played now."""
        if self._chunk is None:
            return self.actors.play()
        chunk, self._chunk = self._chunk.result(), None
        return chunk

    def settle(self) -> None:
        """Wait until the chunk that was started is played, so that nothing else of this process runs beside it."""
        if self._chunk is not None:
            self._chunk.exception()

    @property
    def played_ahead(self) -> Chunk | None:
        """The chunk that was started, when it is played; None if none was."""
        return None if self._chunk is None else self._chunk.result()

    def go_on_with(self, chunk: Chunk) -> None:
        """Have ``chunk`` as the one that was started."""
        self._chunk = Future()
        self._chunk.set_result(chunk)

    def close(self) -> None:
        """Wait for the running chunk and stop the games."""
        self._thread.shutdown()
        self.actors.close()


class RemoteActing:
    """What the rank of a replica's first stage sees of its acting rank."""

    def __init__(self, world: World, source: int, example: Chunk) -> None:
        self._world, self._source, self._example = world, source, example
        self._group = transitions_group(world)

    def deliver(self, weights: Mapping[str, Tensor] | None) -> None:
        """Nothing: each stage sends its own weights."""

    def start(self) -> None:
        """Nothing: the acting rank starts by itself."""

    def chunk(self) -> Chunk:
        """The next chunk, when it is here."""
        buffers = [torch.empty_like(t) for t in outgoing(self._example)]
        messages = [self._world.receive(buffer, self._source, self._group, TRANSITIONS) for buffer in buffers]
        for message in messages:
            message.wait()
        *tensors, ended, counts = buffers
        return Chunk(
            **dict(zip(chunk_tensors(self._example), tensors, strict=True)),
            episodes=episodes_of(ended[: int(counts[0])]),
            restarts=int(counts[1]),
        )

    def settle(self) -> None:
        """Nothing: the acting rank is another process."""

    def close(self) -> None:
        """Nothing: the acting rank closes its own."""


def act_remotely(
    world: World,
    acting: Acting,
    delivery: WeightDelivery,
    *,
    replica: int,
    owner: int,
    rounds: range,
    lag: int,
    due: Callable[[int], bool],
    plays_after: Callable[[int], bool],
    agree: Callable[[], None],
) -> Iterator[int]:
    """The loop of the acting rank of ``replica``: receive weights when they are ``due``, play, send to ``owner``.

    Yields each round when as much of it is done as on the learners' ranks when they yield it: with a lag, the chunk
    of the round after is played, but not sent. ``agree`` is called where those ranks do.
    """

    def receive(r: int) -> None:
        acting.deliver(delivery.receive(replica) if due(r) else None)

    if lag:
        acting.start()
    for r in rounds:
        if not lag:
            receive(r)
        world.activity.set(f"playing round {r}")
        chunk = acting.chunk()
        send_chunk(world, chunk, owner)
        agree()
        if lag and plays_after(r):
            receive(r)
            acting.start()
        yield r


def send_chunk(world: World, chunk: Chunk, owner: int) -> None:
    """Send a chunk to rank ``owner``, which takes it when it asks `RemoteActing` for one."""
    group = transitions_group(world)
    for message in [world.send(t, owner, group, TRANSITIONS) for t in outgoing(chunk)]:
        message.wait()


def outgoing(chunk: Chunk) -> list[Tensor]:
    """What is sent of a chunk: its tensors, dense, its episodes [k, 4] filled up to T·N rows, and two counts."""
    ended = torch.zeros(chunk.num_transitions, 4, dtype=torch.float64)
    ended[: len(chunk.episodes)] = episode_rows(chunk.episodes)
    counts = torch.tensor([len(chunk.episodes), chunk.restarts])
    return [*(t.contiguous() for t in chunk_tensors(chunk).values()), ended, counts]


def chunk_tensors(chunk: Chunk) -> dict[str, Tensor]:
    """Its tensors [T, N, …], by name."""
    values = {field.name: getattr(chunk, field.name) for field in fields(chunk)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def episode_rows(episodes: Sequence[Episode]) -> Tensor:
    """Episodes as float64 [k, 4]: step, environment, return, length."""
    rows = [(e.step, e.environment, e.episode_return, e.length) for e in episodes]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def episodes_of(rows: Tensor) -> tuple[Episode, ...]:
    """What `episode_rows` was made of."""
    return tuple(
        Episode(step=int(step), environment=int(environment), episode_return=total, length=int(length))
        for step, environment, total, length in rows.tolist()
    )
