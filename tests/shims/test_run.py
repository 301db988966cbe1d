"""`xtrain run`: what the script and its children see, and how mistakes are told."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xtrain import cli
from xtrain.base.missing import API_VERSION

REPORT = """
import importlib.metadata, json, multiprocessing, os, subprocess, sys

def who(queue=None):
    import deepspeed
    found = [deepspeed.__version__, deepspeed.version, importlib.metadata.version("deepspeed"),
             os.path.basename(os.path.dirname(deepspeed.__file__))]
    return found if queue is None else queue.put(found)

if __name__ == "__main__":
    if "--leaf" in sys.argv:
        print(json.dumps(who()))
        sys.exit()
    print(sys.argv, sys.path[0], __file__, os.environ["CHECK"])
    assert who() == json.loads(subprocess.check_output([sys.executable, __file__, "--leaf"]))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=who, args=(queue,))
    child.start()
    assert who() == queue.get()
    child.join()
    import sitecustomize
    print(sitecustomize.MINE, *who()[:3])
"""


def _run(folder: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xtrain.cli", "run", *words],
        cwd=folder,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )


def test_a_script_and_its_children(tmp_path: Path) -> None:
    """Also: a sitecustomize of the machine's own runs as before, and options after the script are the script's."""
    (tmp_path / "script.py").write_text(REPORT)
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("MINE = 'mine'\n")
    root = str(Path(cli.__file__).absolute().parents[1])
    done = _run(
        tmp_path, "script.py", "--device-shim", "x", "--", "-m", CHECK="set", PYTHONPATH=f"{own}:{root}"
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"['script.py', '--device-shim', 'x', '--', '-m'] {tmp_path} {tmp_path / 'script.py'} set"
    assert second == f"mine {API_VERSION} {API_VERSION} {API_VERSION}"


def test_a_module_and_its_status(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("import sys, deepspeed\nprint(sys.argv[1:], __name__)\nsys.exit(7)\n")
    done = _run(tmp_path, "--backend", "cpu", "-m", "job", "a b")
    assert (done.returncode, done.stdout) == (7, "['a b'] __main__\n"), done.stderr


ERRORS = {
    "torch.cuda.CUDAGraph()": "torch.cuda.CUDAGraph on this backend is not there yet in xtrain: use torch.compile",
    "torch.utils.cpp_extension.load('fused', ['k.cu'])": "the CUDA kernel fused (k.cu) is not there yet in xtrain",
    "import deepspeed.inference.engine": "inference.engine (inference and generation) is not there yet in xtrain",
    "raise ImportError('libcudart.so.12: cannot open')": "a compiled CUDA extension cannot be loaded here",
    "raise ModuleNotFoundError('No module named triton', name='triton')": "Triton is not installed, and its kernels do",
    "deepspeed.initialize(model=1)": "initialize() needs model=<torch module>, got int",
}


def test_an_error_names_the_line(tmp_path: Path) -> None:
    """All in one process: what Python calls for an error that nobody catches is called for each."""
    script = tmp_path / "script.py"
    lines = ["import sys, torch, deepspeed", "import torch.utils.cpp_extension"]
    for line in ERRORS:
        lines += ["try:", f"    {line}", "except Exception: sys.excepthook(*sys.exc_info())"]
    script.write_text("\n".join([*lines, "deepspeed.never_heard_of"]))
    done = _run(tmp_path, "script.py")
    assert done.returncode == 1
    told = [text for text in done.stderr.splitlines() if "error:" in text]
    for number, (text, said) in enumerate(zip(told, ERRORS.values(), strict=True)):
        assert text.startswith(f"{script}:{4 + 3 * number}: error: {said}")
    assert "AttributeError: xtrain has no 'never_heard_of'" in done.stderr


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import deepspeed\n1 / 0\n")
    done = _run(tmp_path, "script.py")
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "nowhere.py"]) == 2
    assert "there is no script nowhere.py: give a Python file, or -m" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", "--device-shim", "maybe", "x.py"])


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    code = "import importlib.metadata as m; print(m.version('torch'), list(m.distributions(name='json')))"
    (tmp_path / "script.py").write_text(code)
    done = _run(tmp_path, "script.py")
    assert done.stdout == f"{importlib.metadata.version('torch')} []\n"


def test_whatever_imports_torch_first(tmp_path: Path) -> None:
    """The first import of torch may be deep in xtrain's own modules, or in torch's compiler."""
    (tmp_path / "script.py").write_text(
        "from xtrain.backends import Backend\n"
        "from deepspeed.runtime.zero import GatheredParameters\n"
        "import torch, torch._dynamo, deepspeed\n"
        "double = torch.compile(lambda x: x.cuda() + torch.ones(2, device='cuda'), backend='aot_eager')\n"
        "print(torch.cuda.is_available(), double(torch.ones(2)).tolist())\n"
    )
    done = _run(tmp_path, "--device-shim", "on", "script.py")
    assert done.stdout == "True [2.0, 2.0]\n", done.stderr
