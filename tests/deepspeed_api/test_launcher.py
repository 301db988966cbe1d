"""DeepSpeed's import path `deepspeed.launcher`: the functions that public scripts call."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest

from xtrain.base.errors import NotImplementedYetError
from xtrain.base.missing import MissingModuleError
from xtrain.launch.deepspeed import binding
from xtrain.launch.deepspeed import command as deepspeed_command
from xtrain.launcher import runner
from xtrain.utils import numa


def test_hostfiles_as_gpt_neox_reads_them(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=4\n")
    pool = runner.fetch_hostfile(str(tmp_path / "hosts"))
    assert pool == {"a": 2, "b": 4}
    assert runner.fetch_hostfile(str(tmp_path / "none")) is None
    assert runner.parse_inclusion_exclusion(pool, "a@b:1,3", "") == {"a": [0, 1], "b": [1, 3]}
    assert runner.parse_inclusion_exclusion(pool, "", "b:0") == {"a": [0, 1], "b": [1, 2, 3]}
    with pytest.raises(ValueError, match="no slot 4"):
        runner.parse_inclusion_exclusion(pool, "b:4", "")
    with pytest.raises(ValueError, match="the hostfile, line 1"):
        runner._parse_hostfile(["missingslots"])
    assert runner.parse_resource_filter({"a": [0, 1]}, exclude_str="a:1") == {"a": [0]}
    assert runner.parse_node_config("a:1,0") == ("a", [0, 1])
    assert runner.parse_node_config_list("a@b:1") == {"a": [], "b": [1]}


def test_hosts_and_devices_are_limited() -> None:
    pool = {"a": [0, 1], "b": [2], "c": [3]}
    assert runner.apply_num_nodes_and_gpus(pool, -1, -1) == pool
    assert runner.apply_num_nodes_and_gpus(pool, 2, -1) == {"a": [0, 1], "b": [2]}
    assert runner.apply_num_nodes_and_gpus(pool, 1, 3) == {"a": [0, 1, 2]}


def test_names_and_encodings() -> None:
    assert runner.DLTS_HOSTFILE == "/job/hostfile"
    assert runner.DEEPSPEED_ENVIRONMENT_NAME == ".deepspeed_env"
    assert {"PYTHON", "UCX"} <= set(runner.EXPORT_ENVS)
    assert runner.PDSH_LAUNCHER == "pdsh"
    assert json.loads(base64.urlsafe_b64decode(runner.encode_world_info({"a": [0]}))) == {"a": [0]}
    args = runner.parse_args(["--launcher_arg", "-mca x", "train.py", "-y"])
    assert (args.launcher_args, args.user_script, args.user_args) == ("-mca x", "train.py", ["-y"])


def test_main_runs_the_command_with_the_scripts_own_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], list[str]]] = []
    monkeypatch.setattr(
        deepspeed_command, "main", lambda given, names: seen.append((given, names)) or len(seen) - 1
    )
    monkeypatch.setattr(runner, "EXPORT_ENVS", [*runner.EXPORT_ENVS, "WANDB"])
    runner.main(["train.py"])
    assert seen[0][0] == ["train.py"]
    assert "WANDB" in seen[0][1]
    with pytest.raises(SystemExit) as left:
        runner.main(["train.py"])
    assert left.value.code == 1
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cannot be given with"):
        runner.main(["--num_nodes", "1", "-i", "localhost", "foo.py"])


def test_what_is_not_there_says_so() -> None:
    with pytest.raises(NotImplementedYetError, match="train_micro_batch_size_per_gpu"):
        runner.run_autotuning(runner.parse_args(["x"]), {})
    with pytest.raises(MissingModuleError, match="xtrain deepspeed"):
        import xtrain.launcher.multinode_runner  # noqa: F401


def test_cores_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KMP_AFFINITY", raising=False)
    core = binding.physical_cores()[0]
    count, prefix = numa.get_numactl_cmd(str(core), 1, 0)
    assert count == 1
    assert numa.check_for_numactl_pkg() == bool(prefix) == (shutil.which("numactl") is not None)
    assert numa.get_numa_cores() == list(binding.numa_nodes().values())
