"""docs/licences.md and the ranges of pyproject.toml, against each other, the tested set and the installed metadata."""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mpdqn.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]
NOT_INSTALLED_HERE = {"wandb", "peers"}  # extras that `dev` leaves out
COLLECTIONS = {"all", "dev"}  # extras that name other extras

# Names of licences that are not SPDX's.
NAMED = {
    "MIT License": "MIT",
    "Apache 2.0": "Apache-2.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD 2-Clause License": "BSD-2-Clause",
    "LicenseRef-NVIDIA-Proprietary": "NVIDIA proprietary",
    "NVIDIA Proprietary Software": "NVIDIA proprietary",
}
VAGUE = {"", "BSD", "GPL", "LGPL v2.1"}
# What the metadata or a licence file contains where the metadata names no licence, or vaguely.
EVIDENCE = {
    "BSD-3-Clause": "Neither the names? of|names? of .{0,80} may (not )?be used|OSI Approved :: BSD License",
    "GPL-3.0-or-later": "License: GPL",  # its repository says which version
    "LGPL-2.1-or-later": r"LGPL-2\.1-or-later",
    "MIT": "Permission is hereby granted, free of charge|OSI Approved :: MIT License",
    "Matplotlib's (PSF style)": "License agreement for matplotlib",
    "NVIDIA proprietary": "NVIDIA Kitmaker",  # of a package without files
}


def requirements(extra: str) -> list[Requirement]:
    """Return what ``extra``, or the core, asks for directly, without other extras of mpdqn."""
    texts = PROJECT["dependencies"] if extra == "core" else OPTIONAL[extra]
    return [found for text in texts if (found := Requirement(text)).name != "mpdqn"]


def names_of(*extras: str) -> set[str]:
    return {canonicalize_name(found.name) for extra in extras for found in requirements(extra)}


def closure(*extras: str) -> set[str]:
    """Return all packages that ``extras`` install, as the installed metadata says."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [requirement for extra in extras for requirement in requirements(extra)]
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in found:
            continue
        found.add(key)
        for text in distribution(requirement.name).requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                waiting.append(needed)
    return {name for name, _ in found}


def table(heading: str) -> list[list[str]]:
    """Return the cells of the first table below ``heading``, without its head; bold marks are dropped."""
    page = (ROOT / "docs" / "licences.md").read_text()
    below = page.partition(f"\n### {heading}\n")[2].partition("\n#")[0]
    lines = [line for line in below.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().replace("**", "") for cell in line.strip("|").split("|")] for line in lines]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins.items()}


def wrong_licence(package: str, licence: str) -> str:
    """Return what the installed metadata says instead of ``licence``; empty if it agrees."""
    found = distribution(package)
    named = found.metadata.get("License-Expression") or found.metadata.get("License") or ""
    if named not in VAGUE and "\n" not in named:
        says = NAMED.get(named, named)
        return "" if says == licence else f"{package}: {says}"
    text = re.sub(r"\s+", " ", "\n".join([found.read_text("METADATA") or "", *licence_files(found)]))
    return "" if licence in EVIDENCE and re.search(EVIDENCE[licence], text) else f"{package}: not {licence}"


def licence_files(found: Distribution) -> list[str]:
    files = [file for file in found.files or [] if re.search("licen|copying", file.name, re.IGNORECASE)]
    return [file.locate().read_text(errors="replace") for file in files if file.locate().is_file()]  # type: ignore[attr-defined]


def test_the_page_lists_every_direct_dependency() -> None:
    extras_of = defaultdict(set)
    for extra in ("core", *OPTIONAL):
        for name in names_of(extra):
            extras_of[name].add(extra)
    listed = {
        canonicalize_name(name): set(extras.split(", ")) for name, _, _, extras, _ in table("Direct dependencies")
    }
    assert listed == extras_of


def test_the_versions_of_the_page_are_those_of_the_tested_set() -> None:
    pins, installed = constraints(), {canonicalize_name(d.metadata["Name"]): d.version for d in distributions()}
    absent = set()
    for name, version, _, _, _ in table("Direct dependencies"):
        key = canonicalize_name(name)
        assert version == pins.get(key, "–"), name
        if key in installed:
            assert version == installed[key], f"{name} {installed[key]} is installed; pip install -c constraints.txt"
        else:
            absent.add(key)
    assert absent <= names_of(*NOT_INSTALLED_HERE)


def test_the_licences_of_the_page_are_those_of_the_metadata() -> None:
    checked = names_of("core", *(OPTIONAL.keys() - NOT_INSTALLED_HERE))
    rows = [(name, licence.partition(" (its")[0]) for name, _, licence, _, _ in table("Direct dependencies")]
    assert [wrong_licence(*row) for row in rows if canonicalize_name(row[0]) in checked and wrong_licence(*row)] == []


def test_the_page_lists_what_the_dependencies_depend_on() -> None:
    tested = {"core"} | OPTIONAL.keys() - NOT_INSTALLED_HERE - COLLECTIONS
    needed = closure(*tested) - names_of(*tested)
    listed = {name: licence for licence, names in table("What these depend on") for name in names.split(", ")}
    assert needed <= listed.keys()
    # Python 3.13 needs fewer packages than 3.11; what is listed beyond them must not be installed here.
    assert (listed.keys() - needed) & {canonicalize_name(d.metadata["Name"]) for d in distributions()} == set()
    assert listed.keys() <= constraints().keys()
    assert [wrong for name in needed if (wrong := wrong_licence(name, listed[name]))] == []


def test_every_range_ends_and_holds_the_tested_version() -> None:
    pins = constraints()
    for extra in ("core", *OPTIONAL):
        for requirement in requirements(extra):
            assert any(bound.operator == "<" for bound in requirement.specifier), f"{requirement} has no upper bound"
            if pin := pins.get(canonicalize_name(requirement.name)):
                assert requirement.specifier.contains(pin), f"{requirement}, but {pin} is tested"


def test_a_package_has_one_range() -> None:
    ranges = defaultdict(set)
    for extra in ("core", *OPTIONAL):
        for requirement in requirements(extra):
            ranges[canonicalize_name(requirement.name)].add(str(requirement.specifier))
    assert {name: found for name, found in ranges.items() if len(found) > 1} == {}


def test_what_make_installs_holds_every_extra_that_is_tested() -> None:
    """``make compare`` plays Pong, and ``make test`` tests every environment."""
    (everything,) = (Requirement(text) for text in OPTIONAL["all"])
    assert everything.extras == OPTIONAL.keys() - COLLECTIONS - NOT_INSTALLED_HERE
    assert "mpdqn[all]" in OPTIONAL["dev"]
    assert '-e ".[dev]"' in (ROOT / "Makefile").read_text()


def test_the_code_knows_the_extras() -> None:
    own = OPTIONAL.keys() - COLLECTIONS - {"peers"}  # which only experiments need
    assert {extra: {canonicalize_name(name) for name in modules.values()} for extra, modules in EXTRAS.items()} == {
        extra: names_of(extra) for extra in own
    }


@pytest.mark.parametrize("package", ["ale-py", "minatar", "imageio-ffmpeg"])
def test_no_gpl_in_the_core(package: str) -> None:
    assert package not in closure("core")
    for name in closure("core"):
        terms = [distribution(name).metadata.get(field) or "" for field in ("License-Expression", "License")]
        # GCC's runtime library in a wheel: its exception lets any program be linked with it.
        own = [term for term in terms if "GPL-3.0-or-later WITH GCC-exception-3.1" not in term]
        assert not any(re.search(r"\bA?GPL", term) for term in own), name
