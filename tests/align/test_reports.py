"""Reports: complete, well formed, self-contained; envelopes from reruns."""

from __future__ import annotations

import json
import math
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from tests.align.records import write
from xtrain import cli
from xtrain.align.recorder import Recorder
from xtrain.align.sources import read_curve


def _train(path: Path, factor: float = 1.0, steps: int = 30) -> Path:
    """A recorded loop; `factor` multiplies one layer's gradient from step 11 on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    with Recorder(path, model=model, modules_every=5, config={"<lr>": 0.1, "name": path.stem}) as recorder:
        for step in range(steps):
            draw = torch.Generator().manual_seed(step)
            x = torch.randn(16, 4, generator=draw)
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for param in model.parameters():
                    assert param.grad is not None
                    mine = factor if step >= 10 and param is model[2].weight else 1.0
                    param -= 0.05 * mine * param.grad
            recorder.step(loss=loss, lr=0.05)
    return path


class _Balanced(HTMLParser):
    """Checks that every element is closed, and collects what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: set[str] = set()
        self.data: dict[str, Any] = {}
        """What scripts read, by the id of its element."""
        self._reads: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self._reads = dict(attrs).get("id") if ("type", "application/json") in attrs else None
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "data", "srcset")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self._reads is not None:
            self.data[self._reads] = json.loads(data, parse_constant=pytest.fail)

    def handle_endtag(self, tag: str) -> None:
        self._reads = None
        assert self.open.pop() == tag


def test_every_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = _train(tmp_path / "one.jsonl"), _train(tmp_path / "two.jsonl", 1.5)
    files = {kind: str(tmp_path / f"report.{kind}") for kind in ("html", "markdown", "junit", "plot")}
    options = [word for kind, path in files.items() for word in (f"--{kind}", path)]
    assert cli.main(["align", str(one), str(two), "--policy", "exact", *options]) == 1
    said = capsys.readouterr().out
    # Step 11 is the last one of equal weights; its gradients are the same, and its update is not.
    assert "the curves part at step 12" in said
    assert "in phase optimizer of step 11" in said
    assert "first module that departs is 2," in said
    assert "config.name" in said
    page = Path(files["html"]).read_text()
    parser = _Balanced()
    parser.feed(page)
    assert not parser.open
    assert not parser.fetched
    assert "url(" not in page
    assert "@import" not in page
    assert {"svg", "path", "rect"} <= parser.seen
    assert parser.data["curves"][0]["place"] == "loss"
    first, *_ = parser.data["curves"][0]["charts"]
    assert [line["label"] for line in first["lines"]] == ["reference", "candidate"]
    assert first["lines"][0]["values"] == read_curve(one).loss.tolist()
    assert "noscript" in parser.seen
    assert "lr&gt;" in page or "&lt;lr" not in page
    assert page.count("<h2>Phase ") == 4
    suite = ElementTree.parse(files["junit"]).getroot()
    assert suite.attrib["failures"] == "2"
    failure = suite.find("testcase[@name='loss']/failure")
    assert failure is not None
    assert "part at step 12" in failure.attrib["message"]
    text = Path(files["markdown"]).read_text()
    assert text.startswith("# Loss curves: not aligned")
    assert "| 12 |" in text
    assert Path(files["plot"]).read_bytes().startswith(b"\x89PNG")
    assert cli.main(["align", str(one), str(one), "--policy", "exact", *options]) == 0
    assert ElementTree.parse(files["junit"]).getroot().attrib["failures"] == "0"
    assert cli.main(["align", str(one), str(one), "--html", str(tmp_path / "no" / "folder.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_reports_of_curves_with_nothing_to_draw(tmp_path: Path) -> None:
    odd = write(tmp_path / "odd.jsonl", {1: math.nan, 2: math.inf, 3: -1.0, 4: 0.0})
    single = write(tmp_path / "single.jsonl", {1: 2.0})
    for one, two in ((odd, odd), (single, odd), (single, single)):
        page, picture = tmp_path / "page.html", tmp_path / "picture.png"
        status = cli.main(["align", str(one), str(two), "--html", str(page), "--plot", str(picture)])
        # The same file with a NaN is the same as far as it can be compared.
        assert status == (1 if one != two else 2 if one == odd else 0)
        parser = _Balanced()
        parser.feed(page.read_text())
        assert not parser.open


# Without torch, whose import takes seconds: what a recorded run of a perturbed model leaves behind.
_SCRIPT = """
import json, os, random

draw = random.Random(int(os.environ["XTRAIN_PERTURB"]))
names = ["first", "second"]
with open(os.path.join(os.environ["XTRAIN_RUN_DIR"], "metrics.jsonl"), "w") as file:
    lines = [{"type": "header", "version": 2}, {"type": "names", "modules": names}]
    for step in range(1, 26):
        loss = 2.0 + draw.gauss(0, 1e-5)
        lines.append({"type": "step", "step": step, "loss": loss, "loss_hex": loss.hex()})
        if step % 5 == 1:
            values = {name: [1 + draw.gauss(0, 1e-5) for _ in names] for name in ("mean", "abs_mean", "rms", "max_abs")}
            lines.append({"type": "modules", "step": step, "phase": "forward", **values, "nonfinite": [0, 0]})
    file.write("".join(json.dumps(line) + "\\n" for line in lines))
"""


def test_an_envelope_from_reruns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    output = tmp_path / "reference" / "envelope.npz"
    command = ["align", "envelope", "--runs", "3", "-o", str(output), "--"]
    assert cli.main([*command, sys.executable, str(script)]) == 0
    assert "envelope of 3 runs, perturbed by rounding" in capsys.readouterr().out
    runs = sorted(output.parent.glob("envelope-runs-*/*/metrics.jsonl"))
    curves = np.stack([read_curve(run).loss for run in runs])
    assert len(np.unique(curves, axis=0)) == 3
    assert np.abs(curves / curves[0] - 1).max() < 1e-3
    shutil.copy(runs[0], output.parent / "metrics.jsonl")
    page = tmp_path / "page.html"
    arguments = [str(output.parent), str(runs[1].parent), "--policy", "envelope", "--html", str(page)]
    assert cli.main(["align", *arguments]) == 0
    assert "no module departs: 2 modules, 5 measured steps" in capsys.readouterr().out
    assert cli.main([*command, sys.executable, "-c", "import sys; sys.exit('bad luck')"]) == 2
    assert "run 1 of the reference ended with status 1" in capsys.readouterr().err
    assert cli.main([*command, sys.executable, "-c", "pass"]) == 2
    assert "wrote no record" in capsys.readouterr().err
    assert cli.main([*command, str(tmp_path / "none")]) == 2
    assert "cannot be run" in capsys.readouterr().err


def test_a_script_that_cannot_be_perturbed_is_told_after_two_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT.replace('int(os.environ["XTRAIN_PERTURB"])', "7"))
    output = tmp_path / "envelope.npz"
    command = ["align", "envelope", "--runs", "5", "-o", str(output), "--", sys.executable, str(script)]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "run 1 and run 2 have the same losses to the last bit" in said
    assert (
        "calls xtrain.reproducible.perturbation.perturb_if_asked(model) after it has made its model" in said
    )
    assert "--runs" not in said
    runs = sorted(tmp_path.glob("envelope-runs-*/*/metrics.jsonl"))
    assert len(runs) == 2
    assert not output.exists()
    # The same runs, recorded by hand.
    assert cli.main(["align", "envelope", *map(str, runs), "-o", str(output)]) == 2
    said = capsys.readouterr().err
    assert f"{runs[0]} and {runs[1]} have the same losses to the last bit" in said
    assert "XTRAIN_PERTURB=SEED" in said
    assert "--runs" not in said


def test_the_function_that_perturbs_is_where_it_is_said_to_be() -> None:
    import importlib

    from xtrain.align.measure import _PERTURB

    module, _, name = _PERTURB.removesuffix("(model)").rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))
