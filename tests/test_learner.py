"""`Learner` against a Double DQN loop in plain PyTorch, and everything that it refuses."""

from __future__ import annotations

import copy
import itertools
import re
from collections import OrderedDict
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from mpdqn.bench.single import random_batch
from mpdqn.dqn.agents import double_dqn, make_agent
from mpdqn.dqn.batch import Batch
from mpdqn.exchange.reduction import Reduction
from mpdqn.exchange.synchronous import SynchronousExchange
from mpdqn.learner import Learner, LearnerConfig, LearnStep, gather_by_name
from mpdqn.mesh import Mesh, World
from mpdqn.networks import make_network
from mpdqn.pipeline.stopwatch import Stopwatch
from mpdqn.plan import Parallelism, Partition, Plan
from mpdqn.schedule import SCHEDULES, ActionTable, action_table
from tests.distributed import run_ranks

FRAMES, ACTIONS, BATCH = (4, 44, 44), 5, 16
WHOLE, HALVES, THIRDS, QUARTERS = (0, 11), (0, 6, 11), (0, 4, 8, 11), (0, 3, 5, 8, 11)


def network() -> nn.Sequential:
    return make_network("nature", FRAMES, ACTIONS, fc=32, seed=3).double()


def batch(update: int, size: int = BATCH) -> Batch:
    """Transitions with ends of episodes and unequal weights, float64 as the network."""
    drawn = random_batch(FRAMES, ACTIONS, size, update)
    return Batch(
        obs=drawn.obs,
        next_obs=drawn.next_obs,
        action=drawn.action,
        reward=3 * drawn.reward.double(),
        discount=torch.where(drawn.index % 4 == 0, 0.0, 0.9).double(),
        weight=0.25 + (drawn.index % 5).double() / 4,
        index=drawn.index,
    )


def build(
    world: World,
    boundaries: tuple[int, ...] = WHOLE,
    m: int = 1,
    *,
    schedule: str = "gpipe",
    agent: str = "double_dqn",
    data: int = 1,
    stacked: bool = True,
    chain: nn.Sequential | None = None,
    size: int = BATCH,
    table: ActionTable | None = None,
    **config: Any,
) -> Learner:
    partition = Partition(boundaries=boundaries)
    virtual = SCHEDULES[schedule].virtual
    parallelism = Parallelism(
        data=data, pipeline=partition.num_stages // virtual, num_microbatches=m, schedule=schedule, virtual=virtual
    )
    plan = (Plan.stacked if stacked else Plan.rectangular)(partition, parallelism)
    made = make_agent(agent)
    return Learner(
        network() if chain is None else chain,
        mesh=Mesh(world, plan, made.letters),
        agent=made,
        batch_size=size,
        observation_shape=FRAMES,
        config=LearnerConfig(**config),
        table=table,
    )


def learn(learner: Learner, updates: int, first: int = 0) -> list[LearnStep]:
    """``updates`` updates of one process, each batch announced before it is learned from where that is the rule."""
    batches = [batch(update) for update in range(first, first + updates + 1)]
    pairs = itertools.pairwise(batches)
    return [learner.learn(now, upcoming if learner.config.lookahead else None) for now, upcoming in pairs]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """‖a − b‖₂ / ‖b‖₂ over all tensors together."""
    assert a.keys() == b.keys()
    difference = sum(float((a[name] - b[name]).square().sum()) for name in b)
    return float((difference / sum(float(t.square().sum()) for t in b.values())) ** 0.5)


# The oracle


def plain_double_dqn(
    updates: int,
    *,
    target_period: int,
    learning_rate: float,
    adam_eps: float,
    max_grad_norm: float,
    double: bool,
    tau: float = 1.0,
) -> tuple[dict[str, Tensor], list[float], list[float], list[Tensor]]:
    """Double DQN as its paper and torch's tutorials write it; nothing of mpdqn but the network's layers."""
    online = network()
    start = {name: p.detach().clone() for name, p in online.named_parameters()}
    target = copy.deepcopy(online)
    optimizer = torch.optim.Adam(online.parameters(), lr=learning_rate, eps=adam_eps, foreach=False)
    losses, norms, errors = [], [], []
    for update in range(1, updates + 1):
        b = batch(update - 1)
        with torch.no_grad():
            chooser = online if double else target
            best = chooser(b.next_obs).argmax(1, keepdim=True)
            bootstrap = target(b.next_obs).gather(1, best)[:, 0]
        error = online(b.obs).gather(1, b.action[:, None])[:, 0] - (b.reward + b.discount * bootstrap)
        loss = torch.where(error.abs() <= 1, error**2 / 2, error.abs() - 0.5).mul(b.weight).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(online.parameters(), max_grad_norm)))
        optimizer.step()
        if update % target_period == 0:
            with torch.no_grad():
                for old, new in zip(target.parameters(), online.parameters(), strict=True):
                    old.copy_(tau * new + (1 - tau) * old)
        losses.append(loss.item())
        errors.append(error.detach())
    change = {name: p.detach() - start[name] for name, p in online.named_parameters()}
    return change, losses, norms, errors


RULE = {"target_period": 4, "learning_rate": 1e-2, "adam_eps": 1.5e-4, "max_grad_norm": 0.5}


@pytest.mark.parametrize(
    ("boundaries", "m", "schedule"),
    [(WHOLE, 1, "gpipe"), (WHOLE, 4, "gpipe"), (HALVES, 1, "1f1b"), (THIRDS, 2, "gpipe"), (THIRDS, 8, "1f1b")],
)
@pytest.mark.parametrize("agent", ["double_dqn", "dqn"])
def test_it_learns_what_a_plain_loop_learns(
    alone: World, boundaries: tuple[int, ...], m: int, schedule: str, agent: str
) -> None:
    change, losses, norms, errors = plain_double_dqn(6, double=agent == "double_dqn", **RULE)
    assert max(norms) > RULE["max_grad_norm"], "clipping is part of what is compared"
    learner = build(alone, boundaries, m, schedule=schedule, agent=agent, **RULE)
    start = {name: p.detach().clone() for name, p in learner.named_parameters()}
    steps = [learner.learn(batch(update)) for update in range(6)]
    assert [step.update for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.loss.item() for step in steps] == pytest.approx(losses, rel=1e-10)
    assert [step.grad_norm.item() for step in steps] == pytest.approx(norms, rel=1e-10)
    for step, error in zip(steps, errors, strict=True):
        assert step.td_errors is not None
        assert distance({"": step.td_errors}, {"": error}) < 1e-10
        assert step.td_errors.shape == (BATCH,)
        assert step.bytes_sent == 0
    learned = {name: p.detach() - start[name] for name, p in learner.named_parameters()}
    assert distance(learned, change) < 1e-10


@pytest.mark.parametrize(
    ("boundaries", "m", "schedule"),
    [(HALVES, 4, "1f1b"), (HALVES, 4, "td1f1b"), (THIRDS, 2, "tdzb"), (QUARTERS, 2, "zbv"), (WHOLE, 2, "td1f1b")],
)
@pytest.mark.parametrize("rule", [{"lookahead": 1}, {"target_tau": 0.3, "lookahead": 1}, {"accumulation": 4}])
def test_every_rule_learns_what_a_plain_loop_learns(
    alone: World, boundaries: tuple[int, ...], m: int, schedule: str, rule: dict[str, Any]
) -> None:
    """A batch that is announced early, a target that follows softly and a batch in parts are the same updates."""
    change, losses, norms, errors = plain_double_dqn(6, double=True, tau=rule.get("target_tau", 1.0), **RULE)
    learner = build(alone, boundaries, m, schedule=schedule, **RULE, **rule)
    start = {name: p.detach().clone() for name, p in learner.named_parameters()}
    steps = learn(learner, 6)
    assert [step.loss.item() for step in steps] == pytest.approx(losses, rel=1e-10)
    assert [step.grad_norm.item() for step in steps] == pytest.approx(norms, rel=1e-10)
    for step, error in zip(steps, errors, strict=True):
        assert step.td_errors is not None
        assert distance({"": step.td_errors}, {"": error}) < 1e-10
    learned = {name: p.detach() - start[name] for name, p in learner.named_parameters()}
    assert distance(learned, change) < 1e-10


def test_sgd_takes_the_clipped_gradient(alone: World) -> None:
    """Against `clip_grad_norm_` over the whole network, though the stages know only their own gradients."""
    learner = build(alone, THIRDS, 4, optimizer="sgd", learning_rate=1.0, max_grad_norm=0.125)
    free = build(alone, THIRDS, 4, optimizer="sgd", learning_rate=1.0, max_grad_norm=float("inf"))
    norms = [each.learn(batch(0)).grad_norm.item() for each in (learner, free)]
    before = dict(network().named_parameters())
    taken = {name: before[name].detach() - p.detach() for name, p in learner.named_parameters()}
    whole = {name: before[name].detach() - p.detach() for name, p in free.named_parameters()}
    for name, p in before.items():
        p.grad = whole[name].clone()
    norm = nn.utils.clip_grad_norm_(before.values(), 0.125)
    assert norms == pytest.approx([float(norm)] * 2, rel=1e-12), "the norm before clipping, whatever is clipped"
    assert float(norm) > 0.125
    clipped = {name: p.grad for name, p in before.items() if p.grad is not None}
    assert distance(taken, clipped) < 1e-12


def test_a_small_gradient_is_not_clipped(alone: World) -> None:
    learner = build(alone, HALVES, 2, optimizer="sgd", learning_rate=1.0, max_grad_norm=1e6)
    free = build(alone, HALVES, 2, optimizer="sgd", learning_rate=1.0, max_grad_norm=float("inf"))
    for each in (learner, free):
        each.learn(batch(0))
    assert all(torch.equal(a, b) for a, b in zip(learner.parameters(), free.parameters(), strict=True))


def test_the_target_is_refreshed_every_target_period_updates(alone: World) -> None:
    learner = build(alone, HALVES, 2, target_period=3)

    def equal() -> list[bool]:
        return [
            all(torch.equal(a, b) for a, b in zip(s.online.parameters(), s.target.parameters(), strict=True))
            for s in learner.stages
        ]

    assert equal() == [True, True]
    seen = []
    for update in range(7):
        learner.learn(batch(update))
        seen.append(equal())
    same, other = [True, True], [False, False]
    assert seen == [other, other, same, other, other, same, other]
    assert not any(p.requires_grad for stage in learner.stages for p in stage.target.parameters())


def test_td_errors_are_in_the_order_of_the_batch(alone: World) -> None:
    """Each row's error is that of a batch in which it stands alone."""
    learner = build(alone, THIRDS, 8, schedule="1f1b")
    own = build(alone, size=1)
    whole = batch(0)
    together = learner.learn(whole).td_errors
    assert together is not None
    for i in (0, 1, 7, 15):
        error = own.learn(whole.rows(i, i + 1)).td_errors
        own = build(alone, size=1)
        assert error is not None
        assert together[i].item() == pytest.approx(error.item(), rel=1e-9)


def test_looking_at_the_network_first_changes_nothing(alone: World) -> None:
    """DQN acts before it learns: forwards before the first update, with gradient and without, leave no trace."""
    fresh, used = build(alone, HALVES, 2), build(alone, HALVES, 2)
    frames = batch(9).obs
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            values = used.stages[1].online(used.stages[0].online(frames))
            used.stages[1].target(used.stages[0].target(frames))
    values.sum().backward()
    for update in range(3):
        step, other = fresh.learn(batch(update)), used.learn(batch(update))
        assert torch.equal(step.loss, other.loss)
        used.stages[0].online(frames)  # and between updates
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), used.parameters(), strict=True))


def test_float32_networks_take_batches_of_any_float(alone: World) -> None:
    learner = build(alone, HALVES, 2, chain=network().float())
    step = learner.learn(batch(0))
    assert step.td_errors is not None
    assert (step.loss.dtype, step.td_errors.dtype) == (torch.float32, torch.float32)


def test_the_timeline_of_an_update(alone: World) -> None:
    learner = build(alone, HALVES, 4)
    learner.learn(batch(0))
    timeline = learner.timeline()
    kinds = [span.kind for span in timeline.spans]
    assert {kind: kinds.count(kind) for kind in "TDFB"} == dict.fromkeys("TDFB", 2 * 4)
    assert kinds[-2:] == ["exchange", "optimizer"]
    assert all(0 <= span.start <= span.end <= timeline.seconds for span in timeline.spans)
    assert {(s.stage, s.microbatch) for s in timeline.spans if s.kind == "B"} == {
        (j, i) for j in (0, 1) for i in range(4)
    }


def test_gather_by_name_of_one_process(alone: World) -> None:
    learner = build(alone, THIRDS, 2)
    learner.learn(batch(0))
    gathered = gather_by_name(learner, {name: p.grad for name, p in learner.named_parameters() if p.grad is not None})
    assert list(gathered) == [name for name, _ in network().named_parameters()]
    assert not any(t.requires_grad for t in gathered.values())


# Passes that run ahead


@pytest.mark.parametrize(
    ("schedule", "lookahead", "late"),
    [
        ("td1f1b", 1, [1, 0, 0, 1, 0, 0, 1]),
        ("tdzb", 1, [1, 0, 0, 1, 0, 0, 1]),
        ("td1f1b", 0, [0] * 7),
        ("1f1b", 1, [0] * 7),
    ],
)
def test_late_passes_are_counted(alone: World, schedule: str, lookahead: int, late: list[int]) -> None:
    """One at the first update, for which nothing was prepared, and one after each change of the target."""
    learner = build(alone, HALVES, 2, schedule=schedule, lookahead=lookahead, target_period=3)
    kinds = []
    for update in range(7):
        (step,) = learn(learner, 1, update) if not lookahead else [learn_on(learner, update)]
        assert step.late_passes == late[update]
        kinds.append([span.kind for span in learner.timeline().spans])
    passes = 2 * 2
    for update, seen in enumerate(kinds):
        ahead = lookahead and schedule != "1f1b"
        early = passes * ((update + 1) % 3 != 0) if ahead else passes
        assert (seen.count("T"), seen.count("D")) == (early + passes * late[update], passes)
        assert seen.count("late") == late[update]


BATCHES = [batch(update) for update in range(9)]


def learn_on(learner: Learner, update: int) -> LearnStep:
    return learner.learn(BATCHES[update], BATCHES[update + 1])


def test_a_target_that_changes_at_every_update_leaves_nothing_to_run_ahead(alone: World) -> None:
    """As soft updates do. It learns the same; that the schedule has no effect is said."""
    rule = {**RULE, "target_period": 1, "target_tau": 0.2}
    message = "target_period 1 changes the target at every update, so the passes T of schedule td1f1b never run"
    with pytest.warns(UserWarning, match=message):
        learner = build(alone, HALVES, 2, schedule="td1f1b", lookahead=1, **rule)
    single = build(alone, **rule)
    for update in range(5):
        step, other = learn_on(learner, update), single.learn(BATCHES[update])
        assert step.late_passes == 1
        assert step.loss.item() == pytest.approx(other.loss.item(), rel=1e-10)


def test_an_upcoming_batch_must_come_where_it_is_asked_for(alone: World) -> None:
    ahead, plain = build(alone, HALVES, 2, schedule="td1f1b", lookahead=1), build(alone, HALVES, 2)
    with pytest.raises(ValueError, match=r"rank 0 got no batch as upcoming \(lookahead 1\); .* and the upcoming one"):
        ahead.learn(BATCHES[0])
    with pytest.raises(ValueError, match=r"rank 0 got a batch as upcoming \(lookahead 0\); rank 0, "):
        plain.learn(BATCHES[0], BATCHES[1])
    with pytest.raises(ValueError, match=r"rank 0 got 8 transitions but a replica's part of batch_size 16 is 16"):
        ahead.learn(BATCHES[0], BATCHES[1].rows(0, 8))
    assert (ahead.update, plain.update) == (0, 0)


def test_another_batch_than_the_one_announced_is_refused(alone: World) -> None:
    """Its target values would be those of other transitions: an equal batch is not enough, it must be the same."""
    learner = build(alone, HALVES, 2, schedule="td1f1b", lookahead=1)
    learn_on(learner, 0)
    message = "update 2 got another batch than update 1 had announced as upcoming; pass that one"
    for other in (BATCHES[2], batch(1)):
        with pytest.raises(ValueError, match=message):
            learner.learn(other, BATCHES[3])
    assert learn_on(learner, 1).update == 2


# Tables of one's own


def test_a_table_that_was_written_and_read_is_the_built_in_one(alone: World) -> None:
    built_in = build(alone, HALVES, 4, schedule="td1f1b", lookahead=1, **RULE)
    read = ActionTable.from_csv(built_in.table.to_csv())
    custom = build(alone, HALVES, 4, schedule="td1f1b", lookahead=1, table=read, **RULE)
    assert custom.table == built_in.table
    for step, other in zip(learn(custom, 5), learn(built_in, 5), strict=True):
        assert torch.equal(step.loss, other.loss)
        assert torch.equal(step.grad_norm, other.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(custom.parameters(), built_in.parameters(), strict=True))


OWN = """\
# schedule=own passes=D ahead=T
0D0,0D1,0F0,0F1,0T0,0T1,0B1,0I0,0W0
1D1,1D0,1F1,1F0,1I1,1T0,1T1,1W1,1R0,1B0
"""


def test_a_table_of_ones_own(alone: World) -> None:
    """Any order that can run: backwards in reverse, a split one beside a whole one, T before the backwards."""
    change, losses, _, _ = plain_double_dqn(6, double=True, **RULE)
    text = OWN.replace("1D1,1D0,1F1,1F0", "1D0,1D1,1F0,1F1")
    learner = build(alone, HALVES, 2, lookahead=1, table=ActionTable.from_csv(text), **RULE)
    start = {name: p.detach().clone() for name, p in learner.named_parameters()}
    assert [step.loss.item() for step in learn(learner, 6)] == pytest.approx(losses, rel=1e-10)
    assert distance({name: p.detach() - start[name] for name, p in learner.named_parameters()}, change) < 1e-10


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (("1f1b", 3, 4, "TD"), {}, "the table has (stages, m, passes) (3, 4, {"),
        (("1f1b", 2, 2, "TD"), {}, "the table has (stages, m, passes) (2, 2, {"),
        (("1f1b", 2, 4, "T"), {}, "the table has (stages, m, passes) (2, 4, {'T'}) but the plan and double_dqn need"),
        (
            ("td1f1b", 2, 4, "TD", "T"),
            {},
            "the table runs T ahead but with lookahead 0 only nothing may; set",
        ),
        (("td1f1b", 2, 4, "TD", "D"), {"lookahead": 1}, "the table runs D ahead but with lookahead 1 only ['T'] may"),
    ],
)
def test_a_table_of_another_plan(alone: World, table: Any, options: dict[str, Any], message: str) -> None:
    sizes, ahead = table[:4], "".join(table[4:])
    with pytest.raises(ValueError, match=re.escape(message)):
        build(alone, HALVES, 4, table=action_table(*sizes, ahead=ahead), **options)


def test_a_table_that_cannot_run(alone: World) -> None:
    lanes = build(alone, HALVES, 2, schedule="1f1b").table.lanes
    for wrong, message in (
        ((lanes[0][::-1], lanes[1]), "the table cannot run: 0B1 waits for 0F1, which cannot come before it"),
        ((lanes[0][1:], lanes[1]), "the table lacks 0T0"),
        ((lanes[0], (*lanes[1], lanes[1][-1])), "the table has 1B1 2 times"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            build(alone, HALVES, 2, table=ActionTable("own", wrong, "TD"))


# What it refuses


@pytest.mark.parametrize("size", [0, 8, 17])
def test_a_batch_of_the_wrong_size(alone: World, size: int) -> None:
    learner = build(alone, m=2)
    message = f"rank 0 got {size} transitions but a replica's part of batch_size 16 is 16 (d = 1)"
    with pytest.raises(ValueError, match=re.escape(message)):
        learner.learn(batch(0, 17).rows(0, size))
    learner.learn(batch(0))  # nothing was begun
    assert learner.update == 1


def test_a_missing_batch(alone: World) -> None:
    message = (
        "rank 0 got no batch (lookahead 0); rank 0, the first stage of its replica, passes the batch and the other "
        "ranks pass None"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        build(alone).learn(None)


def test_a_batch_that_does_not_divide(alone: World) -> None:
    with pytest.raises(ValueError, match=re.escape("batch_size 16 is not a multiple of d·m = 1·3; try 15")):
        build(alone, m=3)
    with pytest.raises(ValueError, match="batch_size 16 is not a multiple of accumulation 3; change one of them"):
        build(alone, accumulation=3)
    with pytest.raises(ValueError, match=re.escape("batch_size 4 is not a multiple of d·m = 1·8")):
        build(alone, m=8, accumulation=4)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm2d(32), "is a BatchNorm2d, whose statistics depend on how the batch is cut"),
        (nn.Dropout(0.1), "is a Dropout(0.1), which draws in the order of execution"),
    ],
)
def test_a_network_under_which_layouts_differ(alone: World, layer: nn.Module, message: str) -> None:
    layers = dict(network().named_children())
    chain = nn.Sequential(OrderedDict(scale=layers["scale"], conv1=layers["conv1"], bad=layer))
    with pytest.raises(ValueError, match=re.escape(f"layer 'bad' {message}")):
        build(alone, (0, 3), chain=chain)


@pytest.mark.parametrize("boundaries", [(0, 1, 11), (0, 7, 8, 11), (0, 2, 3, 11)])
def test_a_stage_without_parameters(alone: World, boundaries: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"stage [01] \(\w+\) has 0 parameters to train; cut it elsewhere"):
        build(alone, boundaries, 2)


def test_a_stage_of_frozen_parameters(alone: World) -> None:
    chain = network()
    chain[:4].requires_grad_(False)
    with pytest.raises(ValueError, match=r"stage 0 \(scale, conv1, relu1\) has 0 parameters to train"):
        build(alone, (0, 3, 11), 2, chain=chain)
    for schedule in ("1f1b", "zb_h1"):
        learner = build(alone, HALVES, 2, schedule=schedule, chain=copy.deepcopy(chain))
        start = {name: p.detach().clone() for name, p in learner.named_parameters()}
        learner.learn(batch(0))
        moved = {name for name, p in learner.named_parameters() if not torch.equal(p, start[name])}
        assert moved == {name for name, p in learner.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"optimizer": "rmsprop"}, "unknown optimizer 'rmsprop'; choose adam or sgd"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0 but must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan but must be above 0"),
        ({"adam_eps": -1e-8}, "adam_eps is -1e-08 but must be above 0"),
        ({"target_period": 0}, "target_period is 0 but must be above 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0 but must be above 0"),
        ({"target_tau": 0.0}, "target_tau is 0.0 but must be above 0"),
        ({"target_tau": 1.5}, "target_tau is 1.5 but must be at most 1, which copies"),
        ({"accumulation": 0}, "accumulation is 0 but must be above 0"),
        ({"lookahead": 2}, "lookahead is 2 but must be 0 or 1"),
    ],
)
def test_a_bad_config(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LearnerConfig(**setting)


# Two ranks


class ToDouble(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def mixed_network() -> nn.Sequential:
    """float32 up to the cut, float64 behind it: the ranks of a pipeline then hold parameters of different dtypes."""
    chain = network()
    return nn.Sequential(
        OrderedDict([*chain[:6].float().named_children(), ("cast", ToDouble()), *chain[6:].named_children()])
    )


def calls_of_an_update(learner: Learner, parts: tuple[slice, ...]) -> list[str]:
    """What this rank does in its second update, in order: actions, and the parts of the reduction."""
    calls: list[str] = []
    mark, start, totals = Stopwatch.mark, SynchronousExchange.start, Reduction._start_totals

    def marked(self: Stopwatch, kind: str, begin: float, stage: int = -1, i: int = -1) -> None:
        calls.append(f"{stage}{kind}{i}" if stage >= 0 else kind)
        mark(self, kind, begin, stage, i)

    def started(self: SynchronousExchange, stage: int, parameters: Any) -> None:
        calls.append(f"sum of stage {stage}")
        start(self, stage, parameters)

    def summed(self: Reduction) -> Any:
        calls.append("totals")
        return totals(self)

    own = [BATCHES[k].rows(p.start, p.stop) for k, p in enumerate(parts)] if learner.owns_shards else [None] * 3
    learner.learn(own[0], own[1])
    with (
        patch.object(Stopwatch, "mark", marked),
        patch.object(SynchronousExchange, "start", started),
        patch.object(Reduction, "_start_totals", summed),
    ):
        learner.learn(own[1], own[2])
    return calls


def two_ranks() -> dict[str, Any]:
    torch.set_num_threads(1)
    with World.open() as world:
        rank, seen = world.rank, {}
        halves = build(world, HALVES, 4, stacked=False, **RULE)
        seen["roles"] = (halves.owns_shards, halves.has_loss)
        for name, given in (("missing", None if rank == 0 else batch(0)), ("size", batch(0).rows(0, 8))):
            try:
                halves.learn(given if rank == 0 or name == "missing" else batch(0))
            except ValueError as error:
                seen[name] = str(error)
        world.barrier()
        steps = [halves.learn(batch(update) if rank == 0 else None) for update in range(6)]
        seen["losses"], seen["norms"] = [s.loss.item() for s in steps], [s.grad_norm.item() for s in steps]
        seen["td"] = [s.td_errors for s in steps]
        seen["sent"] = [s.bytes_sent for s in steps]
        seen["weights"] = gather_by_name(halves, dict(halves.named_parameters()))
        mixed = build(world, (0, 6, 12), 4, stacked=False, chain=mixed_network(), **RULE)
        seen["mixed_td"] = [mixed.learn(batch(update) if rank == 0 else None).td_errors for update in range(3)]
        replicas = build(world, WHOLE, 2, data=2, stacked=False, **RULE)
        part = slice(8 * rank, 8 * rank + 8)
        steps = [replicas.learn(batch(update).rows(part.start, part.stop)) for update in range(6)]
        seen["replica_norms"] = [s.grad_norm.item() for s in steps]
        seen["replica_td"] = [s.td_errors for s in steps]
        seen["replica_weights"] = gather_by_name(replicas, dict(replicas.named_parameters()))
        ahead = build(world, HALVES, 4, schedule="td1f1b", stacked=False, lookahead=1, **RULE)
        seen["drain"] = calls_of_an_update(ahead, (slice(0, BATCH),) * 3)
        ahead = build(world, HALVES, 4, schedule="td1f1b", data=2, lookahead=1, **RULE)
        seen["stacked_drain"] = calls_of_an_update(ahead, (part,) * 3)
        try:
            replicas.learn(batch(0))
        except ValueError as error:
            seen["whole_batch"] = str(error)
        return seen


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(two_ranks, num_ranks=2, timeout=240)


@pytest.mark.pool
def test_two_ranks_learn_what_a_plain_loop_learns(two: list[dict[str, Any]]) -> None:
    change, losses, norms, errors = plain_double_dqn(6, double=True, **RULE)
    before = {name: p.detach() for name, p in network().named_parameters()}
    first, last = two
    for name in ("weights", "replica_weights"):
        assert list(first[name]) == list(before), "every parameter once, under its global name"
        assert distance({n: first[name][n] - p for n, p in before.items()}, change) < 1e-10
        assert last[name] == {}
    for rank in two:
        assert rank["losses"] == pytest.approx(losses, rel=1e-10)
        assert rank["norms"] == pytest.approx(norms, rel=1e-10)
        assert rank["replica_norms"] == pytest.approx(norms, rel=1e-10)
    assert last["td"] == [None] * 6
    halves = [torch.cat([first["replica_td"][u], last["replica_td"][u]]) for u in range(6)]
    for u, error in enumerate(errors):
        assert distance({"": first["td"][u]}, {"": error}) < 1e-10
        assert distance({"": halves[u]}, {"": error}) < 1e-10


@pytest.mark.pool
def test_stages_of_different_dtypes(two: list[dict[str, Any]], alone: World) -> None:
    """Labels once travelled in the dtype of the sender's own layers and were received in that of the receiver's."""
    single = build(alone, (0, 12), chain=mixed_network(), **RULE)
    for update, td_errors in enumerate(two[0]["mixed_td"]):
        expected = single.learn(batch(update)).td_errors
        assert expected is not None
        assert expected.dtype is td_errors.dtype is torch.float64
        assert distance({"": td_errors}, {"": expected}) < 1e-5


@pytest.mark.pool
def test_only_the_first_rank_of_a_replica_passes_a_batch(two: list[dict[str, Any]]) -> None:
    who = "rank 0, the first stage of its replica, passes the batch and the other ranks pass None"
    first, last = two
    assert (first["roles"], last["roles"]) == ((True, False), (False, True))
    assert (first["missing"], last["missing"]) == (
        f"rank 0 got no batch (lookahead 0); {who}",
        f"rank 1 got a batch (lookahead 0); {who}",
    )
    assert first["size"] == "rank 0 got 8 transitions but a replica's part of batch_size 16 is 16 (d = 1)"
    assert first["whole_batch"] == "rank 0 got 16 transitions but a replica's part of batch_size 16 is 8 (d = 2)"


@pytest.mark.pool
@pytest.mark.parametrize("run", ["drain", "stacked_drain"])
def test_the_exchange_begins_while_there_is_work_left(two: list[dict[str, Any]], run: str) -> None:
    """Each stage's sum right after the last action that adds to its gradients, in front of passes over the next batch
    and of earlier stages' backwards."""
    for calls in (rank[run] for rank in two):
        actions = [call for call in calls if call[0].isdigit()]
        for stage in {call[0] for call in actions}:
            last = [call for call in actions if call[0] == stage and call[1] == "B"][-1]
            assert calls[calls.index(last) + 1] == f"sum of stage {stage}"
        assert calls.count("totals") == 1
        assert calls[-2:] == ["exchange", "optimizer"]
        if run == "stacked_drain":
            assert calls.index("sum of stage 1") < calls.index("0B3")
    first, last = (rank[run] for rank in two)
    assert [call for call in last[last.index("sum of stage 1") :] if call.startswith("1T")], "T fills the drain"
    assert [call for call in first if call.startswith("0T")]


@pytest.mark.pool
def test_bytes_sent(two: list[dict[str, Any]]) -> None:
    """Frames stay where they are: activations of three passes one way, gradients the other, labels and TD errors."""
    activation = network()[:6](batch(0).obs).numel() * 8
    labels, td_errors, totals = BATCH * 8 * 4, BATCH * 8, 2 * 8
    first, last = two
    assert first["sent"] == [3 * activation + labels + totals] * 6
    assert last["sent"] == [activation + td_errors + totals] * 6


def test_the_agent_is_double_dqn() -> None:
    assert double_dqn().letters == "TD"
