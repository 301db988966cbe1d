"""`deepspeed.ops.op_builder`: which of DeepSpeed's operators have a counterpart here. Nothing is compiled.

`deepspeed.ops.__compatible_ops__[FusedAdamBuilder.NAME]` is how scripts ask. The optimizers are there, in plain
tensor operations on every backend, and so is locked host memory; the rest is not. No builder compiles a library.
"""

from xtrain.ops.op_builder.builder import NotImplementedBuilder as NotImplementedBuilder
from xtrain.ops.op_builder.builder import OpBuilder as OpBuilder
from xtrain.ops.op_builder.builder import builder_class
from xtrain.ops.op_builder.pin_memory import PinMemoryBuilder as PinMemoryBuilder

AsyncIOBuilder = builder_class("AsyncIOBuilder", "async_io", "offload to nvme maps files into memory")
CPUAdagradBuilder = builder_class("CPUAdagradBuilder", "cpu_adagrad", optimizer="adagrad.DeepSpeedCPUAdagrad")
CPUAdamBuilder = builder_class("CPUAdamBuilder", "cpu_adam", optimizer="adam.DeepSpeedCPUAdam")
CPULionBuilder = builder_class("CPULionBuilder", "cpu_lion", optimizer="lion.DeepSpeedCPULion")
EvoformerAttnBuilder = builder_class("EvoformerAttnBuilder", "evoformer_attn")
FPQuantizerBuilder = builder_class("FPQuantizerBuilder", "fp_quantizer")
FusedAdamBuilder = builder_class("FusedAdamBuilder", "fused_adam", optimizer="adam.FusedAdam")
FusedLambBuilder = builder_class("FusedLambBuilder", "fused_lamb", optimizer="lamb.FusedLamb")
FusedLionBuilder = builder_class("FusedLionBuilder", "fused_lion", optimizer="lion.FusedLion")
GDSBuilder = builder_class("GDSBuilder", "gds", "offload to nvme maps files into memory")
InferenceBuilder = builder_class("InferenceBuilder", "transformer_inference")
QuantizerBuilder = builder_class("QuantizerBuilder", "quantizer")
RandomLTDBuilder = builder_class("RandomLTDBuilder", "random_ltd")
SpatialInferenceBuilder = builder_class("SpatialInferenceBuilder", "spatial_inference")
StochasticTransformerBuilder = builder_class("StochasticTransformerBuilder", "stochastic_transformer")
TransformerBuilder = builder_class("TransformerBuilder", "transformer")
UtilsBuilder = builder_class("UtilsBuilder", "utils", "use torch._utils._flatten_dense_tensors")

__all__ = [name for name in dir() if name.endswith("Builder")]
