"""Several processes as one run: they meet, agree on what they run, and end together.

jax alone keeps training if the processes were started differently, and aborts with a C++ stack
trace about 100 s after one has died. So each process keeps a TCP connection to process 0. It
carries the facts that must agree and the message that a process stopped with, and the kernel closes
it however a process dies. jax's coordination is relayed through the same port, because jax aborts a
process that loses process 0 before that process can report it.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from nanollama_jax.console import console
from nanollama_jax.errors import BadInput, RunStopped
from nanollama_jax.process import say

CONNECT_S = 300  # time for all processes to connect
JAX_HEARTBEAT_S = 600  # until jax aborts because of a silent process; we find out long before
FOR_JAX = b"jax\n"  # the first line of a connection that carries jax's coordination
WELCOME = {"welcome": True}
PACKAGE = pathlib.Path(__file__).parent
LIBRARIES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "sentencepiece",
)

_links: "Links | None" = None  # set if this process is one of several


@contextlib.contextmanager
def joined(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[None]:
    """Inside, this is one of `num_processes`, also for jax; the only one if all are None.

    `coordinator` is HOST:PORT of process 0, or `auto` in a Slurm or Open MPI job. An exception that
    leaves the block also ends the other processes, and each reports it in one line. Raises BadInput
    if the flags are wrong, the processes do not meet, or their code or versions differ.
    """
    global _links
    place = _place(coordinator, num_processes, process_id)
    if place is None:
        yield
        return
    _links = Links(*place)
    try:
        if _links.process_id == 0:
            _links.listen()
        else:
            _links.connect()
        check_agreement(_installed(), limit_s=CONNECT_S)
        _start_jax(_links)
        yield
        _links.send({"finished": True})
        import jax

        jax.distributed.shutdown()
        _links = None
    except BaseException as error:
        _links.tell(error)
        raise


def check_agreement(facts: dict[str, Any], limit_s: float = float("inf")) -> None:
    """Waits for all processes; process 0 raises BadInput unless `facts` are the same on all.

    Call it before any computation across processes whose shapes depend on the facts.
    """
    if _links is None:
        return
    facts = flat(facts)
    if _links.process_id:
        _links.send({"facts": facts})
        _links.receive(f"all {_links.count} processes", limit_s)
        return
    found = {}
    while missing := sorted(set(range(1, _links.count)) - found.keys()):
        awaited = f"process {', '.join(map(str, missing))} of {_links.count}"
        process, message = _links.receive(awaited, limit_s)
        found[process] = message["facts"]
    for process, theirs in sorted(found.items()):
        if text := difference(facts, theirs, process):
            raise BadInput(text)
    _links.send({"agreed": True})


def difference(ours: dict[str, str], theirs: dict[str, str], process: int) -> str:
    """How the `flat` facts of process 0 and of another differ, in words; empty if they agree."""
    names = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    if not names:
        return ""
    first, *others = names
    here, there = (str(facts.get(first, "absent"))[:80] for facts in (ours, theirs))
    more = f" ({', '.join(others[:3])}{', ...' * (len(others) > 3)} too)" if others else ""
    return (
        f"the processes disagree: {first} is {here} on process 0 and {there} on process {process}"
        f"{more}: start all with the same command, code and data"
    )


def flat(facts: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested dict flattened: keys joined by dots, values as JSON (so that NaN equals NaN)."""
    found = {}
    for key, value in facts.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value, default=str)
    return found


def leave(error: BaseException) -> None:
    """Ends this process, one of several, after an error: jax would wait for the others on exit."""
    status = error.code if isinstance(error, SystemExit) else 1
    if _links is None or not status:
        return
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    _exit(status)


class Links:
    """The connections of this process: process 0 has one to each other, the others one to it.

    Messages are JSON objects, one per line. Each connection has a thread that reads them: it ends
    this process when the peer is gone or has stopped, and queues other messages for `receive`.
    """

    def __init__(self, host: str, port: int, count: int, process_id: int):
        self.host, self.port = host, port
        self.count, self.process_id = count, process_id
        self.jax_port = _free_port()
        self._sockets: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._inbox: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
        self._finished: set[int] = set()
        self._sending, self._ending = threading.Lock(), threading.Lock()

    def listen(self) -> None:
        """On process 0: accepts connections from now on."""
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        try:
            server = socket.create_server(("", self.port), family=family, dualstack_ipv6=dual)
        except OSError as error:
            reason = f"process 0 cannot open port {self.port} here ({error.strerror})"
            raise BadInput(f"{reason}: choose another port in --coordinator") from None
        _thread(_accept, server, self._meet)

    def connect(self) -> None:
        """On another process: connects to process 0, which may start later."""
        waiting = _Waiting(CONNECT_S)
        while True:
            try:
                connection = socket.create_connection((self.host, self.port), timeout=5)
                break
            except OSError as error:
                reason = error.strerror or error
                waiting.check(f"process 0 at {self.host}:{self.port} ({reason})")
                time.sleep(0.5)
        answer = {}
        with contextlib.suppress(OSError, ValueError):
            connection.settimeout(20)
            hello = {"process_id": self.process_id, "num_processes": self.count}
            connection.sendall(_line(hello))
            answer = json.loads(_first_line(connection))
        if answer != WELCOME:
            other = f"what answers at {self.host}:{self.port} is not process 0: choose another port"
            raise BadInput(answer.get("refused", other) if isinstance(answer, dict) else other)
        self._add(0, connection)

    def send(self, message: dict[str, Any]) -> None:
        """Sends to process 0, or from process 0 to all others."""
        with self._sending:
            for connection in self._sockets.values():
                with contextlib.suppress(OSError):  # the connection's thread handles it
                    connection.sendall(_line(message))

    def receive(self, awaited: str, limit_s: float) -> tuple[int, dict[str, Any]]:
        """The next message and its sender; raises BadInput if none comes within `limit_s`."""
        waiting = _Waiting(limit_s)
        while True:
            with contextlib.suppress(queue.Empty):
                process, message = self._inbox.get(timeout=1)
                if "refused" in message:
                    raise BadInput(message["refused"])
                if "finished" in message:
                    idle = f"process {process} has nothing left to do, unlike this one"
                    raise BadInput(f"{idle}: use one --workdir for all, on a shared file system")
                return process, message
            waiting.check(f"{awaited} at {self.host}:{self.port}")

    def tell(self, error: BaseException) -> None:
        """Ends the other processes because of `error`; blocks if they are ending this one."""
        expected = isinstance(error, BadInput | RunStopped | KeyboardInterrupt)
        if not expected:
            # A collective fails when a peer dies; the thread that lost it has the better message
            time.sleep(3)
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()
        text = " ".join(str(error).split()) or type(error).__name__
        if not expected and not isinstance(error, OSError):
            text = f"{type(error).__name__}: {text[:300]} (its output has the traceback)"
        code = {BadInput: 2, RunStopped: 3}.get(type(error), 1)
        self._end_others(f"process {self.process_id} of {self.count} stopped: {text}", code)

    def _end(self, text: str, code: int) -> None:
        """Ends this process; process 0 first ends the others."""
        if self._ending.acquire(blocking=False):
            self._end_others(text, code)
            say(f"error: {text}")
            _exit(code)

    def _end_others(self, text: str, code: int) -> None:
        self.send({"stopped": text, "code": code})
        for connection in list(self._sockets.values()):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 2
        for thread in self._threads:  # each runs until its peer has read this and closed
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _meet(self, connection: socket.socket) -> None:
        """On process 0: the first line says who connects, another process or its jax."""
        with contextlib.suppress(OSError, ValueError):  # neither: a port scan
            connection.settimeout(20)
            first = _first_line(connection)
            if first == FOR_JAX:
                connection.settimeout(None)
                _relay(connection, _reach_service(self.jax_port), hold=False)
                return
            match json.loads(first):
                case {"process_id": int(process), "num_processes": int(count)}:
                    self._welcome(connection, process, count)

    def _welcome(self, connection: socket.socket, process: int, count: int) -> None:
        with self._sending:
            complete = len(self._sockets) == self.count - 1
            if count != self.count:
                refused = f"--num_processes={count} on process {process}, {self.count} on process 0"
            elif process in self._sockets:
                refused = f"two processes have --process_id={process}"
            else:
                connection.sendall(_line(WELCOME))
                self._add(process, connection)
                return
        refused += ": use the same number for all, and a different id for each"
        connection.sendall(_line({"refused": refused}))
        if not complete:
            self._inbox.put((process, {"refused": refused}))

    def _add(self, process: int, connection: socket.socket) -> None:
        connection.settimeout(None)
        _keep_alive(connection)
        self._sockets[process] = connection
        self._threads.append(_thread(self._take, process, connection))

    def _take(self, process: int, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):  # killed in the middle of a line
            for line in connection.makefile("rb"):
                message = json.loads(line)
                if "stopped" in message:
                    self._end(message["stopped"], message["code"])
                    return
                if "finished" in message:
                    self._finished.add(process)
                self._inbox.put((process, message))
        if process not in self._finished:
            gone = f"process {process} of {self.count} is gone (killed, crashed or cut off)"
            resume = "saved checkpoints are intact; rerun the same command on all to resume"
            self._end(f"{gone}: {resume}", 1)


class _Waiting:
    """Prints now and then what this process waits for; raises BadInput when it takes too long."""

    def __init__(self, limit_s: float):
        self._limit_s, self._started, self._say_at_s = limit_s, time.monotonic(), 5.0

    def check(self, awaited: str) -> None:
        waited_s = time.monotonic() - self._started
        if waited_s > self._limit_s:
            raise BadInput(
                f"waited {waited_s:.0f} s for {awaited}: start every process with the same "
                "--coordinator and --num_processes, and let all hosts reach that port"
            )
        if waited_s > self._say_at_s:
            console.print(f"waiting for {awaited} ({waited_s:.0f} s)")
            self._say_at_s = waited_s + 30


def _place(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, int, int, int] | None:
    """Host and port of process 0, number of processes, own id; None for a single process."""
    if coordinator == "auto":
        if (num_processes, process_id) != (None, None):
            raise BadInput("--coordinator=auto goes without --num_processes and --process_id")
        coordinator, num_processes, process_id = _of_cluster()
    flags = {
        "--coordinator=HOST:PORT": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return None
    if missing:
        together = f"{', '.join(flags)} go together (or --coordinator=auto alone)"
        raise BadInput(f"without {' and '.join(missing)}: {together}")
    if num_processes < 1:
        raise BadInput(f"--num_processes={num_processes}: at least 1")
    if not 0 <= process_id < num_processes:
        ids = f"of {num_processes} processes the last one is {num_processes - 1}"
        raise BadInput(f"--process_id={process_id}: the first process is 0, and {ids}")
    host, _, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # IPv6
    if not host or not (port.isascii() and port.isdecimal()) or not 1 <= int(port) <= 65535:
        raise BadInput(f"--coordinator={coordinator}: write HOST:PORT with a port from 1 to 65535")
    try:
        socket.getaddrinfo(host, int(port))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"--coordinator={coordinator}: no address for {host} ({reason})") from None
    return host, int(port), num_processes, process_id


def _of_cluster() -> tuple[str, int, int]:
    """Coordinator, number of processes and own id, from the environment of a cluster job."""
    from jax._src.clusters import ClusterEnv

    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    found = ClusterEnv.auto_detect_unset_distributed_params(address, *[None] * 4, CONNECT_S)[:3]
    if None in found:
        raise BadInput(
            "--coordinator=auto: this is not a Slurm or Open MPI job: use srun or mpirun, or "
            "give --coordinator=HOST:PORT, --num_processes and --process_id"
        )
    return found


def _start_jax(links: Links) -> None:
    """jax.distributed.initialize, through the port of `links`."""
    import jax

    port = links.jax_port
    if links.process_id:
        server = socket.create_server(("127.0.0.1", 0))
        port = server.getsockname()[1]
        _thread(_accept, server, lambda connection: _relay_to_process_0(connection, links))
    # With a proxy in the environment gRPC would ask it for the loopback address, and hang
    os.environ["no_grpc_proxy"] = "127.0.0.1"  # noqa: SIM112
    jax.config.update("jax_check_proxy_envs", False)
    try:
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            links.count,
            links.process_id,
            initialization_timeout=CONNECT_S,
            heartbeat_timeout_seconds=JAX_HEARTBEAT_S,
            coordinator_bind_address=f"127.0.0.1:{links.jax_port}",
        )
    except RuntimeError as error:
        raise BadInput(f"jax.distributed does not start: {error}") from error


def _accept(server: socket.socket, take: Callable[[socket.socket], None]) -> None:
    while True:
        _thread(take, server.accept()[0])


def _reach_service(port: int) -> socket.socket:
    """A connection to jax's coordination service in this process, which may start later."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port))
        time.sleep(0.1)


def _relay_to_process_0(near: socket.socket, links: Links) -> None:
    far = socket.create_connection((links.host, links.port))
    far.sendall(FOR_JAX)
    _keep_alive(far)
    _relay(near, far, hold=True)


def _relay(near: socket.socket, far: socket.socket, hold: bool) -> None:
    """Passes bytes both ways. `hold`: `near` stays open when `far` ends, or its jax would abort."""
    _thread(_pump, near, far, True)
    _pump(far, near, not hold)


def _pump(source: socket.socket, sink: socket.socket, pass_end: bool) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    if pass_end:
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def _keep_alive(connection: socket.socket) -> None:
    """Makes the kernel close the connection when the peer has not answered for a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def _first_line(connection: socket.socket) -> bytes:
    """The first line, without reading beyond it."""
    return connection.makefile("rb", buffering=0).readline(1000)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _thread(target: Callable, *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _installed() -> dict[str, Any]:
    """Code, versions and compiler flags: if they differ, so do programs, and collectives hang."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "xla_dump" not in flag]
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    versions["python"] = platform.python_version()
    code = {}
    for path in PACKAGE.rglob("*.py"):
        code[str(path.relative_to(PACKAGE.parent))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"versions": versions, "XLA_FLAGS": " ".join(sorted(flags)), "code": code}
