"""The toy, but a step takes its time, as real simulators' do."""

from __future__ import annotations

import time
from typing import Any

import gymnasium

from tests.environments.toy import Drift


class Slow(Drift):
    """0.05 s a step."""

    def step(self, action: Any) -> Any:
        time.sleep(0.05)
        return super().step(action)


gymnasium.register("mpdqn-tests/Slow-v0", entry_point=Slow)
