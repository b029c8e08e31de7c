"""`open_logs`: the progress of a run as CSV, as TensorBoard events if that is installed, on Weights & Biases if asked.

    folder/progress.csv    frames,loss,return    the one that mpdqn reads again: `read_progress`
                           4000,0.021,
                           8000,0.019,-20.5      an empty cell: not measured at that time
    folder/tensorboard/events.out.tfevents.…       with the extra tensorboard

Environment frames are the only clock. A run that is resumed goes on in the same files.
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from mpdqn.extras import install_command, missing_packages, require_extra
from mpdqn.files import check_own_folder, check_plain, open_to_append, write_whole

PROGRESS = "progress.csv"
"""The file of a run's folder that holds its progress."""

TENSORBOARD = "tensorboard"
"""The subfolder of its events."""

WANDB = "wandb"
"""The subfolder that Weights & Biases makes."""

FRAMES = "frames"
"""Its first column: environment frames."""


class Sink(Protocol):
    """One place where rows go."""

    def write(self, frames: int, row: Mapping[str, float]) -> None:
        """Take ``row``, measured after ``frames`` environment frames."""

    def close(self) -> None:
        """Write what is still held."""


class Logs:
    """All the places where a run's rows go; a context manager closes them. `open_logs` makes it."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, frames: int, row: Mapping[str, float]) -> None:
        """Log ``row`` after ``frames`` environment frames. Rows may differ in their columns; NaN is not measured.

        Raises:
            ValueError: if a column is called ``frames``.
        """
        if FRAMES in row:
            raise ValueError(f"a row has its own column {FRAMES!r}, {row[FRAMES]}; give frames as the first argument")
        for sink in self._sinks:
            sink.write(frames, row)

    def close(self) -> None:
        """Write what is still held; a second call does nothing."""
        for sink in self._sinks:
            sink.close()
        self._sinks = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def check_logs(*, wandb: bool = False) -> None:
    """Raise ValueError if a log is asked for that cannot be had, before a run has cost anything.

    For Weights & Biases that is a missing extra, or missing credentials, unless its environment says that it stays
    offline. In a terminal it asks for the key, as its own programs do.
    """
    if not wandb:
        return
    require_extra("wandb", "logging to Weights & Biases")
    import wandb as weights_and_biases

    try:
        weights_and_biases.login(verify=False)  # finds credentials wherever it will look for them, without the network
    except weights_and_biases.Error as error:
        text = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"logging to Weights & Biases: {text}; or set WANDB_MODE=offline, or leave --wandb out"
        ) from error


def check_log_files(folder: Path) -> None:
    """Raise ValueError if a log of the run in ``folder`` is a symbolic link, and rows would be written elsewhere."""
    check_plain(folder / PROGRESS)
    for name in (TENSORBOARD, WANDB):
        check_own_folder(folder / name)
    for path in (folder / TENSORBOARD).glob("events.*"):
        check_plain(path)


def open_logs(folder: Path, *, wandb: bool = False, config: Mapping[str, Any], resume_at: int | None = None) -> Logs:
    """Start, or go on with, the logs of the run in ``folder``.

    Args:
        folder: the run's; it is made if there is none.
        wandb: also log to Weights & Biases, as its own environment says where and whether (``WANDB_MODE=offline``).
        config: the run's settings, shown by Weights & Biases.
        resume_at: frames of the checkpoint that the run goes on from. Rows after it are dropped: they come again.

    Raises:
        ValueError: if ``wandb`` is asked for and the extra is not installed, or as `check_log_files`.
    """
    check_log_files(folder)
    remote: list[Sink] = [_Wandb(folder, config)] if wandb else []  # first: it is refused if its extra is missing
    folder.mkdir(parents=True, exist_ok=True)
    local: list[Sink] = [ProgressFile(folder / PROGRESS, resume_at)]
    if missing := missing_packages("tensorboard"):
        note = (
            f"no TensorBoard log: it needs {missing}; {install_command('tensorboard')} ({PROGRESS} has the same rows)"
        )
        print(note, file=sys.stderr)
    else:
        local.append(_TensorBoard(folder / TENSORBOARD, resume_at))
    return Logs([*local, *remote])


def read_progress(folder: Path) -> list[dict[str, float]]:
    """The rows of the run in ``folder``: ``frames`` and what was measured then, in the order of their writing.

    A row that was cut off when the run was killed is left out.

    Raises:
        ValueError: if there is no progress file, or a cell of it is no number.
    """
    path = folder / PROGRESS
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a training run")
    rows = []
    for number, cells in enumerate(_rows(path), start=2):
        try:
            rows.append({column: float(cell) for column, cell in cells.items() if cell})
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return rows


class ProgressFile:
    """``progress.csv`` under way. Every row is on its way to the disk when `write` returns.

    A new column rewrites the file, through a second one that then takes its place: a run that is killed meanwhile
    loses nothing.
    """

    def __init__(self, path: Path, resume_at: int | None = None) -> None:
        """Go on with the file ``path`` if there is one, without its rows after ``resume_at`` frames."""
        self._path = path
        self._columns: list[str] = []
        self._file: IO[str] | None = None
        if path.is_file():
            rows = _rows(path)  # without the half row that a killed run may have left
            self._columns = list(rows[0]) if rows else []
            last = math.inf if resume_at is None else resume_at
            self._rewrite([row for row in rows if float(row[FRAMES]) <= last])

    def write(self, frames: int, row: Mapping[str, float]) -> None:
        """Append one row; a column that there was not is added, empty in earlier rows."""
        measured = {FRAMES: frames} | {name: value for name, value in row.items() if not math.isnan(value)}
        new = [name for name in (FRAMES, *row) if name not in self._columns]
        if new:
            self.close()
            self._columns += new
            self._rewrite(_rows(self._path) if self._path.is_file() else [])
        if self._file is None:
            self._file = open_to_append(self._path)
        csv.DictWriter(self._file, self._columns, lineterminator="\n").writerow(measured)
        self._file.flush()

    def close(self) -> None:
        """Close the file; the next `write` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rewrite(self, rows: Iterable[Mapping[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self._path, text.getvalue())


class _TensorBoard:
    def __init__(self, folder: Path, resume_at: int | None) -> None:
        # Here and not above: it takes a second, and whoever only reads progress should not pay it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=None if resume_at is None else resume_at + 1)

    def write(self, frames: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if not math.isnan(value):
                self._writer.add_scalar(name, value, frames)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        check_logs(wandb=True)
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        # The id is the folder's, so that a resumed run goes on in the same one.
        name = folder.resolve().name
        self._run: Any = wandb.init(
            project="mpdqn", dir=str(folder), id=name, name=name, resume="allow", config=dict(config)
        )
        # Its own counter must rise with every row; frames may begin again where a checkpoint was.
        self._run.define_metric(FRAMES)
        self._run.define_metric("*", step_metric=FRAMES)

    def write(self, frames: int, row: Mapping[str, float]) -> None:
        self._run.log({FRAMES: frames} | {name: value for name, value in row.items() if not math.isnan(value)})

    def close(self) -> None:
        self._run.finish()


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows by column; one that doesn't end with its line is what a killed run left, and is no row."""
    text = path.read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [{name: cell or "" for name, cell in row.items()} for row in csv.DictReader(lines)]
