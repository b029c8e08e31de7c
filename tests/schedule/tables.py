"""Tables to test with: by hand, and of any schedule and size."""

from hypothesis import strategies as st

from mpdqn.schedule import SCHEDULES, Action, ActionTable, action_table


def written(text: str, passes: str = "", ahead: str = "") -> ActionTable:
    """The table with the lanes of ``text``, one a line, unchecked."""
    lanes = tuple(tuple(map(Action.parse, line.split())) for line in text.splitlines())
    return ActionTable("custom", lanes, passes, ahead)


@st.composite
def tables(draw: st.DrawFn, max_p: int = 6, max_m: int = 12) -> ActionTable:
    """Any schedule with any passes, some of them ahead, and any recomputation; also m < p."""
    schedule = draw(st.sampled_from(list(SCHEDULES)))
    p, m = draw(st.integers(1, max_p)), draw(st.integers(1, max_m))
    kind = SCHEDULES[schedule]
    virtual = draw(st.integers(1, 3)) if kind.any_virtual else kind.virtual
    return action_table(
        schedule,
        p,
        m,
        draw(st.sampled_from(["", "T", "D", "TD", "TDX"])),
        ahead=draw(st.sampled_from(["", "T", "TX"])),
        virtual=virtual,
        recompute=draw(st.sets(st.integers(0, p * virtual - 1))),
    )
