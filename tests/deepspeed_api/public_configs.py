"""Counts what becomes of the DeepSpeed configurations in other projects' repositories; writes public_configs.json.

    python -m tests.deepspeed_api.public_configs OWNER/NAME=CLONE [OWNER/NAME=CLONE ...]

A clone is a git folder, bare or not, and its HEAD is read. A configuration is a file with ".json" in its name whose
top level has one of `_MARKS`. In templates a placeholder stands for 1, and of two branches the first is taken.
OpenRLHF writes its configuration in Python: its two functions are called with the values that its command line takes.
No file of another project is kept here, only the counts.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtrain.base.errors import NotImplementedYetError, XtrainError
from xtrain.base.files import write_text
from xtrain.config import load_config

COUNTS = Path(__file__).with_name("public_configs.json")

_MARKS = {"train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization", "steps_per_print"}
_OPENRLHF = "openrlhf/utils/deepspeed/deepspeed_utils.py"


def _git(clone: str, *args: str) -> str:
    found = subprocess.run(
        ["git", "-C", clone, *args], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    )
    return found.stdout.decode(errors="replace")


def _filled(text: str) -> str:
    """A template with 1 for every placeholder: `{{ x }}`, `${x}`, or a bare word in capitals."""
    text = re.sub(r"{% *else *%}.*?{% *endif *%}", "", text, flags=re.DOTALL)
    text = re.sub(r"{%.*?%}", "", text)
    text = re.sub(r"{{.*?}}|\${.*?}", "1", text)
    return re.sub(r'(?<![\w"])[A-Z][A-Za-z0-9]*_\w*(?![\w"])', "1", text)


def _parsed(text: str) -> Any:
    for attempt in (text, _filled(text)):
        try:
            return json.loads(attempt)
        except json.JSONDecodeError:
            continue
    return None


def _files(clone: str) -> Iterator[dict[str, Any]]:
    for path in _git(clone, "ls-tree", "-r", "--name-only", "HEAD").splitlines():
        name = path.rpartition("/")[2]
        if ".json" not in name or name.endswith(".jsonl"):
            continue
        try:
            text = _git(clone, "show", f"HEAD:{path}")
        except subprocess.CalledProcessError:  # a partial clone leaves large files out
            print(f"{path} is not in the clone")
            continue
        if len(text) > 200_000:
            continue
        found = _parsed(text)
        if isinstance(found, dict) and _MARKS & found.keys():
            yield found
        elif found is None and any(f'"{mark}"' in text for mark in _MARKS):
            raise ValueError(f"{path} looks like a configuration and cannot be read")


def _of_openrlhf(clone: str) -> Iterator[dict[str, Any]]:
    tree = ast.parse(_git(clone, "show", f"HEAD:{_OPENRLHF}"))
    wanted = ("get_train_ds_config", "get_eval_ds_config")
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    space: dict[str, Any] = {}
    exec(compile(tree, _OPENRLHF, "exec"), space)
    train = {
        "offload": [False],
        "adam_offload": [False, True],
        "stage": [1, 2, 3],
        "param_dtype": ["bf16", "fp16"],
        "zpg": [1, 8],
        "grad_accum_dtype": [None, "fp32"],
        "overlap_comm": [False, True],
        "use_ds_universal_ckpt": [False, True],
        "deepcompile": [False, True],
        "tensor_parallel_size": [1, 2],
    }
    evaluation = {
        "offload": [False, True],
        "stage": [0, 3],
        "param_dtype": ["bf16", "fp16"],
        "tensor_parallel_size": [1, 2],
    }
    for name, values in zip(wanted, (train, evaluation), strict=True):
        for chosen in itertools.product(*values.values()):
            yield space[name](**dict(zip(values, chosen, strict=True)))


def _count(configs: Iterator[dict[str, Any]]) -> dict[str, Any]:
    accepted, ignored = 0, 0
    refused: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for config in configs:
        try:
            checked = load_config(config)
        except NotImplementedYetError as error:
            refused[error.feature.removeprefix("config key ").replace("'", "").partition(" = ")[0]] += 1
        except XtrainError as error:
            wrong[str(error)] += 1
        else:
            accepted += 1
            ignored += bool(checked.warnings)
    return {
        "configurations": accepted + refused.total() + wrong.total(),
        "accepted": accepted,
        "with_ignored_keys": ignored,
        "refused": dict(sorted(refused.items())),
        "wrong": dict(sorted(wrong.items())),
    }


def count(repository: str, clone: str) -> dict[str, Any]:
    """What becomes of the configurations of one repository, and which version of it was read."""
    commit, date = _git(clone, "log", "-1", "--format=%H %cs").split()
    python = repository == "OpenRLHF/OpenRLHF"
    return {
        "repository": repository,
        "commit": commit,
        "date": date,
        "written_in": "Python" if python else "JSON",
        **_count(_of_openrlhf(clone) if python else _files(clone)),
    }


if __name__ == "__main__":
    counts = [count(*argument.split("=", 1)) for argument in sys.argv[1:]]
    write_text(COUNTS, json.dumps(counts, indent=1) + "\n")
