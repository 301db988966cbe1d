"""Held-out cases: a Llama in bf16 and fp16, which nobody has looked at while the detector was made.

Every defect is modelled on a public report. How much each moves the plain loss curve, beside correct variants:
`python -m benchmarks.detection.sizes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.detection import llama_defects as defects
from benchmarks.detection import llama_faults as faults
from benchmarks.detection import llama_variants as variants
from benchmarks.detection.case import Case, Change, nothing
from benchmarks.detection.harmless import (
    checkpointing,
    fake,
    over_shared_memory,
    resumed,
    top,
    two_threads,
    zero,
)
from benchmarks.detection.llama_training import Bf16, Fp16
from benchmarks.detection.training import Training


def _bf16(title: str, change: Change = nothing, **more: Any) -> Case:
    return Case(f"bf16: {title}", change, reference="bf16", training=Bf16, **more)


def _fp16(title: str, change: Change = nothing, **more: Any) -> Case:
    return Case(f"fp16: {title}", change, reference="fp16", training=Fp16, **more)


def both(*changes: Change) -> Change:
    """One after the other."""

    def change(t: Training) -> None:
        for each in changes:
            each(t)

    return change


HELD_OUT_REFERENCES = (
    Case("bf16", nothing, reference="bf16", training=Bf16),
    Case("fp16", nothing, reference="fp16", training=Fp16),
)

ROTARY, READ, DROPOUT = "layers.0.attention.rotary", "layers.0.attention.o", "layers.0.attention_dropout"

HELD_OUT_DEFECTS = (
    _bf16("a mean of the micro-batches' means", defects.mean_of_means, report="transformers#34191"),
    _bf16("attention across documents", defects.one_document, report="nanoVLM#204", module=READ),
    _bf16("key and value heads are tiled", defects.tiled_heads, report="onnx#7274", module=READ),
    _bf16(
        "gradients of norms are not reduced",
        faults.norms_not_reduced,
        report="Megatron-LM#1446",
        module="*norm",
    ),
    _bf16("weights without masters", faults.without_masters, report="speculators#765"),
    _bf16(
        "the tied weight gets the head's gradient only",
        defects.no_embedding_gradient,
        report="Megatron-LM#844",
        module="[eh]*",
    ),
    _bf16(
        "other dropout masks when layers are recomputed",
        defects.other_masks_when_recomputed,
        report="OLMo-core#828",
        module="layers.1*",
    ),
    _bf16(
        "the same dropout masks on all ranks",
        defects.same_masks_on_ranks,
        report="transformers#31412",
        module=DROPOUT,
    ),
    _bf16(
        "restart with the data from the beginning",
        defects.data_from_the_beginning,
        report="entrenar#294",
    ),
    _bf16(
        "the schedule goes on once for each rank",
        faults.scheduled_for_each_rank,
        report="transformers#24088",
    ),
    _bf16("restart with Adam's count from 1", faults.counts_anew, report="DeepSpeed#4396"),
    _bf16("labels are shifted twice", defects.shifted_twice, report="transformers#47394"),
    _bf16(
        "attention is scaled by the hidden size",
        defects.attention_scale(64**-0.5),
        report="train-llm-from-scratch#3",
        module=READ,
    ),
    _bf16(
        "a bucket is reduced before its last gradients",
        faults.reduced_too_early("layers.1."),
        report="DeepSpeed#8061",
        module="layers.1.*",
    ),
    _bf16(
        "weights of the step before in one layer",
        faults.weights_of_step_before("layers.1."),
        report="Megatron-LM#950",
        module="layers.1.*",
    ),
    _fp16("clipped before unscaling", faults.clipped_before_unscaling, report="pytorch-lightning#9330"),
    _fp16("gradients are divided by the next scale", faults.divided_by_next_scale, report="DeepSpeed#8588"),
    _fp16("skipped steps are updates with zeros", faults.zeros_when_skipped, report="levanter#973"),
    _fp16(
        "the schedule goes on at skipped steps",
        faults.scheduled_when_skipped,
        report="pytorch-lightning#18828",
    ),
    _fp16("restart with the initial loss scale", faults.forgets_scale, report="transformers#34053"),
    _fp16("restart with masters of before the load", faults.masters_not_loaded, report="apex#42"),
    _fp16("restart with Adam's second moment in fp16", faults.squares_in_fp16, report="ultralytics#24085"),
    _fp16(
        "restart with the dropout masks of the beginning",
        defects.masks_begin_again,
        report="transformers#17032",
        module=DROPOUT,
    ),
    _fp16("attention is not causal", defects.not_causal, report="transformers#48745", module=READ),
    _fp16(
        "the rotary base is 500000 instead of 10000",
        defects.rotary_base(500000.0),
        report="SpecForge#265",
        module=ROTARY,
    ),
    _fp16(
        "rotary turns neighbouring pairs",
        defects.neighbouring_pairs,
        report="transformers#25199",
        module=ROTARY,
    ),
    _fp16(
        "the epsilon of norms is 1e-6 instead of 1e-5",
        defects.norm_epsilon(1e-6),
        report="foundation-model-stack#99",
        module="layers.0.attention_norm",
    ),
    _fp16("Adam's epsilon inside the root", faults.epsilon_inside, report="keras-radam#29"),
    _fp16("each rank clips by its own norm", faults.clipped_by_own_norm, report="pytorch#170862"),
    _fp16("every epoch has the same order", defects.same_epoch(25), report="pytorch#31771"),
    _fp16("the loss is divided by the ranks twice", defects.divided_by_ranks, report="transformers#40610"),
    _fp16("ignored labels count in the mean", defects.ignored_count, report="burn#5568"),
    _fp16("only the last micro-batch counts", faults.only_last_micro_batch, report="Megatron-LM#7186"),
    _fp16(
        "no dropout after an evaluation",
        defects.no_dropout_from_middle,
        report="Megatron-LM#411",
        module=DROPOUT,
    ),
)

HELD_OUT_HARMLESS = (
    _bf16("ZeRO stage 0", zero(0)),
    _bf16("ZeRO stage 2", zero(2)),
    _bf16("ZeRO stage 3, everything divided", zero(3, stage3_param_persistence_threshold=0)),
    _bf16("1 rank, 4 micro-batches", ranks=1),
    _bf16("4 ranks, 1 micro-batch", ranks=4),
    _bf16("two samples at a time", variants.two_samples),
    _bf16("PyTorch's fused attention", variants.fused_attention),
    _bf16("attention divided by the softmax's sum at last", variants.divided_last),
    _bf16("one product for query, key and value", variants.one_product_for_qkv),
    _bf16("PyTorch's AdamW, for each tensor", variants.pytorch_adam(foreach=False)),
    _bf16("activation checkpointing", checkpointing),
    _bf16("two threads, 1 rank", two_threads, ranks=1),
    _bf16("interrupted and resumed", resumed),
    _bf16("MPI instead of gloo", needs="mpi4py"),
    _bf16("gradients travel in fp32", top(communication_data_type="fp32")),
    _bf16("no reduce-scatter", zero(1, reduce_scatter=False)),
    _bf16("PyTorch's RMSNorm", variants.fused_norms),
    _bf16("arithmetic of the Sunway profile", fake("sw26010pro")),
    _bf16("arithmetic of the Ascend 910B profile", fake("ascend910b-hf32")),
    _bf16("plain vector instructions", environment=(("ATEN_CPU_CAPABILITY", "default"),)),
    _fp16("ZeRO stage 0", zero(0)),
    _fp16("ZeRO stage 2, small buckets", zero(2, reduce_bucket_size=20_000, allgather_bucket_size=20_000)),
    _fp16("ZeRO stage 3", zero(3)),
    _fp16("1 rank, 4 micro-batches", ranks=1),
    _fp16("4 ranks, 1 micro-batch", ranks=4),
    _fp16("two samples at a time", variants.two_samples),
    _fp16("PyTorch's fused attention", variants.fused_attention),
    _fp16("one product for gate and value", variants.one_product_for_gate),
    _fp16("cross entropy by the logarithm of the sum", variants.own_cross_entropy),
    _fp16("PyTorch's AdamW, all tensors at once", variants.pytorch_adam(foreach=True)),
    _fp16("activation checkpointing, ZeRO stage 3", both(checkpointing, zero(3))),
    _fp16("optimizer states offloaded to the host", zero(1, offload_optimizer={"device": "cpu"})),
    _fp16("shared memory instead of gloo", over_shared_memory),
    _fp16("no overlap, gradients not contiguous", zero(2, overlap_comm=False, contiguous_gradients=False)),
    _fp16("gradients divided before they are added", top(prescale_gradients=True)),
    _fp16("interrupted and resumed", resumed),
    _fp16("arithmetic of the DCU profile", fake("dcu-nobf16")),
    # There, skipped steps have a finite norm: values saturate, and a flag says so.
    _fp16("arithmetic of the Ascend 910 profile", fake("ascend910-fp16")),
    _fp16("plain vector instructions", environment=(("ATEN_CPU_CAPABILITY", "default"),)),
)


@dataclass(frozen=True)
class Below:
    """A defect that moves the loss no more than correct variants do; it is in none of the tuples above.

    Attributes:
        case: the defect.
        largest, mean: its largest and mean relative difference of the loss.
        noise_largest, noise_mean: the largest of the correct variants'.
    """

    case: Case
    largest: float
    mean: float
    noise_largest: float
    noise_mean: float


BELOW_THE_NOISE = (
    Below(
        _bf16(
            "positions run on in packed rows", defects.positions_run_on, report="OLMo-core#591", module=ROTARY
        ),
        4.4e-4,
        5.2e-5,
        5.2e-4,
        6.3e-5,
    ),
    Below(
        _bf16("rotary angles in bf16", defects.narrow_angles, report="transformers#29285", module=ROTARY),
        1.4e-4,
        3.0e-5,
        5.2e-4,
        6.3e-5,
    ),
    Below(
        _bf16("norms in bf16", defects.narrow_norms, report="sglang#27540", module="layers.0.attention_norm"),
        1.2e-4,
        4.2e-5,
        5.2e-4,
        6.3e-5,
    ),
    Below(
        _bf16("gradients are added up in bf16", faults.narrow_sums(torch.bfloat16), report="DeepSpeed#1800"),
        1.1e-4,
        3.1e-5,
        5.2e-4,
        6.3e-5,
    ),
)
"""As `python -m benchmarks.detection.sizes` measured them. That positions run on is no defect while attention stays
inside a document: rotary scores depend on distances alone. The other three round, as correct variants do."""
