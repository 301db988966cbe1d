"""Training on backend "fake": the host's bits without a profile; faults, modelled times, the record's header."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import xtrain
from tests import training
from tests.backends import contract
from tests.live_deepspeed import fresh_deepspeed
from xtrain import comm
from xtrain.align.record import read_record
from xtrain.base.errors import ConfigError, PeerLostError

STEPS = 4


def _train(fake: dict[str, Any] | None, stage: int = 1, backend: str = "fake", **more: Any) -> dict[str, Any]:
    """Four steps; losses, norms and the raw weights."""
    precision = {key: more.pop(key) for key in ("bf16", "fp16", "gradient_clipping") if key in more}
    micro = more.pop("micro", 4)
    section = {"backend": backend, **({} if fake is None else {"fake": fake}), **more}
    config = {**training.config(stage, micro), **precision, "xtrain": section}
    model = training.build_model()
    engine = xtrain.initialize(model=model, model_parameters=training.param_groups(model), config=config)[0]
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(training.engine_step(engine, step))
        norms.append(engine.get_global_grad_norm())
    state = {name: value.detach().clone() for name, value in engine.module_state_dict().items()}
    engine.destroy()
    return {"losses": losses, "norms": norms, "weights": state}


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    same = all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
    return same and a["losses"] == b["losses"] and a["norms"] == b["norms"]


def _none_is_the_host() -> list[bool]:
    results = []
    for stage in range(4):
        host = _train(None, stage, "cpu")
        results += [_equal(_train(None, stage), host), _equal(_train({"profile": "none"}, stage), host)]
        emulated = _train({"profile": "a100-tf32"}, stage)
        results += [not _equal(emulated, host), _equal(emulated, _train({"profile": "a100-tf32"}, stage))]
        results += [_equal(_train(None, stage, "cpu"), host)]  # nothing is left behind
    return results


def test_without_a_profile_the_bits_are_the_hosts(ranks: Any) -> None:
    for results in ranks(2, _none_is_the_host):
        assert all(results), results


def _aligned(profile: str, stage: int, micro: int) -> dict[str, Any]:
    fake = {"profile": profile, "numerics": {"switchable": False}}
    result = _train(fake, stage, aligned=True, micro=micro)
    return {**result, "weights": {name: value.double() for name, value in result["weights"].items()}}


@pytest.mark.parametrize("profile", ["a100-tf32", "sw26010pro"])
def test_aligned_runs_do_not_depend_on_ranks_or_stage(ranks: Any, profile: str) -> None:
    alone = ranks(1, _aligned, profile, 0, 4)[0]
    for stage in (0, 1, 2, 3):
        for result in ranks(2, _aligned, profile, stage, 4):
            # Losses are averaged in another order; norms and weights are what must agree.
            assert result["norms"] == alone["norms"]
            assert all(torch.equal(result["weights"][n], alone["weights"][n]) for n in alone["weights"])


def _contract(profile: str, checks: list[str] | None = None) -> dict[str, tuple[str, str]]:
    os.environ["XTRAIN_FAKE_PROFILE"] = profile
    try:
        return contract.run("fake", checks)
    finally:
        del os.environ["XTRAIN_FAKE_PROFILE"]
        xtrain.backends.get("fake").release()


@pytest.mark.parametrize("profile", ["none", "a100-tf32", "ascend910-fp16", "dcu-nobf16"])
def test_profiles_keep_the_contract(ranks: Any, profile: str) -> None:
    (alone,) = ranks(1, _contract, profile)
    failed = [f"{title}: {why}" for title, (outcome, why) in alone.items() if outcome == "FAILED"]
    assert not failed, "\n".join(failed)


def _precisions() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["stand-in"] = _train({"profile": "dcu-nobf16"}, bf16={"enabled": True})["weights"][
        "first.weight"
    ].dtype
    try:
        _train({"profile": "ascend910-fp16"}, bf16={"enabled": True})
    except ConfigError as error:
        found["refused"] = str(error)
    # A loss scale of 2^32 overflows: the saturated gradients look finite, and the flag skips the step.
    model = training.build_model()
    config = {
        **training.config(1),
        "fp16": {"enabled": True, "initial_scale_power": 32},
        "xtrain": {"backend": "fake", "fake": {"profile": "ascend910-fp16"}},
    }
    engine = xtrain.initialize(model=model, model_parameters=training.param_groups(model), config=config)[0]
    training.engine_step(engine, 0)
    found["skipped"], found["scale"] = engine.skipped_steps, engine.loss_scale()
    engine.destroy()
    return found


def test_missing_dtypes_and_saturation(ranks: Any) -> None:
    found = ranks(1, _precisions)[0]
    assert found["stand-in"] == torch.float32
    assert "does not compute in" in found["refused"]
    assert found["skipped"] == 1


# ---------------------------------------------------------------- record, times


def _recorded(folder: str) -> None:
    path = Path(folder) / "run.jsonl"
    fault = {"kind": "slow_rank", "step": 1, "rank": 1, "seconds": 0.3, "last_step": 2}
    fake = {"profile": "a100-tf32", "numerics": {"block": 8}, "cost": {"latency": 0.5}, "faults": [fault]}
    _train(fake, stage=1, record=str(path))


def test_the_header_says_what_is_emulated(ranks: Any, tmp_path: Path) -> None:
    ranks(2, _recorded, str(tmp_path))
    record = read_record(tmp_path / "run.jsonl")
    header = record.headers[0]
    assert header["backend"] == "fake"
    emulated = header["emulated"]
    assert emulated["profile"] == "a100-tf32"
    assert emulated["numerics"]["products"]["value"] == "tf32"
    assert "Fasi" in emulated["numerics"]["products"]["source"]
    assert emulated["numerics"]["block"] == {"value": 8, "source": "config"}
    assert emulated["faults"][0]["kind"] == "slow_rank"
    assert json.dumps(header["config"]["xtrain"]["fake"])
    seconds = record.column("seconds")
    assert (seconds[:2] > 0.3).all()
    assert seconds[3] < seconds[:2].min()
    modelled = {key: record.column(f"modelled.{key}")[1] for key in ("links", "messages", "compute")}
    # A gradient bucket or more are summed and gathered, and the norm: each takes at least the latency.
    assert modelled["links"] >= 0.5 * modelled["messages"]
    assert modelled["messages"] >= 3
    assert 0 < modelled["compute"] < 1e-3


def _clock() -> dict[str, Any]:
    from xtrain.backends.fake import Costs, Numerics, switched

    costs = Costs({"fp32": 1e9, "fp16": 4e9}, memory=1e6, link=1e6, latency=0.25)
    found: dict[str, Any] = {}
    with switched(Numerics(), costs=costs) as emulated:
        clock = emulated.clock
        assert clock is not None
        a, b = torch.ones(30, 40), torch.ones(40, 50)
        clock.take()
        (a @ b).t()  # the view takes no time
        found["traffic"] = clock.take()
        costs_of_memory = Costs({"fp32": 1e3, "fp16": 4e3}, memory=1e12, link=1.0)
    with switched(Numerics(), costs=costs_of_memory) as emulated:
        clock = emulated.clock
        assert clock is not None
        a @ b
        found["flops"] = clock.take()
        a.half() @ b.half()
        found["half"] = clock.take()
    with switched(Numerics(), costs=Costs({"fp32": 1e9}, memory=1e6, link=1.0, sleep=True)):
        start = time.perf_counter()
        torch.ones(100_000).add_(1.0)  # 0.4 s read and 0.4 s written, beside the making
        found["slept"] = time.perf_counter() - start
    config = {
        **training.config(0),
        "xtrain": {"backend": "fake", "fake": {"profile": "a100-tf32", "cost": {}}},
    }
    engine = xtrain.initialize(model=training.build_model(), config=config)[0]
    engine.backend.take_times()
    comm.ledger.reset()
    tensor = torch.zeros(1000)
    comm.all_reduce(tensor)
    comm.all_gather_into_tensor(torch.zeros(2000), tensor)
    found["links"], found["sent"] = engine.backend.take_times()["links"], float(comm.ledger.sent_bytes())
    engine.destroy()
    return found


def test_modelled_times(ranks: Any) -> None:
    found = ranks(2, _clock)[0]
    moved = 4 * (30 * 40 + 40 * 50 + 30 * 50)
    assert found["traffic"]["operators"] == 1
    assert found["traffic"]["compute"] == pytest.approx(moved / 1e6)
    assert found["flops"]["compute"] == pytest.approx(2 * 30 * 40 * 50 / 1e3)
    assert found["half"]["compute"] == pytest.approx(2 * 30 * 40 * 50 / 4e3, rel=1e-3)
    assert found["slept"] > 0.8
    assert found["sent"] == 4000 + 4000
    assert found["links"] == pytest.approx(2 * 10e-6 + 8000 / 300e9)


# ---------------------------------------------------------------- faults


def _keep_first(kept: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    kept.setdefault(name, value.clone())


def _hit(faults: list[dict[str, Any]], stage: int) -> dict[str, Any]:
    """What one step of a run with faults leaves, beside one without: parameters that differ, and where."""
    seen: dict[str, Any] = {}
    runs = []
    for mine in ([], faults):
        model = training.build_model()
        config = {**training.config(stage), "xtrain": {"backend": "fake", "fake": {"faults": mine}}}
        engine = xtrain.initialize(model=model, model_parameters=training.param_groups(model), config=config)[
            0
        ]
        training.engine_step(engine, 0)
        grads: dict[str, torch.Tensor] = {}
        inside: dict[str, torch.Tensor] = {}
        hooks = [
            param.register_hook(partial(_keep_first, grads, name))
            for name, param in engine.module.named_parameters()
        ]

        def keep(module: Any, inputs: Any, output: torch.Tensor, inside: Any = inside) -> None:
            inside.setdefault("output", output.detach().clone())
            inside.setdefault("weight", module.weight.detach().clone())

        hooks.append(engine.module.first.register_forward_hook(keep))
        runs.append((training.engine_step(engine, 1), inside, grads))
        for hook in hooks:
            hook.remove()
        engine.destroy()
    (seen["loss"], before, grads), (seen["hit loss"], after, hit_grads) = runs
    for key in ("output", "weight"):
        a, b = before[key].flatten().view(torch.int32), after[key].flatten().view(torch.int32)
        places = (a != b).nonzero().flatten().tolist()
        seen[key] = {place: (a[place].item() ^ b[place].item()) for place in places}
    for name in grads:
        a, b = grads[name].flatten().view(torch.int32), hit_grads[name].flatten().view(torch.int32)
        seen[f"grad {name}"] = [(p, a[p].item() ^ b[p].item()) for p in (a != b).nonzero().flatten().tolist()]
    return seen


FLIP = {"kind": "bit_flip", "step": 2, "rank": 1, "bit": 21, "element": 12}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_bit_of_a_parameter_on_one_rank(ranks: Any, stage: int) -> None:
    # In stage 3 rank 1 has the last elements; the gathered weights are hit on both ranks then.
    fault = {**FLIP, "name": "first.weight", "element": 230 if stage == 3 else 12}
    clean, hit = ranks(2, _hit, [fault], stage)
    assert hit["weight"] == {fault["element"]: 1 << 21}
    assert clean["weight"] == ({fault["element"]: 1 << 21} if stage == 3 else {})
    assert hit["loss"] != hit["hit loss"]


def test_one_bit_of_a_gradient_and_of_an_activation(ranks: Any) -> None:
    clean, hit = ranks(2, _hit, [{**FLIP, "target": "gradient", "name": "second.bias", "element": 3}], 1)
    assert hit["grad second.bias"] == [(3, 1 << 21)]
    assert clean["grad second.bias"] == []
    assert hit["grad first.weight"] == []
    clean, hit = ranks(2, _hit, [{**FLIP, "target": "activation", "name": "first"}], 2)
    assert hit["output"] == {12: 1 << 21}
    assert clean["output"] == {}
    assert hit["grad second.weight"] != []


def _nan() -> str:
    fault = {"kind": "nan", "step": 2, "target": "gradient", "name": "first.bias", "rank": 1}
    try:
        _train({"faults": [fault]}, stage=0)
    except xtrain.base.errors.TrainingError as error:
        return str(error)
    return "trained"


def test_a_nan_reaches_everybody(ranks: Any) -> None:
    for message in ranks(2, _nan):
        assert "step 2" in message


def _killed() -> list[Any]:
    calls: list[Any] = []
    original, os.kill = os.kill, lambda pid, number: calls.append((pid == os.getpid(), int(number)))  # type: ignore[assignment]
    try:
        _train({"faults": [{"kind": "killed_rank", "step": 3, "rank": 1}]})
    finally:
        os.kill = original
    return calls


def test_a_killed_rank(ranks: Any) -> None:
    assert ranks(2, _killed) == [[], [(True, 9)]]


def _lost() -> str:
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
    fault = {"kind": "lost_message", "step": 2, "rank": 1, "message": 0, "seconds": 3}
    start = time.monotonic()
    try:
        _train({"faults": [fault]}, aligned=True)
    except PeerLostError as error:
        assert time.monotonic() - start < 30
        return str(error)
    return "trained"


def test_a_lost_message_ends_in_a_sentence_on_every_rank(ranks: Any) -> None:
    waiting, losing = ranks(2, _lost)
    assert "another rank did not take part in time" in waiting
    assert "number 0 of step 2 was lost (a fault of backend 'fake')" in losing


def _mistake(fault: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        _train({"faults": [fault]})
    return str(caught.value)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({**FLIP, "name": "first.weigth", "rank": 0}, "did you mean 'first.weight'"),
        ({**FLIP, "name": "third", "rank": 0, "target": "activation"}, "unknown module 'third'"),
        ({**FLIP, "name": "first.bias", "rank": 0, "element": 33}, "'first.bias' has 33"),
        ({**FLIP, "name": "first.bias", "rank": 0, "bit": 32}, "bit 32 is not there"),
        ({**FLIP, "name": "first.bias"}, "rank 1 is not there"),
        ({**FLIP, "rank": 0}, "needs the name"),
        ({"kind": "nan", "step": 1, "name": "first.bias", "bit": 3}, "nothing else has one"),
        ({"kind": "slow_rank", "step": 1}, "needs seconds"),
        ({"kind": "killed_rank", "step": 4, "last_step": 5}, "last_step is for slow_rank"),
        ({"kind": "killed_rank", "step": 0}, "greater than or equal to 1"),
    ],
)
def test_mistakes_in_faults_are_one_sentence(ranks: Any, fault: dict[str, Any], said: str) -> None:
    message = ranks(1, _mistake, fault)[0]
    assert said in message
    assert "\n" not in message


def _settings_mistakes() -> list[str]:
    messages = []
    for fake in (
        {"profile": "h100"},
        {"numerics": {"block": 3}},
        {"profile": "a100-tf32", "numerics": {"products": "fp8"}},
    ):
        with pytest.raises(ConfigError) as caught:
            _train(fake)
        messages.append(str(caught.value))
    return messages


def test_mistakes_in_settings_are_one_sentence(ranks: Any) -> None:
    profile, unnamed, value = ranks(1, _settings_mistakes)[0]
    assert "unknown profile of backend 'fake' 'h100'" in profile
    assert "'xtrain.fake.numerics' changes a profile, and none is named" in unnamed
    assert "'xtrain.fake.numerics.products' is 'fp8'" in value


def _under_deepspeed(folder: str) -> Any:
    losses = {}
    for profile in ("none", "a100-tf32", "none"):
        with fresh_deepspeed():
            config = training.config(1)
            config["optimizer"]["params"]["torch_adam"] = True
            section = {"engine": "deepspeed", "backend": "fake", "fake": {"profile": profile}}
            config["xtrain"] = {**section, "record": f"{folder}/{profile}.jsonl"}
            model = training.build_model()
            engine = xtrain.initialize(
                model=model, model_parameters=training.param_groups(model), config=config
            )[0]
            curve = []
            for step in range(STEPS):
                x, y = training.samples(step)
                for micro in range(2):
                    start = (2 * engine.global_rank + micro) * 4
                    loss = training.loss_of(engine, x[start : start + 4], y[start : start + 4])
                    engine.backward(loss)
                    engine.step()
                    curve.append(loss.item())
            losses.setdefault(profile, []).append(curve)
    xtrain.backends.get("fake").release()
    return losses


@pytest.mark.deepspeed
def test_arithmetic_is_emulated_under_deepspeeds_engine_too(ranks: Any, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    losses = ranks(2, _under_deepspeed, str(tmp_path))[0]
    assert losses["none"][0] == losses["none"][1]
    assert losses["none"][0] != losses["a100-tf32"][0]
    assert losses["a100-tf32"][0] == pytest.approx(losses["none"][0], rel=1e-3)
    assert read_record(tmp_path / "a100-tf32.jsonl").headers[0]["emulated"]["profile"] == "a100-tf32"
