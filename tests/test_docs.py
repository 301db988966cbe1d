"""The documentation: pages are in the site's menu, the README's links lead somewhere, the tutorial's script runs.

Links inside docs/ are checked by `make site`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def test_every_page_is_in_the_menu() -> None:
    menu = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert pages - menu - {"index.md"} == set(), "add them to mkdocs.yml and to docs/index.md"
    links = set(re.findall(r"\]\(([^)#]+\.md)", (DOCS / "index.md").read_text()))
    assert pages - links - {"index.md"} == set(), "docs/index.md has a line for every page"


def test_the_readmes_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert len(targets) > 20
    missing = [
        target
        for target in targets
        if not target.startswith(("http", "#")) and not (ROOT / target.split("#")[0]).exists()
    ]
    assert not missing


def _block(page: Path, title: str) -> str:
    found = re.search(rf'^```\w+ title="{re.escape(title)}"\n(.*?)^```$', page.read_text(), re.M | re.S)
    assert found is not None
    return found.group(1)


def test_the_tutorials_script_runs_after_the_swap(tmp_path: Path) -> None:
    page = DOCS / "tutorial" / "swap.md"
    script, config = _block(page, "train.py"), _block(page, "ds.json")
    assert script.count("\nimport deepspeed\n") == 1
    (tmp_path / "train.py").write_text(
        script.replace("\nimport deepspeed\n", "\nimport xtrain as deepspeed\n")
    )
    (tmp_path / "ds.json").write_text(json.dumps(json.loads(config)))
    command = [sys.executable, "train.py", "--deepspeed_config", "ds.json", "--steps", "10"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    shown = re.search(r"^step 10 loss (\S+)$", page.read_text(), re.MULTILINE)
    printed = re.search(r"^step 10 loss (\S+)$", out, re.MULTILINE)
    assert shown is not None
    assert printed is not None, out
    assert abs(float(printed.group(1)) - float(shown.group(1))) < 0.01
