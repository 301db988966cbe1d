"""`deepspeed.env_report`: what a training script prints at its start."""

from __future__ import annotations

import pytest

from xtrain import env_report
from xtrain.backends import registry
from xtrain.base.missing import API_VERSION


def test_it_names_versions_operators_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    env_report.main()
    told = capsys.readouterr().out
    assert f"for DeepSpeed {API_VERSION}" in told
    assert "fused_adam ...................... there" in told
    assert "async_io ........................ not there" in told
    assert all(f"  {name} ." in told for name in registry.names())
    env_report.main(hide_operator_status=True)
    assert "fused_adam" not in capsys.readouterr().out
