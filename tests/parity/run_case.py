"""One rank of one recorded run, started by torchrun: the example script on the named engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.parity.cases import load_script


def _spare_deepspeed_its_compiler() -> None:
    """Tell DeepSpeed that no compiled op is available; it would build its shared-memory op for minutes."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__.update(dict.fromkeys(deepspeed.ops.__compatible_ops__, False))


def main() -> None:
    engine, output, *flags = sys.argv[1:]
    if engine == "deepspeed":
        _spare_deepspeed_its_compiler()
    losses = load_script(engine).main(flags)
    if torch.distributed.get_rank() == 0:
        Path(output).write_text(json.dumps([loss.hex() for loss in losses]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
