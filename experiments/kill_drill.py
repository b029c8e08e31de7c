"""Runs whose ranks are killed again and again, each time gone on with, beside the same runs left alone.

SIGKILL goes to a random rank at random moments that are spread over the whole run (`experiments.drill.moments`), about
one in four while a checkpoint is being written. A synchronous run must end with the same bits on the same layout
(MinAtar on two replicas, Atari on a pipeline whose gaps are filled), and within 1e-10 in float64 where each part runs
on another layout (1 × 1, 2 × 2, 1 × 2).

python -m experiments.kill_drill [--kills N] [--smoke]
about 20 minutes on 2 quiet cores, 15 with --kills 10; run again, it goes on
"""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from experiments.drill.moments import flag, kill_moments
from experiments.drill.table import END, KILL, drill_table
from experiments.drill.victim import Victim, progress_of
from mpdqn.checkpoint.contents import contents, differences
from mpdqn.checkpoint.folder import DRAFT, CheckpointFolder
from mpdqn.logs import read_progress
from mpdqn.records import RECORDS, Environment, Record, Value, append_records, read_records
from mpdqn.train.status import read_status

BOUND = 1e-10
"""Of ‖a − b‖ / ‖b‖ over all weights, where the layout changes."""
NOT_THE_RUN = ("frames_per_s", "updates_per_s", "late_passes")
"""Columns of progress that tell how it was computed."""
JITTER_S = 0.2
"""Most seconds between a kill and the progress entry that it waits for: without, it would always follow a round."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run: its flags, the layouts of its parts in turn, and how often it is killed."""

    name: str
    flags: tuple[str, ...]
    layouts: tuple[str, ...]
    kills: int

    @property
    def same_layout(self) -> bool:
        """Whether all parts are to be bit-identical."""
        return len(self.layouts) == 1

    @property
    def frames(self) -> int:
        """Environment frames of the whole run."""
        return flag(self.flags, "--frames")

    def moments(self, seed: int) -> tuple[int, ...]:
        """The frames after which each kill is due."""
        return kill_moments(self.kills, self.frames, flag(self.flags, "--checkpoint-every"), f"{seed} {self.name}")


MINATAR = ("--env", "minatar-breakout", "--min-replay", "500", "--capacity", "1000", "--target-period", "50")
ATARI = (
    "--env",
    "breakout",
    "--min-replay",
    "400",
    "--capacity",
    "1000",
    "--target-period",
    "50",
    "--replay-period",
    "8",
)
CASES = (
    Case(
        name="MinAtar, dp2, prioritised",
        flags=(*MINATAR, "--frames", "16000", "--log-every", "8", "--checkpoint-every", "160", "--prioritized", "True"),
        layouts=("dp2",),
        kills=25,
    ),
    Case(
        name="Atari, pp2-td1f1b, lookahead 1",
        flags=(*ATARI, "--frames", "25600", "--log-every", "32", "--checkpoint-every", "256", "--lookahead", "1"),
        layouts=("pp2-td1f1b/m2",),
        kills=25,
    ),
    Case(
        name="MinAtar in float64, 1×1 → 2×2 → 1×2",
        flags=(*MINATAR, "--frames", "4000", "--log-every", "8", "--checkpoint-every", "160", "--dtype", "float64"),
        layouts=("single@1", "dp2xpp2-1f1b/m2", "pp2-1f1b/m2"),
        kills=6,
    ),
)
SMOKE = (
    Case(
        name="MinAtar, dp2, prioritised",
        flags=(*MINATAR, "--frames", "1440", "--log-every", "8", "--checkpoint-every", "160", "--prioritized", "True"),
        layouts=("dp2",),
        kills=2,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to drill."""

    out: Path = Path("results/kill_drill")
    """Folder of the records and of the runs."""
    kills: int = 0
    """Kills of each run; 0: 25, 25 and 6."""
    seed: int = 0
    """Seed of the moments and of the ranks."""
    smoke: bool = False
    """Two kills of one short run."""


class Drill:
    """One case, as far as it has come."""

    def __init__(self, case: Case, config: Config) -> None:
        self.case, self._config = case, config
        self._folder = config.out / case.name.replace(" ", "-").replace("/", "-").replace(",", "")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._environment = Environment.current()
        own = [r for r in _records(config.out) if r.row == case.name]
        if other := {r.settings.get("kills") for r in own} - {case.kills}:
            raise ValueError(
                f"{config.out / RECORDS} holds {case.name!r} with {other.pop() or 'an unknown number of'} kills, not "
                f"{case.kills}; choose another --out"
            )
        self._kills = sum(r.settings["what"] == KILL for r in own)
        self.finished = any(r.settings["what"] == END for r in own)

    def run(self) -> None:
        """Kill it as often as is asked for, let it come to its end, and compare that with the run left alone."""
        alone = self._undisturbed()
        while self._kills < self.case.kills:
            self._record(KILL, self._kill())
            self._kills += 1
        self._record(END, {"verdict": self._compare(alone, self._to_the_end())})

    def _flags(self, out: Path, layout: str) -> list[str]:
        common = ("--evaluation-episodes", "0", "--checkpoint-minutes", "0", "--checkpoint-at-end", "--out", str(out))
        return [*self.case.flags, *common, "--layout", layout]

    def _undisturbed(self) -> Path:
        out = self._folder / "alone"
        if (found := _run_folder(out)) is not None and list(found.glob("policy.pt2")):
            return found
        shutil.rmtree(out, ignore_errors=True)
        with Victim(self._flags(out, self.case.layouts[0]), self._folder / "alone.log") as run:
            code = run.wait()
        found = _run_folder(out)
        if code or found is None:
            raise RuntimeError(f"the run left alone ended with code {code}; see {self._folder / 'alone.log'}")
        return found

    def _start(self, part: int) -> Victim:
        out, layout = self._folder / "killed", self.case.layouts[part % len(self.case.layouts)]
        found = _run_folder(out)
        arguments = self._flags(out, layout) if found is None else ["--resume", str(found), "--layout", layout]
        return Victim(arguments, self._folder / "killed.log")

    def _kill(self) -> dict[str, Value]:
        """Start or go on, kill, and go on until all is made good; what that took."""
        choice = random.Random(f"{self._config.seed} {self.case.name} {self._kills}")
        due = self.case.moments(self._config.seed)[self._kills]
        earlier = _run_folder(self._folder / "killed")
        before = 0 if earlier is None else _pid(earlier)
        with self._start(self._kills) as run:
            run.until(lambda: _run_folder(self._folder / "killed") is not None)
            folder = _run_folder(self._folder / "killed")
            if folder is None:
                raise RuntimeError(f"the run to be killed did not begin; see {self._folder / 'killed.log'}")
            run.until(lambda: _pid(folder) != before and progress_of(folder)[0] > 0)
            recovery = self._recovered(run, folder)
            run.until(lambda: progress_of(folder)[0] >= due)
            if choice.random() < 0.25:
                run.until(lambda: any(CheckpointFolder(folder).root.glob(f"*{DRAFT}")))
            else:
                deadline = time.monotonic() + choice.uniform(0, JITTER_S)
                run.until(lambda: time.monotonic() > deadline)
            if not run.alive:
                raise RuntimeError(
                    f"{self.case.name} came to its end before {self.case.kills} kills; give it more frames"
                )
            rank = run.kill_one(choice)
        frames, updates = progress_of(folder)
        manifests = CheckpointFolder(folder).manifests()
        resumed_at = manifests[0].frames if manifests else 0
        return {
            "rank": rank,
            "due": due,
            "frames": frames,
            "fraction": frames / self.case.frames,
            "updates": updates,
            "resumed_at": resumed_at,
            "updates_repeated": updates - (manifests[0].updates if manifests else 0),
            "while_writing": any(CheckpointFolder(folder).root.glob(f"*{DRAFT}")),
            "recovery_s": recovery,
        }

    def _recovered(self, run: Victim, folder: Path) -> float | None:
        """Wait until the run is where it was killed last; the seconds since its start. None for the first part."""
        last = [r for r in _records(self._config.out) if r.row == self.case.name and r.settings["what"] == KILL]
        if not last:
            return None
        goal = last[-1].values["frames"]
        assert isinstance(goal, int)
        run.until(lambda: progress_of(folder)[0] >= goal)
        return time.monotonic() - run.begin

    def _to_the_end(self) -> Path:
        with self._start(self._kills) as run:
            code = run.wait()
        folder = _run_folder(self._folder / "killed")
        if code or folder is None:
            raise RuntimeError(f"the killed run ended with code {code}; see {self._folder / 'killed.log'}")
        return folder

    def _compare(self, alone: Path, killed: Path) -> str:
        """``identical``, or what differs."""
        one, other = (torch.load(f / "weights.pt", weights_only=True) for f in (alone, killed))
        norm = sum(float((t.double() ** 2).sum()) for t in one.values()) ** 0.5
        error = sum(float(((one[n].double() - other[n].double()) ** 2).sum()) for n in one) ** 0.5 / norm
        rows = [
            [{k: v for k, v in r.items() if k not in NOT_THE_RUN} for r in read_progress(f)] for f in (alone, killed)
        ]
        if not self.case.same_layout:
            episodes = [[(r["frames"], r["episodes"], r.get("mean_return")) for r in part] for part in rows]
            verdict = "same episodes" if episodes[0] == episodes[1] else "OTHER EPISODES"
            return f"{verdict}, weights within {error:.1e} ({'met' if error <= BOUND else 'MISSED'}: ≤ {BOUND:g})"
        wrong = differences(contents(alone), contents(killed))
        wrong += ["progress"] * (rows[0] != rows[1]) + ["weights"] * any(not torch.equal(one[n], other[n]) for n in one)
        return f"DIFFERENT: {', '.join(wrong[:5])}" if wrong else "identical"

    def _record(self, what: str, values: dict[str, Value]) -> None:
        record = Record(
            experiment="kill_drill",
            row=self.case.name,
            round=self._kills,
            seed=self._config.seed,
            settings={
                "what": what,
                "flags": " ".join(self.case.flags),
                "layouts": " ".join(self.case.layouts),
                "kills": self.case.kills,
            },
            values=values,
            environment=self._environment,
        )
        append_records(self._config.out / RECORDS, [record])


def main(config: Config) -> None:
    """Drill every case and write the table."""
    config.out.mkdir(parents=True, exist_ok=True)
    for case in SMOKE if config.smoke else CASES:
        case = replace(case, kills=config.kills or case.kills)
        drill = Drill(case, config)
        if not drill.finished:
            drill.run()
    table = drill_table(_records(config.out))
    (config.out / "table.md").write_text(table.markdown())
    print(table.markdown())


def _records(out: Path) -> list[Record]:
    path = out / RECORDS
    return list(read_records(path)) if path.exists() else []


def _run_folder(out: Path) -> Path | None:
    """The folder of the run in ``out``, once it has a status."""
    return next((path.parent for path in out.glob("*/status.json")), None)


def _pid(folder: Path) -> int:
    """The process that wrote the run's status last; 0 for none."""
    try:
        return read_status(folder).pid
    except ValueError:
        return 0


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,)))
