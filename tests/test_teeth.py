"""The transparency tests have teeth: each of these defects, put into the real code, must be found by them.

A defect patches one name while a layout runs; the reference it is compared with stays clean. There are two kinds:

    layout      what only micro-batches, stages, replicas or a schedule can get wrong: the single process with the very
                same patch computes what it should
    algorithm   another update rule: the single process with the patch differs from the reference as well, so that the
                tooth says that the comparison looks at this quantity, and less about the layout
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from mpdqn.launch import launch
from mpdqn.mesh import World
from tests.comparator import errors, violations
from tests.defects import agents, schedules, update
from tests.transparency import Case, References, Trace, read_trace, run_case, tiny_case

pytestmark = pytest.mark.pool

HYBRID = Case(data=2, pipeline=2, schedule="1f1b", m=4)
AHEAD = tiny_case("td1f1b", lookahead=1)
SPLIT = tiny_case("tdzb", lookahead=1)
AGAIN = tiny_case("1f1b", pipeline=3, recompute="all")
SOFT = tiny_case("td1f1b", lookahead=1, target_tau=0.25)
PARTS = tiny_case("td1f1b", data=2, lookahead=1, accumulation=2)

SINGLE = Case(m=4)


@dataclass(frozen=True)
class Tooth:
    """A defect, the layout in which it bites, a quantity that must give it away, and what kind of defect it is."""

    defect: Callable[[], Any]
    case: Case
    shows_in: str
    kind: Literal["layout", "algorithm"] = "layout"

    @property
    def name(self) -> str:
        """The name of the defect."""
        return self.defect.__name__

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}"


TEETH = (
    Tooth(update.missing_1_over_m, SINGLE, "gradients"),
    Tooth(update.averaged_replicas, HYBRID, "gradients"),
    Tooth(update.unreduced_replicas, HYBRID, "gradients"),
    Tooth(update.exchange_one_backward_early, HYBRID, "gradients"),
    Tooth(update.clip_norm_of_the_stage, replace(HYBRID, data=1), "gradients"),
    Tooth(update.clip_norm_counted_for_each_replica, HYBRID, "gradients"),
    Tooth(update.refresh_of_the_first_stage_only, HYBRID, "td_errors"),
    Tooth(update.swapped_microbatch, HYBRID, "td_errors"),
    Tooth(update.swapped_values, HYBRID, "td_errors"),
    Tooth(update.lost_gradient_message, HYBRID, "gradients"),
    Tooth(update.shard_sampled_twice, HYBRID, "gradients"),
    Tooth(update.td_errors_in_reverse, HYBRID, "td_errors"),
    Tooth(update.gradient_in_another_memory_format, replace(HYBRID, memory_format="channels_last"), "gradients"),
    Tooth(update.exchange_before_the_last_weight_gradients, replace(SPLIT, data=2), "gradients"),
    Tooth(schedules.refresh_that_keeps_the_passes_ahead_of_it, AHEAD, "td_errors"),
    Tooth(schedules.values_of_before_the_refresh, AHEAD, "td_errors"),
    Tooth(schedules.gaps_filled_with_this_batch, AHEAD, "td_errors"),
    Tooth(schedules.swapped_values_of_the_next_batch, AHEAD, "td_errors"),
    Tooth(schedules.lost_weight_gradients_of_a_microbatch, SPLIT, "gradients"),
    Tooth(schedules.weight_gradients_twice, tiny_case("zbv"), "gradients"),
    Tooth(schedules.split_that_loses_the_gradient_of_the_input, SPLIT, "gradients"),
    Tooth(schedules.recomputed_from_the_frames_of_another_microbatch, AGAIN, "gradients"),
    Tooth(schedules.recomputed_from_what_another_microbatch_received, AGAIN, "gradients"),
    Tooth(schedules.recomputed_with_other_weights, AGAIN, "gradients"),
    Tooth(schedules.labels_of_the_first_part_for_all, PARTS, "td_errors"),
    Tooth(schedules.frames_of_the_first_part_for_all, PARTS, "td_errors"),
    Tooth(schedules.gradients_of_the_last_part_only, PARTS, "gradients"),
    Tooth(schedules.reduced_in_every_part, PARTS, "gradients"),
    Tooth(agents.target_noise_of_this_update_for_the_next_batch, replace(AHEAD, agent="noisy_dqn"), "td_errors"),
    Tooth(agents.recomputed_under_other_noise, tiny_case("1f1b", agent="noisy_dqn", recompute="all"), "gradients"),
    Tooth(agents.cross_entropy_as_the_mean_of_the_rows_here, tiny_case("1f1b", data=2, agent="c51"), "gradients"),
    # What the comparison itself must not overlook: max(0.0, nan) is 0.0, and tensors that are absent differ in nothing.
    Tooth(update.gradient_that_is_not_a_number, HYBRID, "gradients"),
    Tooth(update.gradients_freed_after_the_step, HYBRID, "gradients"),
    Tooth(update.gradient_of_one_weight_freed_after_the_step, HYBRID, "gradients"),
    # Other update rules
    Tooth(update.missing_1_over_d, replace(HYBRID, pipeline=1), "gradients", "algorithm"),
    Tooth(update.ignored_importance_weights, HYBRID, "gradients", "algorithm"),
    Tooth(update.argmax_of_the_target_network, HYBRID, "td_errors", "algorithm"),
    Tooth(update.undiscounted_terminals, HYBRID, "td_errors", "algorithm"),
    Tooth(update.stale_target_at_a_refresh, HYBRID, "td_errors", "algorithm"),
    Tooth(update.target_that_shares_the_online_weights, SINGLE, "td_errors", "algorithm"),
    Tooth(update.frames_of_another_update, HYBRID, "td_errors", "algorithm"),
    Tooth(update.lost_weight, HYBRID, "change", "algorithm"),
    Tooth(update.gradients_kept_from_the_last_update, HYBRID, "gradients", "algorithm"),
    # Rainbow's noise makes other choices in each step.
    Tooth(schedules.values_of_the_step_before, replace(AHEAD, agent="rainbow"), "td_errors", "algorithm"),
    Tooth(schedules.soft_update_that_copies, SOFT, "td_errors", "algorithm"),
    Tooth(schedules.soft_update_the_other_way_round, SOFT, "td_errors", "algorithm"),
    Tooth(agents.noise_drawn_in_the_order_of_execution, tiny_case("1f1b", agent="noisy_dqn"), "gradients", "algorithm"),
    Tooth(
        agents.noise_named_by_the_place_in_the_stage,
        tiny_case("1f1b", pipeline=3, agent="rainbow"),
        "gradients",
        "algorithm",
    ),
    Tooth(
        agents.late_passes_with_the_noise_of_the_next_update,
        replace(AHEAD, agent="noisy_dqn"),
        "td_errors",
        "algorithm",
    ),
    Tooth(agents.one_noise_for_both_networks, tiny_case("1f1b", agent="rainbow"), "td_errors", "algorithm"),
    Tooth(agents.noise_of_another_seed, tiny_case("1f1b", agent="noisy_dqn"), "gradients", "algorithm"),
    Tooth(agents.log_policy_of_the_next_observation, replace(AHEAD, agent="munchausen_dqn"), "td_errors", "algorithm"),
    Tooth(agents.log_policy_of_the_online_network, tiny_case("1f1b", agent="munchausen_dqn"), "td_errors", "algorithm"),
    Tooth(agents.projection_of_the_microbatch_before, tiny_case("1f1b", data=2, agent="c51"), "td_errors", "algorithm"),
    Tooth(agents.atoms_of_another_action, tiny_case("1f1b", agent="rainbow"), "td_errors", "algorithm"),
    Tooth(agents.next_value_of_the_online_network, tiny_case("1f1b", agent="dueling_dqn"), "td_errors", "algorithm"),
    Tooth(agents.action_dimensions_in_reverse, tiny_case("1f1b", agent="decqn"), "td_errors", "algorithm"),
    Tooth(agents.sum_over_action_dimensions, tiny_case("1f1b", data=2, agent="decqn"), "td_errors", "algorithm"),
)
NEEDS_A_LAYOUT = (
    update.exchange_one_backward_early,
    update.exchange_before_the_last_weight_gradients,
    update.swapped_microbatch,
)
"""Patches that cannot be entered in the single process: it has no second micro-batch and no split backward."""


Bitten = dict[str, tuple[Case, dict[str, float], dict[str, float]]]
"""By the tooth's name: its case, and the errors without and with its defect."""


def bite(names: list[str], references: dict[Case, Path]) -> Bitten:
    """On rank 0: what comes of these teeth, given the files of their references."""
    torch.set_num_threads(1)
    found: Bitten = {}
    clean: dict[Case, dict[str, float]] = {}
    with World.open("cpu", 60) as world:
        for tooth in (tooth for tooth in TEETH if tooth.name in names):
            case, reference = tooth.case, read_trace(references[tooth.case])
            if case not in clean:
                clean[case] = errors(world, case, run_case(world, case), reference)
            with tooth.defect():
                trace = run_case(world, case)
            found[tooth.name] = case, clean[case], errors(world, case, trace, reference)
    return found


@pytest.fixture(scope="module")
def references(alone: World, tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(alone, tmp_path_factory.mktemp("references"))


@pytest.fixture(scope="module")
def bitten(references: References) -> Bitten:
    """Each tooth among as few ranks as its case needs."""
    found: Bitten = {}
    for num_ranks in sorted({tooth.case.ranks for tooth in TEETH}):
        teeth = [tooth for tooth in TEETH if tooth.case.ranks == num_ranks]
        paths = references.of(tooth.case for tooth in teeth)
        found |= launch(bite, [tooth.name for tooth in teeth], paths, num_workers=num_ranks)[0]
    return found


@pytest.mark.parametrize("tooth", TEETH, ids=str)
def test_defect_is_found(tooth: Tooth, bitten: Bitten) -> None:
    case, clean, defective = bitten[tooth.name]
    assert violations(case, clean) == []
    assert any(line.startswith(tooth.shows_in) for line in violations(case, defective)), defective


def test_the_teeth_are_marked_as_what_they_are(alone: World, references: References) -> None:
    """With the same patch the single process differs where the algorithm is another, and only there."""
    found = {}
    for tooth in TEETH:
        if tooth.defect in NEEDS_A_LAYOUT:
            continue
        case = tooth.case.reference()
        reference = read_trace(references.of([case])[case])
        with tooth.defect():
            trace = run_case(alone, case)
        differs = violations(case, errors(alone, case, trace, reference)) != []
        found[tooth.name] = "algorithm" if differs else "layout"
    assert found == {tooth.name: tooth.kind for tooth in TEETH if tooth.defect not in NEEDS_A_LAYOUT}


def test_there_are_enough_teeth() -> None:
    assert len({tooth.name for tooth in TEETH}) == len(TEETH)
    kinds = [tooth.kind for tooth in TEETH]
    assert (kinds.count("layout"), kinds.count("algorithm")) == (34, 24), "docs/exactness.md says how many"


def first(tensors: dict[str, Tensor]) -> str:
    return next(iter(tensors))


def not_a_number(trace: Trace, reference: Trace) -> None:
    trace.gradients[1][first(trace.gradients[1])].view(-1)[0] = math.nan


def infinite_change(trace: Trace, reference: Trace) -> None:
    trace.change[first(trace.change)].view(-1)[0] = math.inf


def no_gradients(trace: Trace, reference: Trace) -> None:
    trace.gradients[1].clear()


def tiny_tensor_lost(trace: Trace, reference: Trace) -> None:
    name = first(trace.gradients[1])
    for one in (trace, reference):
        one.gradients[1][name] *= 1e-12
    del trace.gradients[1][name]


def tensor_that_the_single_process_lacks(trace: Trace, reference: Trace) -> None:
    trace.change["other.weight"] = torch.zeros(1)


def shape_that_broadcasts(trace: Trace, reference: Trace) -> None:
    name = next(n for n, t in trace.gradients[1].items() if t.dim() == 1)
    for one in (trace, reference):
        one.gradients[1][name] = torch.ones_like(one.gradients[1][name])
    trace.gradients[1][name] = torch.ones(1)


def loss_that_is_not_a_number(trace: Trace, reference: Trace) -> None:
    trace.losses[-1] = math.nan


def td_error_that_is_not_a_number(trace: Trace, reference: Trace) -> None:
    trace.td_errors[1][0] = math.nan


def no_td_errors(trace: Trace, reference: Trace) -> None:
    trace.td_errors.clear()
    reference.td_errors.clear()


def single_process_that_does_not_train(trace: Trace, reference: Trace) -> None:
    for one in (trace, reference):
        one.change = {name: torch.zeros_like(t) for name, t in one.change.items()}


BLIND_SPOTS = {
    not_a_number: "gradients",
    infinite_change: "change",
    no_gradients: "gradients",
    tiny_tensor_lost: "gradients",
    tensor_that_the_single_process_lacks: "change",
    shape_that_broadcasts: "gradients",
    loss_that_is_not_a_number: "losses",
    td_error_that_is_not_a_number: "td_errors",
    no_td_errors: "td_errors",
    single_process_that_does_not_train: "change",
}
"""What is done to a trace that equals the single process's, and the one quantity that is wrong then."""


@pytest.fixture(scope="module")
def equal(alone: World) -> tuple[Case, Trace, Trace]:
    case = tiny_case("1f1b", placement="stacked")
    return case, run_case(alone, case, updates=2), run_case(alone, case.reference(), updates=2)


@pytest.mark.parametrize("spoil", BLIND_SPOTS, ids=lambda spoil: spoil.__name__)
def test_the_comparison_has_no_blind_spot(
    spoil: Callable[[Trace, Trace], None], equal: tuple[Case, Trace, Trace], alone: World
) -> None:
    """Each of these was, or could have been, an error of 0.0."""
    case, trace, reference = copy.deepcopy(equal)
    assert violations(case, errors(alone, case, trace, reference)) == []
    spoil(trace, reference)
    found = violations(case, errors(alone, case, trace, reference))
    assert [line.split()[0] for line in found] == [BLIND_SPOTS[spoil]], found
