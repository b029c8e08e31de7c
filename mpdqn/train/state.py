"""A trainer between two rounds as named tensors, and back, on this layout or another.

    online. target. adam.    the learner, by parameter name                          replica 0's stages
    replay.V.                all of shard V but its frames                           the rank that has it
    queue.K.V.               shard V's part of the K-th batch that is drawn already  the same
    games.V.                 where shard V's environments are                        whoever plays them
    chunk.V.                 their part of the chunk that is played ahead            the same
    acting.current. .K.      weights that acting is behind with (actor_lag)          the same; equal everywhere

What the schedule prepared for the next batch is left out: it is computed again from the same numbers, as late passes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields

import torch
from torch import Tensor

from mpdqn.actors import Chunk
from mpdqn.checkpoint.learner import ONLINE, learner_state, learner_targets
from mpdqn.checkpoint.loader import Choice, empty, load_frames, load_tensors, on_every_rank
from mpdqn.dqn.batch import Batch
from mpdqn.train.acting import Acting, LaggedWeights, chunk_tensors, episode_rows, episodes_of
from mpdqn.train.loop import Trainer

EPISODES = "episodes"


def trainer_state(trainer: Trainer) -> dict[str, Tensor]:
    """This rank's part of the state after a round that `Trainer.run` yielded; not copied."""
    return dict(_state(trainer))


def _state(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    config, owned = trainer.job.config, trainer.owned
    if trainer.learner is not None and trainer.learner.mesh.replica == 0:
        yield from learner_state(trainer.learner).items()
    if trainer.shards is not None:
        for name, tensor in trainer.shards.state(frames=False).items():
            yield f"replay.{name}", tensor
    if trainer.queue is not None:
        for k, batch in enumerate(trainer.queue.waiting):
            for field in fields(batch):
                parts = getattr(batch, field.name).chunk(len(owned))
                yield from ((f"queue.{k}.{v}.{field.name}", part) for v, part in zip(owned, parts, strict=True))
    if isinstance(trainer.acting, Acting):
        chunk = trainer.acting.played_ahead
        games = trainer.acting.actors.state()
        yield from _by_shard("games", games, owned, config.envs_per_shard, dim=0)
        if chunk is not None:
            tensors = chunk_tensors(chunk)
            yield from _by_shard("chunk", tensors, owned, config.envs_per_shard, dim=1)
            first = owned[0] * config.envs_per_shard
            for place, v in enumerate(owned):
                low = first + place * config.envs_per_shard
                mine = [e for e in chunk.episodes if low <= e.environment < low + config.envs_per_shard]
                yield f"chunk.{v}.{EPISODES}", episode_rows(mine)
        if (weights := trainer.acting.weights) is not None and weights.lag:
            yield from ((f"acting.current.{n}", t) for n, t in weights.network.state_dict().items())
            for k, waiting in enumerate(weights.waiting):
                yield from ((f"acting.{k}.{n}", t) for n, t in (waiting or {}).items())


def waiting_deliveries(trainer: Trainer) -> int:
    """How many deliveries of weights wait to be played with; the same wherever anybody acts."""
    weights = trainer.acting.weights if isinstance(trainer.acting, Acting) else None
    return len(weights.waiting) if weights is not None and weights.lag else 0


def restore(trainer: Trainer, choice: Choice) -> None:
    """Bring a trainer that has done nothing yet to where the checkpoint was. Collective over the world.

    On a rank some of whose frames are gone all environments begin new episodes, and their shards' are interrupted; the
    shards that are gone start empty: see `refill`.

    Raises:
        WrongCheckpoint: on every rank, if a tensor is missing or of another shape.
        DamagedCheckpoint: on every rank, if what was saved cannot be restored, as where an episode comes out
            differently when it is played again.
    """
    world = trainer.world
    targets: dict[str, Tensor] = {}
    with on_every_rank(world, choice):
        targets |= _targets(trainer, choice)
    load_tensors(world, choice, targets)
    acting: dict[str, Tensor] = {}
    weights = trainer.acting.weights if isinstance(trainer.acting, Acting) else None
    with on_every_rank(world, choice):
        acting |= _acting_targets(weights, choice)
    load_tensors(world, choice, acting)
    with on_every_rank(world, choice):
        _put_back(trainer, choice, targets)


def _targets(trainer: Trainer, choice: Choice) -> dict[str, Tensor]:
    """Where this rank's part of the checkpoint is loaded to, the acting weights apart."""
    saved, targets = choice.manifest.tensors, dict[str, Tensor]()
    if trainer.learner is not None:
        targets |= learner_targets(trainer.learner, saved)
    for v in trainer.owned:
        targets |= empty(choice, [n for n in saved if n.split(".")[0] in ("games", "chunk") and _is_of(n, v)])
        if trainer.shards is not None:
            targets |= empty(choice, [n for n in saved if n.startswith(f"replay.{v}.")])
            targets |= empty(choice, [n for n in saved if n.startswith("queue.") and n.split(".")[2] == str(v)])
    return targets


def _put_back(trainer: Trainer, choice: Choice, targets: Mapping[str, Tensor]) -> None:
    """Hand the loaded tensors, and the frames, to the parts of this rank."""
    owned = trainer.owned
    broken = any(v in choice.gone for v in owned)
    trainer.first_round = choice.manifest.round
    if trainer.learner is not None:
        trainer.learner.update = choice.manifest.updates
    if trainer.shards is not None and trainer.queue is not None:
        for v in owned:
            if v not in choice.gone:
                prefix = f"replay.{v}."
                trainer.shards[v].load_tensors(
                    {n.removeprefix(prefix): t for n, t in targets.items() if n.startswith(prefix)}
                )
        load_frames(choice, trainer.shards)
        if broken:
            trainer.shards.interrupt()
        trainer.queue.go_on_with(_batches(trainer, targets, choice))
    if isinstance(trainer.acting, Acting):
        games = _joined("games", targets, owned, dim=0)
        steps = choice.manifest.counters["steps_played"]
        trainer.acting.actors.load_state(games, steps, begin_anew=broken)
        if f"chunk.{owned[0]}.reward" in targets and not broken:
            tensors = _joined("chunk", targets, owned, dim=1)
            episodes = episodes_of(tensors.pop(EPISODES))
            episodes = tuple(sorted(episodes, key=lambda e: (e.step, e.environment)))
            restarts = trainer.acting.actors.restarts
            trainer.acting.go_on_with(Chunk(**tensors, episodes=episodes, restarts=restarts))


def refill(trainer: Trainer, choice: Choice) -> int:
    """Fill the shards whose frames are gone; how many steps of each environment that took. Collective.

    As many steps are played as fill replay before a run's first update, with the weights and the ε of now. They count
    neither as rounds nor as frames of the run.
    """
    job = trainer.job
    steps = math.ceil(job.settings.min_replay / job.num_envs) + job.settings.n_step + 1
    rounds = math.ceil(steps / job.config.round_steps)
    if any(v in choice.gone for v in trainer.owned) and trainer.acting is not None:
        trainer.play_besides(rounds)
    trainer.world.barrier()
    return rounds * job.config.round_steps


def _by_shard(
    kind: str, tensors: Mapping[str, Tensor], owned: range, envs: int, dim: int
) -> Iterator[tuple[str, Tensor]]:
    """``kind``.V.name of each tensor, whose dim ``dim`` runs over the environments of the owned shards."""
    for name, tensor in tensors.items():
        if name == "actions" and "step" in tensors:  # those of running episodes, as many as each has steps
            sizes = tensors["step"].view(len(owned), envs).sum(dim=1).tolist()
            parts = torch.split(tensor, sizes)
        else:
            parts = torch.split(tensor, envs, dim=dim)
        yield from ((f"{kind}.{v}.{name}", part) for v, part in zip(owned, parts, strict=True))


def _joined(kind: str, targets: Mapping[str, Tensor], owned: range, dim: int) -> dict[str, Tensor]:
    """What `_by_shard` took apart."""
    names = [n.split(".", 2)[2] for n in targets if n.startswith(f"{kind}.{owned[0]}.")]
    return {
        name: torch.cat(
            [targets[f"{kind}.{v}.{name}"] for v in owned],
            dim=0 if name == EPISODES else dim,
        )
        for name in names
    }


def _is_of(name: str, shard: int) -> bool:
    return name.split(".")[1] == str(shard)


def _batches(trainer: Trainer, targets: Mapping[str, Tensor], choice: Choice) -> list[Batch]:
    """The batches that were drawn already, this replica's part of them."""
    owned, device = trainer.owned, trainer.world.device
    count = len({n.split(".")[1] for n in targets if n.startswith("queue.")})
    batches = []
    for k in range(count):
        parts = []
        for v in owned:
            values = {f.name: targets[f"queue.{k}.{v}.{f.name}"] for f in fields(Batch)}
            if v in choice.gone:  # nothing may come back to what is not there: positions of before all rings
                values["index"] = torch.full_like(values["index"], torch.iinfo(torch.int64).min // 2)
            parts.append(Batch(**values))
        batches.append(Batch.concatenate(parts).to(device, getattr(torch, trainer.job.config.dtype)))
    return batches


def _acting_targets(weights: LaggedWeights | None, choice: Choice) -> dict[str, Tensor]:
    """Where acting weights are loaded to: with a lag what was played with and what waits, else the newest ones."""
    if weights is None:
        return {}
    network = weights.network.state_dict()
    if not weights.lag:
        return {ONLINE + name: tensor for name, tensor in network.items()}
    targets = {f"acting.current.{name}": tensor for name, tensor in network.items()}
    weights.waiting = deque()
    for k in range(choice.manifest.counters["waiting_deliveries"]):
        names = [f"acting.{k}.{name}" for name in network]
        if names[0] not in choice.manifest.tensors:
            weights.waiting.append(None)
            continue
        waiting = empty(choice, names)
        targets |= waiting
        weights.waiting.append({name: waiting[f"acting.{k}.{name}"] for name in network})
    return targets
