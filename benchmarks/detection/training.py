"""glm_tiny in training on a few ranks, with places at which a case can change something. One process is one rank."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import xtrain
from xtrain.data.corpus import find_files
from xtrain.data.infilling import InfillingSampler
from xtrain.data.tokens import prepare
from xtrain.models.glm import GLM, GLMConfig

STEPS, WARMUP = 200, 20
SAMPLES, LENGTH, VOCABULARY, SEED = 4, 64, 2048, 1234
MIDDLE = 100
"""Step at which one-time defects happen, and after which restarts happen."""


class Training:
    """One run; a case changes attributes before `run`.

    Attributes:
        steps, warmup, samples: of a run; steps with a growing learning rate; samples of a step, over all ranks.
        middle: step at which one-time defects happen, and after which restarts happen.
        ranks: data-parallel ranks of this run.
        config: of the engine.
        architecture: changes to glm_tiny.
        decay, vector_decay: weight decay of matrices; of biases and norms.
        step: the one that is running.
        restart: save, build everything anew and load after step `middle`.
        load_options: of `load_checkpoint` then.
        model_made, engine_made: called with the model, and with the engine, each time one was made.
        after_load: called with the engine when a restart has loaded the checkpoint.
        before_update, after_update: called with the step around the call that ends it.
        batch: (step, slot) -> arguments of the model.
        loss: arguments of the model -> scalar.
        undo: closed after the run.
    """

    steps, warmup, samples, middle = STEPS, WARMUP, SAMPLES, MIDDLE

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder, self.ranks = folder, ranks
        self.rank = dist.get_rank()
        self.micro = 1
        self.config: dict[str, Any] = {
            "train_batch_size": self.samples,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {
                    "warmup_max_lr": 2e-3,
                    "warmup_num_steps": self.warmup,
                    "warmup_type": "linear",
                    "total_num_steps": self.steps,
                },
            },
            "xtrain": {"record": {"path": str(folder / "metrics.jsonl"), "modules_every": 1}},
        }
        self.architecture: dict[str, Any] = {}
        self.decay, self.vector_decay = 0.1, 0.0
        self.restart = False
        self.load_options: dict[str, Any] = {}
        self.model_made: list[Callable[[nn.Module], None]] = []
        self.engine_made: list[Callable[[Any], None]] = []
        self.after_load: list[Callable[[Any], None]] = []
        self.before_update: list[Callable[[int], None]] = []
        self.after_update: list[Callable[[int], None]] = []
        self.batch: Callable[[int, int], dict[str, Any]] = self.read
        self.loss: Callable[..., torch.Tensor] = lambda **batch: self.engine(**batch)
        self.make: Callable[[nn.Module], Any] = self.initialize
        self.undo = ExitStack()
        self.restarted = False
        self.step = 0
        self.engine: Any = None
        self._sampler = self.make_sampler()

    def make_sampler(self) -> Any:
        """Where samples come from."""
        return InfillingSampler(prepare(find_files(None), VOCABULARY), LENGTH, SEED)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.samples // (self.ranks * self.micro)

    def section(self, **keys: Any) -> None:
        """Set keys of the config's section `xtrain`."""
        self.config["xtrain"].update(keys)

    def read(self, step: int, slot: int) -> dict[str, Any]:
        """The micro-batch of a slot of a step (from 1)."""
        return {name: torch.from_numpy(a) for name, a in self._sampler.batch(step, slot, self.micro).items()}

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Matrices with weight decay, vectors without."""
        return [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": self.decay},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": self.vector_decay},
        ]

    def build_model(self) -> nn.Module:
        """glm_tiny of conf/model."""
        torch.manual_seed(SEED)
        sizes = {"num_layers": 3, "hidden_size": 128, "num_heads": 4, "ffn_size": 352, "rotary": "2d"}
        model = GLM(GLMConfig(**{"vocab_size": VOCABULARY, **sizes, **self.architecture}))
        for change in self.model_made:
            change(model)
        return model

    def initialize(self, model: nn.Module) -> Any:
        """The engine of `config`."""
        config = {**self.config, "train_micro_batch_size_per_gpu": self.micro}
        return xtrain.initialize(model=model, model_parameters=self.param_groups(model), config=config)[0]

    def _build(self) -> None:
        self.engine = self.make(self.build_model())
        for change in self.engine_made:
            change(self.engine)
        self.engine.train()

    def _begin_again(self) -> None:
        """As a job that was stopped and started once more."""
        self.engine.save_checkpoint(str(self.folder / "checkpoint"))
        self.engine.destroy()
        self.restarted = True
        self._build()
        self.engine.load_checkpoint(str(self.folder / "checkpoint"), **self.load_options)
        for change in self.after_load:
            change(self.engine)

    def run(self) -> None:
        """All steps."""
        with self.undo:
            self._build()
            for step in range(1, self.steps + 1):
                self.step = step
                for index in range(self.accumulation):
                    slot = self.rank * self.accumulation + index
                    self.engine.backward(self.loss(**self.batch(step, slot)))
                    ends = index == self.accumulation - 1
                    for change in self.before_update if ends else ():
                        change(step)
                    self.engine.step()
                for change in self.after_update:
                    change(step)
                if step == self.middle and self.restart:
                    self._begin_again()
            if hasattr(self.engine, "destroy"):
                self.engine.destroy()
