"""Leaving in order when SIGTERM or SIGHUP asks for it: all ranks save at the same step boundary, and end.

In a run folder the recorder's flag brings the ranks together (align/run_recording.py), and a signal raises it.
Elsewhere they meet at the store. Never replaces a handler of the script's, and does nothing in a run without signals.

Handlers written in Python do not run while the main thread is inside a collective, so a thread that the signal wakes
does the talking: it notes how many step boundaries this rank has passed, and waits for the notes of the others. Ranks
that are ahead wait at their next boundary meanwhile; all leave one boundary after the highest note.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from xtrain import comm
from xtrain.base.errors import PeerLostError, RunSignalled
from xtrain.base.files import write_text
from xtrain.base.log import log_dist
from xtrain.base.run_folder import SIGNALLED
from xtrain.comm import rendezvous

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 30.0
"""Seconds in which all ranks have to get the signal; launchers kill about as long after it."""
_AGAIN = 5.0
"""A second signal after so many seconds ends the process at once; earlier, launchers forward the same one twice."""
_IDLE = 25.0
"""Where no step is under way and none begins for so many seconds, nothing would save; launchers kill soon after."""
_LOOK = 1.0
_QUESTION = "signal"


class _State:
    """Of this process, which leaves once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.engines: list[weakref.ref[Any]] = []
        self.destroyed: weakref.WeakSet[Any] = weakref.WeakSet()
        self.run_dir: Path | None = None
        self.passed = 0
        self.stepping = False
        """A micro-batch has begun, and no update has come since."""
        self.boundary = 0.0
        """When the last update was, by the monotonic clock."""
        self.number = 0
        self.since = 0.0
        self.decided = threading.Event()
        self.target = 0
        self.leaving = False
        self.pipe: tuple[int, int] | None = None


_state = _State()


# ---------------------------------------------------------------- engines


def attach(engine: Any) -> None:
    """Save `engine` and all others when a signal comes. For scripts that xtrain's launcher has not started.

    Call it after whatever else watches the engine's updates has registered. Does nothing outside the main thread, where
    Python takes no signals, and for signals that the script handles or ignores itself.
    """
    reference = weakref.ref(engine)
    _state.engines.append(reference)
    engine.train_hooks.before_forward.append(lambda *_: _begun(engine.module.training))
    engine.train_hooks.after_update.append(lambda _: _boundary())
    engine.train_hooks.on_destroy.append(lambda _: _detach(reference()))
    _install()


def raise_flag_in(run_dir: Path) -> None:
    """Let a signal be asked for by `came`, and be written down in the run folder."""
    _state.run_dir = run_dir
    _install()


def came() -> bool:
    """Whether a signal has asked this rank to leave."""
    return _state.number != 0


def has_left() -> None:
    """The ranks have come together and begin to save: peers that end are no reason to end at once any more."""
    _state.leaving = True


def _live() -> list[tuple[int, Any]]:
    found = [(number, reference()) for number, reference in enumerate(_state.engines)]
    return [
        (number, engine) for number, engine in found if engine is not None and engine not in _state.destroyed
    ]


def _detach(engine: Any) -> None:
    """Its number stays taken: the folders of the others are named by theirs."""
    _state.destroyed.add(engine)


def _begun(training: bool) -> None:
    """A micro-batch begins; one that is only evaluated leads to no update."""
    _state.stepping = _state.stepping or training


def _boundary() -> None:
    """An engine has made an update, and all that watch it have seen that."""
    state = _state
    state.stepping, state.boundary = False, time.monotonic()
    with state.lock:
        state.passed += 1
        if not state.number or state.run_dir is not None:
            return
    if not state.decided.wait(2 * _PATIENCE):
        _end("the ranks did not find out in time where to stop")
    if state.passed < state.target:
        return
    has_left()
    raise RunSignalled(_saved(), 128 + state.number)


def _saved() -> str:
    """Save every engine where it was last saved or loaded; what to say."""
    name, used, told = signal.Signals(_state.number).name, set(), []
    for number, engine in _live():
        step = f"step {engine.train_state.counters.global_steps}"
        folder = engine.checkpoint_folder
        if folder is None:
            told.append(f"{step} was not saved, since the script has not saved or loaded a checkpoint")
            continue
        path = Path(folder)
        if path in used:  # with another engine's: `latest` names one checkpoint
            path = path / f"engine{number}"
        used.add(path)
        engine.save_checkpoint(str(path))
        told.append(f"{step} was saved in {path}")
    text = f"stopped by {name}: {'; '.join(told)}"
    log_dist(text, ranks=[0])
    return text


# ---------------------------------------------------------------- the signal


def _install() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _handle)
    if _state.pipe is not None or _handle not in map(signal.getsignal, _SIGNALS):
        return
    _state.pipe = reading, writing = os.pipe()
    for end in _state.pipe:
        os.set_inheritable(end, False)
    os.set_blocking(writing, False)
    theirs = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    if theirs != -1:  # an event loop's: then only the handler wakes the thread
        signal.set_wakeup_fd(theirs)
    threading.Thread(target=_listen, args=(reading,), name="xtrain-signals", daemon=True).start()


def _handle(number: int, _: Any) -> None:
    """Python's handler: wakes the thread where nothing else has."""
    if _state.pipe is not None:
        os.write(_state.pipe[1], bytes([number]))


def _forked() -> None:
    """A child (a DataLoader's, say) belongs to no run: signals do to it what they always do."""
    global _state
    if _state.pipe is None:
        return
    if (theirs := signal.set_wakeup_fd(-1)) not in (-1, _state.pipe[1]):
        signal.set_wakeup_fd(theirs)
    for end in _state.pipe:
        os.close(end)
    for number in _SIGNALS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_DFL)
    _state = _State()


os.register_at_fork(after_in_child=_forked)


def _listen(reading: int) -> None:
    """The thread: every byte is a signal."""
    while True:
        for number in os.read(reading, 64):
            if number not in _SIGNALS or signal.getsignal(number) is not _handle:
                continue  # SIGINT, or what the script has begun to handle itself since
            with _state.lock:
                first = not _state.number
                if first:
                    _state.number, _state.since = number, time.monotonic()
                note = _state.passed
            if first:
                threading.Thread(target=_leave, args=(note,), name="xtrain-leave", daemon=True).start()
            elif time.monotonic() - _state.since > _AGAIN:
                _end("it came again")


def _leave(note: int) -> None:
    """Find out with the others where to stop; then watch that they are there until all save."""
    try:
        if _state.run_dir is not None:
            _write_down(_state.run_dir)
        elif not _live() or not dist.is_initialized():
            _end("no engine trains")
        else:
            _state.target = _agree(note) + 1
            _state.decided.set()
        while not _state.leaving:
            _look_for_ended()
            if _state.run_dir is None and not _state.stepping:
                idle = time.monotonic() - max(_state.since, _state.boundary)
                if idle > _IDLE:
                    _end(f"no step has begun for {idle:.0f} s")
            time.sleep(_LOOK)
    except Exception as error:  # whatever it was, the main thread must not wait for this one
        _end(rendezvous.first_line(error))


def _agree(note: int) -> int:
    """The highest number of boundaries that a rank has passed."""
    everyone = comm.RollCall("leave on signal", range(comm.get_world_size()))
    everyone.raise_to(_QUESTION, note)
    if not everyone.all_here(_QUESTION, _PATIENCE, _look_for_ended):
        _end(f"not every rank got a signal within {_PATIENCE:g} s")
    return everyone.highest(_QUESTION)


_next_look = 0.0


def _look_for_ended() -> None:
    """Raise when another rank has ended: nobody can save without it, and a launcher may be ending the rest."""
    global _next_look
    if rendezvous.current is None or not dist.is_initialized() or time.monotonic() < _next_look:
        return
    _next_look = time.monotonic() + _LOOK
    ended = rendezvous.current.gone(range(comm.get_world_size()), patience=0.0)
    if ended and not _state.leaving:
        raise PeerLostError(f"{rendezvous.listed(ended)} {'has' if len(ended) == 1 else 'have'} ended")


def _write_down(run_dir: Path) -> None:
    path = run_dir / SIGNALLED
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rank = int(os.environ.get("RANK", "0"))
        about = {"rank": rank, "signal": signal.Signals(_state.number).name, "time": time.time()}
        write_text(path, json.dumps(about))


def _end(why: str) -> NoReturn:
    """End this process as the signal would have, but with words."""
    name, rank = signal.Signals(_state.number).name, os.environ.get("RANK", "0")
    sys.stdout.flush()
    print(
        f"xtrain: rank {rank} ends because of {name}, and has saved nothing: {why}",
        file=sys.stderr,
        flush=True,
    )
    # The signal's default action, from a thread, where Python's own signal.signal() may not be called.
    handle = ctypes.CDLL(None).signal
    handle.argtypes, handle.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    handle(_state.number, None)
    os.kill(os.getpid(), _state.number)
    os._exit(128 + _state.number)  # blocked in every thread: by status, then
