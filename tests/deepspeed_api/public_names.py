"""What public repositories import and touch of DeepSpeed, and what becomes of it on xtrain.

    python -m tests.deepspeed_api.public_names FOLDER

FOLDER has a folder for each repository, `owner+name`, with its files. Writes public_names.json: each name with the
number of repositories that have it. Needs the extra deepspeed, which says which of the names it has today.
"""

from __future__ import annotations

import datetime
import importlib
import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtrain.base.missing import API_VERSION

NAMES = Path(__file__).with_name("public_names.json")


@dataclass(frozen=True)
class Outcome:
    """What becomes of a name: `there`, else the sentence that a script gets."""

    name: str
    repositories: int
    there: bool
    said: str


def resolve(name: str, package: str) -> Any:
    """What a dotted name means: at each dot an attribute, or a module of that name, as in `from a import b`."""
    path = package
    found: Any = importlib.import_module(package)
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        try:
            found = getattr(found, part)
        except AttributeError as error:
            try:
                found = importlib.import_module(path)
            except ModuleNotFoundError:
                raise error from None
    return found


def outcome(name: str, repositories: int) -> Outcome:
    """What becomes of a name on xtrain."""
    from xtrain.base.errors import NotImplementedYetError

    try:
        resolve(name, "xtrain")
    except NotImplementedYetError as error:
        return Outcome(name, repositories, False, str(error))
    except (ImportError, AttributeError) as error:
        return Outcome(name, repositories, False, f"not explained: {error}")
    return Outcome(name, repositories, True, "")


def record() -> dict[str, Any]:
    """The committed record."""
    return dict(json.loads(NAMES.read_text()))


def outcomes() -> list[Outcome]:
    """Of every name that DeepSpeed has today, the most used first."""
    rows = [
        (name, found["repositories"]) for name, found in record()["names"].items() if found["in_deepspeed"]
    ]
    return [outcome(name, count) for name, count in sorted(rows, key=lambda row: (-row[1], row[0]))]


def share(found: list[Outcome]) -> float:
    """Of the imports and touches, each counted once a repository, those that are there; in percent."""
    return (
        100
        * sum(item.repositories for item in found if item.there)
        / sum(item.repositories for item in found)
    )


_ASK = """
import json, sys
from tests.deepspeed_api.public_names import resolve
found = {}
for name in json.load(sys.stdin):
    try:
        resolve(name, "deepspeed")
        found[name] = True
    except Exception:  # whatever a part of DeepSpeed raises when it is imported here
        found[name] = False
json.dump(found, open(sys.argv[1], "w"))
"""


def _in_deepspeed(names: list[str], file: Path) -> dict[str, bool]:
    command = [sys.executable, "-c", _ASK, str(file)]
    subprocess.run(command, input=json.dumps(names), text=True, check=True, stdout=subprocess.DEVNULL)
    return dict(json.loads(file.read_text()))


def main(folder: Path) -> None:
    """Scan the repositories and write the record."""
    from xtrain.migrate.scan import scan

    users: dict[str, set[str]] = defaultdict(set)
    for repository in sorted(path for path in folder.iterdir() if path.is_dir()):
        for use in scan(repository):
            if (
                use.kind == "deepspeed"
                and use.name.startswith("deepspeed.")
                and "__" not in use.name.replace("__version__", "")
            ):
                users[use.name].add(repository.name.replace("+", "/"))
    known = _in_deepspeed(sorted(users), folder / "in_deepspeed.json")
    written = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "deepspeed": API_VERSION,
        "repositories": sorted(set().union(*users.values())),
        "names": {
            name: {"repositories": len(users[name]), "in_deepspeed": known[name]} for name in sorted(users)
        },
    }
    NAMES.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
