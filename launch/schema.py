"""The launch configuration after Hydra has composed it: types and ranges of every key."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class ClusterSection(_Section):
    """`cluster`: where ranks run."""

    name: str
    launcher: Literal["torchrun"]
    nodes: int = Field(ge=1)
    ranks_per_node: int = Field(ge=1)
    stop_timeout: float = Field(gt=0)
    env: dict[str, str]


class BackendSection(_Section):
    """`backend`: None detects. `fake`: config key `xtrain.fake`, for the backend of that name."""

    name: str | None
    fake: dict[str, Any] | None = None


class ModelSection(_Section):
    """`model`: sizes of the built-in GLM; see xtrain.models.glm.GLMConfig."""

    name: str
    vocab_size: int = Field(ge=261)
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=4)
    num_heads: int = Field(ge=1)
    ffn_size: int = Field(ge=1)
    rotary: Literal["1d", "2d"]
    dropout: float = Field(ge=0, lt=1)
    embedding_gradient_alpha: float = Field(gt=0, le=1)


class ParallelSection(_Section):
    """`parallel`."""

    zero_stage: int = Field(ge=0, le=3)


class TrainSection(_Section):
    """`train`: see conf/train/default.yaml."""

    steps: int = Field(ge=1)
    seq_length: int = Field(ge=16)
    micro_batch_size: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    precision: Literal["fp32", "bf16", "fp16"]
    lr: float = Field(gt=0)
    betas: tuple[float, float]
    eps: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    warmup_steps: int = Field(ge=1)
    gradient_clipping: float = Field(ge=0)
    seed: int = Field(ge=0)
    save_interval: int = Field(ge=0)
    log_interval: int = Field(ge=1)


class DataSection(_Section):
    """`data`: one path or a list."""

    path: str | list[str] | None

    @property
    def paths(self) -> list[str] | None:
        """The paths as a list; None for the default corpus."""
        return [self.path] if isinstance(self.path, str) else self.path


class LaunchConfig(_Section):
    """Everything; field names are the keys of conf/config.yaml."""

    cluster: ClusterSection
    backend: BackendSection
    model: ModelSection
    parallel: ParallelSection
    train: TrainSection
    data: DataSection
    script: str | None
    script_args: list[str | int | float]
    run_dir: str
    resume: str | None
    deepspeed_config: str | None
    deepspeed: dict[str, Any]

    @property
    def ranks(self) -> int:
        """Ranks on all nodes."""
        return self.cluster.nodes * self.cluster.ranks_per_node
