"""Processes that train together: they meet before anything is computed, and when one is lost all end, with a line each.

The first process listens where the coordinator will, the others connect, all say who they are, and keep these connections: a
process that ends closes its own, one that hangs falls silent, and either is told to all.
"""

import json
import os
import socket
import threading
import time

from experiments import boundary
from experiments.boundary import Refused

BEAT, DONE, LOST = b".", b"!", b"x"
_state = {"done": set(), "lost": False, "peers": {}}


def check(coordinator: str | None, count: int | None, index: int | None, timeout: float) -> tuple[str, int] | None:
    """The address of the coordinator as (host, port); None if all is left to be found by jax, as on a TPU pod."""
    given = {"--coordinator": coordinator, "--num-processes": count, "--process-id": index}
    missing = [name for name, value in given.items() if value is None]
    if not timeout > 0:
        raise Refused(f"--timeout is {timeout}; it must be a number of seconds above 0")
    if len(missing) == 3:
        return None
    if missing:
        raise Refused(f"--distributed needs all of {', '.join(given)}, or, on a TPU pod, none; there is no {missing[0]}")
    host, colon, port = coordinator.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
        raise Refused(f"--coordinator is {coordinator!r}; it must be HOST:PORT, such as 10.0.0.1:1234")
    if not 1 <= count <= 4096:
        raise Refused(f"--num-processes is {count}; it must lie in 1 … 4096")
    if not 0 <= index < count:
        raise Refused(f"--process-id is {index}; with {count} processes it must lie in 0 … {count - 1}")
    return host.strip("[]"), int(port)


def meet(address: tuple[str, int], count: int, index: int, timeout: float):
    """Waits, for `timeout` seconds at most, until all processes are there, then watches them until `leave`."""
    end = time.monotonic() + timeout
    try:
        peers = _gather(address, count, end) if index == 0 else {0: _connect(address, count, index, end)}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error or "no answer"
        raise Refused(f"process {index} cannot meet the others at {address[0]}:{address[1]} within {timeout:g} s ({reason}); "
                      f"start all {count}, each with its --process-id, and one --coordinator for all") from error
    _state["peers"] = peers
    for peer, connection in peers.items():
        connection.settimeout(timeout)
        threading.Thread(target=_watch, args=(peer, connection, timeout), daemon=True).start()
    threading.Thread(target=_beat, args=(timeout / 4,), daemon=True).start()


def leave():
    """This process has done its part; from now on its end is no loss."""
    _tell(DONE)


def settle():
    """Before an error of this process is told: it may be that of another, which is told instead, and ends this one."""
    if _state["peers"]:
        time.sleep(1)


def _gather(address, count, end):
    peers, family = {}, socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server(("", address[1]), family=family) as server:
        while len(peers) < count - 1:
            server.settimeout(max(end - time.monotonic(), 0.001))
            try:
                connection = server.accept()[0]
            except TimeoutError:
                absent = sorted(set(range(1, count)) - peers.keys())
                raise ValueError(f"process {absent[0]} did not come") from None
            try:
                hello = _receive(connection, end)
                other, of = hello["process"], hello["of"]
                wrong = (f"has --num-processes {of}, process 0 has {count}" if of != count else "is there twice"
                         if other in peers else None if 0 < other < count else "is not one of them")
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()  # something else that knocks at the port
                continue
            if wrong:
                for peer in [*peers.values(), connection]:
                    _send(peer, {"error": f"process {other} {wrong}"})
                    peer.close()
                raise ValueError(f"process {other} {wrong}")
            peers[other] = connection
    for peer in peers.values():
        _send(peer, {})
    return peers


def _connect(address, count, index, end):
    while True:
        try:
            connection = socket.create_connection(address, timeout=max(end - time.monotonic(), 0.001))
        except (ConnectionError, socket.gaierror):  # process 0 does not listen yet
            if time.monotonic() > end - 0.2:
                raise
            time.sleep(0.2)
            continue
        try:
            _send(connection, {"process": index, "of": count})
            answer = _receive(connection, end)
            if "error" not in answer:
                return connection
            raise ValueError(answer["error"])
        except (OSError, ValueError):
            connection.close()
            raise


def _send(connection, message):
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection, end):
    connection.settimeout(max(end - time.monotonic(), 0.001))
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(1)
        if not part or len(line) > 1000:
            raise ConnectionResetError("the other side has gone")
        line += part
    return dict(json.loads(line))


def _watch(peer, connection, timeout):
    while True:
        try:
            said = connection.recv(64)
        except TimeoutError:
            return _end(f"process {peer} has been silent for {timeout:g} s")
        except OSError:
            said = b""
        if DONE in said:
            _state["done"].add(peer)
        if LOST in said:
            return _end("another process is lost")
        if not said:
            return None if peer in _state["done"] else _end(f"process {peer} is lost")


def _end(reason):
    if not _state["lost"]:
        _state["lost"] = True
        _tell(LOST)
        boundary.say(f"\nerror: {reason}, so this one ends too; the same commands go on from the last checkpoint")
        os._exit(boundary.FAILED)


def _beat(seconds):
    while True:
        time.sleep(seconds)
        _tell(BEAT)


def _tell(word):
    for connection in _state["peers"].values():
        try:
            connection.sendall(word)
        except OSError:
            pass  # its watcher tells
