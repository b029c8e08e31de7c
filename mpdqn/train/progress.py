"""`Progress`: what a run's rows say, added up over the rounds since the last row."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mpdqn.actors import Episode
from mpdqn.train.step import TrainStep


class Progress:
    """Adds up rounds; ``row`` is what happened since the row before, ``episodes`` everything that ended so far.

    Args:
        batch_size: transitions of an update.
        clock: where the time comes from, in seconds.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._begin = time.perf_counter()
        self._last: TrainStep | None = None
        self._steps: list[TrainStep] = []

    def add(self, step: TrainStep) -> None:
        """Take one round."""
        self._steps.append(step)

    def resume(self) -> None:
        """Begin to count the time anew: what was done since the last row, such as an evaluation, is no training."""
        self._begin = time.perf_counter()

    def take(self) -> tuple[list[Episode], int]:
        """The episodes that ended on this rank since the row before, and its environments' restarts so far."""
        return [e for step in self._steps for e in step.episodes], self._steps[-1].restarts

    def row(self, episodes: Sequence[Episode], restarts: int) -> dict[str, float]:
        """The row of these rounds, with the ``episodes`` and ``restarts`` of all replicas.

        ``mean_return`` and ``mean_length`` are of the episodes that ended; they and ``loss`` are missing where there
        is nothing to take the mean of. Rates are per second since the row before.
        """
        step, now = self._steps[-1], time.perf_counter()
        seconds = now - self._begin
        earlier = (self._last.frames, self._last.transitions, self._last.updates) if self._last else (0, 0, 0)
        frames, transitions, updates = (
            step.frames - earlier[0],
            step.transitions - earlier[1],
            step.updates - earlier[2],
        )
        row: dict[str, float] = {
            "transitions": step.transitions,
            "updates": step.updates,
            "epsilon": step.epsilon,
            "episodes": len(episodes),
            "frames_per_s": frames / seconds,
            "updates_per_s": updates / seconds,
            "samples_per_insert": updates * self._batch_size / transitions,
            "actor_lag": step.actor_lag,
            "late_passes": sum(s.late_passes for s in self._steps),
            "restarts": restarts,
        }
        losses = [loss.item() for s in self._steps for loss in s.losses]
        norms = [norm.item() for s in self._steps for norm in s.grad_norms]
        if losses:
            row |= {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms)}
        if episodes:
            row["mean_return"] = sum(e.episode_return for e in episodes) / len(episodes)
            row["mean_length"] = sum(e.length for e in episodes) / len(episodes)
        self._last, self._begin, self._steps = step, now, []
        return row
