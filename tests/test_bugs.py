"""One test per bug that was found the hard way, its story first.

Bugs of one part alone are tested with it: the order of gloo's messages and its groups in test_mesh.py, golden action
tables in schedule/test_schedules.py, Atari's defaults in environments/test_atari.py, peak memory and pinning in
test_cores.py, several stages on one GPU in test_layouts.py and test_gpu.py.
"""

from __future__ import annotations

import ast
import copy
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpdqn.bench.config import CompareConfig
from mpdqn.bench.single import random_batch
from mpdqn.dqn.agents import double_dqn
from mpdqn.layouts import Layout
from mpdqn.learner import Learner, LearnerConfig
from mpdqn.mesh import Mesh, World
from mpdqn.networks import check_exactness, count_macs, make_network, set_memory_format
from mpdqn.partition import balance_costs
from mpdqn.partition.split import split
from mpdqn.plan import Parallelism, Partition, Plan
from mpdqn.schedule import action_table

SOURCES = sorted((Path(__file__).parents[1] / "mpdqn").rglob("*.py"))
FRAMES, ACTIONS, BATCH = (4, 44, 44), 5, 16
HALVES = (0, 6, 11)


def learner(world: World, chain: nn.Sequential | None = None, m: int = 4, **config: Any) -> Learner:
    if chain is None:
        chain = make_network("nature", FRAMES, ACTIONS, fc=32, seed=3).double()
    agent = double_dqn()
    boundaries = HALVES if len(chain) == HALVES[-1] else (0, 2, len(chain))
    plan = Plan.stacked(Partition(boundaries=boundaries), Parallelism(pipeline=2, num_microbatches=m, schedule="1f1b"))
    return Learner(
        chain,
        mesh=Mesh(world, plan, agent.letters),
        agent=agent,
        batch_size=BATCH,
        observation_shape=FRAMES,
        config=LearnerConfig(**config),
    )


def batch(update: int = 0, size: int = BATCH) -> Any:
    return random_batch(FRAMES, ACTIONS, size, update)


def calls_and_imports() -> Iterator[tuple[Path, str]]:
    """Every name, attribute and keyword that mpdqn's code uses."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.alias):
                yield path, node.name
            elif isinstance(node, ast.Name):
                yield path, node.id
            elif isinstance(node, ast.Attribute):
                yield path, node.attr
            elif isinstance(node, ast.keyword) and node.arg:
                yield path, node.arg


@pytest.mark.parametrize("name", ["DistributedDataParallel", "fully_shard", "scale_grads"])
def test_torch_features_that_break_a_pipeline_are_not_used(name: str) -> None:
    """DistributedDataParallel around a stage dies in its second step, and with zero-bubble schedules its gradients are
    silently wrong by 11–34 %; ``scale_grads=True`` scales what an earlier step accumulated once more."""
    assert [path for path, used in calls_and_imports() if used == name] == []


def test_private_names_of_pipelining_are_in_one_file() -> None:
    """torch's stages changed between 2.11 and 2.14: one file knows, so that the next change is one file's."""
    private = ("_prepare_forward_infra", "_prepare_backward_infra", "_inference_mode", "fwd_cache", "bwd_cache")
    assert {path.name for path, used in calls_and_imports() if used in private} == {"static_stage.py"}


def test_gradients_accumulate_over_steps(alone: World) -> None:
    """The 1/m of torch's ``scale_grads`` divides whatever is in ``.grad``: a second step halved the first one's part.
    Here each term is divided by the global batch size once, and m changes nothing."""
    sums = []
    for m in (1, 4, 8):
        one = learner(alone, m=m, learning_rate=1e-30)
        obs = batch()
        gradients: list[list[Tensor]] = []
        for steps in (1, 2):
            one.optimizer.zero_grad(set_to_none=True)
            zero_grad, one.optimizer.zero_grad = one.optimizer.zero_grad, lambda set_to_none: None
            one._clip = lambda norm: None  # type: ignore[method-assign]
            for _ in range(steps):
                one.learn(obs)
            one.optimizer.zero_grad = zero_grad
            gradients.append([p.grad.clone() for p in one.parameters() if p.grad is not None])
        for once, twice in zip(*gradients, strict=True):
            torch.testing.assert_close(twice, 2 * once, rtol=1e-9, atol=1e-12)
        sums.append(gradients[0])
    for others in zip(*sums, strict=True):
        for other in others[1:]:
            torch.testing.assert_close(other, others[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [8, 15, 17, 32])
def test_a_batch_of_another_size_is_refused_before_any_message(alone: World, size: int) -> None:
    """Uneven micro-batches, and a batch size that changes between steps, ended as "Connection closed" on the peer."""
    one = learner(alone)
    one.learn(batch())
    with pytest.raises(ValueError, match=f"rank 0 got {size} transitions but a replica's part of batch_size 16 is 16"):
        one.learn(batch(size=size))
    one.learn(batch(1))
    assert one.update == 2


def test_evaluating_before_the_first_update(alone: World) -> None:
    """``schedule.eval`` before the first train step left torch's backward uninitialised: DQN's own order, which plays
    before it learns."""
    fresh, used = learner(alone), learner(alone)
    with torch.no_grad():
        used.stages[1].online(used.stages[0].online(batch(5).obs))
    first, second = fresh.learn(batch()), used.learn(batch())
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.grad_norm, second.grad_norm)


def test_no_pass_gets_a_backward(alone: World) -> None:
    """A second schedule for the no-gradient passes is not needed: their stages keep nothing for a backward pass."""
    one = learner(alone)
    one.learn(batch())
    for (kind, _), runner in one._pipeline._runners.items():
        assert runner.has_backward == (kind == "F")
    assert not any(p.grad is not None for stage in one.stages for p in stage.target.parameters())


def test_shapes_are_told_not_asked(alone: World) -> None:
    """torch's default shape inference runs one extra forward in training mode, in which BatchNorm statistics moved."""
    one = learner(alone)
    calls: list[tuple[int, ...]] = []
    one.stages[0].online.register_forward_pre_hook(lambda _, inputs: calls.append(tuple(inputs[0].shape)))
    one.learn(batch())
    assert calls == [(4, *FRAMES)] * 8, "m micro-batches of D and of F, nothing else"


def test_batch_norm_breaks_micro_batches_and_is_refused(alone: World) -> None:
    """BatchNorm takes its statistics from the micro-batch: with m = 2 the same batch gave another output."""
    norm = nn.BatchNorm2d(4)
    frames = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    halves = torch.cat([norm(half) for half in frames.chunk(2)])
    assert not torch.allclose(halves, norm(frames), atol=1e-2)
    group = nn.GroupNorm(2, 4)
    torch.testing.assert_close(torch.cat([group(half) for half in frames.chunk(2)]), group(frames))
    check_exactness(nn.Sequential(group))
    network = make_network("nature", FRAMES, ACTIONS, fc=32)
    network[2] = norm
    with pytest.raises(ValueError, match="layer 'relu1' is a BatchNorm2d"):
        learner(alone, network)


def test_a_slice_keeps_global_names_and_rebuilding_does_not() -> None:
    """``nn.Sequential(*layers)`` counts from 0 again, and a checkpoint of stages could not be put together."""
    chain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    rebuilt = nn.Sequential(*list(chain)[2:])
    assert [name for name, _ in rebuilt.named_parameters()] == ["0.weight", "0.bias"]
    stages = split(chain, Partition(boundaries=(0, 2, 3)))
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"] == list(chain.state_dict())


@pytest.mark.parametrize(("name", "share"), [("impala", 0.6), ("resnet18", 0.55), ("resnet50", 0.55)])
def test_a_cut_can_fall_inside_a_section(name: str, share: float) -> None:
    """IMPALA cut at its section's borders left 0.63–0.67 of the work in one of two stages."""
    frames = (4, 84, 84)
    with torch.device("meta"):
        network = make_network(name, frames, 6)
    macs, seen = [], 0
    for k in range(1, len(network) + 1):
        total = count_macs(network[:k], frames)
        macs.append(float(total - seen))
        seen = total
    stages = [sum(macs[a:b]) for a, b in itertools.pairwise(balance_costs(macs, 2))]
    assert max(stages) / sum(stages) < share


def test_messages_of_channels_last_activations(alone: World) -> None:
    """A message carries memory without strides: a gradient that autograd returned in another memory format than the
    peer's buffer has was read scrambled. Stacked stages, which send nothing, are the measure."""
    plain, last = (make_network("nature", FRAMES, ACTIONS, fc=32, seed=3).double() for _ in range(2))
    set_memory_format(last, "channels_last")
    first, second = learner(alone, plain), learner(alone, last)
    assert second.stages[0].example_output.is_contiguous(memory_format=torch.channels_last)
    assert first.stages[0].example_output.is_contiguous()
    for update in range(3):
        a, b = first.learn(batch(update)), second.learn(batch(update))
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-10, atol=0)


def test_adam_with_its_usual_eps_hides_and_invents_differences() -> None:
    """With eps 1e-8 Adam's first step is ±lr whatever the gradient's size: it hid an 8 times wrong gradient and turned
    rounding into differences of whole steps. Dopamine's 1.5e-4 is the default, and SGD is there for comparisons."""

    def step(gradient: float, eps: float) -> float:
        p = nn.Parameter(torch.zeros((), dtype=torch.float64))
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        torch.optim.Adam([p], lr=1.0, eps=eps).step()
        return p.item()

    assert step(8e-4, 1e-8) == pytest.approx(step(1e-4, 1e-8), rel=1e-3)
    assert step(1e-12, 1e-8) != pytest.approx(step(0.0, 1e-8), abs=1e-5)
    assert abs(step(8e-4, 1.5e-4) / step(1e-4, 1.5e-4)) > 2
    assert LearnerConfig().adam_eps == 1.5e-4
    LearnerConfig(optimizer="sgd")


def test_a_cut_before_a_layer_that_writes_in_place(alone: World) -> None:
    """A received activation is a leaf that takes a gradient; ``ReLU(inplace=True)`` as a stage's first layer wrote
    into it, which autograd refuses, so that a user's network trained or died by where it was cut."""
    chain = nn.Sequential(Frames(), nn.Conv2d(4, 8, 8, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(800, ACTIONS))
    kept = copy.deepcopy(chain)
    step = learner(alone, chain, m=1).learn(batch())
    kept[2].inplace = False
    assert torch.equal(step.loss, learner(alone, kept, m=1).learn(batch()).loss)


class Frames(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 255


def test_a_rank_may_hold_any_stages() -> None:
    """With stages dealt to two ranks in turn, a receiver that posted in its own order under 1F1B got the sender's
    messages in another one. The orders of the ranks must fit together, whoever holds what."""
    for schedule, m, owners in itertools.product(
        ("gpipe", "1f1b"), (1, 2, 5), ((0, 1, 0, 1), (0, 1, 1, 0), (0, 0, 1, 1))
    ):
        table = action_table(schedule, 4, m, "TD")
        orders = [table.rank_order(owners, rank) for rank in (0, 1)]
        assert sorted(orders[0] + orders[1]) == sorted(table.actions)


def test_a_frozen_stage_is_refused_before_its_backward(alone: World) -> None:
    """Parameters were counted, not those to train: a first stage of frozen layers passed and died in backward."""
    chain = make_network("nature", FRAMES, ACTIONS, fc=32)
    chain[: HALVES[1]].requires_grad_(False)
    with pytest.raises(ValueError, match=r"stage 0 \(.*\) has 0 parameters to train"):
        learner(alone, chain)


def test_names_of_layouts_are_told_apart() -> None:
    """``dp2`` and ``dp2-1f1b`` were two rows of one name, which the table refused after the whole run; the name
    ``pp2-gpipe`` of m = 1 was read back as m = 8; ``2*pp2+stacked`` died in the workers."""
    for text in ("dp2-1f1b", "single-gpipe@1", "2*pp2+stacked"):
        with pytest.raises(ValueError, match=r"one stage has no schedule|only single processes"):
            Layout.parse(text, cores=2)
    one = Layout.parse("pp2/m1", cores=2)
    assert Layout.parse(one.name, cores=2) == one


def test_smoke_keeps_what_was_asked_for() -> None:
    """``--smoke --batch-size 510`` ran with 16 and said nothing."""
    config = CompareConfig(smoke=True, batch_size=510, rounds=7).resolved()
    assert (config.batch_size, config.rounds, config.steps) == (510, 7, 1)


def test_the_files_that_this_one_refers_to_exist() -> None:
    """Three of them had moved, and one section was of a document outside the repository."""
    assert __doc__ is not None
    named = re.findall(r"[\w/]+\.py", __doc__)
    assert len(named) == 6
    assert [name for name in named if not (Path(__file__).parent / name).exists()] == []
