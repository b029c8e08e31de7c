"""What is trained: environment, network, agent and replay from their settings, for `train` and `compare` alike.

workload.py      Workload: one frozen value, and what follows from it
acceleration.py  precision and compilation, chosen by measurement where they are left open
checks.py        the refusals and warnings that both commands share
"""

from mpdqn.workload.workload import Workload

__all__ = ["Workload"]
