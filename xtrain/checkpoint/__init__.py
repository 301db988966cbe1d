"""Checkpoints: readable by parameter name, complete or absent, loadable into any number of ranks.

A checkpoint is the directory `save_dir/tag`:

- `model.safetensors`: the module's weights and buffers by name, in their training dtype;
- `optimizer-{r}-of-{n}.safetensors`: what rank r owned: runs of master weights and optimizer states (in
  ZeRO stage 3 of weights, too), named `kind|parameter|start`, one-dimensional;
- `state.pt`: counters, schedule, scalar optimizer state and the script's client state;
- `rng-{r}-of-{n}.pt`: the rank's random-number states, named ones (Megatron's tracker) included;
- `manifest.json`: written last; sizes and SHA-256 of all files, which file holds which run, further names of tied
  weights, and names that hooks of the module's `state_dict` have changed.

Beside the directories lie `latest`, which names the last one, and `zero_to_fp32.py`, which writes one as plain files.

Where an mpu divides the model, each model-parallel rank has a part of its own: files are called
`model-part-{p}-of-{m}.safetensors` and so on, and the manifest lists parameters and runs by part. Such a checkpoint
loads into any number of data-parallel ranks and any stage, and into the same division of the model only.

Reading never executes code from a file: tensors are safetensors, the rest is loaded with
`weights_only=True`.
"""

from xtrain.checkpoint.constants import *  # noqa: F403  # DeepSpeed has them here, too
from xtrain.checkpoint.contents import find_tag, is_checkpoint, read_manifest

# Writing (write.py) and reading (read.py) need torch and are imported by the engine; asking what a
# folder holds does not, and the launcher does.
__all__ = ["find_tag", "is_checkpoint", "read_manifest"]
