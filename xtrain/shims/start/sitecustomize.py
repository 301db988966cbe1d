"""Python imports this at its start, because `xtrain run` and `xtrain.install()` put this folder on PYTHONPATH.

So processes that a script starts (multiprocessing, torchrun, `accelerate launch`, `python -m`) have xtrain's names too.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec

# The machine's own file of this name comes first, as it would without this one.
_here = os.path.dirname(os.path.abspath(__file__))
_rest = [entry for entry in sys.path if os.path.abspath(entry) != _here]
_spec = PathFinder.find_spec("sitecustomize", _rest)
if _spec is not None and _spec.loader is not None:
    _module = module_from_spec(_spec)
    sys.modules["sitecustomize"] = _module
    _spec.loader.exec_module(_module)

# Another Python, without xtrain, can be among what a script starts: a build tool, say.
if find_spec("xtrain") is not None:
    from xtrain.shims import process

    process.in_child()
