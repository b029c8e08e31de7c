"""The commands that there are, their flags, and their exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpdqn.cli import COMMANDS, main

FLAGS = {
    "compare": """
        --env --network --width --head --agent --batch-size --num-microbatches --layouts --lookahead --recompute
        --memory-limit --precision --compile --trace --steps --rounds --transitions --num-shards --envs-per-shard
        --epsilon --device --seed --out --timeout --smoke --render-only
    """,
    "train": """
        --env --agent --network --width --layout --frames --double --dueling --noisy --prioritized --n-step --batch-size
        --learning-rate --replay-period --min-replay --capacity --target-period --target-tau --epsilon-decay-frames
        --evaluation-epsilon --lookahead --prefetch --recompute --num-shards --envs-per-shard --round-steps --actor-lag
        --actors --env-workers --replay-dir --dtype --precision --compile --device --evaluate-every
        --evaluation-episodes --log-every --checkpoint-minutes --checkpoint-every --checkpoint-at-end --keep-checkpoints
        --resume --trust --seed --out --wandb --timeout --smoke
    """,
    "status": "",
    "evaluate": """
        --run --network --env --trust --episodes --epsilon --video --seed --num-envs --workers --max-steps --device
    """,
    "curves": "--runs --out --column --average --band --window",
}


def test_every_command_has_its_flags_frozen() -> None:
    assert FLAGS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", FLAGS)
def test_the_flags_are_frozen(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A flag that goes or changes its name breaks somebody's script: change this list knowingly."""
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capfd.readouterr().out
    offered = {word.strip("│, ") for word in text.split() if word.strip("│, ").startswith("--")}
    assert offered - {"--help"} == set(FLAGS[command].split())


def test_an_unknown_command_and_none(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["comapre"]) == 2
    out, err = capfd.readouterr()
    assert (out, err.splitlines()[0]) == ("", "mpdqn: unknown command 'comapre'")
    assert main([]) == 0
    assert main(["--help"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("usage: mpdqn {compare,train,status,evaluate,curves} [flags]")
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--agent", "rainbw"], "unknown agent 'rainbw'; did you mean 'rainbow'?"),
        (["train", "--env", "pomg"], "try 'pong'"),
        (["train", "--resume", "nowhere"], "nowhere does not exist; give the folder that a training run made"),
        (["status", "nowhere"], "nowhere has no readable status.json"),
        (["evaluate", "--run", "nowhere"], "nowhere is no finished training run"),
        (["curves", "--runs", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    words: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"mpdqn {arguments[0]}: ")
    assert words in err
    assert len(err.splitlines()) == 1
