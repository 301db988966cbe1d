"""What an import costs, and what a wheel holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.architecture import modules

ROOT = Path(__file__).resolve().parents[1]


def _python(code: str, path: Path = ROOT, cwd: Path = ROOT) -> str:
    env = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, cwd=cwd
    ).stdout


def test_imports_are_lean() -> None:
    """No torch for the command line; no deepspeed, hydra or matplotlib for training; nothing compiled."""
    code = (
        "import json, sys; import xtrain, xtrain.cli, xtrain.launch.main; early = 'torch' in sys.modules; "
        "hydra = 'hydra' in sys.modules; import subprocess; "
        "import torch; before = set(sys.modules); "
        "subprocess.Popen = None; "  # a compiler would need it
        "xtrain.initialize, xtrain.comm; "
        "print(json.dumps([early, sorted({m.split('.')[0] for m in set(sys.modules) - before})]))"
    )
    early, added = json.loads(_python(code))
    assert early is False
    assert not {"deepspeed", "hydra", "matplotlib", "tokenizers", "mpi4py", "torch_npu"} & set(added)


def test_the_api_is_deepspeeds() -> None:
    code = (
        "import inspect, json, xtrain as deepspeed; "
        "print(json.dumps(list(inspect.signature(deepspeed.initialize).parameters)))"
    )
    assert json.loads(_python(code)) == [
        "args", "model", "optimizer", "model_parameters", "training_data", "lr_scheduler", "distributed_port",
        "mpu", "dist_init_required", "collate_fn", "config", "mesh_param", "config_params",
    ]  # fmt: skip


def test_a_name_that_is_missing_says_so() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        _python("import xtrain; xtrain.DualPipeV")
    assert "DualPipeV (pipeline parallelism) is not there yet in xtrain: " in caught.value.stderr


def test_the_engine_never_asks_which_backend_it_is() -> None:
    for path in (ROOT / "xtrain").rglob("*.py"):
        assert "backend ==" not in path.read_text(), path
        assert "backend.name ==" not in path.read_text(), path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    # A copy of what git tracks, so that nothing else can be packed and no build folder is left here.
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    source = folder / "source"
    source.mkdir()
    archive = subprocess.Popen(
        ["tar", "-c", "--null", "-T", "-"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert archive.stdin is not None
    archive.stdin.write(files)
    archive.stdin.close()
    subprocess.run(["tar", "-x", "-C", str(source)], stdin=archive.stdout, check=True)
    assert archive.wait() == 0
    subprocess.run([*command, "-w", str(folder), str(source)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_has_everything_and_runs_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names}
    assert all(top == "xtrain" or top.endswith(".dist-info") for top in tops), tops
    for folder, suffix in (("backends", ".py"), ("comm", ".py"), ("launch", ".py"), ("conf", ".yaml")):
        for path in (ROOT / folder).rglob(f"*{suffix}"):
            assert f"xtrain/{path.relative_to(ROOT)}" in names
    for name in modules():  # what links lead to is there under the links' names
        path = name.replace(".", "/")
        assert f"{path}.py" in names or f"{path}/__init__.py" in names, name
    for path in ((ROOT / "xtrain/align/curves.js"), *(ROOT / "xtrain/align/vendor").iterdir()):
        assert str(path.relative_to(ROOT)) in names
    assert "xtrain/py.typed" in names
    assert "xtrain/examples/pretrain_glm.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    code = "import sys; from xtrain import cli; sys.exit(cli.main(['launch', '--dry-run', 'train.steps=3']))"
    out = _python(code, path=tmp_path / "site", cwd=tmp_path)
    assert str(tmp_path / "site" / "xtrain" / "examples" / "pretrain_glm.py") in out


def test_the_wheels_pytest_plugin(wheel: Path, tmp_path: Path) -> None:
    """Found by its entry point; it imports nothing heavy for tests that do not use it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    project = tmp_path / "project"
    project.mkdir()
    (project / "conftest.py").write_text(
        "import sys\n"
        "def pytest_sessionfinish():\n"
        "    print('heavy:', sorted({'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))\n"
    )
    (project / "test_it.py").write_text(
        "def test_plain(): pass\ndef test_curve(xtrain_align): xtrain_align('none', 'none')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=project)

    light = run("-k", "plain")
    assert light.returncode == 0, light.stdout
    assert "heavy: []" in light.stdout
    used = run("-k", "curve")
    assert used.returncode == 1
    assert "there is no reference" in used.stdout
    off = run("-p", "no:xtrain.align.pytest_plugin", "-k", "curve")
    assert "fixture 'xtrain_align' not found" in off.stdout
    assert (
        "unrecognized arguments: --update-reference"
        in run("-p", "no:xtrain.align.pytest_plugin", "--update-reference").stderr
    )
