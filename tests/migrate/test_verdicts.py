"""Verdicts agree with what importing gives; the command, its output and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import xtrain
from tests.deepspeed_api import probe
from tests.migrate import surface
from xtrain import cli
from xtrain.migrate import judge, resolve
from xtrain.migrate.cuda import cuda_verdict
from xtrain.migrate.scan import scan
from xtrain.migrate.use import Use
from xtrain.migrate.verdict import Verdict

CONDITIONAL = {"engine.flops_profiler"}
"""There when the configuration asks for it."""


def _differences() -> list[str]:
    """Names of DeepSpeed for which the sources say something else than an import does."""
    recorded = probe.read_record()
    found = [item for short, names in recorded["modules"].items() for item in probe.module(short, names)]
    wrong = []
    for item in found:
        place = resolve.find(f"xtrain.{item.path}")
        there = item.available or item.status.startswith(probe._DIFFERS)
        if (place.there and place.refused is None) != there:
            wrong.append(f"{item.path}: {place}, and importing it says: {item.status}")
    objects = {
        "engine": (probe.engine(), judge.engine_verdict),
        "accelerator": (xtrain.get_accelerator(), judge.accelerator_verdict),
    }
    for heading, (instance, verdict) in objects.items():
        for item in probe.members(heading, instance, recorded["objects"][heading]):
            said = verdict(item.path)
            if (said[0] is Verdict.AS_IS) != item.available and item.path not in CONDITIONAL:
                wrong.append(f"{item.path}: {said}, and asking for it says: {item.status}")
    return wrong


def test_sources_say_what_importing_gives(ranks):
    assert ranks(1, _differences)[0] == []


def test_the_engines_surface_is_the_records():
    assert surface.TARGET.read_text() == surface.document(), "run `make docs`"


@pytest.mark.parametrize(
    ("kind", "name", "verdict", "text"),
    [
        ("deepspeed", "deepspeed.initialize", Verdict.SHIM, ""),
        ("deepspeed", "deepspeed.zero.Init", Verdict.SHIM, ""),
        ("deepspeed", "xtrain.zero.Init", Verdict.AS_IS, ""),
        ("deepspeed", "xtrain.init_inference", Verdict.UNSUPPORTED, "inference and generation"),
        ("deepspeed", "deepspeed.init_inference", Verdict.UNSUPPORTED, "inference and generation"),
        ("deepspeed", "deepspeed.never.was", Verdict.UNSUPPORTED, "does not know"),
        ("engine", "engine.backward", Verdict.AS_IS, ""),
        ("engine", "engine.module.anything", Verdict.AS_IS, ""),
        ("engine", "engine.gradient_checkpointing_enable", Verdict.AS_IS, "the model's own"),
        ("engine", "engine.train_batch", Verdict.UNSUPPORTED, "pipeline"),
        ("accelerator", "accelerator.synchronize", Verdict.AS_IS, ""),
        ("accelerator", "accelerator.nothing", Verdict.UNSUPPORTED, "no such name"),
        ("apex", "apex", Verdict.SHIM, ""),
        ("apex", "apex.optimizers.FusedAdam", Verdict.SHIM, "same arithmetic"),
        ("apex", "apex.normalization.fused_layer_norm.FusedLayerNorm", Verdict.SHIM, "same arithmetic"),
        ("apex", "amp_C.multi_tensor_l2norm", Verdict.SHIM, "same arithmetic"),
        ("apex", "apex_C.flatten", Verdict.SHIM, "same arithmetic"),
        ("apex", "apex.contrib.fmha.fmha", Verdict.UNSUPPORTED, "scaled_dot_product_attention"),
        ("apex", "apex.fp16_utils.FP16_Optimizer", Verdict.UNSUPPORTED, '"fp16"'),
        ("apex", "amp_C.multi_tensor_never", Verdict.UNSUPPORTED, "does not have"),
        ("library", "flash_attn.flash_attn_func", Verdict.UNSUPPORTED, "sdpa"),
        ("library", "accelerate.utils.DeepSpeedPlugin", Verdict.SHIM, "accelerate"),
        ("extension", "CUDA source", Verdict.UNSUPPORTED, "NVIDIA"),
        ("extension", "torch.utils.cpp_extension.CppExtension", Verdict.AS_IS, ""),
        ("environment", "CUDA_VISIBLE_DEVICES", Verdict.SHIM, ""),
        ("environment", "NCCL_DEBUG", Verdict.AS_IS, "NCCL"),
        ("unreadable", "invalid syntax", Verdict.CHANGE, "cannot be read"),
    ],
)
def test_verdicts(kind, name, verdict, text):
    found = judge.verdict_of(Use("f.py", 1, kind, name))
    assert found[0] is verdict
    assert text in found[1]


def test_cuda():
    assert cuda_verdict("torch.cuda.synchronize") == (Verdict.SHIM, "")
    assert cuda_verdict("torch.cuda.is_available")[0] is Verdict.AS_IS
    for name in ("torch.cuda.CUDAGraph", "torch.cuda.memory.MemPool", "torch.cuda.nccl.version"):
        assert cuda_verdict(name)[0] is Verdict.UNSUPPORTED
    assert cuda_verdict("torch.backends.cudnn.benchmark")[0] is Verdict.AS_IS


def test_configurations():
    def said(value: object) -> tuple[Verdict, str]:
        return judge.verdict_of(Use("ds.json", 1, "config", "file", value=value))

    assert said({"train_batch_size": 4, "zero_optimization": {"stage": 2}}) == (Verdict.AS_IS, "")
    verdict, text = said({"train_batch_size": 4, "zero_optimization": {"stag": 2}})
    assert verdict is Verdict.CHANGE
    assert "'stag'" in text
    verdict, text = said({"train_batch_size": 4, "data_efficiency": {"enabled": True}})
    assert verdict is Verdict.UNSUPPORTED
    assert "data_efficiency" in text


def test_the_line_is_that_of_the_key(tmp_path: Path):
    (tmp_path / "ds.json").write_text('{\n"train_batch_size": 4,\n"zero_optimization": {\n  "stag": 2}\n}\n')
    [finding] = judge.judge(scan(tmp_path / "ds.json"))
    assert (finding.use.line, finding.verdict) == (4, Verdict.CHANGE)


def test_a_part_of_a_configuration_is_not_judged_by_what_is_not_in_it():
    def said(value: object) -> tuple[Verdict, str]:
        return judge.verdict_of(Use("ds.py", 1, "config", "part of a dictionary", value=value))

    assert said({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})[0] is Verdict.AS_IS
    assert said({"optimizer": {"params": {}}})[0] is Verdict.AS_IS
    assert said({"zero_optimization": {"offload_optimiser": {"device": "cpu"}}})[0] is Verdict.CHANGE


def test_launch_lines():
    def said(name: str, line: str) -> tuple[Verdict, str]:
        return judge.verdict_of(Use("run.sh", 1, "launch", name, value=line))

    assert said("deepspeed", "deepspeed t.py")[0] is Verdict.SHIM
    assert said("deepspeed", "deepspeed --autotuning run t.py")[0] is Verdict.UNSUPPORTED
    assert "xtrain run" in said("torchrun", "torchrun t.py")[1]


def test_what_a_file_can_do_without_works_as_is():
    [finding] = judge.judge([Use("f.py", 1, "library", "flash_attn", optional=True)])
    assert finding.verdict is Verdict.AS_IS
    assert "goes on without it" in finding.text


GOOD = "import deepspeed\nengine, *_ = deepspeed.initialize()\nengine.step()\n"


def test_exit_status_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    script = tmp_path / "good.py"
    script.write_text(GOOD)
    assert cli.main(["migrate", str(tmp_path)]) == 0
    assert "works as is: 1" in capsys.readouterr().out
    (tmp_path / "bad.py").write_text("import deepspeed\n\ndeepspeed.init_inference()\n")
    assert cli.main(["migrate", "--json", "--verdict", "unsupported", str(tmp_path)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    assert found["counts"] == {"as_is": 1, "shim": 3, "change": 0, "unsupported": 1}
    [use] = found["uses"]
    text = use.pop("text")
    assert text.startswith("inference and generation: ")
    assert use == {
        "file": "bad.py",
        "line": 3,
        "cell": None,
        "kind": "deepspeed",
        "name": "deepspeed.init_inference",
        "optional": False,
        "verdict": "unsupported",
    }
    assert cli.main(["migrate", "--verdict", "as_is", str(tmp_path)]) == 1  # the status is that of everything
    shown = capsys.readouterr().out
    assert "engine.step" in shown
    assert "init_inference" not in shown


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["migrate", str(tmp_path / "nowhere")]) == 2
    assert cli.main(["migrate", str(tmp_path)]) == 2
    assert "there is no Python in" in capsys.readouterr().err
    (tmp_path / "x.txt").touch()
    assert cli.main(["migrate", str(tmp_path / "x.txt")]) == 2


def test_nothing_is_executed_and_no_torch_is_imported(tmp_path: Path):
    (tmp_path / "script.py").write_text(f"{GOOD}raise SystemExit(7)\n")
    (tmp_path / "ds.json").write_text('{"train_batch_size": 4, "zero_optimization": {"stage": 2}}')
    code = (
        "import sys; from xtrain import cli; "
        f"status = cli.main(['migrate', {str(tmp_path)!r}]); print(status, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "0 False"
