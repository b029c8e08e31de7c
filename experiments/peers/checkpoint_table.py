"""The table and the bars of `experiments.checkpoint_cost`, as functions of its records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mpdqn.bench.tables import NOTHING, Table, decimals, spread, summarize
from mpdqn.records import Record, Value

QUIET = ("quiet before", "quiet between", "quiet after")
FULL, INCREMENTAL = "full beside training", "incremental beside training"
WAITED_FULL, WAITED_INCREMENTAL = "full, waited for", "incremental, waited for"
PEER = "torch.save"
TURNS = (QUIET[0], FULL, QUIET[1], INCREMENTAL, QUIET[2], WAITED_FULL, WAITED_INCREMENTAL, PEER)
"""What is measured in a round, one after the other."""

SLOWER = 1.10
"""The bar: how many times as long steps may take while a checkpoint is written."""

ROUNDS = 4
"""Rounds that it takes to call the bar met."""


@dataclass(frozen=True)
class Round:
    """The values of one round's turns, by turn."""

    turns: Mapping[str, Mapping[str, Value]]

    def value(self, turn: str, name: str) -> float:
        """A number of one turn."""
        value = self.turns[turn][name]
        assert isinstance(value, int | float)
        return float(value)

    def seconds(self, turn: str) -> tuple[float, ...]:
        """Of each of a turn's steps."""
        values = self.turns[turn]["step_s"]
        assert isinstance(values, list | tuple)
        return tuple(values)

    def quiet(self, turn: str) -> float:
        """Mean seconds of a step in the quiet turns on both sides of ``turn``."""
        place = TURNS.index(turn)
        steps = [*self.seconds(TURNS[place - 1]), *self.seconds(TURNS[place + 1])]
        return sum(steps) / len(steps)

    def slower(self, turn: str) -> float:
        """How many times as long steps took, from the start of a checkpoint until it was written."""
        return self.value(turn, "total_s") / (len(self.seconds(turn)) * self.quiet(turn))

    def lost(self, turn: str) -> float:
        """Seconds that training lost to a checkpoint."""
        return self.value(turn, "total_s") - len(self.seconds(turn)) * self.quiet(turn)


def rounds_of(records: Iterable[Record]) -> dict[int, Round]:
    """The turns of ``records`` by round."""
    turns: dict[int, dict[str, Mapping[str, Value]]] = {}
    for record in records:
        turns.setdefault(record.round, {})[str(record.settings["turn"])] = record.values
    return {number: Round(own) for number, own in sorted(turns.items())}


def bars(records: Iterable[Record]) -> tuple[str, ...]:
    """Return what the bar asks for and what was measured, a sentence for each kind.

    It is met by both the median of the rounds' ratios and the ratio of the medians, in at least `ROUNDS` rounds.
    """
    rounds, sentences = list(rounds_of(records).values()), []
    for what, turn in (("the first, full checkpoint", FULL), ("an incremental checkpoint", INCREMENTAL)):
        slower = summarize(r.slower(turn) for r in rounds)
        step_s = summarize(r.value(turn, "total_s") / len(r.seconds(turn)) for r in rounds).median
        of_medians = step_s / summarize(r.quiet(turn) for r in rounds).median
        verdict = "missed" if max(slower.median, of_medians) > SLOWER else "met"
        few = f": {ROUNDS} are needed to call it met" if len(rounds) < ROUNDS and verdict == "met" else ""
        sentences.append(
            f"bar {'undecided' if few else verdict}: steps while {what} is written take {spread(slower, 3)} × the "
            f"quiet ones' ({of_medians:.3f} by the medians), at most {SLOWER:.2f}, in {len(rounds)} "
            f"round{'s' * (len(rounds) != 1)}{few}"
        )
    return tuple(sentences)


Cell = Callable[[Round], float]


def checkpoint_table(records: Iterable[Record], notes: Iterable[str] = ()) -> Table:
    """One row for each quantity; a column for each kind of checkpoint and the peer, and their ratios within rounds."""
    taken = list(records)
    rounds = list(rounds_of(taken).values())

    def cells(full: Cell, incremental: Cell, peer: Cell | None, unit: float = 1.0) -> tuple[str, ...]:
        measured = [[cell(r) / unit for r in rounds] if cell else [] for cell in (full, incremental, peer)]
        *ours, theirs = measured
        ratios = [[a / b for a, b in zip(own, theirs, strict=True)] if theirs else [] for own in ours]
        return (*map(_told, measured), *(f"{_told(own)}×" if own else NOTHING for own in ratios))

    def of(turn: str, name: str) -> Cell:
        return lambda r: r.value(turn, name)

    def written(turn: str) -> Cell:
        return lambda r: r.value(turn, "tensor_bytes") + r.value(turn, "frame_bytes")

    saved, loaded, megabyte = of(PEER, "save_s"), of(PEER, "load_s"), 1e6
    rows = (
        ("steps while it is written, × quiet", *cells(_slower(FULL), _slower(INCREMENTAL), None)),
        ("updates while it is written", *cells(_count(FULL), _count(INCREMENTAL), None)),
        ("training loses, s", *cells(_lost(FULL), _lost(INCREMENTAL), saved)),
        ("of it copying, s", *cells(of(FULL, "copying_s"), of(INCREMENTAL, "copying_s"), None)),
        ("writing beside training, s", *cells(of(FULL, "writing_s"), of(INCREMENTAL, "writing_s"), None)),
        ("saving, waited for, s", *cells(of(WAITED_FULL, "save_s"), of(WAITED_INCREMENTAL, "save_s"), saved)),
        ("loading, s", *cells(of(WAITED_FULL, "load_s"), of(WAITED_INCREMENTAL, "load_s"), loaded)),
        ("of it taking digests, s", *cells(of(WAITED_FULL, "check_s"), of(WAITED_INCREMENTAL, "check_s"), None)),
        (
            "written, MB",
            *cells(written(WAITED_FULL), written(WAITED_INCREMENTAL), of(PEER, "file_bytes"), megabyte),
        ),
        (
            "of it tensors, MB",
            *cells(of(WAITED_FULL, "tensor_bytes"), of(WAITED_INCREMENTAL, "tensor_bytes"), None, megabyte),
        ),
        (
            "of it frames, MB",
            *cells(of(WAITED_FULL, "frame_bytes"), of(WAITED_INCREMENTAL, "frame_bytes"), None, megabyte),
        ),
    )
    settings = taken[0].settings
    quiet = [sum(r.seconds(t)) / len(r.seconds(t)) for r in rounds for t in QUIET]
    return Table(
        title=f"What a checkpoint costs: {settings['network']}, {settings['transitions']:,} transitions in replay",
        columns=("what", "full, the first", "incremental", PEER, f"full × {PEER}", f"incremental × {PEER}"),
        rows=rows,
        notes=(
            f"median [min–max] of {len(rounds)} rounds, in each of which all of it was measured, one after the other; "
            "ratios are taken within a round",
            f"a quiet step takes {spread(summarize(quiet), 2)} s: double DQN, batches of {settings['batch_size']} from "
            f"replay, {settings['threads']} threads, Adam; 32 transitions are stored after every 8th",
            "full: the first of a run, which writes all frames and copies to new memory; incremental: a later one, "
            f"{settings['new']:,} transitions after it",
            "steps while it is written: all time from the start of the copying until the step in which it was written "
            "ends; training loses what is above that many quiet steps, and with torch.save all the time it takes",
            "waited for: nothing else runs; a full and an incremental checkpoint of another run. Everything written is "
            "on the disk (fsync) when its time ends; everything loaded is read from the page cache, and put into the "
            f"networks, the optimizer and replay; {PEER} has no digests",
            *notes,
            *_environments(taken),
        ),
    )


def _slower(turn: str) -> Cell:
    return lambda r: r.slower(turn)


def _lost(turn: str) -> Cell:
    return lambda r: r.lost(turn)


def _count(turn: str) -> Cell:
    return lambda r: float(len(r.seconds(turn)))


def _told(values: list[float]) -> str:
    if not values:
        return NOTHING
    summary = summarize(values)
    return spread(summary, decimals(summary.median))


def _environments(records: Iterable[Record]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for record in records:
        e = record.environment
        versions = ", ".join(f"{name} {version}" for name, version in e.versions.items())
        found[
            f"{e.hardware}, {e.cores} cores; {versions}; commit {e.commit or 'unknown'}; command: {e.command}; seed "
            f"{record.seed}"
        ] = None
    return tuple(found)
