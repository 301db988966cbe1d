"""The store of a run: never unpickles, listens on one address, and lets in only who knows the run's secret.

The agent of the first node runs a `Server`, those of other nodes a `Relay`, and ranks ask through `RunStore`. Not a
process-group library, and not what ranks say to each other: that is rendezvous.py and roll_call.py.
"""

from xtrain.comm.store.client import RunStore
from xtrain.comm.store.environment import (
    environment,
    from_environment,
    group_store,
    is_stated,
    serve_environment,
)
from xtrain.comm.store.relay import Relay
from xtrain.comm.store.server import Server

__all__ = [
    "Relay",
    "RunStore",
    "Server",
    "environment",
    "from_environment",
    "group_store",
    "is_stated",
    "serve_environment",
]
