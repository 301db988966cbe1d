"""What is known of other chips' arithmetic and speed, with the source of each property. Data, no behaviour.

A property that no public document states is left as the host has it, and is not listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from xtrain.base.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Numerics:
    """How arithmetic differs from the host's. The defaults leave it as it is.

    Attributes:
        products: format that float32 inputs of matrix products and convolutions are rounded to: "fp32" (none),
            "tf32" (10 stored mantissa bits), "hf32" (11), "bf16", "fp16".
        rounding: how: "nearest-even", "nearest-away" (ties away from zero) or "toward-zero". bf16 and fp16 are
            always rounded to nearest even.
        switchable: whether aligned mode gets exact float32 products, as where the chip has a switch.
        accumulation: format of the sum that a product of matrices is added up in.
        block: so many products at a time are added together before their sum goes to the accumulator, block after
            block; 0: in the host's order. Not in convolutions.
        sums: of n elements, ceil(n / sums) workers add `sums` each, a stride apart, one after the other; then
            the upper half of the workers is added to the lower until one is left. 0: in the host's order.
        flush_denormals: results below the smallest normal number become zero.
        saturate: float16 results beyond the largest number become it, and raise a flag, instead of infinity.
        bf16: "native", "fp32" (models are trained in float32 instead) or "refused".
        norm: format in which the gradient norm's squares are added up, "fp64" or "fp32".
    """

    products: str = "fp32"
    rounding: str = "nearest-even"
    switchable: bool = True
    accumulation: str = "fp32"
    block: int = 0
    sums: int = 0
    flush_denormals: bool = False
    saturate: bool = False
    bf16: str = "native"
    norm: str = "fp64"

    @property
    def reaches_operators(self) -> bool:
        """Whether any operator computes otherwise than on the host."""
        plain = replace(self, switchable=True, rounding="nearest-even", bf16="native", norm="fp64")
        return plain != Numerics()


@dataclass(frozen=True)
class Costs:
    """How long things take on the chip. Rates are peak figures, so modelled times are lower bounds.

    Attributes:
        flops: floating-point operations per second of matrix products, by format of their inputs.
        memory: bytes per second between the chip and its memory.
        link: bytes per second that a rank sends to other ranks.
        latency: seconds that a collective takes at least.
        sleep: let the process wait as long as the model says.
    """

    flops: Mapping[str, float] = field(default_factory=dict)
    memory: float = 0.0
    link: float = 0.0
    latency: float = 0.0
    sleep: bool = False


@dataclass(frozen=True)
class Profile:
    """A chip: what differs, and where each property is documented."""

    numerics: Numerics
    sources: Mapping[str, str]
    costs: Costs | None = None
    cost_sources: Mapping[str, str] = field(default_factory=dict)


_PTX = (
    "PTX ISA, cvt: the conversion to tf32 that sm_80 has is cvt.rna (nearest, ties away); "
    "https://docs.nvidia.com/cuda/parallel-thread-execution/"
)
_FASI = "Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021, https://doi.org/10.7717/peerj-cs.330"
_REDUCE = "PyTorch's aten/src/ATen/native/cuda/Reduce.cuh: a thread adds vt0 = 4 elements, then a tree"
_INF_NAN = (
    "INF_NAN_MODE_ENABLE, Atlas training series: saturation only; "
    "https://hiascend.com/document/detail/zh/Pytorch/600/apiref/Envvariables/Envir_004.html"
)
_CUBE = (
    "Liao et al., DaVinci: A Scalable Architecture for Neural Network Computing, Hot Chips 2019: the cube unit "
    "multiplies 16 x 16 x 16 matrices of fp16 and adds in fp32"
)
_A100_SHEET = "NVIDIA A100 40 GB data sheet"
_MI60 = "AMD's data sheet of MI60, whose architecture (gfx906) Z100 shares; Z100's own is not public"
_SUNWAY = "Chips and Cheese, SC23; BaGuaLu, PPoPP 2022"
_OUR_BACKEND = "what xtrain's backend for the chip does; docs/backends.md"

PROFILES: dict[str, Profile] = {
    "none": Profile(Numerics(), {}),
    "a100-tf32": Profile(
        Numerics(products="tf32", rounding="nearest-away", block=32, sums=4),
        {
            "products": f"tf32 switched on; 10 stored mantissa bits: {_FASI}",
            "rounding": _PTX,
            "switchable": "torch.backends.cuda.matmul.allow_tf32",
            "accumulation": f"{_FASI} (that the adder truncates is not emulated)",
            "block": "CUTLASS's tiles of 32 along the inner dimension; inside a tile the host's order",
            "sums": _REDUCE,
        },
        Costs({"tf32": 156e12, "fp16": 312e12, "bf16": 312e12, "fp32": 19.5e12}, 1.555e12, 300e9, 10e-6),
        {
            "flops": _A100_SHEET,
            "memory": _A100_SHEET,
            "link": "NVLink 3, 600 GB/s in both directions together: NVIDIA A100 data sheet",
            "latency": "assumed: 10 us a collective",
        },
    ),
    "ascend910-fp16": Profile(
        Numerics(
            products="fp16", switchable=False, block=16, sums=64, saturate=True, bf16="refused", norm="fp32"
        ),
        {
            "products": f"{_CUBE}; float32 inputs are rounded (CANN's ACL_PRECISION_MODE may choose so)",
            "switchable": f"there is no float32 in the cube unit: {_CUBE}",
            "accumulation": _CUBE,
            "block": _CUBE,
            "sums": "assumed: 64 repeats of the 256-byte vector unit before its lanes are added",
            "saturate": _INF_NAN,
            "bf16": "torch_npu's is_bf16_supported is false on the 910A; xtrain's ascend backend refuses it",
            "norm": "HCCL does not add fp64; xtrain's ascend backend sums norms in fp32",
        },
        Costs({"fp16": 256e12}, 1.2e12, 30e9, 20e-6),
        {
            "flops": "Liao et al., Hot Chips 2019: 256 TFLOP/s in fp16",
            "memory": "Liao et al., Hot Chips 2019: 1.2 TB/s",
            "link": "Liao et al., Hot Chips 2019: HCCS, 30 GB/s a link",
            "latency": "assumed: 20 us a collective",
        },
    ),
    "dcu-nobf16": Profile(
        Numerics(bf16="fp32", block=16, sums=4),
        {
            "bf16": f"gfx906 (Z100) has no bf16 instructions; {_OUR_BACKEND}",
            "block": "assumed: tiles of 16 along the inner dimension, which Tensile has among others",
            "sums": f"{_REDUCE}, built for HIP",
        },
        Costs({"fp32": 14.7e12, "fp16": 29.5e12}, 1e12, 6.25e9, 20e-6),
        {
            "flops": f"{_MI60}: 14.7 and 29.5 TFLOP/s",
            "memory": f"{_MI60}: 1 TB/s",
            "link": "4 x 50 Gb/s InfiniBand for the 4 DCU of a node, in the cluster of 3000 nodes",
            "latency": "assumed: 20 us a collective",
        },
    ),
    "sw26010pro": Profile(
        Numerics(block=16, sums=8),
        {
            "block": "assumed: a compute core adds a 512-bit vector of 16 fp32 at a time",
            "sums": "assumed: 8 elements a compute core, then over the cores' mesh",
            "bf16": f"fp16 and bf16 are native: {_SUNWAY}",
            "norm": _OUR_BACKEND,
        },
        # Of one core group, which is what a rank has: a sixth of the chip.
        Costs({"fp32": 4.6e12, "fp16": 9.2e12, "bf16": 9.2e12}, 51.2e9, 8e9, 20e-6),
        {
            "flops": f"27.6 TFLOP/s fp32 a chip of six core groups: {_SUNWAY}; 16-bit at twice that: assumed",
            "memory": f"51.2 GB/s a core group: {_SUNWAY}",
            "link": "assumed: 8 GB/s a core group; the network is proprietary",
            "latency": "assumed: 20 us a collective",
        },
    ),
    "ascend910b-hf32": Profile(
        Numerics(products="hf32", block=16, sums=64, norm="fp32"),
        {
            "products": "hf32 switched on; 11 stored mantissa bits: CANN's --allow_hf32, "
            "https://www.hiascend.com/document/detail/en/CANNCommunityEdition/910/devaids/atctool/atlasatcparam_16_0067.html",
            "rounding": "Ascend C SetHF32, transMode 0 (its default): nearest, ties to even",
            "switchable": "torch.npu.matmul.allow_hf32",
            "accumulation": _CUBE,
            "block": _CUBE,
            "sums": "assumed: 64 repeats of the 256-byte vector unit before its lanes are added",
            "norm": "HCCL does not add fp64; xtrain's ascend backend sums norms in fp32",
        },
    ),
}
"""By name; "custom" is `none` with everything said in the config."""


@dataclass(frozen=True)
class Chosen:
    """A profile with the config's changes: what is emulated, and the source of each property that differs."""

    name: str
    numerics: Numerics
    sources: Mapping[str, str]
    costs: Costs | None
    cost_sources: Mapping[str, str]

    def describe(self) -> dict[str, Any]:
        """For the record's header: every property that is not the host's, with its source."""
        plain = asdict(Numerics())
        values = asdict(self.numerics)
        shown = {
            name: {"value": value, "source": self.sources.get(name, "config")}
            for name, value in values.items()
            if value != plain[name] or name in self.sources
        }
        result: dict[str, Any] = {"profile": self.name, "numerics": shown}
        if self.costs is not None:
            result["cost"] = {
                name: {"value": value, "source": self.cost_sources.get(name, "config")}
                for name, value in asdict(self.costs).items()
            }
        return result


def choose(
    name: str, numerics: Mapping[str, Any] | None = None, cost: Mapping[str, Any] | None = None
) -> Chosen:
    """A profile by name, with changes.

    Args:
        numerics: values of `Numerics` that win over the profile's.
        cost: None: no modelled times. Else values of `Costs` that win over those of the profile it names under
            "profile", which is the numerics' own when left out.

    Raises:
        ConfigError: there is no such profile, or a cost is missing.
    """
    names = [*PROFILES, "custom"]
    if name not in names:
        raise ConfigError(unknown_name("profile of backend 'fake'", name, names))
    if name == "custom" and not numerics:
        raise ConfigError(
            "profile 'custom' of backend 'fake' says nothing by itself: set 'xtrain.fake.numerics'"
        )
    profile = PROFILES.get(name, PROFILES["none"])
    changes = dict(numerics or {})
    merged = replace(profile.numerics, **changes)
    sources = {key: source for key, source in profile.sources.items() if key not in changes}
    if cost is None:
        return Chosen(name, merged, sources, None, {})
    said = dict(cost)
    base_name = said.pop("profile", None) or name
    if base_name not in names:
        raise ConfigError(unknown_name("cost profile of backend 'fake'", base_name, names))
    base = PROFILES.get(base_name, PROFILES["none"])
    costs = replace(base.costs or Costs(), **said)
    missing = [
        f.name for f in fields(Costs) if f.name not in ("sleep", "latency") and not getattr(costs, f.name)
    ]
    if missing:
        raise ConfigError(
            f"the cost profile {base_name!r} of backend 'fake' has no {', '.join(missing)}: name another under "
            "'xtrain.fake.cost.profile', or say the values there"
        )
    cost_sources = {key: source for key, source in base.cost_sources.items() if key not in said}
    return Chosen(name, merged, sources, costs, cost_sources)
