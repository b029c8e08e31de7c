"""`ActionValues`: a network of any agent, as the action values that acting takes."""

from __future__ import annotations

from torch import Tensor, nn

from mpdqn.dqn.agents import Agent


class ActionValues(nn.Module):
    """``network`` with expected action values instead of what ``agent`` learns; it shares the network's parameters.

    Output: floats [B, A]; [B, D, A] for actions of D > 1 dimensions.
    """

    def __init__(self, network: nn.Module, agent: Agent) -> None:
        super().__init__()
        self.network, self.agent = network, agent

    def forward(self, observation: Tensor) -> Tensor:
        """Expected values of uint8 [B, C, H, W]."""
        values = self.agent.action_values(self.network(observation))
        # One dimension is an action without dimensions: an environment that has such actions need not know.
        return values.squeeze(1) if values.dim() == 3 and values.shape[1] == 1 else values
