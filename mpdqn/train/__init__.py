"""Training: a configuration, one rank's loop, and the run around it.

config.py    TrainConfig, and TrainJob, what follows from it
check.py     from the one to the other, with every refusal before any work
loop.py      Trainer: the whole wiring of one rank, as a generator
step.py      what it yields
acting.py    how chunks of experience come, inline or from acting ranks, and what actor_lag means
batches.py   batches, drawn as early as lookahead and prefetch say
progress.py  rows of progress
run.py       train(): the run around the loop: logs, evaluations, folder
folder.py    a run's folder, written and read back
"""

from mpdqn.train.config import TrainConfig
from mpdqn.train.folder import Run, load_run
from mpdqn.train.loop import Trainer
from mpdqn.train.run import TrainResult, train
from mpdqn.train.step import NotANumber, TrainStep

__all__ = ["NotANumber", "Run", "TrainConfig", "TrainResult", "TrainStep", "Trainer", "load_run", "train"]
