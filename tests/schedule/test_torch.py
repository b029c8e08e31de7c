"""Our textbook tables beside those of torch.distributed.pipelining, which loads no process group for them."""

from unittest.mock import MagicMock

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from mpdqn.schedule import ActionTable, action_table


def torch_csv(schedule: str, p: int, m: int, v: int) -> str:
    """What torch writes for this schedule: a line a rank, empty cells where it waits."""
    stages = [
        MagicMock(group_size=p, group_rank=0, num_stages=p * v, stage_index=chunk * p, has_backward=True)
        for chunk in range(v)
    ]
    order = getattr(torch_schedules, schedule)(stages, m, loss_fn=lambda output, target: output).pipeline_order
    return "".join(",".join("" if a is None else str(a) for a in order[rank]) + "\n" for rank in range(p))


@pytest.mark.parametrize(
    ("schedule", "name", "v"),
    [
        ("interleaved_1f1b", "ScheduleInterleaved1F1B", 2),
        ("interleaved_1f1b", "ScheduleInterleaved1F1B", 3),
        ("zb_h1", "ScheduleInterleavedZeroBubble", 1),
        ("zbv", "ScheduleZBVZeroBubble", 2),
    ],
)
@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 2), (2, 4), (3, 3), (4, 6), (4, 8), (4, 12)])
def test_the_same_order_as_torch(schedule: str, name: str, v: int, p: int, m: int):
    theirs = ActionTable.from_csv(torch_csv(name, p, m, v))
    assert theirs.lanes == action_table(schedule, p, m, virtual=v).lanes


def test_a_table_of_torch_loads_with_its_waits():
    text = torch_csv("ScheduleInterleaved1F1B", 2, 2, 2)
    assert ",,2B0,," in text
    assert str(ActionTable.from_csv(text)) == "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1\n1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1\n"


def test_torchs_breadth_first_goes_back_the_other_way():
    """It hands the micro-batches back in reverse; the paper's figure, and we, in order."""
    theirs = ActionTable.from_csv(torch_csv("ScheduleLoopedBFS", 2, 2, 2))
    assert str(theirs) == "0F0 0F1 2F0 2F1 2B1 2B0 0B1 0B0\n1F0 1F1 3F0 3F1 3B1 3B0 1B1 1B0\n"
    assert str(action_table("looped_bfs", 2, 2)).splitlines()[0] == "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1"
