"""`Record`: one measurement, one JSON line, with the environment it was taken in.

Every table and plot is a function of record files, so a record says by itself what was measured, where and how. It is
made to be shown to others: no path in it says where on a machine something lies (`without_place`).
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from mpdqn.files import open_to_append

PACKAGES = ("mpdqn", "torch", "torchrl", "tensordict", "ale-py", "gymnasium", "numpy")

RECORDS = "records.jsonl"
"""The file of a run's folder that holds its records."""

TRACES = "traces"
"""The subfolder of its timelines."""

TABLES = "tables"
"""The subfolder of the action tables that ran."""

_ABSOLUTE = re.compile(r"""(?<![^\s'"(\[{,;=])/[^\s/'")\]},;][^'")\]},;]*""")

Value = float | int | str | bool | None | Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where and how a record was taken: commit, versions, hardware and command."""

    commit: str
    versions: Mapping[str, str]
    hardware: str
    cores: int
    memory_gib: float
    command: str

    @classmethod
    def current(cls, devices: str = "") -> Self:
        """The environment of this process; ``devices`` names its accelerators, if any."""
        cpu = _cpu_model()
        return cls(
            commit=_commit(),
            versions={"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
            hardware=f"{devices}, {cpu}" if devices else cpu,
            cores=len(os.sched_getaffinity(0)),
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            command=" ".join([_program(), *(without_place(argument) for argument in sys.argv[1:])]),
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement: ``values`` of the row ``row`` of experiment ``experiment`` in round ``round``.

    ``settings`` says how the row was run (layout, batch size …), ``values`` what came out, with the unit in each name.
    """

    experiment: str
    row: str
    round: int
    seed: int
    settings: Mapping[str, Value]
    values: Mapping[str, Value]
    environment: Environment = field(repr=False)

    def __post_init__(self) -> None:
        settings = {n: without_places(value) if isinstance(value, str) else value for n, value in self.settings.items()}
        object.__setattr__(self, "settings", settings)

    def to_json(self) -> str:
        """This record as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Self:
        """The record that `to_json` wrote."""
        data: dict[str, Any] = json.loads(line)
        return cls(**data | {"environment": Environment(**data["environment"])})


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Append each record to the JSONL file ``path`` as one line; ValueError if ``path`` is not a plain file."""
    with open_to_append(path) as file:
        for record in records:
            file.write(record.to_json() + "\n")


def read_records(path: Path) -> Iterator[Record]:
    """The records of the JSONL file ``path``, in the order they were taken.

    Raises:
        ValueError: at a line that is no record, naming file and line.
    """
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            yield Record.from_json(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a record of this version: {error}") from error


def without_place(text: str) -> str:
    """Return ``text`` with each absolute path in it made relative to the working directory, or cut to its last part.

    A path begins the text or follows a blank, a quotation mark, a bracket, a comma or an equals sign.
    """

    def shorter(match: re.Match[str]) -> str:
        path = Path(match.group())
        here = Path.cwd()
        return str(path.relative_to(here)) if path.is_relative_to(here) else path.name

    return _ABSOLUTE.sub(shorter, text)


def without_places(data: Any) -> Any:
    """Return ``data``, of JSON's kinds, paths and tuples, with every path in it as `without_place` has it."""
    if isinstance(data, Path):
        return without_place(str(data))
    if isinstance(data, str):
        return without_place(data) if data.startswith("/") else data
    if isinstance(data, Mapping):
        return {name: without_places(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_places(value) for value in data]
    return data


def _program() -> str:
    """How this process was started: ``mpdqn``, ``python -m`` and a module's name, or a script's name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return Path(sys.argv[0]).name
    module = spec.name.removesuffix(".__main__")
    return module if module == "mpdqn" else f"python -m {module}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of the checkout this package lies in, with a plus if it was changed; empty when pip-installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "") if commit.returncode == 0 else ""


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
