"""Event files of TensorBoard, read with the package tensorboard (extra `monitor`)."""

from __future__ import annotations

import struct
from pathlib import Path

from xtrain.align.record import Record
from xtrain.align.sources.common import CurveBuilder
from xtrain.base.errors import RecordError

EVENT_FILES = "*.tfevents.*"
_FIRST_EVENT = b"brain.Event:"


def is_event_file(start: bytes) -> bool:
    """Whether these first bytes are those of an event file: a length, its checksum, and the version."""
    if len(start) < 12:
        return False
    (length,) = struct.unpack("<Q", start[:8])
    return length < 4096 and _FIRST_EVENT in start[12 : 12 + length]


def read_events(path: Path, loss: str | None) -> Record:
    """The scalars of an event file, or of all event files in a folder.

    Raises:
        RecordError: tensorboard is not installed, or no scalar is the loss.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise RecordError(
            f"{path} is a TensorBoard event file, for which the package tensorboard is needed ({error}): "
            "pip install tensorboard"
        ) from None
    keep_all = {"scalars": 0, "tensors": 0}
    events = EventAccumulator(str(path), size_guidance=keep_all)
    try:
        events.Reload()
    except Exception as error:  # it raises what protobuf and the file system raise
        raise RecordError(f"{path} cannot be read as TensorBoard events: {error}") from None
    builder = CurveBuilder(path, "TensorBoard events")
    builder.float32 = True
    tags = events.Tags()
    for tag in tags["scalars"]:
        for event in events.Scalars(tag):
            builder.add(event.step, {tag: event.value})
    for tag in tags["tensors"]:  # PyTorch's add_scalar(new_style=True) and TensorFlow 2
        for event in events.Tensors(tag):
            values = event.tensor_proto.float_val or _content(event.tensor_proto)
            if len(values) == 1:
                builder.add(event.step, {tag: float(values[0])})
    return builder.build(loss)


def _content(proto: object) -> tuple[float, ...]:
    content: bytes = getattr(proto, "tensor_content", b"")
    is_float = getattr(proto, "dtype", None) == 1
    return struct.unpack("<f", content) if is_float and len(content) == 4 else ()
