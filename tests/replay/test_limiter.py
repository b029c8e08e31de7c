"""The replay ratio, held by counting."""

from __future__ import annotations

import pytest

from mpdqn.replay.limiter import RateLimiter


def test_updates_come_one_a_period_after_the_first_transitions():
    limiter = RateLimiter(min_replay=100, period=4)
    assert [limiter.updates_due(n) for n in (0, 99, 100, 103, 104, 111, 112)] == [0, 0, 0, 0, 1, 2, 3]


@pytest.mark.parametrize("step", [1, 3, 8, 32, 1000])
def test_the_ratio_does_not_depend_on_how_many_come_at_once(step):
    limiter = RateLimiter(min_replay=1000, period=4)
    made = 0
    for inserted in range(0, 50_000, step):
        made += limiter.updates_due(inserted + step) - limiter.updates_due(inserted)
        assert abs(made - max(0, inserted + step - 1000) / 4) < 1


@pytest.mark.parametrize("settings", [{"min_replay": 1, "period": 0}, {"min_replay": -1, "period": 1}])
def test_counts_out_of_range(settings):
    with pytest.raises(ValueError, match="at least"):
        RateLimiter(**settings)
