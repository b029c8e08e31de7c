"""`Progress`: what a run's rows say, added up over the rounds since the last row."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpdqn.actors import Episode
from mpdqn.train.step import TrainStep


class Progress:
    """Adds up rounds; ``row`` is what happened since the row before, ``episodes`` everything that ended so far.

    Args:
        batch_size: transitions of an update.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._begin = time.perf_counter()
        self._before = (0, 0, 0)
        self._step: TrainStep | None = None
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._episodes: list[Episode] = []
        self._late = 0

    def add(self, step: TrainStep) -> None:
        """Take one round."""
        self._step = step
        self._losses += step.losses
        self._norms += step.grad_norms
        self._episodes += step.episodes
        self._late += step.late_passes

    def resume(self) -> None:
        """Begin to count the time anew: what was done since the last row, such as an evaluation, is no training."""
        self._begin = time.perf_counter()

    def take(self) -> tuple[list[Episode], int]:
        """The episodes that ended on this rank since the row before, and its environments' restarts so far."""
        return list(self._episodes), self._step.restarts if self._step else 0

    def row(self, episodes: Sequence[Episode], restarts: int) -> dict[str, float]:
        """The row of these rounds, with the ``episodes`` and ``restarts`` of all replicas.

        ``mean_return`` and ``mean_length`` are of the episodes that ended; they and ``loss`` are missing where there
        is nothing to take the mean of. Rates are per second since the row before.
        """
        assert self._step is not None
        step, now = self._step, time.perf_counter()
        seconds = now - self._begin
        counts = step.frames, step.transitions, step.updates
        frames, transitions, updates = (count - earlier for count, earlier in zip(counts, self._before, strict=True))
        row: dict[str, float] = {
            "transitions": step.transitions,
            "updates": step.updates,
            "epsilon": step.epsilon,
            "episodes": len(episodes),
            "frames_per_s": frames / seconds,
            "updates_per_s": updates / seconds,
            "samples_per_insert": updates * self._batch_size / transitions,
            "actor_lag": step.actor_lag,
            "late_passes": self._late,
            "restarts": restarts,
        }
        losses, norms = ([value.item() for value in values] for values in (self._losses, self._norms))
        if losses:
            row |= {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms)}
        if episodes:
            row["mean_return"] = sum(e.episode_return for e in episodes) / len(episodes)
            row["mean_length"] = sum(e.length for e in episodes) / len(episodes)
        self._before, self._begin, self._late = counts, now, 0
        self._losses, self._norms, self._episodes = [], [], []
        return row

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint needs of a row under way, its episodes apart: float64 tensors, and small numbers."""
        tensors = {
            name: torch.tensor([value.item() for value in values], dtype=torch.float64)
            for name, values in (("losses", self._losses), ("norms", self._norms))
        }
        seconds = time.perf_counter() - self._begin
        return tensors, {"row_before": list(self._before), "row_seconds": seconds, "row_late_passes": self._late}

    def load_state(
        self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any], episodes: Sequence[Episode]
    ) -> None:
        """Go on with the row of `state`, and with the ``episodes`` that had ended on all ranks since the one before."""
        self._losses, self._norms = list(tensors["losses"]), list(tensors["norms"])
        self._before = tuple(counters["row_before"])
        self._late, self._episodes = counters["row_late_passes"], list(episodes)
        self._begin = time.perf_counter() - counters["row_seconds"]
