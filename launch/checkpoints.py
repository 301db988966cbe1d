"""The checkpoints of a run, as the launcher handles them: the newest that is whole, and how many are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xtrain.base.errors import CheckpointError
from xtrain.base.files import remove, write_text
from xtrain.base.run_folder import CHECKPOINTS
from xtrain.checkpoint.contents import (
    LATEST,
    MANIFEST,
    complete_tags,
    find_tag,
    is_checkpoint,
    latest_tag,
    read_manifest,
    verified,
)

AUTO = "auto"


@dataclass(frozen=True)
class Source:
    """Where a run continues from: a checkpoint folder, and a tag in it (None: what `latest` names)."""

    folder: Path
    tag: str | None = None


def check_whole(directory: Path) -> None:
    """Read every file of a checkpoint and compare it with its checksum.

    Raises:
        CheckpointError: it is damaged; says how.
    """
    manifest = read_manifest(directory)
    for name in manifest["files"]:
        verified(directory, manifest, name)


def newest_whole(folder: Path) -> tuple[str | None, list[str]]:
    """The newest checkpoint of a folder whose files are as they were written, and what is wrong with newer ones."""
    damage: list[str] = []
    tags = complete_tags(folder)[::-1] if folder.is_dir() else []
    named = newest_tag(folder)
    if named in tags:  # what `latest` names is the newest, whatever the clocks of file systems say
        tags = [named, *(tag for tag in tags if tag != named)]
    for tag in tags:
        try:
            check_whole(folder / tag)
        except CheckpointError as error:
            damage.append(str(error))
        else:
            return tag, damage
    return None, damage


def make_newest_whole(folder: Path) -> tuple[str | None, list[str]]:
    """As `newest_whole`, in the run's own folder: damaged ones are put aside (hidden, not removed), and `latest` names
    the one that is left, so that a script that loads the latest finds it."""
    tag, damage = newest_whole(folder)
    if not damage:
        return tag, damage
    for one in complete_tags(folder):
        if one == tag:
            continue
        try:
            check_whole(folder / one)
        except CheckpointError:
            (folder / one).rename(_aside(folder, one))
    if tag is not None:
        write_text(folder / LATEST, tag)
    else:
        (folder / LATEST).unlink(missing_ok=True)
    return tag, damage


def _aside(folder: Path, tag: str) -> Path:
    number = 1
    while (path := folder / f".{tag}.damaged-{number}").exists():
        number += 1
    return path


def find_source(resume: str | None, run_dir: Path) -> Source | None:
    """What `resume=` means: a run folder, its checkpoint folder, a checkpoint's own folder, or auto.

    Raises:
        CheckpointError: there is no complete checkpoint there.
    """
    if resume is None:
        return None
    if resume == AUTO:
        own = run_dir / CHECKPOINTS
        return Source(own) if own.is_dir() and is_checkpoint(own) else None
    given = Path(resume).expanduser()
    if (given / MANIFEST).is_file():
        return Source(given.parent.resolve(), given.name)
    for folder in (given / CHECKPOINTS, given):
        if folder.is_dir() and is_checkpoint(folder):
            find_tag(folder, None)
            return Source(folder.resolve())
    raise CheckpointError(f"resume={resume}: there is no complete checkpoint in this folder")


def usable(source: Source) -> tuple[Source, list[str]]:
    """The source with the tag that is to be loaded, and what is wrong with newer ones.

    Raises:
        CheckpointError: the tag that was asked for is damaged, or all are.
    """
    if source.tag is not None:
        check_whole(source.folder / source.tag)
        return source, []
    tag, damage = newest_whole(source.folder)
    if tag is None:
        raise CheckpointError(damage[0] if damage else f"{source.folder} holds no complete checkpoint")
    return Source(source.folder, tag), damage


def prune(folder: Path, keep: int) -> list[str]:
    """Remove the oldest complete checkpoints beyond `keep`, never what `latest` names; their tags."""
    named = newest_tag(folder)
    if named is None:
        return []  # there is nothing, or it is told when it is to be loaded
    old = [tag for tag in complete_tags(folder)[:-keep] if tag != named]
    for tag in old:
        hidden = folder / f".{tag}.pruned"
        remove(hidden)
        (folder / tag).rename(hidden)  # incomplete at once, so that nobody begins to load it
        remove(hidden)
    return old


def newest_tag(folder: Path) -> str | None:
    """What `latest` names in a run's own folder; None when there is nothing, or it cannot be read."""
    if not folder.is_dir():
        return None
    try:
        return latest_tag(folder)
    except CheckpointError:
        return None
