"""Training: a configuration, one rank's loop, and the run around it.

config.py    TrainConfig, and TrainJob, what follows from it
check.py     from the one to the other, with every refusal before any work
rank.py      Rank: what one rank has
loop.py      Trainer: its loop, as a generator
step.py      what it yields
acting.py    how chunks of experience come, inline or from acting ranks, and what actor_lag means
batches.py   batches, drawn as early as lookahead and prefetch say
progress.py  rows of progress
run.py       train(): from a configuration, or a run to go on with, to a result
session.py   what goes on around the loop: rows, evaluations, checkpoints
state.py     a trainer between two rounds as named tensors, and back
checkpoints.py  when a run writes checkpoints, and how it goes on from one
recorded.py  what a run's folder says of the run, every value checked
resume.py    what a run may be resumed with
folder.py    a run's folder, written and read back
status.py    how far a run is; lock.py, that one process at a time is in its folder; stop.py, SIGTERM
"""

from mpdqn.train.config import TrainConfig
from mpdqn.train.folder import Run, load_run
from mpdqn.train.loop import Trainer
from mpdqn.train.run import train
from mpdqn.train.session import TrainResult
from mpdqn.train.step import NotANumber, TrainStep

__all__ = ["NotANumber", "Run", "TrainConfig", "TrainResult", "TrainStep", "Trainer", "load_run", "train"]
