"""Ends the whole job when one of its processes dies, hangs or is cut off, and says which one and why.

A daemon thread in every process sends a line a second to the main process, the hub, and gets one back:

- a connection that closes without a farewell: that process died; known at once;
- no line for `DEAD_SECONDS`: that process is frozen, or its host is cut off; each side notices it of the other;
- nobody anywhere in its code for `hang_seconds`: the job hangs; the process that is behind the others is named;
- a process that leaves with an error of its own: the others, who would wait for it for ever, end too.

The main process prints the cause and tells it to all, and they end with `Exit.LOST`; who has lost the main process
itself says so. Time is counted in own beats: a job that was suspended as a whole and goes on is not taken for dead.
The training thread only sets an attribute (`at`). Standard library only.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import os
import resource
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from data_pipeline.errors import UserError
from trainer.exits import Exit, explained

if TYPE_CHECKING:
    from trainer.processes import Processes

BEAT_SECONDS = 1.0
DEAD_SECONDS = 20.0  # without a line: frozen or cut off
LEAVE_SECONDS = 3.0  # for the others to leave by themselves after one left with an error, and for farewells
_MAX_LINE = 65536  # bytes
_REMEDY = "This job ends; the same command continues."


@dataclass(frozen=True)
class Member:
    """One process, as the others know it."""

    rank: int
    host: str
    pid: int
    born: str  # its start in clock ticks since boot: with the pid, a name that is not given twice

    @classmethod
    def me(cls, rank: int) -> Member:
        return cls(rank, socket.gethostname(), os.getpid(), _born(os.getpid()))

    def __str__(self) -> str:
        return f"process {self.rank} (pid {self.pid} on {self.host})"

    def kill_if_here(self) -> None:
        """End it where it runs on this machine: frozen, it would keep its device."""
        if self.host == socket.gethostname() and self.born and _born(self.pid) == self.born:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Verdict:
    """Why the job ends."""

    cause: str
    code: int = Exit.LOST
    frozen: Member | None = None  # does not answer, so it cannot end itself
    behind: tuple[int, ...] = ()  # ranks to show where they stand

    def __str__(self) -> str:
        cause = self.cause.rstrip(".") + "."
        return f"{cause} {_REMEDY}" if self.code == Exit.LOST else cause

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Verdict:
        frozen = fields["frozen"]
        return cls(fields["cause"], fields["code"], Member(**frozen) if frozen else None, tuple(fields["behind"]))


@dataclass
class Place:
    """Where a process is: the value that `Watchdog.at` last set, and for how many beats it has been that one."""

    nimg: int = 0
    phase: str = "setup"
    beats: int = 0


@dataclass
class Entry:
    """What the hub knows of one process."""

    member: Member | None = None  # None until its first line
    place: Place = field(default_factory=Place)
    silent: int = 0  # beats since its last line
    error: tuple[str, int] | None = None  # it left with this message and exit code, ...
    gone: int = 0  # ... so many beats ago
    left: bool = False
    closed: bool = False  # without a farewell


class Roll:
    """The hub's list of all processes, and its judgement."""

    def __init__(self, world_size: int, *, hang_seconds: float, dead_seconds: float) -> None:
        self.entries = [Entry() for _ in range(world_size)]
        self._hang_beats, self._dead_beats = hang_seconds / BEAT_SECONDS, dead_seconds / BEAT_SECONDS
        self._leave_beats = LEAVE_SECONDS / BEAT_SECONDS

    def beat(self) -> None:
        """A second has passed; the main process, entry 0, needs no line."""
        for entry in self.entries[1:]:
            entry.silent += 1
        for entry in self.entries:
            entry.gone += entry.error is not None

    def others_here(self, but: Member | None = None) -> bool:
        return not all(entry.left or entry.closed or (but and entry.member == but) for entry in self.entries[1:])

    def judge(self) -> Verdict | None:
        for rank, entry in enumerate(self.entries):
            name = entry.member or f"process {rank}"
            if entry.closed:
                return Verdict(f"{name} died, last seen {_at(entry.place)}")
            if entry.error is not None and entry.gone > self._leave_beats:
                return Verdict(f"{name} failed: {entry.error[0]}", entry.error[1])
            if not entry.left and entry.silent > self._dead_beats:
                cause = f"{name} has not answered for {entry.silent * BEAT_SECONDS:.0f} s"
                cause += f", last seen {_at(entry.place)}: it is frozen, or its host is cut off"
                return Verdict(cause, frozen=entry.member)
        return self._judge_progress()

    def _judge_progress(self) -> Verdict | None:
        there = {rank: entry for rank, entry in enumerate(self.entries) if not entry.left}
        if not self._hang_beats or not there:
            return None
        beats = min(entry.place.beats for entry in there.values())
        if beats < self._hang_beats:
            return None
        behind = _behind({rank: entry.place for rank, entry in there.items()})
        names = ", ".join(f"{self.entries[rank].member} {_at(self.entries[rank].place)}" for rank in behind[:4])
        more = f" and {len(behind) - 4} more" if len(behind) > 4 else ""
        everywhere = Counter(_at(entry.place) for entry in there.values())
        where = "; ".join(f"{number} {place}" for place, number in everywhere.items())
        cause = f"no process has moved on for {beats * BEAT_SECONDS:.0f} s (engine.hang_seconds)"
        cause += f"; behind is {names}{more}" if behind else f"; none is behind the others: {where}"
        return Verdict(cause, behind=behind or (min(there),))


def _behind(places: dict[int, Place]) -> tuple[int, ...]:
    """The ranks that the others wait for: fewest images, else another phase than waiting in a step; () if all alike."""
    lowest = min(place.nimg for place in places.values())
    for late in (
        [rank for rank, place in places.items() if place.nimg == lowest],
        [rank for rank, place in places.items() if place.phase != "compute"],
    ):
        if 0 < len(late) < len(places):
            return tuple(late)
    return ()


def _at(place: Place) -> str:
    return f"in {place.phase!r} at {place.nimg:,} images"


class Watchdog:
    """One process's part in it. As a context manager it takes leave of the others, with the error if there is one."""

    def __init__(self, member: Member, role: Hub | Client) -> None:
        self.member, self._role = member, role
        self._role.start()

    @classmethod
    def start(cls, processes: Processes, *, hang_seconds: float) -> Watchdog:
        """Called by all processes together. Raises UserError where the main process cannot be reached."""
        member = Member.me(processes.rank)
        server = _listen() if processes.is_main and processes.world_size > 1 else None
        token = secrets.token_hex(16)
        port = server.getsockname()[1] if server else 0
        main, port, token = processes.from_main(lambda: (asdict(member), port, token))
        if processes.is_main:
            roll = Roll(processes.world_size, hang_seconds=hang_seconds, dead_seconds=DEAD_SECONDS)
            return cls(member, Hub(member, roll, server, token))
        return cls(member, Client(member, Member(**main), _connect(port), token, dead_seconds=DEAD_SECONDS))

    def at(self, nimg: int, phase: str) -> None:
        """This process has seen `nimg` images and begins "setup", "data", "compute" or "save"."""
        self._role.place = Place(nimg, phase)

    def stop(self, error: BaseException | None = None) -> None:
        """Take leave. Where `error` only says that a peer is gone, wait for the cause instead, which ends us."""
        if error is not None and lost_a_peer(error):
            time.sleep(DEAD_SECONDS + 2 * LEAVE_SECONDS)
        self._role.leave(_describe(error))

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop(error)


def lost_a_peer(error: BaseException) -> bool:
    """A collective operation broke because another process ended: the words of gloo and NCCL."""
    if not isinstance(error, RuntimeError):  # such as the OSError of a disk, or of an output that nobody reads
        return False
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited",
             "No route to host", "Network is unreachable", "Connection timed out")  # fmt: skip
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and any(word in str(error) for word in words)


def _describe(error: BaseException | None) -> tuple[str, int] | None:
    """Message and exit code of an error for the others. A mistake that only one process met is all the job's."""
    if error is None:
        return None
    known = explained(error)
    if known is not None:
        return str(known), known.exit_code
    return f"{type(error).__name__}: {error}"[:2000], Exit.LOST


class _Role(threading.Thread):
    """What hub and client have in common: the place of the own process, and how to end it."""

    def __init__(self, member: Member) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.member = member
        self.place = Place()

    def _shows(self, verdict: Verdict) -> None:
        if self.member.rank in verdict.behind:
            _say(f"process {self.member.rank} stands here:\n{_main_stack()}")
        if verdict.frozen is not None:
            verdict.frozen.kill_if_here()


class Hub(_Role):
    """The main process's side: hears everybody, judges, tells."""

    def __init__(self, member: Member, roll: Roll, server: socket.socket | None, token: str) -> None:
        super().__init__(member)
        self._roll, self._token = roll, token
        roll.entries[0].member = member
        self._selector = selectors.DefaultSelector()
        self._server = server
        self._last_word: dict[str, Any] | None = None  # told to all, also to who comes late
        self._lines: dict[socket.socket, _Lines] = {}
        self._ranks: dict[socket.socket, int] = {}  # of those who gave the token
        self._leaving, self._over = threading.Event(), threading.Event()
        self._to_judge = False  # not after every line: with n processes that is n looks at n entries a second
        if server is not None:
            _allow_open_files(len(roll.entries) + 1024)
            server.setblocking(False)
            self._selector.register(server, selectors.EVENT_READ)

    def leave(self, error: tuple[str, int] | None) -> None:
        """Stay until the others have left too, or had the time to."""
        entry = self._roll.entries[0]
        entry.left, entry.error = True, error
        self._leaving.set()
        if error is None:
            self._tell_all({"bye": None})
        if self._roll.others_here():
            self._over.wait(4 * LEAVE_SECONDS)

    def run(self) -> None:
        next_beat = time.monotonic() + BEAT_SECONDS
        while not self._leaving.is_set() or self._roll.others_here():
            self._serve(max(0.0, next_beat - time.monotonic()))
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT_SECONDS
                self._beat()
            verdict = self._roll.judge() if self._to_judge else None
            self._to_judge = False
            if verdict is not None:
                self._end(verdict)
                break
        self._over.set()

    def _beat(self) -> None:
        self.place.beats += 1
        self._roll.entries[0].place = self.place
        self._roll.beat()
        self._to_judge = True

    def _serve(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._server:
                self._accept()
            else:
                self._read(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        assert self._server is not None
        with contextlib.suppress(OSError):
            connection, _ = self._server.accept()
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ)
            self._lines[connection] = _Lines()

    def _read(self, connection: socket.socket) -> None:
        try:
            for message in self._lines[connection].feed(connection.recv(_MAX_LINE)):
                self._hear(connection, message)
        except BlockingIOError:
            return
        except (OSError, ValueError, KeyError, TypeError):  # closed; or a stranger who speaks something else
            self._close(connection)

    def _hear(self, connection: socket.socket, message: dict[str, Any]) -> None:
        rank = self._ranks.get(connection)
        if rank is None:
            if not hmac.compare_digest(str(message["token"]), self._token):
                raise ValueError("a stranger")
            member = Member(**message["member"])
            self._ranks[connection] = member.rank
            self._roll.entries[member.rank].member = member
            if self._last_word is not None:
                _send(connection, self._last_word)
            return
        entry = self._roll.entries[rank]
        if "bye" in message:
            entry.left = True
            entry.error = tuple(message["bye"]) if message["bye"] else None
            raise ConnectionError("left")  # to be closed: what it sends after its farewell does not count
        entry.place, entry.silent = Place(**message["place"]), 0
        _send(connection, {})

    def _close(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        del self._lines[connection]
        rank = self._ranks.pop(connection, None)
        if rank is None or self._roll.entries[rank].left:
            return
        if self._leaving.is_set():  # our own farewell, or the verdict, was the last word
            self._roll.entries[rank].left = True
        else:
            self._roll.entries[rank].closed = True
            self._to_judge = True

    def _tell_all(self, message: dict[str, Any]) -> None:
        self._last_word = message
        for connection in list(self._ranks):
            _send(connection, message)

    def _end(self, verdict: Verdict) -> None:
        """Tell all, print the cause, end. What ends us already (`leave`) prints its own message and code."""
        self._tell_all({"verdict": asdict(verdict)})
        if not self._leaving.is_set():
            _end_without_fail(verdict.code)
            _say(f"error: {verdict}")
        self._shows(verdict)
        self._leaving.set()
        deadline = time.monotonic() + LEAVE_SECONDS
        while self._roll.others_here(verdict.frozen) and time.monotonic() < deadline:
            self._serve(0.1)  # until all have heard it: a close with unread lines would take it back
        if not self._roll.entries[0].left:
            _exit(verdict.code)


class Client(_Role):
    """Any other process's side: reports, and hears the verdict or the hub's silence."""

    def __init__(
        self, member: Member, main: Member, connection: socket.socket, token: str, *, dead_seconds: float
    ) -> None:
        super().__init__(member)
        self._main, self._connection, self._dead_beats = main, connection, dead_seconds / BEAT_SECONDS
        self._lines, self._sending = _Lines(), threading.Lock()
        self._leaving = False
        self._send({"token": token, "member": asdict(member)})

    def leave(self, error: tuple[str, int] | None) -> None:
        """Say goodbye and stay until the hub has heard it."""
        self._leaving = True
        self._send({"bye": error})
        self.join(LEAVE_SECONDS)

    def run(self) -> None:
        silent = 0
        next_beat = time.monotonic()
        while silent <= self._dead_beats:
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT_SECONDS
                self.place.beats += 1
                silent += 1
                self._connection.settimeout(BEAT_SECONDS)
                self._send({"place": asdict(self.place)})
            self._connection.settimeout(max(0.01, next_beat - time.monotonic()))
            try:
                data = self._connection.recv(_MAX_LINE)
                messages = list(self._lines.feed(data))
            except TimeoutError:
                continue
            except OSError:
                break
            silent = 0
            for message in messages:
                if "verdict" in message:
                    self._obey(Verdict.parse(message["verdict"]))
                elif "bye" in message:
                    self._leaving = True  # an orderly end: nobody to report to any more
                    self._connection.close()
                    return
        if not self._leaving:
            self._lost_the_main_process(silent)

    def _send(self, message: dict[str, Any]) -> None:
        with self._sending:
            _send(self._connection, message)

    def _obey(self, verdict: Verdict) -> None:
        if not self._leaving:
            _end_without_fail(verdict.code)
        if self.member.host != self._main.host and os.environ.get("LOCAL_RANK", "0") == "0":
            _say(f"error: {verdict}")  # once a host: the main one printed it on its own
        self._shows(verdict)
        if not self._leaving:
            _exit(verdict.code)

    def _lost_the_main_process(self, silent: int) -> NoReturn:
        _end_without_fail(Exit.LOST)
        frozen = silent > self._dead_beats
        how = f"it has not answered for {silent * BEAT_SECONDS:.0f} s: frozen, or cut off" if frozen else "it died"
        _say(f"error: lost the main process, {self._main}: {how}. {_REMEDY}")
        if frozen:
            self._main.kill_if_here()
        _exit(Exit.LOST)


class _Lines:
    """JSON objects from a stream, one a line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Raises ConnectionError at the stream's end, ValueError for what is no such line."""
        if not data:
            raise ConnectionError("closed")
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE:
            raise ValueError("a line without an end")
        for line in lines:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError("not an object")
            yield message


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    """One line; who cannot take it is dead or frozen, which the silence shows."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _listen() -> socket.socket:
    """A port at the address that MASTER_ADDR leads to.

    At all addresses where that name leads elsewhere from the other hosts: it is a loopback here (Debian gives a
    machine's own name one), or no address of this machine's (behind a translation).
    """
    name = os.environ["MASTER_ADDR"]
    family, _, _, _, place = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0]
    address = str(place[0])
    only_here = ipaddress.ip_address(address.partition("%")[0]).is_loopback and name not in (address, "localhost")
    if not only_here:
        with contextlib.suppress(OSError):
            return socket.create_server((address, 0), family=family, backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _allow_open_files(number: int) -> None:
    """The usual limit, 1,024, is too low for the connections of a thousand processes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number:
        wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _connect(port: int) -> socket.socket:
    name = os.environ["MASTER_ADDR"]
    try:
        return socket.create_connection((name, port), timeout=DEAD_SECONDS)
    except OSError as error:
        raise UserError(
            f"the main process cannot be reached at {name}, port {port} ({error}). Every process must be able to open "
            "connections to any port of MASTER_ADDR: see the firewall."
        ) from None


def _born(pid: int) -> str:
    """The start of a process in clock ticks since boot; "" where there is none or the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _main_stack() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)).rstrip() if frame is not None else "(unknown)"


def _say(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)


def _end_without_fail(code: int) -> None:
    """End soon, even where printing the cause blocks for ever: the terminal may be what the job hangs at."""
    timer = threading.Timer(2 * LEAVE_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    os._exit(code)
