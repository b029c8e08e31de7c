"""`contents`: all that a checkpoint holds, byte by byte, for a comparison of two."""

from __future__ import annotations

from pathlib import Path

from mpdqn.checkpoint.folder import CheckpointFolder


def contents(run_folder: Path) -> dict[str, bytes]:
    """What the newest checkpoint of a run holds, by name; each frame of replay as ``frame shard.environment.position``.

    Two runs that are one and the same hold the same, but for frames that a ring has lost: a file of them is kept while
    any of its frames is in the ring.

    Raises:
        ValueError: if there is no checkpoint.
    """
    folder = CheckpointFolder(run_folder)
    manifests = folder.manifests()
    if not manifests:
        raise ValueError(f"{folder.root} holds no checkpoint; give a run that was stopped or has --checkpoint-at-end")
    manifest, held = manifests[0], dict[str, bytes]()
    for name, entry in manifest.tensors.items():
        data = (folder.folder(manifest.round) / entry.file).read_bytes()
        held[name] = data[entry.offset : entry.offset + entry.bytes]
    for v, shard in manifest.rows.items():
        for one in shard.files:
            data = (Path(shard.folder) / one.file).read_bytes()
            places = [(e, p) for e, (a, b) in enumerate(zip(one.first, one.stop, strict=True)) for p in range(a, b)]
            size = len(data) // len(places)
            held |= {f"frame {v}.{e}.{p}": data[k * size : (k + 1) * size] for k, (e, p) in enumerate(places)}
    return held


def differences(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """The names under which two `contents` differ, sorted; frames that only one of them still has left aside."""
    apart = {name for name in one.keys() ^ other.keys() if not name.startswith("frame ")}
    return sorted(apart | {name for name in one.keys() & other.keys() if one[name] != other[name]})
