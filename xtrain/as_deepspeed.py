"""`import xtrain.as_deepspeed` as a script's first import: libraries that `import deepspeed` get xtrain."""

from xtrain.deepspeed_api.compat import alias

alias.install()
