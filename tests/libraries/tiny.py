"""What the libraries train here: a model of two layers from a config, a tokenizer of a few words, settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
SAMPLES = 32
LENGTH = 8


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """A config as users of these libraries write it; nothing is too small to be divided."""
    small = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 3000, **small},
        **more,
    }


def _several_ranks_on_the_host(self: Any, *args: Any) -> tuple[str, Any]:
    """Accelerate takes the ranks of a host without accelerator for one process each, unless told `cpu=True`, which it
    does not combine with DeepSpeed. Where there is a chip, or a shim that shows the host as one, it counts them."""
    from accelerate.utils import DistributedType

    return "gloo", DistributedType.MULTI_CPU


@contextmanager
def fresh() -> Iterator[None]:
    """Environment and global states of the libraries as at the start of a process, and so again afterwards."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations import unset_hf_deepspeed_config

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        GradientState._reset_state()
        unset_hf_deepspeed_config()

    known = mock.patch.object(PartialState, "_prepare_backend", _several_ranks_on_the_host)
    with (
        mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"], MASTER_ADDR="localhost"),
        known,
    ):
        reset()
        try:
            yield
        finally:
            reset()


def config(**more: Any) -> Any:
    """Of a causal language model with 2 layers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **more,
    )


def model() -> Any:
    """The same weights on every rank."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(config())


def tokenizer() -> Any:
    """One token a word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=64,
    )


def ids(samples: int = SAMPLES) -> list[dict[str, Any]]:
    """Sequences of equal length, as Trainer takes them."""
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randint(3, len(WORDS), (samples, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row} for row in drawn]


def text(row: int, words: int, seed: int = 7) -> str:
    """Some words."""
    generator = torch.Generator().manual_seed(seed * 1000 + row)
    return " ".join(
        WORDS[3 + int(n)] for n in torch.randint(0, len(WORDS) - 3, (words,), generator=generator)
    )
