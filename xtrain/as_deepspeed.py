"""`import xtrain.as_deepspeed` as a script's first import: libraries that `import deepspeed` get xtrain.

In this process only, and no other name. `xtrain.install()` does more: processes started by this one, apex, torch.cuda.
"""

from xtrain.shims import alias

alias.install("deepspeed")
