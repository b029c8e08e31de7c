"""`read_config`: what a run's folder says of the run. The folder may be another user's, so every value is checked.

config.json ─ JSON? ─ each setting of the type that `TrainConfig` gives it? ─ text printable? ─▶ plain values
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mpdqn.checkpoint.entries import MalformedEntry, check_mapping, check_text, printable
from mpdqn.layouts import Layout
from mpdqn.train.config import TrainConfig

CONFIG = "config.json"
PROVENANCE = "environment.json"

ADDED: tuple[str, ...] = ()
"""Settings that folders of earlier versions lack, whose defaults are what those versions did."""

REMOVED = ("port",)
"""Settings of earlier versions that are gone and changed no number."""

NOT_RECORDED = ("trust",)
"""Settings that a folder does not answer for its user."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return what ``config.json`` in ``folder`` holds: ``config`` (settings by name), ``layout``, ``run`` and more.

    Every known setting has the type that `TrainConfig` declares, paths as text. Unknown settings are kept unchecked;
    see `strange_and_missing`.

    Raises:
        ValueError: in one line, if the file cannot be read or a value in it has another type.
    """
    try:
        about = check_mapping(CONFIG, json.loads((folder / CONFIG).read_text()))
        config = check_mapping("config", about.get("config"))
        kinds = get_type_hints(TrainConfig)
        typed = {name: _typed(name, config[name], kind) for name, kind in kinds.items() if name in config}
    except MalformedEntry:
        raise
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG} cannot be read: {printable(' '.join(str(error).split()))}") from error
    return about | {"config": with_micro_batches(config | typed, about.get("layout"))}


def strange_and_missing(settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the names among ``settings`` that `TrainConfig` does not know, and its own that they lack."""
    known = {field.name for field in fields(TrainConfig)}
    return sorted(set(settings) - known - {*REMOVED}), sorted(known - set(settings) - {*ADDED, *NOT_RECORDED})


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``settings`` that a folder may set."""
    return {name: value for name, value in settings.items() if name not in {*NOT_RECORDED, *REMOVED}}


def with_micro_batches(settings: dict[str, Any], name: Any) -> dict[str, Any]:
    """Return ``settings`` with the m of the layout ``name`` written out where their own layout text gives none.

    A pipeline without ``/m`` had 4 micro-batches in version 0.1.0 and has `mpdqn.layouts.MICROBATCHES` now, but the
    run's folder holds the full name of its layout beside the text that its user gave.
    """
    text = settings.get("layout")
    if not isinstance(text, str) or not isinstance(name, str) or "/m" in text:
        return settings
    try:
        given, full = Layout.parse(text, cores=1), Layout.parse(name, cores=1)
    except ValueError:  # reported where the layout is used
        return settings

    def structure(layout: Layout) -> tuple[Any, ...]:  # without threads: a name omits them where they are a fair share
        return layout.data, layout.pipeline, layout.schedule, layout.virtual, layout.copies, layout.stacked

    if given.pipeline == 1 or structure(given) != structure(full):
        return settings
    return settings | {"layout": f"{text}/m{full.num_microbatches}"}


def recorded_version(folder: Path) -> str:
    """Return the version of mpdqn that wrote ``folder``, in brackets; empty if that cannot be read."""
    try:
        version = json.loads((folder / PROVENANCE).read_text())["versions"]["mpdqn"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" ({printable(str(version))[:60]})"


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raise MalformedEntry unless ``value``, from JSON, can stand for a field of the type ``kind``."""
    if not _fits(value, kind):
        text = repr(value)
        wanted = getattr(kind, "__name__", None) if get_origin(kind) is None else None
        raise MalformedEntry(
            f"{name} is {text if len(text) <= 60 else text[:57] + '…'} but must be "
            f"{wanted or str(kind).replace('typing.', '').replace('pathlib.', '')}"
        )


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Return ``value`` after `check_type`; text is printable. A whole number given as 1e6 in Python becomes an int."""
    if type(value) is float and value.is_integer() and not _fits(value, kind) and _fits(int(value), kind):
        return int(value)
    check_type(name, value, kind)
    if value != value:
        raise MalformedEntry(f"{name} is {value}, not a number")
    if isinstance(value, str):
        check_text(name, value)
    return value


def _fits(value: Any, kind: Any) -> bool:
    """Whether JSON's ``value`` is of the annotated type ``kind``; a path is text, a tuple a list."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, list) and all(_fits(element, parts[0]) for element in value)
    if origin is not None:
        return isinstance(value, dict) and all(_fits(element, parts[1]) for element in value.values())
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (str if kind is Path else kind)
