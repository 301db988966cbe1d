"""Names of the files and the manifest. Imports no torch: the launcher asks it whether a folder is a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xtrain.base.errors import CheckpointError
from xtrain.base.files import sha256

FORMAT = "xtrain-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
MODEL = "model.safetensors"
STATE = "state.pt"
LOST = "not saved"
"""Stands for states of an optimizer that could not be saved."""
MASTER, WEIGHT = "master", "weight"
"""Kinds of runs beside the optimizer's states. A parameter of stage 3 is not in MODEL but here: as weight,
or as master alone where that has its dtype."""


def part_of(name: str, part: int, parts: int) -> str:
    """A file's name for model-parallel rank `part` of `parts`: `model-part-00001-of-00002.safetensors`, say.

    The name itself when the model is not divided.
    """
    stem, suffix = name.rsplit(".", 1)
    return name if parts == 1 else f"{stem}-part-{part:05d}-of-{parts:05d}.{suffix}"


def select_part(
    manifest: dict[str, Any], directory: Path, part: int, tensor: int, pipeline: int
) -> dict[str, Any]:
    """The manifest as model-parallel rank `part` sees it: `parameters` and `runs` are its own.

    Raises:
        CheckpointError: the model was divided otherwise when the checkpoint was written.
    """
    saved = manifest.get("model_parallel", {"tensor": 1, "pipeline": 1})
    if (saved["tensor"], saved["pipeline"]) != (tensor, pipeline):
        raise CheckpointError(
            f"checkpoint {directory} was written with tensor parallelism {saved['tensor']} and pipeline parallelism "
            f"{saved['pipeline']}, this run has {tensor} and {pipeline}: use the same sizes"
        )
    parts = tensor * pipeline
    own = manifest["parts"][part] if parts > 1 else {}
    return {**manifest, **own, "part": (part, parts)}


def own_file(manifest: dict[str, Any], name: str) -> str:
    """A file's name in a manifest that `select_part` returned."""
    return part_of(name, *manifest["part"])


def optimizer_file(rank: int, ranks: int) -> str:
    """Name of the file with what data-parallel rank `rank` of `ranks` owned."""
    return f"optimizer-{rank:05d}-of-{ranks:05d}.safetensors"


def rng_file(rank: int, ranks: int) -> str:
    """Name of the file with the random-number states of global rank `rank` of `ranks`."""
    return f"rng-{rank:05d}-of-{ranks:05d}.pt"


def run_key(kind: str, parameter: str, start: int) -> str:
    """Name of the tensor that holds one run of a parameter's elements of one kind of state."""
    return f"{kind}|{parameter}|{start}"


def complete_tags(save_dir: Path) -> list[str]:
    """Tags of the complete checkpoints in a folder, oldest first."""
    manifests = sorted(save_dir.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    return [path.parent.name for path in manifests if not path.parent.name.startswith(".")]


def is_checkpoint(save_dir: Path) -> bool:
    """Whether a folder holds at least one complete checkpoint."""
    return bool(complete_tags(save_dir))


def leftovers(tag: str) -> tuple[str, str]:
    """Folders in which a save that was interrupted while replacing `tag` keeps the new and the old one."""
    return f".{tag}.tmp", f".{tag}.old"


def latest_tag(save_dir: Path) -> str | None:
    """What `latest` names; None when there is no such file.

    Raises:
        CheckpointError: it cannot be read, or what it holds cannot be the name of a folder.
    """
    path = save_dir / LATEST
    if not path.is_file():
        return None
    try:
        tag = path.read_bytes().decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; {_hint(save_dir)}") from None
    if not is_plain_name(tag) or not tag.isprintable():
        raise CheckpointError(
            f"{path} does not hold the name of a checkpoint but {tag!r:.60}; {_hint(save_dir)}"
        )
    return tag


def is_plain_name(tag: str) -> bool:
    """Whether a tag can be the name of a checkpoint's folder; hidden names are those of unfinished ones."""
    return bool(tag) and not ("/" in tag or "\0" in tag or tag.startswith(".")) and len(tag.encode()) < 250


def _hint(save_dir: Path) -> str:
    found = complete_tags(save_dir)
    return f"pass tag={found[-1]!r}, the newest one in it" if found else "it holds no checkpoint"


def is_empty(save_dir: Path) -> bool:
    """Whether there is nothing in a folder, or no folder. What an interrupted save leaves behind is hidden."""
    if not save_dir.exists():
        return True
    if not save_dir.is_dir():
        raise CheckpointError(f"{save_dir} is not a folder: pass the folder that save_checkpoint wrote to")
    return all(entry.name.startswith(".") for entry in save_dir.iterdir())


def find_tag(save_dir: Path, tag: str | None) -> str | None:
    """The folder to load: of the given tag, or of what `latest` names; None when there is nothing yet.

    Raises:
        CheckpointError: the folder has files but no checkpoint, or the tag is not there.
    """
    if tag is None:
        if is_empty(save_dir):
            return None
        tag = latest_tag(save_dir)
        if tag is None:
            raise CheckpointError(f"{save_dir} has no file {LATEST!r}: {_hint(save_dir)}")
    if is_plain_name(tag):
        for name in (tag, *leftovers(tag)):
            if (save_dir / name / MANIFEST).is_file():
                return name
    found = complete_tags(save_dir)
    hint = (
        f"complete ones in {save_dir}: {', '.join(found)}" if found else f"{save_dir} holds no complete one"
    )
    raise CheckpointError(f"{save_dir / tag} is not a complete checkpoint ({hint})")


_KEYS = ("files", "parameters", "runs", "ranks")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of `save_dir/tag`, checked for format, version, its parts' form, and the files' presence and sizes.

    Raises:
        CheckpointError: it cannot be read, is damaged or of another format, or a file is missing or truncated.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint manifest {path} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of an xtrain checkpoint")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {manifest.get('version')}, this xtrain reads {VERSION}: use a matching release"
        )
    lacking = [key for key in _KEYS if key not in manifest]
    if lacking:
        raise CheckpointError(f"checkpoint {directory} is damaged: {MANIFEST} lacks {', '.join(lacking)}")
    if (bad := _malformed(manifest)) is not None:
        raise CheckpointError(f"checkpoint {directory} is damaged: in {MANIFEST}, {bad}")
    for name, entry in manifest["files"].items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {directory} is damaged: file {name} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"checkpoint {directory} is damaged: file {name} has {file.stat().st_size} bytes, not {entry['bytes']}"
            )
    return manifest


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _malformed(manifest: dict[str, Any]) -> str | None:
    """The first entry of a manifest that cannot be what it should be; None when all can."""
    if not _is_count(manifest["ranks"]) or manifest["ranks"] < 1:
        return f"'ranks' is {manifest['ranks']!r:.60}"
    for name in ("files", "parameters", "runs"):
        if not isinstance(manifest[name], dict):
            return f"{name!r} is no dictionary"
    for name, entry in manifest["files"].items():
        good = (
            isinstance(entry, dict) and _is_count(entry.get("bytes")) and isinstance(entry.get("sha256"), str)
        )
        if not good or not is_plain_name(name):
            return f"the entry of file {name!r:.80} is not one"
    absent = [
        name
        for r in range(manifest["ranks"])
        if (name := rng_file(r, manifest["ranks"])) not in manifest["files"]
    ]
    if absent:
        return f"there is no entry of file {absent[0]}"
    sizes = manifest.get("model_parallel", {"tensor": 1, "pipeline": 1})
    try:
        count = sizes["tensor"] * sizes["pipeline"]
        parts = manifest["parts"] if count > 1 else [manifest]
        return (
            next(filter(None, (_malformed_part(part) for part in parts)), None)
            if len(parts) == count
            else "parts lack"
        )
    except (KeyError, TypeError, AttributeError) as error:
        return f"the parts of the model are described wrongly ({type(error).__name__}: {error})"


def _malformed_part(part: dict[str, Any]) -> str | None:
    for name, entry in part["parameters"].items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if (
            not isinstance(shape, list)
            or not all(map(_is_count, shape))
            or not isinstance(entry["dtype"], str)
        ):
            return f"the entry of parameter {name!r:.80} is not one"
    for name, runs in part["runs"].items():
        for run in runs:
            if len(run) != 4 or not (_is_count(run[2]) and _is_count(run[3]) and run[2] <= run[3]):
                return f"a run of parameter {name!r:.80} is not one"
    return None


def verified(directory: Path, manifest: dict[str, Any], name: str) -> Path:
    """Path of a file of the checkpoint, after its content was compared with the manifest's checksum.

    Raises:
        CheckpointError: the file is not listed, or its content has changed since it was written.
    """
    if name not in manifest["files"]:
        raise CheckpointError(f"checkpoint {directory} has no file {name}")
    if sha256(directory / name) != manifest["files"][name]["sha256"]:
        raise CheckpointError(
            f"checkpoint {directory} is damaged: the content of {name} does not match its checksum"
        )
    return directory / name
