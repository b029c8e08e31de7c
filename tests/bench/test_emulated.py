"""Emulated stages sleep where they should and compute what they promise; rows are what the simulator is told."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mpdqn.bench import emulated
from mpdqn.bench.emulated import FRAMES, WIDTH, Sleeper, StageSeconds, emulated_network, emulated_times
from mpdqn.bench.emulated_row import EmulatedRow
from mpdqn.bench.emulated_turns import shortened_note
from mpdqn.bench.single import random_batch
from mpdqn.dqn.agents import double_dqn
from mpdqn.learner import Learner, LearnerConfig
from mpdqn.mesh import Mesh, World
from mpdqn.plan import Partition, Plan
from mpdqn.records import Environment, Record
from mpdqn.schedule import Action

SECONDS = StageSeconds(forward_s=1.0, backward_input_s=10.0, backward_weight_s=100.0)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept, in place of the sleeping."""
    naps: list[float] = []
    monkeypatch.setattr(Sleeper, "sleep", lambda self, seconds, since=None: naps.append(seconds))
    return naps


def total(naps: list[float], work: Callable[[], object]) -> float:
    naps.clear()
    work()
    return sum(naps)


def test_forward_sleeps_with_and_without_gradient(slept: list[float]) -> None:
    network = emulated_network([SECONDS] * 3)
    frames = torch.randint(256, (5, *FRAMES), dtype=torch.uint8)
    assert total(slept, lambda: network(frames)) == 3.0
    with torch.no_grad():
        assert total(slept, lambda: network(frames)) == 3.0
        assert network(frames).shape == (5, WIDTH)


def test_backward_sleeps_for_input_and_weight_apart(slept: list[float]) -> None:
    _, later = emulated_network([SECONDS] * 2)
    x = torch.rand(5, WIDTH, requires_grad=True)
    weight = later.get_parameter("weight")

    def gradient(*of: Tensor) -> Callable[[], object]:
        y = later(x).sum()
        return lambda: torch.autograd.grad(y, of)

    assert total(slept, gradient(x)) == 10.0
    assert total(slept, gradient(weight)) == 100.0
    assert total(slept, gradient(x, weight)) == 110.0


def test_the_first_stage_has_only_a_weight_part(slept: list[float]) -> None:
    (first,) = emulated_network([SECONDS])
    y = first(torch.randint(256, (5, *FRAMES), dtype=torch.uint8)).sum()
    assert total(slept, y.backward) == 110.0


def test_gradients_are_those_of_a_product() -> None:
    nothing = StageSeconds(forward_s=0.0, backward_input_s=0.0, backward_weight_s=0.0)
    network = emulated_network([nothing] * 2).double()
    frames = torch.randint(256, (5, *FRAMES), dtype=torch.uint8)
    y = network(frames)
    first, second = (layer.get_parameter("weight").detach().clone().requires_grad_() for layer in network)
    expected = frames.flatten(1).double() / 255 @ first @ second
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for layer, weight in zip(network, (first, second), strict=True):
        torch.testing.assert_close(layer.get_parameter("weight").grad, weight.grad)


def test_sleeps_are_on_average_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    late = iter([0.25, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0])

    def nap(seconds: float) -> None:
        assert seconds >= 0
        clock[0] += seconds + next(late)

    monkeypatch.setattr(emulated, "MOST_LATE", 4.0)
    monkeypatch.setattr(emulated.time, "sleep", nap)
    monkeypatch.setattr(emulated.time, "perf_counter", lambda: clock[0])
    sleeper = Sleeper()
    ends = []
    for _ in range(12):
        sleeper.sleep(1.0)
        ends.append(clock[0])
    assert ends[:7] == [1.25, 2.0, 6.0, 6.0, 6.0, 6.0, 7.0], "three seconds late: the next three take no time"
    assert ends[7:] == [17.0, 17.0, 17.0, 17.0, 17.0], "of nine seconds, four"
    begin = clock[0]
    clock[0] += 0.5
    sleeper.sleep(1.0, since=begin)
    assert clock[0] == begin + 1.0, "what was done since counts"
    assert copy.deepcopy(sleeper) is sleeper


def test_a_real_sleep_takes_time() -> None:
    (stage,) = emulated_network([StageSeconds(forward_s=0.02, backward_input_s=0.01, backward_weight_s=0.01)])
    begin = time.perf_counter()
    y = stage(torch.zeros((1, *FRAMES), dtype=torch.uint8))
    middle = time.perf_counter()
    y.sum().backward()
    assert middle - begin >= 0.02
    assert time.perf_counter() - begin >= 0.04


def row(schedule: str, virtual: int = 1) -> EmulatedRow:
    stages = (SECONDS,) * (2 * virtual)
    return EmulatedRow(
        name=schedule,
        schedule=schedule,
        pipeline=2,
        num_microbatches=4,
        stages=stages,
        batch_size=8,
        agent=double_dqn(),
    )


@pytest.mark.parametrize(("schedule", "virtual"), [("1f1b", 1), ("td1f1b", 1), ("tdzb", 1), ("zbv", 2)])
def test_every_action_sleeps_as_the_simulator_is_told(slept: list[float], schedule: str, virtual: int) -> None:
    """The learner runs the row's table in one process; each action's sleep is what `emulated_times` says."""
    wanted = row(schedule, virtual)
    parallelism = wanted.plan.parallelism
    plan = Plan.stacked(Partition(boundaries=tuple(range(len(wanted.stages) + 1))), parallelism)
    seen: dict[Action, float] = {}
    with World.open() as world:
        learner = Learner(
            emulated_network(wanted.stages),
            mesh=Mesh(world, plan, wanted.letters),
            agent=double_dqn(),
            batch_size=wanted.batch_size,
            observation_shape=FRAMES,
            config=LearnerConfig(lookahead=1),
            table=wanted.table,
        )
        first, second = (random_batch(FRAMES, WIDTH, wanted.batch_size, seed) for seed in range(2))
        learner.learn(first, second)
        mark = learner.stopwatch.mark

        def note(kind: str, begin: object, stage: int = -1, microbatch: int = -1) -> None:
            seen[Action(stage, kind, microbatch)] = sum(slept)
            slept.clear()
            mark(kind, begin, stage, microbatch)  # type: ignore[arg-type]

        learner.stopwatch.mark = note  # type: ignore[method-assign]
        slept.clear()
        learner.learn(second, first)
    assert {a: s for a, s in seen.items() if a.stage >= 0} == {a: wanted.times.of(a) for a in wanted.table.actions}


def test_rows_of_equal_stages_give_the_known_paces() -> None:
    unit = StageSeconds(forward_s=1.0, backward_input_s=1.0, backward_weight_s=1.0)

    def utilisation(schedule: str, forward: float = 1.0, *, alone: bool = False) -> float:
        stage = StageSeconds(forward_s=forward, backward_input_s=1.0, backward_weight_s=1.0)
        made = EmulatedRow(
            name="",
            schedule=schedule,
            pipeline=4,
            num_microbatches=8,
            stages=(stage,) * 4,
            batch_size=8,
            agent=None if alone else double_dqn(),
        )
        assert made.work_s == 4 * 8 * 5
        return made.simulated.mean_utilisation

    assert utilisation("1f1b") == pytest.approx(0.816, abs=1e-3)
    assert utilisation("td1f1b") == pytest.approx(0.952, abs=1e-3)
    assert utilisation("1f1b", 3.0, alone=True) == pytest.approx(0.727, abs=1e-3)
    assert emulated_times([unit] * 2, "T").of(Action(0, "I", 0)) == 0.0


def test_recomputation_runs_every_forward_again() -> None:
    made = EmulatedRow(
        name="",
        schedule="gpipe",
        pipeline=2,
        num_microbatches=4,
        stages=(SECONDS,) * 2,
        batch_size=8,
        recompute=True,
    )
    assert made.plan.recompute == ("all", "all")
    assert made.work_s == 2 * 4 * (1 + 1 + 110)
    steps = {span.step for span in made.simulated_timeline(2).spans}
    assert steps == {0, 1}


def test_what_late_wake_ups_took_off_later_sleeps_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    late = iter([0.25, 0.0, 3.0, 0.0, 0.0, 0.0])

    def nap(seconds: float) -> None:
        clock[0] += seconds + next(late)

    monkeypatch.setattr(emulated, "MOST_LATE", 1.5)
    monkeypatch.setattr(emulated.time, "sleep", nap)
    monkeypatch.setattr(emulated.time, "perf_counter", lambda: clock[0])
    sleeper, shortened = Sleeper(), []
    for _ in range(6):
        sleeper.sleep(1.0)
        shortened.append(sleeper.shortened_s)
    # 0.25 off the second; of three seconds 1.5 are kept: one off the fourth, which has no more, and 0.5 off the fifth.
    assert shortened == [0.0, 0.25, 0.25, 1.25, 1.75, 1.75]


@pytest.mark.parametrize(("shortened", "told"), [(0.002, "2.0 [2.0–2.0] ms of an update"), (None, "do not hold")])
def test_the_note_says_by_how_much_sleeps_were_shortened(shortened: float | None, told: str) -> None:
    record = Record(
        experiment="",
        row="",
        round=0,
        seed=0,
        settings={},
        values={"step_s": 0.1} | ({} if shortened is None else {"shortened_s": shortened}),
        environment=Environment.current(),
    )
    note = shortened_note([record])
    assert told in note
    assert "at most 5 ms each" in note
    assert ("2.0% of it" in note) == (shortened is not None)
