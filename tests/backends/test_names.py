"""Every name of torch_npu and torch.cuda that xtrain takes exists there, and takes the arguments it is given."""

from __future__ import annotations

import inspect
import json
import operator
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backends import names, record_torch_npu
from xtrain.backends.ascend import AscendBackend

CUDA = [names.ROOT / "backends" / "cuda.py", names.ROOT / "backends" / "dcu.py"]


def _parse(signature: str) -> inspect.Signature:
    from typing import Any, Optional, Union

    scope: dict[str, Any] = {"torch": torch, "Union": Union, "Optional": Optional, "Any": Any}
    exec(f"def function{signature}: ...", scope)
    return inspect.signature(scope["function"])


def _misfits(use: names.Use, signature: inspect.Signature) -> str | None:
    if use.call is None:
        return None
    count, keywords = use.call
    try:
        signature.bind(*[None] * count, **dict.fromkeys(keywords))
    except TypeError as error:
        return f"{use.where} calls {use.name}{signature} with {count} arguments and {keywords}: {error}"
    return None


def _against_record(uses: list[names.Use], recorded: dict[str, str]) -> list[str]:
    wrong = []
    for use in uses:
        if use.name not in recorded:
            wrong.append(f"{use.where} uses {use.name}: record it anew (tests/backends/record_torch_npu.py)")
        elif recorded[use.name].startswith("(") and (text := _misfits(use, _parse(recorded[use.name]))):
            wrong.append(text)
    return wrong


def test_torch_npus_names_are_in_the_record() -> None:
    recorded = json.loads(record_torch_npu.RECORD.read_text())
    uses = names.of_package("torch_npu", "torch_npu.npu", record_torch_npu.ASCEND, *names.SHARED)
    assert {"torch_npu.npu.set_device", "torch_npu.npu.matmul.allow_hf32"} <= {use.name for use in uses}
    assert _against_record(uses, recorded["names"]) == []
    assert {use.name for use in uses} == recorded["names"].keys()  # and nothing that is not used any more
    strings = recorded["strings"]
    assert strings == record_torch_npu.STRINGS
    assert set(AscendBackend.runtime.visible_devices_variables) <= strings.keys()
    assert f'"{AscendBackend.collectives.process_group_backend}"' in strings
    assert "HCCL_DETERMINISTIC" in record_torch_npu.ASCEND.read_text()


def test_a_name_or_an_argument_that_is_not_there_is_told(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "import torch_npu\n\nclass A:\n    def f(self):\n        self.chip.no_such(1)\n"
        "        torch.npu.set_device(1, 2)\n        return torch_npu.npu.stream(self.chip.current_stream())\n"
    )
    recorded = json.loads(record_torch_npu.RECORD.read_text())["names"]
    uses = [use for use in names.of_package("torch_npu", "torch_npu.npu", source) if use.where != "promised"]
    assert [use.name.rpartition(".")[2] for use in uses] == [
        "no_such",
        "set_device",
        "stream",
        "current_stream",
    ]
    first, second = _against_record(uses, recorded)
    assert first.startswith("source.py:5 uses torch_npu.npu.no_such: record it anew")
    assert "source.py:6 calls torch_npu.npu.set_device(device) with 2 arguments" in second


def _wheel(folder: Path, init: str) -> Path:
    path = folder / "torch_npu-9.9-py3-none-any.whl"
    files = {
        "torch_npu/__init__.py": "",
        "torch_npu/npu/__init__.py": init,
        "torch_npu/npu/utils.py": "def synchronize(device=None): ...\ndef is_support_inf_nan(): ...",
        "torch_npu/npu/config.py": "class _Switch:\n def __setattr__(cls, name, value):\n  name == 'allow_hf32'",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_a_wheel_is_read_without_being_imported(tmp_path: Path) -> None:
    init = (
        "raise SystemExit('imported')\nfrom .utils import synchronize as wait\nfrom .utils import *\n"
        "from . import config\nmatmul = config._Switch()\n"
        "class Stream:\n def __new__(cls, device=None): ...\n def query(self): ...\n"
    )
    wheel = record_torch_npu.Wheel(_wheel(tmp_path, init))
    found = {
        name: wheel.signature(f"torch_npu.npu.{name}")
        for name in (
            "wait", "synchronize", "utils.is_support_inf_nan", "matmul.allow_hf32", "matmul.no", "Stream",
            "Stream.query", "Stream.no", "no",
        )
    }  # fmt: skip
    assert found == {
        "wait": "(device=None)", "synchronize": "(device=None)", "utils.is_support_inf_nan": "()",
        "matmul.allow_hf32": "attribute", "matmul.no": None, "Stream": "(device=None)", "Stream.query": "()",
        "Stream.no": None, "no": None,
    }  # fmt: skip
    with pytest.raises(LookupError, match=r"which torch_npu-9\.9-py3-none-any\.whl does not define"):
        record_torch_npu.record(tmp_path / "torch_npu-9.9-py3-none-any.whl")
    assert "torch_npu" not in sys.modules


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except ValueError:  # of a class that is written in C
        return None


def test_torchs_names_are_in_the_installed_torch() -> None:
    uses = names.of_package("torch", "torch.cuda", *CUDA, *names.SHARED)
    assert {"torch.cuda.mem_get_info", "torch.backends.cuda.matmul.allow_tf32"} <= {use.name for use in uses}
    for use in uses:
        found = operator.attrgetter(use.name.removeprefix("torch."))(torch)
        if use.call is not None and (signature := _signature(found)) is not None:
            assert _misfits(use, signature) is None
    # Of an object that only a device can make: torch's own declaration.
    stub = Path(torch.__file__).parent / "_C" / "__init__.pyi"
    assert "gcnArchName: str" in stub.read_text().partition("class _CudaDeviceProperties")[2][:2000]
