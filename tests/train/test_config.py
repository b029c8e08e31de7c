"""Bad input is refused before any work, with both numbers and the next step."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mpdqn.train import TrainConfig
from mpdqn.train.check import check, check_writable


def small(tmp_path: Path, **settings: Any) -> TrainConfig:
    base = {"env": "minatar-breakout", "frames": 4_000, "min_replay": 500, "capacity": 2_000, "out": tmp_path}
    return TrainConfig(**base | settings)


def test_a_good_configuration_becomes_a_job(tmp_path: Path) -> None:
    job = check(small(tmp_path, agent="rainbow", layout="dp2xpp2-1f1b/m2", n_step=2, double=False))
    assert (job.settings.n_step, job.agent.double, job.agent.noisy) == (2, False, True)
    assert job.settings.prioritization is not None
    assert (job.num_ranks, job.num_envs) == (4, 8)
    assert job.num_rounds == 500
    assert job.updates_after(job.num_rounds) == (4_000 - 500) // 4
    assert job.settings.learning_rate == 2.5e-4  # of MinAtar's configurations, not Atari's
    assert check(small(tmp_path, layout="dp2", actors="workers")).num_ranks == 4
    assert check(small(tmp_path, agent="rainbow", prioritized=False)).settings.prioritization is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"agent": "rainbw"}, "unknown agent 'rainbw'; did you mean 'rainbow'?"),
        ({"env": "minatar-brekout"}, "minatar-breakout"),
        ({"layout": "pp2-1f2b"}, "unknown schedule '1f2b'; did you mean '1f1b'?"),
        ({"layout": "2*single@1"}, "is 2 runs; train one at a time"),
        ({"layout": "dp3"}, "3"),
        ({"layout": "pp2/m5"}, "batch_size 32 is not a multiple of d·m"),
        ({"frames": 0}, "frames is 0 but must be at least 1"),
        ({"actor_lag": -1}, "actor_lag is -1 but must be at least 0"),
        ({"lookahead": 2}, "lookahead is 2 but must be 0 or 1"),
        ({"min_replay": 30}, "min_replay is 30 but batch_size 32 and 8 environments"),
        ({"capacity": 400}, "capacity is 400 but learning begins at 500"),
        ({"layout": "pp9"}, "layout pp9-gpipe/m8 wants p·v = 9 stages"),
        ({"agent": "decqn"}, "agent decqn has a branching head but environment minatar-breakout has 1 discrete action"),
        ({"network": "nature"}, "Nature needs frames of at least 36×36"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0 but must be above 0"),
        ({"evaluation_epsilon": 2.0}, "evaluation_epsilon is 2.0 but must be between 0 and 1"),
        ({"target_tau": 2.0}, "target_tau is 2.0 but must be between 0 and 1"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; choose float32, tf32, bf16 or auto"),
        ({"round_steps": 1_000}, "is 8000 frames but only 4000 are to be played"),
        ({"replay_dir": Path("/proc/nope")}, "--replay-dir /proc/nope cannot be written"),
        ({"timeout": 0.0}, "timeout is 0.0 s but must be above 0"),
        ({"device": "cuda"}, "sees 0 CUDA devices"),
        ({"epsilon_decay_frames": -1}, "epsilon_decay_frames is -1"),
    ],
)
def test_bad_input(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        check(small(tmp_path, **settings))
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        check(small(tmp_path, out=tmp_path / "file" / "runs"))


def test_probes_of_one_pid_do_not_meet(tmp_path: Path) -> None:
    """Two containers on one shared folder may have the same process id: one deleted the other's probe, which was then
    told as a folder that cannot be written. Threads have one process id too."""
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(lambda: [check_writable(tmp_path) for _ in range(100)]) for _ in range(8)]:
            done.result()
    assert not list(tmp_path.iterdir())


def test_a_run_too_short_to_learn_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing will be learned"):
        check(small(tmp_path, frames=400))


def test_a_replay_folder_that_holds_one_already(tmp_path: Path) -> None:
    (tmp_path / "shard-1").mkdir()
    (tmp_path / "shard-1" / "frames.memmap").touch()
    with pytest.raises(ValueError, match="already holds shard-1"):
        check(small(tmp_path, replay_dir=tmp_path))


def test_settings_follow_the_run_and_its_field(tmp_path: Path) -> None:
    rainbow = check(small(tmp_path, agent="rainbow"))
    assert rainbow.settings.prioritization is not None
    assert rainbow.settings.prioritization.beta_updates == rainbow.updates_after(rainbow.num_rounds)
    assert rainbow.settings.epsilon.start == 0
    without_noise = check(small(tmp_path, agent="rainbow", noisy=False))
    assert without_noise.settings.epsilon.start == 1
    with pytest.warns(UserWarning, match="has no effect: the ε of agent rainbow is 0"):
        check(small(tmp_path, agent="rainbow", epsilon_decay_frames=10))
    assert check(TrainConfig(env="highway", out=tmp_path)).settings.discount == 0.8
    assert check(TrainConfig(env="pong", out=tmp_path)).settings.min_replay == 20_000


def test_runs_that_differ_in_one_setting_have_other_records(tmp_path: Path) -> None:
    """By these, curves tell seeds of one line from other lines."""
    base = check(small(tmp_path)).record_settings()
    assert base == check(small(tmp_path, seed=1, log_every=7)).record_settings()
    assert json.loads(json.dumps(base)) == base
    for settings in ({"double": True}, {"n_step": 3}, {"learning_rate": 1e-5}, {"prioritized": True}, {"actor_lag": 1}):
        assert check(small(tmp_path, **settings)).record_settings() != base, settings


def test_a_schedule_whose_gaps_stay_empty_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="set --lookahead 1"):
        check(small(tmp_path, layout="pp2-td1f1b/m4"))


def test_a_disk_too_small_for_replay_is_named_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"replay needs \d+ bytes .* are free; make room"):
        check(small(tmp_path / "runs", replay_dir=tmp_path, capacity=10**13))
    assert not list(tmp_path.glob("shard-*"))
    assert not list((tmp_path / "runs").iterdir()), "no run's folder either"
