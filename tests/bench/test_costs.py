"""The table of layer costs says what the profile says, and where each layer goes."""

from mpdqn.bench.costs import cost_table
from mpdqn.plan import LayerCost, Partition, Profile


def layer(name: str, forward: float, backward_input: float, backward_weight: float, scale: int) -> LayerCost:
    return LayerCost(
        name=name,
        forward_ms=forward,
        backward_input_ms=backward_input,
        backward_weight_ms=backward_weight,
        parameter_bytes=scale * 2**20,
        activation_bytes=scale * 2**19,
        boundary_bytes=scale * 2**21,
    )


PROFILE = Profile(
    network="three",
    batch_size=8,
    device="cpu",
    threads=2,
    memory_format="channels_last",
    layers=(layer("conv", 1.234, 0.0, 2.5, 1), layer("relu", 0.5, 0.75, 0.0, 0), layer("head", 2.0, 3.0, 4.0, 2)),
)


def test_layers_and_their_stages() -> None:
    cuts = [Partition(boundaries=b) for b in ((0, 3), (0, 2, 3), (0, 1, 2, 3), (0, 2, 3))]
    table = cost_table(PROFILE, cuts)
    assert table.title == "Layer costs of three: batch 8, cpu, 2 threads, channels_last"
    assert table.columns[-2:] == ("stage (of 2)", "stage (of 3)"), "one column for each cut, none for the whole"
    assert table.rows == (
        ("conv", "1.23", "0.00", "2.50", "1,024", "0.50", "2.00", "0", "0"),
        ("relu", "0.50", "0.75", "0.00", "0", "0.00", "0.00", "0", "1"),
        ("head", "2.00", "3.00", "4.00", "2,048", "1.00", "4.00", "1", "2"),
    )
    assert table.notes[0] == "forward 4 ms + backward 10 ms = 14 ms"
    assert table.notes[1] == (
        "cut into 2 stages after relu: 5 + 9 ms with 1 forward and one backward pass, 0.64 of it in the slowest stage"
    )
    twice = cost_table(PROFILE, cuts, forward_passes=2)
    assert "after conv, relu: 5 + 2 + 11 ms" in twice.notes[2], "conv 2·1.234 + 2.5, relu 2·0.5 + 0.75, head 2·2 + 7"
    assert "| head" in table.markdown()


def test_no_cut_no_column() -> None:
    table = cost_table(PROFILE, [Partition(boundaries=(0, 3))])
    assert table.columns[-1] == "boundary MiB"
    assert {len(row) for row in table.rows} == {len(table.columns)}


def test_a_stage_takes_every_forward_pass_of_its_layers() -> None:
    """6.2, 2.25 and 13 ms with the two no-gradient passes of Double DQN."""
    table = cost_table(PROFILE, [Partition(boundaries=(0, 2, 3))], forward_passes=3)
    assert table.notes[1] == (
        "cut into 2 stages after relu: 8 + 13 ms with 3 forward and one backward pass, 0.61 of it in the slowest stage"
    )
