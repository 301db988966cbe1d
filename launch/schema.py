"""The launch configuration after Hydra has composed it: types and ranges of every key."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class SshSection(_Section):
    """`cluster.ssh`: how the system's own ssh is called; what is not said here stands in ~/.ssh/config."""

    command: str
    args: list[str]
    connect_timeout: int = Field(ge=1)


class SlurmSection(_Section):
    """`cluster.slurm`: options of sbatch, by their long names in `options`."""

    time: str | None
    partition: str | None
    account: str | None
    qos: str | None
    signal_seconds: int = Field(ge=0)
    requeue: bool
    options: dict[str, str | bool]
    srun_args: list[str]
    setup: list[str]


class MpiSection(_Section):
    """`cluster.mpi`: which mpiexec, and what it is told in addition."""

    command: str
    flavour: Literal["mpich", "openmpi", "intel"] | None
    args: list[str]


class SunwaySection(_Section):
    """`cluster.sunway`: bsub's queue and sizes."""

    queue: str | None
    compute_cores: int = Field(ge=1)
    core_groups: int = Field(ge=1)
    share_size: int | None
    cross_size: int | None
    options: list[str]


class KubernetesSection(_Section):
    """`cluster.kubernetes`: what the TrainJob says."""

    namespace: str
    runtime: str
    image: str | None
    claim: str | None
    mount: str
    resources: dict[str, str | int]


class DeviceSection(_Section):
    """`cluster.device`: one accelerator of the cluster, for checks and plans; sizes in GB (10^9 bytes) and TFLOP/s."""

    name: str
    memory_gb: float | None = Field(gt=0)
    tflops: float | None = None
    bandwidth_gb_s: float | None = None


class LinksSection(_Section):
    """`cluster.links`: bandwidths in GB/s, of a device inside its node and of a node to the others."""

    inside_gb_s: float | None = None
    between_gb_s: float | None = None
    about: str | None = None


class ClusterSection(_Section):
    """`cluster`: where ranks run, and what happens when they end: conf/cluster/local.yaml explains every key."""

    name: str
    launcher: Literal["local", "hosts", "slurm", "mpi", "sunway", "kubernetes"]
    nodes: int = Field(ge=1)
    ranks_per_node: int = Field(ge=1)
    backend: str | None
    hosts: list[str] | None
    hostfile: str | None
    include: str | None
    exclude: str | None
    python: str | None
    interface: str | None
    master_port: int | None = Field(ge=1, le=65535)
    shared: bool
    stop_timeout: float = Field(gt=0)
    start_timeout: float = Field(gt=0)
    node_timeout: float = Field(ge=3)
    hang_timeout: float = Field(ge=0)
    max_restarts: int | None = Field(ge=0)
    restart_delay: float = Field(ge=0)
    node_failures: int = Field(ge=1)
    min_nodes: int | None = Field(ge=1)
    model_parallel_size: int = Field(ge=1)
    rejoin_interval: float = Field(ge=0)
    save_interval: int = Field(ge=0)
    env: dict[str, str]
    ssh: SshSection
    slurm: SlurmSection
    mpi: MpiSection
    sunway: SunwaySection
    kubernetes: KubernetesSection
    device: DeviceSection | None
    links: LinksSection | None

    @property
    def multi_node(self) -> bool:
        """Whether ranks are, or may be, on more than one machine."""
        return self.nodes > 1 or self.launcher != "local"


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
    save_interval: int | None = Field(ge=0)
    log_interval: int = Field(ge=1)


class DataSection(_Section):
    """`data`: one path or a list."""

    path: str | list[str] | None

    @property
    def paths(self) -> list[str] | None:
        """The paths as a list; None for the default corpus."""
        return [self.path] if isinstance(self.path, str) else self.path


def _switch(value: Any) -> Any:
    """`on` and `off` are true and false in YAML."""
    return ("on" if value else "off") if isinstance(value, bool) else value


class LaunchConfig(_Section):
    """Everything; field names are the keys of conf/config.yaml."""

    cluster: ClusterSection
    backend: BackendSection
    model: ModelSection
    parallel: ParallelSection
    train: TrainSection
    data: DataSection
    script: str | None
    shims: Annotated[Literal["auto", "on", "off"] | None, BeforeValidator(_switch)]
    pass_config: Literal["auto"] | bool
    pass_local_rank: bool
    script_args: list[str | int | float]
    run_dir: str
    resume: str | None
    keep: int | None = Field(ge=1)
    deepspeed_config: str | None
    deepspeed: dict[str, Any]

    @property
    def ranks(self) -> int:
        """Ranks on all nodes."""
        return self.cluster.nodes * self.cluster.ranks_per_node
