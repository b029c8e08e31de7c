"""A run's folder may name code, and none of it runs unless its user names it too, or trusts the folder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mpdqn.bench.evaluation import EvaluateConfig, evaluate_run
from mpdqn.cli import main
from mpdqn.mesh import World
from mpdqn.train import TrainConfig, load_run, train
from mpdqn.train.check import check
from mpdqn.train.folder import WEIGHTS
from mpdqn.train.resume import UntrustedCode, check_resume, recorded_config
from tests.environments.toy import MODULE
from tests.train.settings import small
from tests.train.stopping import train_for

NETWORK = f"{Path(__file__).parent / 'network.py'}:make_network"
DRIFT = f"{MODULE}:mpdqn-tests/Drift-v0"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the user's own network on an environment of theirs, stopped after 90 rounds."""
    with World.open("cpu", 60) as world:
        return train_for(
            world, small(tmp_path_factory.mktemp("runs"), env=DRIFT, network=NETWORK, log_every=200), 90
        ).folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / pristine.name))


@pytest.fixture
def foreign(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str, str]]:
    """The folder as somebody else sent it, with the names of a network and of an environment: each leaves a mark."""
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (tmp_path / "bomb_network.py").write_text(code)
    (tmp_path / "bomb_environment.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    network, env = f"{tmp_path}/bomb_network.py:make_network", "bomb_environment:Bomb-v0"
    name_in(folder, network=network, env=env)
    (folder / WEIGHTS).touch()
    yield folder, network, env
    assert not (tmp_path / "ran").exists(), "code of the folder ran"
    assert "bomb_environment" not in sys.modules


def name_in(folder: Path, **settings: Any) -> None:
    about = json.loads((folder / "config.json").read_text())
    about["config"] |= settings
    (folder / "config.json").write_text(json.dumps(about))


def from_api(folder: Path) -> object:
    return train(resume=folder)


def from_configuration(folder: Path) -> object:
    return train(recorded_config(folder))


def from_checks(folder: Path) -> object:
    return check(recorded_config(folder))


def from_rank(folder: Path) -> object:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
            patch.setenv(name, value)
        return train(resume=folder, layout="dp2")


def from_loading(folder: Path) -> object:
    return load_run(folder)


def from_evaluation(folder: Path) -> object:
    return evaluate_run(EvaluateConfig(run=folder))


@pytest.mark.parametrize(
    "start", [from_api, from_configuration, from_checks, from_rank, from_loading, from_evaluation, check_resume]
)
def test_code_that_only_the_folder_names_is_refused(
    start: Callable[[Any], object], foreign: tuple[Path, str, str]
) -> None:
    folder, network, env = foreign
    with pytest.raises(UntrustedCode) as caught:
        start(recorded_config(folder) if start is check_resume else folder)
    flags = f"--network {network} --env {env}"
    assert str(caught.value) == (
        f"{folder} names code of its own that would run: {flags}; if you trust that code, give {flags} yourself, or "
        "--trust"
    )


def test_one_name_given_is_not_the_other(foreign: tuple[Path, str, str]) -> None:
    folder, network, env = foreign
    with pytest.raises(UntrustedCode, match=r"would run: --env bomb_environment:Bomb-v0; if"):
        train(resume=folder, network=network)
    with pytest.raises(UntrustedCode, match=r"would run: --network .*bomb_network\.py:make_network; if"):
        load_run(folder, env=env)
    with pytest.raises(ValueError, match=r"network is other\.py:f but the run in"):
        train(resume=folder, network="other.py:f", env=env)
    with pytest.raises(ValueError, match=r"env is pong but the run in .* has bomb_environment:Bomb-v0; give that one"):
        load_run(folder, network=network, env="pong")


def test_a_folder_cannot_trust_itself(foreign: tuple[Path, str, str]) -> None:
    folder, _, _ = foreign
    name_in(folder, trust=True)
    for start in (from_api, from_configuration, from_evaluation):
        with pytest.raises(UntrustedCode):
            start(folder)


@pytest.mark.parametrize("value", [7, ["x.py:f"], None])
def test_a_name_that_is_no_text_is_refused(value: object, foreign: tuple[Path, str, str]) -> None:
    folder, _, _ = foreign
    name_in(folder, network=value)
    with pytest.raises(ValueError, match="holds no training run to go on with"):
        train(resume=folder)
    with pytest.raises(ValueError, match="is no finished training run"):
        load_run(folder)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["train", "--resume"], 2),
        (["evaluate", "--run"], 2),
        (["status"], 0),
        (["curves", "--out", "curves", "--runs"], 0),
    ],
)
def test_no_command_runs_it(
    command: list[str],
    code: int,
    foreign: tuple[Path, str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, network, _ = foreign
    assert main([*command, str(folder)]) == code
    err = capfd.readouterr().err
    assert len(err.splitlines()) == (code == 2)
    assert (f"--network {network}" in err) == (command[0] in ("train", "evaluate"))
    with pytest.raises(SystemExit):
        main([*command, str(folder), "--help"])


def test_names_given_again_and_trust_resume_and_evaluate(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From the command line too. Both ways come to the same run."""
    other = Path(shutil.copytree(folder, tmp_path / "other" / folder.name))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", str(folder), "--network", NETWORK, "--env", DRIFT]) == 0
    result = train(resume=other, trust=True)
    assert (folder / WEIGHTS).read_bytes() == (result.folder / WEIGHTS).read_bytes()
    assert "trust" not in json.loads((other / "config.json").read_text())["config"]

    config = ["--episodes", "1", "--epsilon", "1"]
    assert main(["evaluate", "--run", str(folder), *config]) == 2
    assert main(["evaluate", "--run", str(folder), *config, "--trust"]) == 0
    assert main(["evaluate", "--run", str(folder), *config, "--network", NETWORK, "--env", DRIFT]) == 0
    out = capfd.readouterr().out
    assert len({line for line in out.splitlines() if line.startswith(f"| {DRIFT}")}) == 1
    assert load_run(other, trust=True).job.config.network == NETWORK


def test_trust_without_a_folder_warns(tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="--trust has no effect without --resume"),
        pytest.raises(ValueError, match="pomg"),
    ):
        train(TrainConfig(env="pomg", out=tmp_path, trust=True))
