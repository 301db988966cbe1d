"""The run's store does what torch's stores do, through a relay too; and only for who knows the secret."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch.distributed as dist
from hypothesis import given, settings

from tests.comm.store.tools import SECRET, listening, not_loopback
from xtrain.base.errors import BackendError, ConfigError
from xtrain.comm.store import Relay, RunStore, Server, frames
from xtrain.comm.store import listener as listeners

TIMEOUT = timedelta(seconds=20)
SHORT = timedelta(milliseconds=200)


@pytest.fixture
def server() -> Iterator[Server]:
    serving = Server("127.0.0.1", SECRET)
    yield serving
    serving.close()


@pytest.fixture(params=["server", "relay"])
def store(request: pytest.FixtureRequest, server: Server) -> Iterator[RunStore]:
    """A client, once of the server and once of a relay."""
    if request.param == "server":
        yield RunStore(*server.address, SECRET, TIMEOUT)
        return
    relay = Relay(*server.address, SECRET)
    yield RunStore(*relay.address, SECRET, TIMEOUT)
    relay.close()


KEYS = st.sampled_from(["a", "b", "ключ", ""])
VALUES = st.sampled_from(["", "1", "-7", "x", "long " * 500])
OPERATIONS = st.one_of(
    st.tuples(st.just("set"), KEYS, VALUES),
    st.tuples(st.just("add"), KEYS, st.integers(-5, 2**40)),
    st.tuples(st.just("compare_set"), KEYS, VALUES, VALUES),
    st.tuples(st.just("check"), st.lists(KEYS, min_size=1, max_size=2)),
    st.tuples(st.just("delete_key"), KEYS),
    st.tuples(st.just("append"), KEYS, VALUES),
    st.tuples(st.just("num_keys")),
    st.tuples(
        st.just("multi_set"), st.lists(KEYS, min_size=2, max_size=2, unique=True), st.tuples(VALUES, VALUES)
    ),
)


def _done(store: Any, operation: tuple[Any, ...]) -> Any:
    name, *arguments = operation
    if name == "multi_set":
        arguments = [arguments[0], list(arguments[1])]
    try:
        return getattr(store, name)(*arguments)
    except (RuntimeError, ValueError):  # adding to what is no number
        return "refused"


def _left(store: Any) -> dict[str, bytes]:
    return {key: store.get(key) for key in ("a", "b", "ключ", "") if store.check([key])}


def _adds_to_text(store: Any, operation: tuple[Any, ...]) -> bool:
    if operation[0] != "add" or not store.check([operation[1]]):
        return False
    return not store.get(operation[1]).lstrip(b"-").isdigit()


@settings(max_examples=60)
@given(st.lists(OPERATIONS, max_size=12))
def test_it_does_what_torchs_store_does(operations: list[tuple[Any, ...]]) -> None:
    server = Server("127.0.0.1", SECRET)
    try:
        ours, torchs = RunStore(*server.address, SECRET, TIMEOUT), dist.HashStore()
        for operation in operations:
            # torch reads as many digits as there are; here a value that is no number is not added to.
            if _adds_to_text(torchs, operation):
                assert _done(ours, operation) == "refused"
                continue
            assert _done(ours, operation) == _done(torchs, operation), operation
        assert _left(ours) == _left(torchs)
    finally:
        server.close()


def test_waiting(store: RunStore) -> None:
    def later() -> None:
        time.sleep(0.2)
        store.multi_set(["late", "later"], ["1", b"\x00\xff"])

    thread = threading.Thread(target=later)
    thread.start()
    store.wait(["late"])
    assert store.multi_get(["later", "late"]) == [b"\x00\xff", b"1"]
    thread.join()
    store.set("big", bytes(5_000_000))
    assert store.get("big") == bytes(5_000_000)
    short = store.clone()
    short.set_timeout(SHORT)
    for absent in (lambda: store.wait(["none", "late"], SHORT), lambda: short.get("none")):
        begun = time.monotonic()
        with pytest.raises(dist.DistStoreError, match=r"wait timeout after 0.2 s, keys: none$"):
            absent()
        assert 0.2 <= time.monotonic() - begun < 5
    assert store.timeout == TIMEOUT
    with pytest.raises(dist.DistStoreError):
        store.add("big", 1)
    assert store.add("counter", 3) == 3  # the connection is as good as before


def test_threads_wait_side_by_side(store: RunStore) -> None:
    found: list[int] = []

    def count(number: int) -> None:
        store.wait([f"go {number}"])
        for _ in range(50):
            store.add("sum", 1)
        found.append(number)

    threads = [threading.Thread(target=count, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for number in reversed(range(8)):
        store.set(f"go {number}", "1")
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(8))
    assert store.add("sum", 0) == 400


def test_as_torchs_c_plus_plus_uses_it(store: RunStore) -> None:
    prefixed: Any = dist.PrefixStore("p", store)
    prefixed.set("k", "v")
    assert (prefixed.get("k"), store.get("p/k"), prefixed.num_keys()) == (b"v", b"v", 1)
    assert prefixed.delete_key("k")
    assert not prefixed.check(["k"])
    prefixed.multi_set(["x", "y"], ["1", "2"])
    assert prefixed.multi_get(["y", "x"]) == [b"2", b"1"]
    prefixed.append("x", "0")
    assert prefixed.compare_set("x", "10", "11") == b"11"
    with pytest.raises(dist.DistStoreError):
        prefixed.wait(["absent"], SHORT)


def _child(host: str, port: int, store: RunStore, queue: Any) -> None:
    queue.put((store.add("n", 1), store.get("from the parent")))


def test_a_forked_child_has_connections_of_its_own(server: Server) -> None:
    store = RunStore(*server.address, SECRET, TIMEOUT)
    store.set("from the parent", "1")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(*server.address, store, queue))
    child.start()
    assert queue.get(timeout=30) == (1, b"1")
    child.join()
    assert store.add("n", 1) == 2


def test_a_store_that_goes_is_said(server: Server) -> None:
    relay = Relay(*server.address, SECRET)
    direct, relayed = (RunStore(*at.address, SECRET, TIMEOUT) for at in (server, relay))
    told: list[str] = []

    def wait(store: RunStore) -> None:
        try:
            store.get("never")
        except dist.DistNetworkError as error:
            told.append(str(error))

    threads = [threading.Thread(target=wait, args=(store,)) for store in (direct, relayed)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    server.close()
    for thread in threads:
        thread.join(10)
    assert ["has gone" in text for text in told] == [True, True], told
    for store in (direct, relayed):
        with pytest.raises(dist.DistNetworkError, match="has gone"):
            store.check(["a"])
    with pytest.raises(dist.DistNetworkError, match=r"was not reached within 0.2 s"):
        RunStore(*server.address, SECRET, SHORT)
    server.close()
    relay.close()  # a second time, and after it went by itself


def test_addresses_and_secrets_that_cannot_be(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for host, why in (("localhost", "IP address"), ("0.0.0.0", "means all"), ("::", "means all")):
        with pytest.raises(ConfigError, match=why):
            Server(host, SECRET)
    with pytest.raises(ConfigError, match="at least 16"):
        Server("127.0.0.1", b"short")
    with pytest.raises(BackendError, match=r"cannot listen at 192.0.2.77"):
        Server("192.0.2.77", SECRET)
    with pytest.raises(BackendError, match=r"cannot listen at 127.0.0.1"):
        Server("127.0.0.1", SECRET, server.address[1])
    with pytest.raises(BackendError, match="another secret"):
        RunStore(*server.address, bytes(32), TIMEOUT)
    with pytest.raises(BackendError, match="another secret"):
        Relay(*server.address, bytes(32))
    torchs = dist.TCPStore("127.0.0.1", 0, 1, True)  # says nothing before it is asked
    with pytest.raises(dist.DistNetworkError, match="was not reached"):
        RunStore("127.0.0.1", torchs.port, SECRET, SHORT)
    monkeypatch.setattr("xtrain.comm.store.relay._PATIENCE", 0.3)
    with pytest.raises(BackendError, match=r"not reached within 0.3 s"):
        Relay("127.0.0.1", 1, SECRET)


class _Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def _intrude(host: str, port: int, marker: Path) -> None:
    """What somebody without the secret can send."""
    poison = pickle.dumps(_Touch(marker))
    hello = frames.MAGIC + bytes(frames.NONCE)
    for raw in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 100_000,
        frames.pack(1, frames.SET, [b"stolen", poison]),
        bytes(frames.NONCE + frames.PROOF) + frames.pack(1, frames.SET, [b"stolen", poison]),
        hello + frames.pack(1, frames.GET, [frames.seconds(1), b"precious"]),
    ):
        with socket.create_connection((host, port)) as connection:
            connection.settimeout(10)
            got = b""
            with suppress(OSError):  # reset, which is right
                connection.sendall(raw)
                while part := connection.recv(65536):
                    got += part
            assert len(got) in (0, frames.HELLO), "something beyond the first nonce was answered"
    with pytest.raises(RuntimeError):
        _poison_by_torch(host, port, poison)


def _poison_by_torch(host: str, port: int, poison: bytes) -> None:
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=1), wait_for_workers=False)
    for key in (
        "torch.rendezvous.run",
        "/torch.rendezvous.run",
    ):  # what c10d's rendezvous reads and unpickles
        store.set(key, poison)


def test_without_the_secret_nothing_is_read_or_written(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners, "_PATIENCE", 1.0)
    relay = Relay(*server.address, SECRET)
    store = RunStore(*server.address, SECRET, TIMEOUT)
    store.set("precious", "value")
    silent = [socket.create_connection(server.address) for _ in range(50)]  # block nobody
    for at in (server, relay):
        _intrude(*at.address, tmp_path / "marker")
        assert RunStore(*at.address, SECRET, TIMEOUT).get("precious") == b"value"
    assert store.num_keys() == 1
    assert not (tmp_path / "marker").exists()
    for connection in silent:
        connection.settimeout(10)
        assert len(connection.recv(1000)) == frames.HELLO
        assert connection.recv(1000) == b"", "who stays silent is dropped"
        connection.close()
    relay.close()


def test_a_proof_cannot_be_used_again(server: Server) -> None:
    """Neither on another connection nor as the server's own."""
    with socket.create_connection(server.address) as first:
        nonce = first.recv(frames.HELLO)[len(frames.MAGIC) :]
        ours = bytes(frames.NONCE)
        answer = ours + frames.proof(SECRET, b"client", nonce, ours)
        first.sendall(answer)
        assert first.recv(frames.PROOF) == frames.proof(SECRET, b"server", nonce, ours)
    with socket.create_connection(server.address) as second:
        second.recv(frames.HELLO)
        second.sendall(answer)
        assert second.recv(frames.PROOF) == b""


def test_what_is_too_large_or_broken_ends_the_connection(server: Server) -> None:
    with pytest.raises(frames.FrameError):
        frames.length(frames.LENGTH.pack(frames.LARGEST + 1))
    for body in (b"", b"123", b"\0\0\0\1\1" + frames.LENGTH.pack(9) + b"x"):
        with pytest.raises(frames.FrameError):
            frames.unpack(body)
    store = RunStore(*server.address, SECRET, TIMEOUT)
    for code, fields in ((77, []), (frames.SET, [b"odd"]), (frames.ADD, [b"a", b"b"]), (frames.ADD, [])):
        with pytest.raises(dist.DistStoreError):
            store._connections.ask(code, fields, 1.0)
    for fields in ([], [b"x"]):
        with pytest.raises(dist.DistNetworkError):
            store._connections.ask(frames.GET, fields, 1.0)
    store.set("a", "1")


def test_only_loopback_listens(server: Server) -> None:
    relay = Relay(*server.address, SECRET)
    found = listening(os.getpid())
    assert {server.address, relay.address} <= found
    assert not not_loopback(
        {address for address in found if address[1] in (server.address[1], relay.address[1])}
    )
    relay.close()
