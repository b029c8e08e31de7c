"""The verdict on a comparison: which layout is fastest here, by how much, and what the others lose it to.

One step of a layout on k ranks, beside the single process with the same threads per rank (times within one round):

    0       ideal                                                                                step
    |─────────|── micro-batching ──|─ contention ─|─ imbalance ─|─ bubble ─|───── messages ─────|─ … ─|
     T(1) / k   (T(m) − T(1)) / k   slower passes   slowest rank    ramps     the rest of waiting

T(m) is the single process's step at m micro-batches. What is left after the measured parts is called other.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mpdqn.bench.rows import Row, best_single, ratios, rows_of
from mpdqn.bench.tables import Summary, spread, summarize
from mpdqn.records import Record

OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Where one layout's step goes beyond the ideal: seconds per step, medians over the rounds.

    Each part is taken within a round and at least 0, so that together they may exceed step − ideal. T(m) is the step of
    the single process at m micro-batches, with the same threads as one of the k ranks, and f = 1/k; if that was not
    measured, of the single process with as many threads as all ranks together, and f = 1. On a GPU threads do not
    matter.

    ideal: f·T(1).
    micro-batching: f·(T(µ) − T(1)). µ is d·m, where the single process's micro-batches are as small as this layout's;
        if that row was not measured, m. Not told apart from other if neither was (m > 1).
    contention: mean over ranks of ``compute_s``, minus f times that of T(µ): the same passes take longer beside other
        ranks, which share memory bandwidth, caches and clock. Where T(µ) had larger micro-batches, their size too.
    imbalance: max − mean over ranks of ``compute_s``: the others wait for the slowest stage or replica.
    bubble: waiting in the pipeline beyond imbalance, up to what simulation explains; ``bubble_measured`` and
        ``bubble_simulated`` are shares b of the pipeline's time, so that waiting is b / (1 − b) of ``compute_s``.
    messages: the rest of waiting, and ``exchange_s`` beyond the single process's: latency and bandwidth.
    optimizer: mean of ``optimizer_s``, minus f times the single process's: replicas repeat each other's update.
    other: what is left of the step.
    """

    step_s: float
    ideal_s: float
    parts: Mapping[str, float]

    def share(self, part: str) -> float:
        """The share of the step that goes to ``part``, at most all that the step is longer than the ideal."""
        return min(self.parts[part], max(0.0, self.step_s - self.ideal_s)) / self.step_s

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        return max(self.parts, key=lambda part: self.parts[part])


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Who is fastest: ``leader``, and the ``tied`` rows whose difference from it lies within the rounds' spread."""

    leader: str
    tied: tuple[str, ...]


def verdict(records: Iterable[Record]) -> str:
    """The comparison in one sentence. Independent processes side by side train nothing together and do not compete."""
    rows = {row.name: row for row in rows_of(records) if row.count("copies") == 1}
    if not rows:
        return "No layout was measured, only independent processes: there is nothing to compare."
    parallel = {name: row for name, row in rows.items() if not row.single}
    reference = best_single(rows.values())
    medians = {name: statistics.median(row.speeds.values()) for name, row in rows.items() if row.single}
    best = max(medians, key=lambda name: medians[name], default="")
    if not parallel:
        return f"{best} is the fastest single process here; no layout of several ranks or stages was measured."
    # The single processes compete as one: the best of each round, under the name that is best in the median.
    speeds = {name: row.speeds for name, row in parallel.items()}
    place = standing({best: reference} | speeds if reference else speeds, reference)
    if not reference:
        unknown = "no single process was measured, so by how much is unknown and no loss is attributed"
        return f"{_fastest(place, parallel)}; {unknown}."
    pace = {name: ratios(row.speeds, reference) for name, row in parallel.items()}
    losses = _losses({name: row for name, row in parallel.items() if name != place.leader}, _breakdown(rows.values()))
    if place.leader == best:
        next_ = max(parallel, key=lambda name: statistics.median(pace[name] or [0.0]))
        head = f"The single process ({best}) {_leads(place)}"
        head += f": {next_} reaches {_times(pace[next_])} of it" if pace[next_] else ""
    elif best in place.tied:
        head = (
            f"{_fastest(place, parallel)}; it reaches {_times(pace[place.leader])} of {best}, the best single process"
        )
    else:
        head = f"{_fastest(place, parallel)}, {_times(pace[place.leader])} the best single process ({best})"
    return "; ".join(filter(None, (head, losses))) + "."


def standing(speeds: Mapping[str, Mapping[int, float]], reference: Mapping[int, float]) -> Standing:
    """The fastest of some rows, and who ties with it.

    The leader has the largest median of ``speeds`` over ``reference``, within the rounds; of the speeds themselves if
    there is no reference. A row ties unless the leader was faster in every round that both have, and two at least are
    needed to tell.

    Args:
        speeds: transitions/s by round, for each row.
        reference: transitions/s of the best single process by round.
    """
    paces = {name: ratios(s, reference) if reference else list(s.values()) for name, s in speeds.items()}
    leader = max(paces, key=lambda name: statistics.median(paces[name] or [0.0]))
    tied = []
    for name in speeds:
        paired = ratios(speeds[leader], speeds[name])
        if name != leader and (len(paired) < 2 or min(paired) <= 1.0):
            tied.append(name)
    return Standing(leader=leader, tied=tuple(tied))


def breakdown(records: Iterable[Record]) -> dict[str, Loss | None]:
    """The `Loss` of every layout that is more than one process alone.

    None (not attributed) for oversubscribed layouts, whose ranks have no core or device of their own to lose time on,
    and where the single process at m = 1 with the same threads was not measured.
    """
    return _breakdown([row for row in rows_of(records) if row.count("copies") == 1])


def _breakdown(rows: Iterable[Row]) -> dict[str, Loss | None]:
    rows = tuple(rows)
    singles = [row for row in rows if row.single]
    return {row.name: _loss(row, singles) for row in rows if not row.single}


def _loss(row: Row, singles: Sequence[Row]) -> Loss | None:
    alone, scale = _comparable(row, singles)
    m, d = row.count("num_microbatches"), row.count("data")
    if 1 not in alone or row.setting("oversubscribed"):
        return None
    whole, cut = alone[1], alone.get(d * m, alone.get(m))
    shared = [r for r in row.rounds if r in whole.rounds and (cut is None or r in cut.rounds)]
    if not shared:
        return None
    parts = [_parts(row, whole, cut, scale, r) for r in shared]
    return Loss(
        step_s=statistics.median(row.number(r, "step_s") for r in shared),
        ideal_s=statistics.median(scale * whole.number(r, "step_s") for r in shared),
        parts={name: statistics.median(part[name] for part in parts) for name in parts[0]},
    )


def _waiting(bubble: float | None, compute: Sequence[float]) -> float:
    """Seconds of waiting beside ``compute`` where it makes up the share ``bubble`` of the two together."""
    return statistics.mean(compute) * bubble / (1 - bubble) if bubble and bubble < 1 else 0.0


def _comparable(row: Row, singles: Sequence[Row]) -> tuple[dict[int, Row], float]:
    """The single process by its m, with the threads that `Loss` asks for, and f."""
    k, threads = row.count("ranks"), row.count("threads")
    if row.setting("device") != "cpu":
        return {s.count("num_microbatches"): s for s in singles}, 1 / k
    for wanted, scale in ((threads, 1 / k), (k * threads, 1.0)):
        alone = {s.count("num_microbatches"): s for s in singles if s.count("threads") == wanted}
        if 1 in alone:
            return alone, scale
    return {}, 1.0


def _parts(row: Row, whole: Row, cut: Row | None, scale: float, r: int) -> dict[str, float]:
    """The parts of round ``r`` as `Loss` defines them, in seconds; ``cut`` is the single process at µ micro-batches."""
    step, ideal = row.number(r, "step_s"), scale * whole.number(r, "step_s")
    compute, exchange, optimizer = (row.per_rank(r, key) for key in ("compute_s", "exchange_s", "optimizer_s"))
    imbalance = max(compute) - statistics.mean(compute)
    waiting, ramps = (_waiting(row.value(r, k), compute) for k in ("bubble_measured", "bubble_simulated"))
    bubble = min(max(0.0, waiting - imbalance), ramps)
    alone = cut or whole
    sending = statistics.mean(exchange) - scale * alone.per_rank(r, "exchange_s")[0]
    parts = {
        "imbalance": imbalance,
        "bubble": bubble,
        "messages": sending + waiting - imbalance - bubble,
        "optimizer": statistics.mean(optimizer) - scale * alone.per_rank(r, "optimizer_s")[0],
    }
    if cut is not None:
        parts["micro-batching"] = scale * cut.number(r, "step_s") - ideal
        parts["contention"] = statistics.mean(compute) - scale * cut.per_rank(r, "compute_s")[0]
    parts = {name: max(0.0, seconds) for name, seconds in parts.items()}
    parts[OTHER] = max(0.0, step - ideal - sum(parts.values()))
    return parts


def _losses(rows: Mapping[str, Row], losses: Mapping[str, Loss | None]) -> str:
    """What each of the rows that did not win loses most of its step to; the unknown ones last."""
    known = {name: loss for name in rows if (loss := losses[name]) is not None}
    clauses = []
    for name, loss in known.items():
        percent = f"{100 * loss.share(loss.largest):.0f} %"
        if percent == "0 %":
            clauses.append(f"{name} under 1 %")
        else:
            clauses.append(
                f"{name} {percent} " + ("to causes not measured" if loss.largest == OTHER else f"to {loss.largest}")
            )
    crowded = [name for name, row in rows.items() if name not in known and row.setting("oversubscribed")]
    unknown = [name for name in rows if name not in known and name not in crowded]
    sentences = ["of its step time, " + _first_loses(clauses)] if clauses else []
    sentences += [f"{_listed(crowded)} {_are(crowded)} oversubscribed"] if crowded else []
    sentences += [f"the loss of {_listed(unknown)} is not attributed"] if unknown else []
    return "; ".join(sentences)


def _first_loses(clauses: Sequence[str]) -> str:
    name, rest = clauses[0].split(" ", 1)
    return _listed([f"{name} loses {rest}", *clauses[1:]])


def _fastest(place: Standing, rows: Mapping[str, Row]) -> str:
    crowded = " (oversubscribed)" if rows[place.leader].setting("oversubscribed") else ""
    return f"{place.leader}{crowded} {_leads(place)}"


def _leads(place: Standing) -> str:
    if place.tied:
        return f"leads here in the median but is not distinguishable from {_listed(place.tied)}"
    return "is fastest here"


def _times(values: Sequence[float]) -> str:
    summary: Summary = summarize(values)
    return spread(summary, 2).replace(" ", "× ", 1)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
