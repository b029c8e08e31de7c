"""Training: a configuration, one rank's loop, and the run around it.

config.py    TrainConfig, and the checks before any work
loop.py      Trainer: the whole wiring of one rank, as a generator
acting.py    how chunks of experience come, inline or from acting ranks, and what actor_lag means
batches.py   batches, drawn as early as lookahead and prefetch say
progress.py  rows of progress
run.py       train(): the run around the loop: logs, evaluations, folder
folder.py    a run's folder, written and read back
"""

from mpdqn.train.config import TrainConfig
from mpdqn.train.folder import Run, load_run
from mpdqn.train.loop import NotANumber, Trainer, TrainStep
from mpdqn.train.run import TrainResult, train

__all__ = ["NotANumber", "Run", "TrainConfig", "TrainResult", "TrainStep", "Trainer", "load_run", "train"]
