"""The rules of docs/architecture.md: imports point down, there are no circles, and few files lie loose."""

from __future__ import annotations

import pytest

from tests.architecture import FOLDERS, ROOT, Architecture, circles


@pytest.fixture(scope="module")
def found() -> Architecture:
    return Architecture()


def test_arrows_between_folders_point_down(found: Architecture) -> None:
    assert found.upward() == []


def test_no_circle_of_files(found: Architecture) -> None:
    assert found.circles() == []


def test_every_import_leads_somewhere(found: Architecture) -> None:
    assert found.unknown == []


def test_every_folder_has_its_place(found: Architecture) -> None:
    assert set(found.folders.values()) == set(FOLDERS)


def test_only_the_doors_import_deepspeeds_names(found: Architecture) -> None:
    """And everybody by the links: under two names there would be two of everything."""
    into = {source for source, target in found.arrows if target == "deepspeed_api"}
    assert into <= {"doors"}
    linked = {link.name.removesuffix(".py") for link in ROOT.iterdir() if link.is_symlink()}
    wrong = [
        f"{name} imports {target}"
        for name, targets in found.files.items()
        for target in targets
        if target.startswith("xtrain.deepspeed_api.") and target.split(".")[2] in linked
    ]
    assert wrong == []


def test_what_stands_below_needs_no_torch(found: Architecture) -> None:
    for name, path in found.known.items():
        if found.folders[name] == "base":
            assert "import torch" not in path.read_text(), name


def test_few_files_lie_loose(found: Architecture) -> None:
    assert len(found.loose()) <= 8


def test_the_tool_sees_circles() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"f"}, "f": {"e"}}
    assert circles(graph) == [["b", "c"], ["e", "f"]]
