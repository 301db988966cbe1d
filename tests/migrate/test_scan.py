"""What the scanner finds in sources, notebooks, shell scripts and configurations."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from xtrain.base.errors import ConfigError
from xtrain.migrate.scan import scan


def uses(tmp_path: Path, source: str, name: str = "script.py") -> list[tuple[int, str, str]]:
    (tmp_path / name).write_text(textwrap.dedent(source))
    return [(use.line, use.kind, use.name) for use in scan(tmp_path / name)]


def names(tmp_path: Path, source: str) -> list[str]:
    return [name for _, _, name in uses(tmp_path, source)]


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("import deepspeed as ds\nds.initialize()", "deepspeed.initialize"),
        ("import xtrain as deepspeed\ne = deepspeed.initialize()[0]\ne.step", "engine.step"),
        ("import deepspeed.comm as dist\ndist.barrier()", "deepspeed.comm.barrier"),
        ("from deepspeed.runtime.zero import GatheredParameters as GP", "deepspeed.runtime.zero.GatheredParameters"),
        ("import deepspeed\nwith deepspeed.zero.Init(): pass", "deepspeed.zero.Init"),
        ('import deepspeed\ngetattr(deepspeed, "pipe")', "deepspeed.pipe"),
        ('import importlib\nimportlib.import_module("deepspeed.moe")', "deepspeed.moe"),
        ("def f():\n    import deepspeed as d\n    return d.zero", "deepspeed.zero"),
        ("import deepspeed\nz = deepspeed.zero\nz.Init", "deepspeed.zero.Init"),
        ("import deepspeed\nclass A(deepspeed.DeepSpeedEngine): pass", "deepspeed.DeepSpeedEngine"),
        ("import torch.cuda as tc\ntc.synchronize()", "torch.cuda.synchronize"),
        ("from torch import cuda\ncuda.empty_cache()", "torch.cuda.empty_cache"),
        ("from torch.cuda.amp import autocast", "torch.cuda.amp.autocast"),
        ("import torch\ntorch.backends.cudnn.benchmark = True", "torch.backends.cudnn.benchmark"),
        ("x = model.cuda(0)", "Tensor.cuda"),
        ('device = "cuda:1"', '"cuda:1"'),
        ('device = f"cuda:{rank}"', '"cuda:..."'),
        ('device = "cuda:%d" % rank', '"cuda:..."'),
        ('if x.device.type == "cuda": pass', '== "cuda"'),
        ('init("nccl")', '"nccl"'),
        ('init("cpu:gloo,cuda:nccl")', '"nccl"'),
        ('kind = "torch.cuda.HalfTensor"', "torch.cuda.HalfTensor"),
        ("from apex.optimizers import FusedAdam", "apex.optimizers.FusedAdam"),
        ("import amp_C\namp_C.multi_tensor_scale", "amp_C.multi_tensor_scale"),
        ("from flash_attn import flash_attn_func", "flash_attn.flash_attn_func"),
        ("from transformers.integrations import HfDeepSpeedConfig", "transformers.integrations.HfDeepSpeedConfig"),
        ("from torch.utils.cpp_extension import CUDAExtension", "torch.utils.cpp_extension.CUDAExtension"),
        ('import os\nos.environ["CUDA_VISIBLE_DEVICES"] = "0"', "CUDA_VISIBLE_DEVICES"),
        ('import os\nos.system("deepspeed --num_gpus 2 train.py")', "deepspeed"),
        ("try:\n    import deepspeed\nexcept ImportError:\n    deepspeed = None\ndeepspeed.zero", "deepspeed.zero"),
        ("from deepspeed.accelerator import get_accelerator\nget_accelerator().device_name()",
         "accelerator.device_name"),
        ("import deepspeed\nacc = deepspeed.get_accelerator()\nacc.Stream", "accelerator.Stream"),
    ],
)  # fmt: skip
def test_names_as_the_packages_have_them(tmp_path, source, wanted):
    assert wanted in names(tmp_path, source)


@pytest.mark.parametrize(
    "source",
    [
        '"""Moves it to cuda."""\ndef f():\n    "cuda"',
        "from .deepspeed import helper\nhelper.x",
        "def f(deepspeed):\n    return deepspeed.zero",
        "def f():\n    deepspeed = Settings()\n    return deepspeed.zero",
        'print("cuda is not there")',
        "# import deepspeed",
        "import numpy\nnumpy.cuda",
        "from transformers import AutoModel",
        "def initialize(): pass\ninitialize()[0].step()",
    ],
)
def test_what_is_none(tmp_path, source):
    assert names(tmp_path, source) == []


ENGINES = """
import deepspeed
from deepspeed import DeepSpeedEngine

class Trainer:
    def __init__(self, net):
        self.engine, self.opt, _, _ = deepspeed.initialize(model=net)
        self.other = deepspeed.initialize(model=net)[0]

    def train(self, x):
        self.engine.backward(x)
        self.opt.step()
        helper(1, engine=self.other)

def helper(n, engine):
    engine.no_sync()

def build():
    model, opt, *_ = deepspeed.initialize()
    return model, opt

def hinted(engine: "DeepSpeedEngine", other: deepspeed.DeepSpeedEngine | None):
    engine.train(); other.module.eval()

wrapped, opt = build()
wrapped.save_checkpoint("x")
getattr(wrapped, "global_steps")

def elsewhere(wrapped):
    wrapped.nothing()
"""


def test_attributes_of_engines(tmp_path):
    found = {name for _, kind, name in uses(tmp_path, ENGINES) if kind == "engine"}
    assert found == {
        "engine.backward", "engine.no_sync", "engine.save_checkpoint", "engine.train", "engine.module.eval",
        "engine.global_steps",
    }  # fmt: skip


OPTIONAL = """
import torch
try:
    from apex.optimizers import FusedAdam
    import flash_attn
except (ImportError, OSError):
    FusedAdam = None
try:
    import deepspeed.moe
except ValueError:
    pass
if is_deepspeed_available():
    import deepspeed.pipe
device = "cuda" if torch.cuda.is_available() else "cpu"
if torch.cuda.is_available():
    x.cuda()
else:
    y.cuda()
FusedAdam.step
hasattr(torch.cuda, "nvtx")
"""


def test_what_a_file_can_do_without(tmp_path):
    (tmp_path / "script.py").write_text(OPTIONAL)
    found = {(use.name, use.optional) for use in scan(tmp_path)}
    assert found == {
        ("apex.optimizers.FusedAdam", True),
        ("apex.optimizers.FusedAdam.step", True),
        ("flash_attn", True),
        ("deepspeed.moe", False),
        ("deepspeed.pipe", True),
        ("torch.cuda.is_available", False),
        ('"cuda"', True),
        ("Tensor.cuda", True),
        ("Tensor.cuda", False),
        ("torch.cuda.nvtx", True),
    }


def test_lines_and_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text("\n\nimport deepspeed\n")
    (tmp_path / "kernel.cu").write_text("__global__ void f() {}")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "c.py").write_text("import deepspeed")
    assert [(use.file, use.line, use.name) for use in scan(tmp_path)] == [
        ("kernel.cu", 1, "CUDA source"),
        ("a/b.py", 3, "deepspeed"),
    ]


def test_a_repositorys_own_package_is_no_library(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    (tmp_path / "script.py").write_text("import triton\nimport xformers")
    assert [use.name for use in scan(tmp_path)] == ["xformers"]


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "old.py").write_text("print 'cuda'\n")
    (tmp_path / "broken.py").write_text("x = 1\nif x\n")
    (tmp_path / "null.py").write_bytes(b"x = 1\0")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": STAGE}}')
    (tmp_path / "old.ipynb").write_text("{}")
    found = {use.file: (use.kind, use.line, use.name) for use in scan(tmp_path)}
    assert found["old.py"][:2] == ("unreadable", 1)
    assert "Python 2" in found["old.py"][2]
    assert found["broken.py"][:2] == ("unreadable", 2)
    assert {found[name][0] for name in ("null.py", "ds.json", "old.ipynb")} == {"unreadable"}


def test_notebooks(tmp_path):
    def cell(source: str, kind: str = "code") -> dict[str, object]:
        return {"cell_type": kind, "source": source.splitlines(keepends=True)}

    cells = [
        cell("import deepspeed in words", "markdown"),
        cell("%matplotlib inline\n!pip install x\nimport deepspeed as ds"),
        cell("!deepspeed train.py --x 1"),
        cell("%%bash\ntorchrun train.py"),
        cell("if True:\n    !ls\nds.zero.Init"),
        cell("this is no Python"),
        cell('x.to("cuda")'),
    ]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    assert [(use.cell, use.line, use.kind, use.name) for use in scan(tmp_path)] == [
        (2, 3, "deepspeed", "deepspeed"),
        (3, 1, "launch", "deepspeed"),
        (4, 2, "launch", "torchrun"),
        (5, 3, "deepspeed", "deepspeed.zero.Init"),
        (6, 1, "unreadable", "invalid syntax"),
        (7, 1, "cuda", '"cuda"'),
    ]


def test_shell_scripts(tmp_path):
    script = r"""
    # deepspeed in words.py
    export CUDA_VISIBLE_DEVICES=0,1 NCCL_DEBUG=INFO
    OMP_NUM_THREADS=1 deepspeed --num_gpus 2 \
        train.py --deepspeed
    cd x && torchrun --nproc_per_node 2 train.py
    run="python -m torch.distributed.launch train.py"
    if [ 1 ]; then accelerate launch train.py; fi
    pip install deepspeed
    srun -n 2 python -u -m torch.distributed.run train.py
    echo deepspeed=1
    """
    assert uses(tmp_path, script, "run.sh") == [
        (3, "environment", "CUDA_VISIBLE_DEVICES"),
        (3, "environment", "NCCL_DEBUG"),
        (4, "launch", "deepspeed"),
        (6, "launch", "torchrun"),
        (7, "launch", "torch.distributed.run"),
        (8, "launch", "accelerate launch"),
        (10, "launch", "torch.distributed.run"),
    ]


def test_configurations(tmp_path):
    (tmp_path / "ds.json").write_text('{"train_batch_size": 8, "zero_optimization": {"stage": 2}}')
    (tmp_path / "all.yaml").write_text(
        "name: x\ndeepspeed:\n  zero_optimization: {stage: 1}\n  bf16: {enabled: true}\n"
    )
    (tmp_path / "package.json").write_text('{"name": "train_batch_size"}')
    (tmp_path / "script.py").write_text(
        'def f(stage):\n    return {"train_micro_batch_size_per_gpu": 1, "fp16": {"enabled": True},\n'
        '            "zero_optimization": {"stage": stage, "overlap_comm": True}}\n'
        'other = {"optimizer": 1, "fp16": 2}\n'
    )
    found = {use.file: (use.line, use.name, use.value) for use in scan(tmp_path)}
    assert found == {
        "all.yaml": (2, "section deepspeed", {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}),
        "ds.json": (1, "file", {"train_batch_size": 8, "zero_optimization": {"stage": 2}}),
        "script.py": (
            2,
            "part of a dictionary",
            {
                "train_micro_batch_size_per_gpu": 1,
                "fp16": {"enabled": True},
                "zero_optimization": {"overlap_comm": True},
            },
        ),
    }


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        scan(tmp_path / "nowhere")
