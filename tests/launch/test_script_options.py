"""What a script of the user's is given by `xtrain launch`, and under which names it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch.runs import run
from tests.zero_lines.record import SCRIPT, config, recorded
from xtrain.base.errors import ConfigError
from xtrain.launch.compose import compose_config
from xtrain.launch.job import check_overrides_are_used, options_for_config
from xtrain.launch.script_options import config_options

BOTH = ["--deepspeed", "--deepspeed_config"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import deepspeed\ndeepspeed.add_config_arguments(parser)", BOTH),
        ("from deepspeed import add_config_arguments as add\nadd(parser)\nadd_config_arguments", BOTH),
        ("parser.add_argument('--deepspeed-config', type=str)", ["--deepspeed_config"]),
        ("parser.add_argument('--deepspeed', type=str)", []),  # Transformers': a file
        ("import deepspeed\ndeepspeed.initialize(config='own.json')", []),
        ("from options import parser", BOTH),
        ("import tools.options", BOTH),
        ("print 'Python 2'", []),
    ],
)
def test_the_source_says_which_options_it_takes(tmp_path: Path, source: str, found: list[str]) -> None:
    (tmp_path / "tools").mkdir()
    for file in ("options.py", "tools/options.py"):
        (tmp_path / file).write_text("import script, deepspeed\nparser = deepspeed.add_config_arguments(p)\n")
    (tmp_path / "script.py").write_text(source)
    assert config_options(tmp_path / "script.py") == found


def test_a_script_with_a_config_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import deepspeed\n")

    def options(*overrides: str) -> list[str]:
        composed, _ = compose_config([f"script={script}", *overrides])
        check_overrides_are_used(composed, list(overrides))
        return options_for_config(composed)

    assert options() == []
    assert options("pass_config=true", "train.lr=0.1") == BOTH
    with pytest.raises(ConfigError, match=r"train\.lr would not be used: .* is not given the config"):
        options("train.lr=0.1")
    with pytest.raises(ConfigError, match=r"deepspeed_config would not be used"):
        options("deepspeed_config=x.json")
    for override in ("shims=on", "pass_config=false", "pass_local_rank=true"):
        with pytest.raises(ConfigError, match=r"is for a script of your own: add script=FILE"):
            check_overrides_are_used(compose_config([override])[0], [override])


def test_a_script_for_cuda_runs_as_it_is(tmp_path: Path) -> None:
    """And its error names its line."""
    run_dir = tmp_path / "run"
    losses = tmp_path / "losses.json"
    (tmp_path / "ds_config.json").write_text(json.dumps(config("fp32")))
    settings = [
        "shims=on",
        "pass_local_rank=true",
        f"deepspeed_config={tmp_path}/ds_config.json",
        f"script={SCRIPT}",
    ]
    status, output = run(run_dir, *settings, "--", "--steps=3", f"--record={losses}")
    assert status == 0, output
    assert json.loads(losses.read_text()) == pytest.approx(recorded("fp32")[:3], rel=1e-6)

    script = tmp_path / "script.py"
    lines = [
        "import sys, torch",
        "assert sys.argv[1].startswith('--local_rank='), sys.argv",
        "torch.cuda.graph()",
        "",
    ]
    script.write_text("\n".join(lines))
    status, output = run(tmp_path / "second", "shims=auto", "pass_local_rank=true", f"script={script}")
    assert status == 2, output
    assert f"{script}:3: torch.cuda.graph on this backend is not there yet in xtrain" in " ".join(
        output.split()
    )
