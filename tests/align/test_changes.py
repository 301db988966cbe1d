"""Differences of two configurations, and mixtures of them."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from xtrain.align.changes import ABSENT, Tree, find_changes, follows, group, make_settings, mix

_values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.lists(st.integers(0, 1), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
_trees = st.dictionaries(st.sampled_from("abc"), _values, max_size=3)


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@given(_trees, _trees, st.randoms())
def test_mixtures_lead_from_one_to_the_other(good: Tree, bad: Tree, random: Any) -> None:
    before = json.dumps([good, bad])
    changes = find_changes(good, bad)
    settings = make_settings(changes, {})
    assert len(settings) == len(changes)
    random.shuffle(settings)
    assert _same(mix(good, bad, settings), bad)
    assert _same(mix(good, bad, []), good)
    assert bool(changes) is not _same(good, bad)
    for setting in settings:  # one at a time, and no other value moves
        mixed = mix(good, bad, [setting])
        assert {change.key for change in find_changes(mixed, bad)} >= {
            other.changes[0].key
            for other in settings
            if other is not setting and other.changes[0].bad is not ABSENT
        }
    assert json.dumps([good, bad]) == before
    assert sorted(s.name for found in group(settings) for s in found) == sorted(s.name for s in settings)


def _names(good: Tree, bad: Tree, sources: Any = None) -> list[list[str]]:
    return [[s.name for s in found] for found in group(make_settings(find_changes(good, bad), sources or {}))]


def test_what_belongs_together() -> None:
    good: Tree = {
        "train_batch_size": 8,
        "lr": 1,
        "fp16": {"enabled": True, "hysteresis": 2},
        "gradient_accumulation_steps": 1,
    }
    bad: Tree = {"train_batch_size": 16, "lr": 2, "bf16": {"enabled": True}, "gradient_accumulation_steps": 2}
    assert _names(good, bad) == [
        ["train_batch_size", "gradient_accumulation_steps"],
        ["lr"],
        ["fp16.enabled", "fp16.hysteresis", "bf16.enabled"],
    ]
    adam = {"optimizer": {"type": "Adam", "params": {"lr": 1, "eps": 1}}}
    other = {"optimizer": {"type": "SGD", "params": {"lr": 2}}}
    assert _names(adam, other) == [["optimizer.type", "optimizer.params.lr", "optimizer.params.eps"]]
    tuned = {"optimizer": {"type": "Adam", "params": {"lr": 2, "eps": 2}}}
    assert _names(adam, tuned) == [["optimizer.params.lr"], ["optimizer.params.eps"]]
    assert _names(adam, {}) == [["optimizer.type", "optimizer.params.lr", "optimizer.params.eps"]]
    deep = {"zero": {"stage": 2, "offload": {"device": "cpu", "pin": True}}}
    assert _names({"zero": {"stage": 1}}, deep) == [
        ["zero.stage"],
        ["zero.offload.device", "zero.offload.pin"],
    ]


def test_what_follows() -> None:
    template = {
        "deepspeed": {
            "lr": "${train.lr}",
            "bf16": {"enabled": "${equal:${train.precision},bf16}"},
            "xtrain": {"fake": "${oc.select:backend.fake,null}", "backend": "${backend.name}"},
            "fixed": 1,
        }
    }
    sources = follows(template)
    assert sources == {
        ("deepspeed", "lr"): ("train", "lr"),
        ("deepspeed", "bf16", "enabled"): ("train", "precision"),
        ("deepspeed", "xtrain", "fake"): ("backend", "fake"),
        ("deepspeed", "xtrain", "backend"): ("backend", "name"),
    }

    def tree(lr: float, precision: str, fake: Any, other: float = 0) -> Tree:
        return {
            "backend": {"name": "fake" if fake else None, **({"fake": fake} if fake else {})},
            "deepspeed": {
                "lr": other or lr,
                "bf16": {"enabled": precision == "bf16"},
                "xtrain": {"backend": "fake" if fake else None, "fake": fake},
            },
            "train": {"lr": lr, "precision": precision},
        }

    def said(good: Tree, bad: Tree) -> list[str]:
        return [setting.sentence() for setting in make_settings(find_changes(good, bad), sources)]

    good = tree(1, "fp32", None)
    assert said(good, tree(2, "bf16", {"profile": "p", "seed": 1})) == [
        "backend.name: null -> fake (with deepspeed.xtrain.backend)",
        "backend.fake.profile: (absent) -> p (with backend.fake.seed, deepspeed.xtrain.fake)",
        "train.lr: 1 -> 2 (with deepspeed.lr)",
        "train.precision: fp32 -> bf16 (with deepspeed.bf16.enabled)",
    ]
    assert said(good, tree(1, "fp32", None, other=3)) == ["deepspeed.lr: 1 -> 3"]
    assert said(tree(1, "fp32", {"a": 1, "b": 1}), tree(1, "fp32", {"a": 2, "b": 2})) == [
        "backend.fake.a: 1 -> 2 (with deepspeed.xtrain.fake.a)",
        "backend.fake.b: 1 -> 2 (with deepspeed.xtrain.fake.b)",
    ]


def test_secrets_are_not_shown() -> None:
    (change,) = find_changes({"comet": {"api_key": "one"}}, {"comet": {"api_key": "two"}})
    assert change.sentence() == "comet.api_key: *** -> ***"
