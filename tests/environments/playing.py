"""Playing an environment with given actions, for tests of every field."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict

from mpdqn.environments import BatchedEnvironment


def some_actions(environment: BatchedEnvironment, steps: int) -> torch.Tensor:
    """Actions [T, N] or [T, N, D], the same for an environment of the same index in any division."""
    spec = environment.spec
    columns = [
        torch.randint(spec.num_actions, (steps, *spec.action_shape), generator=torch.Generator().manual_seed(e))
        for e in environment.indices
    ]
    return torch.stack(columns, dim=1)


def play(
    environment: BatchedEnvironment, actions: torch.Tensor, before_step: Callable[[int], None] = lambda t: None
) -> TensorDict:
    """The transitions [T, N] that ``actions`` lead to, with resets where episodes end."""
    current, steps = environment.reset(), []
    for t, action in enumerate(actions):
        before_step(t)
        current["action"] = action
        transition, current = environment.step_and_maybe_reset(current)
        steps.append(transition.clone())
    return torch.stack(steps)


def assert_stacks(environment: BatchedEnvironment, steps: TensorDict) -> None:
    """Stacks shift by one frame with each step, and begin padded with zeros."""
    channels = environment.observation_shape[0] // environment.spec.stack
    before, after = steps["observation"], steps["next", "observation"]
    torch.testing.assert_close(after[:, :, :-channels], before[:, :, channels:], rtol=0, atol=0)
    begins = steps["step"] == 0
    assert begins.any()
    assert not before[begins][:, :-channels].any()
    assert before[begins][:, -channels:].any()
