"""`Workload`: environment, agent, network and replay of a run, from their settings.

settings ─▶ Workload ─ spec, agent ─▶ actors, learner
                     ─ make_network ─▶ stages            the same weights on every rank
                     ─ make_shards  ─▶ batches           of observations as the environment returned them
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpdqn.dqn.agents import Agent
from mpdqn.dqn.published import Published
from mpdqn.environments import EnvironmentSpec
from mpdqn.layouts import Layout
from mpdqn.networks import Head, NetworkFunction, load_network
from mpdqn.networks.nature import SMALLEST
from mpdqn.replay import VirtualShards
from mpdqn.update import LearnerConfig


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained, whatever the layout.

    Attributes:
        env: name of the environment, see `mpdqn.environments.make_environment`.
        spec: of one of its environments.
        settings: the agent, and its hyperparameters in this run.
        network: zoo name, ``my_file.py:make_network`` or a function; empty: nature, or minatar for small frames.
        num_shards: V.
        envs_per_shard: E.
        seed: the run's seed.
        width: width multiplier of IMPALA; None leaves it at 1.
        head: head of the network; None takes the agent's.
        dtype: of the network's parameters.
    """

    env: str
    spec: EnvironmentSpec
    settings: Published
    network: str | NetworkFunction
    num_shards: int
    envs_per_shard: int
    seed: int
    width: float | None = None
    head: Head | None = None
    dtype: Literal["float32", "float64"] = "float32"

    @property
    def agent(self) -> Agent:
        """The update rule."""
        return self.settings.agent

    @property
    def num_envs(self) -> int:
        """V·E."""
        return self.num_shards * self.envs_per_shard

    @property
    def least_transitions(self) -> int:
        """Transitions after which each shard can give its part of a batch."""
        # Those at the head of a ring wait for their n-step return.
        return self.settings.batch_size + self.num_envs * self.settings.n_step

    @property
    def network_name(self) -> str:
        """Zoo name, file and function, or name of the function."""
        if not isinstance(self.network, str):
            return getattr(self.network, "__name__", type(self.network).__name__)
        small = min(self.spec.observation_shape[1:]) < SMALLEST
        return self.network or ("minatar" if small else "nature")

    @property
    def head_options(self) -> dict[str, Any]:
        """The options with which `load_network` gives the network the agent's output for this environment."""
        options = self.agent.head_options(self.spec.branches)
        return options | ({"head": self.head} if self.head else {})

    def make_network(self, *, stream: int = 0, warn: bool = False) -> nn.Sequential:
        """Return the network on the CPU, with the same weights on every call and every rank.

        Args:
            stream: number of the random stream of its weights; another one gives other weights.
            warn: whether to warn of options that have no effect on this network; for the one call that checks it.
        """
        with warnings.catch_warnings():
            if not warn:
                warnings.filterwarnings("ignore", ".* has no effect on")
            network = load_network(
                self.network if not isinstance(self.network, str) else self.network_name,
                self.spec.observation_shape,
                self.spec.num_actions,
                width=self.width,
                seed=self.seed + stream,
                **self.head_options,
            )
        return network.to(dtype=getattr(torch, self.dtype))

    def make_shards(self, *, owned: Sequence[int] | None = None, directory: Path | None = None) -> VirtualShards:
        """Return empty replay shards for transitions of the environment.

        Args:
            owned: numbers of the shards that this process holds; None for all V.
            directory: folder in which frames are mapped to disk; None for memory.
        """
        settings = self.settings
        return VirtualShards(
            observation_shape=self.spec.observation_shape,
            stack=self.spec.stack,
            action_shape=self.spec.action_shape,
            num_shards=self.num_shards,
            envs_per_shard=self.envs_per_shard,
            seed=self.seed,
            capacity=settings.capacity,
            n_step=settings.n_step,
            discount=settings.discount,
            clip_rewards=settings.clip_rewards,
            prioritization=settings.prioritization,
            owned=owned,
            directory=directory,
        )

    def learner_config(self, *, lookahead: int) -> LearnerConfig:
        """Return how an update is made with these settings."""
        settings = self.settings
        return LearnerConfig(
            learning_rate=settings.learning_rate,
            adam_eps=settings.adam_eps,
            target_period=settings.target_period,
            target_tau=settings.target_tau,
            max_grad_norm=settings.max_grad_norm,
            lookahead=lookahead,
            seed=self.seed,
        )

    def micro_batch_frames(self, layout: Layout) -> Tensor:
        """Return black frames uint8 [B/(d·m), C, H, W]: one micro-batch of ``layout``, to measure and count with."""
        rows = self.settings.batch_size // (layout.data * layout.num_microbatches)
        return torch.zeros((rows, *self.spec.observation_shape), dtype=torch.uint8)
