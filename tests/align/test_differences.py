"""In what two headers differ: every one names its engine, and what is missing says what that means."""

from __future__ import annotations

from typing import Any

from xtrain.align.differences import header_differences

_CONFIG = {"train_batch_size": 8, "optimizer": {"type": "AdamW"}}


def _header(**more: Any) -> dict[str, Any]:
    """As Recorder writes it."""
    environment = {"device": "cpu", "threads": 1, "variables": {"OMP_NUM_THREADS": "1"}}
    return {
        "type": "header",
        "version": 2,
        "xtrain": "0.1.0",
        "torch": "2.13",
        "environment": environment,
        **more,
    }


NATIVE = _header(engine="native", backend="cpu", config=_CONFIG)
DEEPSPEED = _header(engine="deepspeed", deepspeed="0.19.8", backend="cpu", config=_CONFIG)
ALONE = _header(config=_CONFIG)


def _said(reference: dict[str, Any], candidate: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(d.key, d.reference, d.candidate) for d in header_differences(reference, candidate)]


def test_every_header_names_its_engine() -> None:
    alone = "none named (xtrain's Recorder alone)"
    assert _said(NATIVE, DEEPSPEED) == [("engine", "native", "deepspeed 0.19.8")]
    assert _said(DEEPSPEED, {**DEEPSPEED, "deepspeed": "0.19.9"}) == [
        ("engine", "deepspeed 0.19.8", "deepspeed 0.19.9")
    ]
    assert _said(NATIVE, ALONE) == [("engine", "native", alone)]
    assert _said(ALONE, DEEPSPEED) == [("engine", alone, "deepspeed 0.19.8")]
    assert _said(ALONE, ALONE) == []


def test_a_backend_that_is_not_named_is_known_by_its_device() -> None:
    emulated = {**NATIVE, "backend": "fake", "emulated": {"profile": "dcu", "numerics": {"products": "tf32"}}}
    found = _said(emulated, ALONE)
    assert ("backend", "fake", "(device cpu)") in found
    assert ("emulated.profile", "dcu", "(not emulated)") in found
    other = _header(config=_CONFIG)
    other["environment"] = {**other["environment"], "device": "npu"}
    assert ("backend", "cpu", "(device npu)") in _said(NATIVE, other)
    assert not any("(absent)" in difference for difference in found)


def test_what_a_header_has_nothing_of_is_told_once() -> None:
    assert _said(NATIVE, _header(engine="native", backend="cpu")) == [
        ("config", "(recorded)", "(not recorded)")
    ]
    old = {
        "type": "header",
        "version": 1,
        "xtrain": "0.1.0",
        "torch": "2.13",
        "engine": "native",
        "backend": "cpu",
    }
    assert _said(old, NATIVE) == [
        ("config", "(not recorded)", "(recorded)"),
        ("environment", "(not recorded)", "(recorded)"),
    ]


def test_what_is_missing_says_what_that_means() -> None:
    other = _header(engine="native", backend="cpu", config={**_CONFIG, "gradient_clipping": 1.0})
    other["environment"] = {**other["environment"], "cuda": "12.4", "variables": {}}
    assert _said(NATIVE, other) == [
        ("config.gradient_clipping", "(absent)", "1.0"),
        ("environment.cuda", "(none)", "12.4"),
        ("environment.variables.OMP_NUM_THREADS", "1", "(not set)"),
    ]
