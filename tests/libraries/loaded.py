"""The libraries, imported once in the process that the ranks are forked from, with xtrain as their DeepSpeed."""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import xtrain.as_deepspeed  # noqa: I001 - before whatever imports deepspeed

import accelerate
import datasets
import lightning
import peft
import transformers
import trl
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer

__all__ = [
    "DPOTrainer",
    "GRPOTrainer",
    "KTOTrainer",
    "SFTTrainer",
    "accelerate",
    "datasets",
    "lightning",
    "peft",
    "transformers",
    "trl",
    "xtrain",
]
