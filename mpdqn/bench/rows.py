"""`Row`: the records of one layout, read with care.

records ─ rows_of ─▶ rows × rounds ─ ratios ─▶ within a round, because the machine drifts between rounds
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mpdqn.records import Record, Value

EXPERIMENT = "compare"


@dataclass(frozen=True, kw_only=True)
class Row:
    """The records of one layout, by round."""

    name: str
    rounds: Mapping[int, Record]

    def setting(self, key: str, otherwise: Value = None) -> Value:
        """The setting ``key``, the same in every round.

        ``otherwise`` stands for it in records of versions that did not write it; ValueError if that is None.
        """
        if otherwise is not None and key not in next(iter(self.rounds.values())).settings:
            return otherwise
        return _read(next(iter(self.rounds.values())), "settings", key)

    def count(self, key: str) -> int:
        """The setting ``key``, a whole number; ValueError if it is none."""
        value = self.setting(key)
        if not isinstance(value, int):
            raise ValueError(f"setting {key!r} of row {self.name!r} is {value!r} but must be a whole number")
        return value

    def value(self, round_: int, key: str) -> float | None:
        """The measured value ``key`` of a round, None if it was left out there; ValueError if it is no number."""
        value = _read(self.rounds[round_], "values", key)
        if value is None or isinstance(value, int | float):
            return value
        raise ValueError(f"value {key!r} of row {self.name!r}, round {round_}, is {value!r} but must be a number")

    def known(self, key: str) -> list[float]:
        """The measured value ``key`` of each round in which it was not left out."""
        return [value for round_ in self.rounds if (value := self.value(round_, key)) is not None]

    def number(self, round_: int, key: str) -> float:
        """`value`, where it must not be left out."""
        value = self.value(round_, key)
        if value is None:
            raise ValueError(f"value {key!r} of row {self.name!r}, round {round_}, is null but must be a number")
        return value

    def per_rank(self, round_: int, key: str) -> tuple[float, ...]:
        """The measured value ``key`` of each rank in a round; ValueError if it is no list of numbers."""
        values = _read(self.rounds[round_], "values", key)
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(
                f"value {key!r} of row {self.name!r}, round {round_}, is {values!r} but must list a number per rank"
            )
        return tuple(float(value) for value in values)

    @property
    def speeds(self) -> dict[int, float]:
        """Transitions/s of each round."""
        return {round_: self.number(round_, "transitions_per_s") for round_ in self.rounds}

    @property
    def single(self) -> bool:
        """Whether this is one process on its own: what every other layout is compared with."""
        return self.count("data") == self.count("pipeline") == self.count("copies") == 1


def rows_of(records: Iterable[Record]) -> tuple[Row, ...]:
    """The layouts of a comparison, in the order in which they were measured.

    Raises:
        ValueError: if there are no records of a comparison, or two contradict each other.
    """
    rounds: dict[str, dict[int, Record]] = {}
    for record in records:
        if record.experiment == EXPERIMENT:
            row = rounds.setdefault(record.row, {})
            if record.round in row:
                raise ValueError(f"row {record.row!r} has two records of round {record.round}; keep one run per folder")
            row[record.round] = record
    if not rounds:
        raise ValueError(f"there are 0 records of experiment {EXPERIMENT!r}; run `mpdqn compare` first")
    for name, row in rounds.items():
        first, *others = row.values()
        if any(other.settings != first.settings for other in others):
            raise ValueError(f"the rounds of row {name!r} have different settings; keep one run per folder")
    return tuple(Row(name=name, rounds=dict(sorted(row.items()))) for name, row in rounds.items())


def best_single(rows: Iterable[Row]) -> dict[int, float]:
    """Transitions/s of the best single process in each round that has one."""
    best: dict[int, float] = {}
    for row in rows:
        if row.single:
            for round_, speed in row.speeds.items():
                best[round_] = max(best.get(round_, 0.0), speed)
    return best


def ratios(speeds: Mapping[int, float], reference: Mapping[int, float]) -> list[float]:
    """``speeds`` over ``reference``, within each round that both have."""
    return [speed / reference[round_] for round_, speed in speeds.items() if round_ in reference]


def _read(record: Record, part: str, key: str) -> Value:
    mapping: Mapping[str, Value] = getattr(record, part)
    if key not in mapping:
        raise ValueError(
            f"the record of row {record.row!r}, round {record.round}, has no {key!r} among its {part} "
            f"({', '.join(mapping)}); it was written by another version: measure again"
        )
    return mapping[key]
