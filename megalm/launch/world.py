"""The processes of a run: they agree before anything is made, and when one fails all end, and say which.

    prepare on each rank -> facts to the store -> rank 0 compares -> process group -> work

    failure:   who fails leaves a word in the store -> every rank's watching thread answers -> who does not answer is
               named; if all do, the word's writer is -> all exit

Nothing is sent while all is well. A collective that fails or times out does not tell which rank is to blame, since a
dead or stopped rank breaks the collectives of many; silence in the roll call does. The thread answers while the main
thread is stuck in a collective, and ends a process that stays so.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import Store

from megalm.config.sections import Run
from megalm.errors import RunFailed, UserError
from megalm.launch.ranks import Process
from megalm.parallel.backend import backend

T = TypeVar("T")
WORD, HERE, LEFT = "megalm/failed", "megalm/here", "megalm/left"
GONE = "rank 0, or the launcher, which kept the ranks' store, no longer answers"
TIMEOUT: float = Run.model_fields["timeout"].default
TRY = 5.0  # seconds of each attempt to reach the store, and of each look at it
POLL, GRACE = 1.0, 6.0  # seconds between looks at the store; seconds that the others have to answer


class World:
    """The run's processes, seen from `process`. With one process nothing is sent and no thread is started."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self._store: Store | None = None
        self._done = threading.Event()
        self._answered = False
        """Whether this rank has answered a roll call: who holds it will say what happened."""

    def agree(
        self,
        prepare: Callable[[], T],
        facts: Callable[[T], Mapping[str, str]],
        timeout: Callable[[T], float] = lambda _: TIMEOUT,
        asked: Callable[[], bool] = lambda: False,
    ) -> T:
        """What `prepare` gives, if it gives the same `facts` on every rank. What it raises on any rank ends all: rank 0
        raises a UserError, the others a RunFailed without words, or what is no UserError where it began. Waits for the
        others for at most `timeout` seconds, and not once it is `asked` to stop."""
        if self.process.size == 1:
            return prepare()
        prepared, found, mistake, failure, limit = None, {}, "", None, TIMEOUT
        try:
            prepared = prepare()
            found, limit = dict(facts(prepared)), timeout(prepared)
        except (UserError, OSError) as error:
            mistake = str(error)
        except Exception as error:
            mistake, failure = f"{type(error).__name__}: {error}", error
        self._store = self._connect(limit, asked)
        word = json.dumps({"host": socket.gethostname(), "mistake": mistake, "facts": found})
        self._store.set(f"megalm/start/{self.process.rank}", word)
        if failure is not None and self.process.rank:
            raise failure
        verdict = self._verdict(limit, asked)
        if failure is not None:
            raise failure
        if verdict:
            self._leave(self._store, self.process.size)
            raise UserError(verdict) if self.process.rank == 0 else RunFailed("", 2)
        assert prepared is not None
        return prepared

    @contextmanager
    def joined(self, device: torch.device, timeout: float) -> Iterator[None]:
        """The default process group while inside. What any rank raises there ends all ranks."""
        if self._store is None:
            yield
            return
        rank, size = self.process.rank, self.process.size
        watch = threading.Thread(target=self._watch, args=(self._connect(timeout),), daemon=True)
        watch.start()
        try:
            limit = timedelta(seconds=timeout)
            # No `device_id`: with it NCCL runs all messages of a group one after the other, and a pipeline's receives
            # that are posted ahead would hold up its sends; without it each pair of ranks has its own order.
            where = own_address(self.process.address)
            dist.init_process_group(
                backend(device, where), store=self._store, rank=rank, world_size=size, timeout=limit
            )
            yield
            dist.barrier()  # a group that goes while a peer still uses it may end the process
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            with self._bounded():
                failure = self._failure(error)
            if failure is error:
                raise
            raise failure from error
        finally:
            self._done.set()
            watch.join(2 * POLL)  # it may be waiting for a store that will never answer
        dist.destroy_process_group()

    def _connect(self, timeout: float, asked: Callable[[], bool] = lambda: False) -> Store:
        process = self.process
        keeper = process.rank == 0 and not process.agent and self._store is None
        listening = _listen(process) if keeper else None
        deadline = time.monotonic() + timeout
        while True:
            try:
                store = dist.TCPStore(
                    process.address,
                    process.port,
                    is_master=keeper,
                    timeout=timedelta(seconds=min(TRY, timeout)),  # no signal is heard meanwhile
                    wait_for_workers=False,  # so that those who are missing can be named
                    master_listen_fd=listening.detach() if listening else None,
                )
            except dist.DistNetworkError as error:
                self._stop_if(asked())
                if not keeper and time.monotonic() < deadline:
                    continue
                where = f"{process.address}:{process.port}"
                raise RunFailed(f"rank {process.rank}: nobody answers at {where} within {timeout:.0f} s", 1) from error
            store.set_timeout(timedelta(seconds=timeout))
            return store

    def _stop_if(self, asked: bool) -> None:
        if asked:
            raise RunFailed(f"rank {self.process.rank}: asked to stop while it waited for the other ranks", 1)

    def _verdict(self, timeout: float, asked: Callable[[], bool]) -> str:
        """What rank 0 finds when it compares all ranks; empty if all are alike."""
        store, key = self._store, "megalm/verdict"
        assert store is not None

        def wait(keys: list[str], seconds: float) -> bool:
            deadline = time.monotonic() + seconds
            while (left := deadline - time.monotonic()) > 0:
                try:
                    store.wait(keys, timedelta(seconds=min(TRY, left)))  # no signal is heard meanwhile
                    return True
                except dist.DistStoreError:
                    self._stop_if(asked())
            return False

        if self.process.rank:
            with suppress(dist.DistNetworkError):
                if wait([key], timeout + GRACE):
                    return store.get(key).decode()
            raise RunFailed("", 1)
        names = [f"megalm/start/{rank}" for rank in range(self.process.size)]
        if wait(names, timeout):
            verdict = compare([json.loads(store.get(name)) for name in names])
        else:
            missing = ", ".join(str(rank) for rank, name in enumerate(names) if not store.check([name]))
            verdict = f"rank {missing} of {len(names)} did not start within {timeout:.0f} s: see what it says"
        store.set(key, verdict)
        return verdict

    def _leave(self, store: Store, expected: int) -> None:
        """Says that this rank has read all it needs. Who keeps the store stays until `expected` ranks have."""
        left = store.add(LEFT, 1)
        if self.process.rank == 0 and not self.process.agent:
            deadline = time.monotonic() + GRACE
            while left < expected and time.monotonic() < deadline:
                time.sleep(0.05)
                left = store.add(LEFT, 0)

    def _watch(self, store: Store) -> None:
        """Answers the roll call, and ends a process whose main thread stays in a collective after a failure."""
        while not self._done.wait(POLL):
            try:
                failed = store.check([WORD])
                if failed:
                    store.set(f"{HERE}/{self.process.rank}", "")
                    self._answered = True
            except RuntimeError:  # the store's process is gone
                failed = True
            if failed:
                break
        else:
            return
        if not self._done.wait(3 * GRACE):
            try:
                failure = self._judge(store)
            except RuntimeError:
                failure = self._unanswered()
            _end(failure)

    def _failure(self, error: BaseException) -> BaseException:
        """What this rank ends with after `error`: the error itself if it began here."""
        assert self._store is not None
        ours = isinstance(error, UserError)
        code = 2 if ours else 1
        text = " ".join(str(error).split()) or type(error).__name__
        word = json.dumps(
            {
                "rank": self.process.rank,
                "error": text if ours else f"{type(error).__name__}: {text}"[:500],
                "code": code,
            }
        )
        try:
            self._store.compare_set(WORD, "", word)
            self._store.set(f"{HERE}/{self.process.rank}", "")
            first = json.loads(self._store.get(WORD))["rank"]
            failure = self._judge(self._store)
        except RuntimeError:
            return self._unanswered()
        if ours:
            return error if self.process.rank == 0 else failure
        if first == self.process.rank and not _of_network(error):
            return error  # with its traceback
        return failure

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """Ends this process if it is inside for longer than a roll call takes: a question to a store whose process is
        stopped, or whose network is cut, is never answered, whatever the store's timeout."""

        def end() -> None:
            _end(self._unanswered())

        timer = threading.Timer(5 * GRACE, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _unanswered(self) -> RunFailed:
        """The store is gone. After a roll call its keeper has said why, and left without waiting for this rank, which
        was stuck in a collective."""
        return RunFailed("" if self._answered else f"rank {self.process.rank}: {GONE}", 1)

    def _judge(self, store: Store) -> RunFailed:
        """Calls the roll, and says on the lowest rank that answers who ended the run."""
        keys = [f"{HERE}/{rank}" for rank in range(self.process.size)]
        deadline = time.monotonic() + GRACE
        while not (everyone := store.check(keys)) and time.monotonic() < deadline:
            time.sleep(0.1)
        silent = [] if everyone else [rank for rank, key in enumerate(keys) if not store.check([key])]
        word = json.loads(store.get(WORD))
        speaker = min(rank for rank in range(self.process.size) if rank not in silent)
        names = [f"{rank} ({json.loads(store.get(f'megalm/start/{rank}'))['host']})" for rank in silent]
        self._leave(store, self.process.size - len(silent))
        if self.process.rank != speaker:
            return RunFailed("", 1 if silent else word["code"])
        if not silent:
            return RunFailed(f"rank {word['rank']}: {word['error']}", word["code"])
        return RunFailed(
            f"rank {', '.join(names)} no longer answers: it was killed, stopped or cut off; rank {word['rank']} "
            f"noticed: {word['error']}",
            1,
        )


def _listen(process: Process) -> socket.socket:
    """Where the store will listen: at the ranks' meeting place alone, not on every network of this machine."""
    try:
        found = socket.getaddrinfo(process.address, process.port, type=socket.SOCK_STREAM)
        family, _, _, _, where = found[0]
    except OSError as error:
        raise UserError(f"MASTER_ADDR={process.address}: {error.strerror or error}: name rank 0's host") from error
    if _only_a_loopback(process.address, str(where[0])):
        raise UserError(
            f"MASTER_ADDR={process.address}: other hosts would not find rank 0, as its host's name leads to {where[0]} "
            "there: set MASTER_ADDR to its address on the network of the ranks, or to localhost on one host"
        )
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(where)
        listening.listen(min(process.size + 64, 4096))
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"MASTER_ADDR={process.address}: is no address of rank 0's host: correct it") from error
        raise UserError(f"MASTER_PORT={process.port}: cannot listen there: choose another one") from error
    return listening


def own_address(peer: str) -> str:
    """This machine's address on the way to `peer`; empty if there is none, or if its name leads to a loopback, where
    other hosts would not find it."""
    try:
        family, _, _, _, where = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as way:  # nothing is sent
            way.connect(where)
            own = str(way.getsockname()[0])
    except OSError:
        return ""
    return "" if _only_a_loopback(peer, own) else own


def _only_a_loopback(name: str, address: str) -> bool:
    """Whether a host's name leads to itself alone, as Debian's /etc/hosts has it."""
    literal = name.replace(".", "").isdigit() or ":" in name or name == "localhost"
    return not literal and ipaddress.ip_address(address).is_loopback


def _end(failure: RunFailed) -> NoReturn:
    """Ends this process from a thread beside the main one, which is stuck."""
    if str(failure):
        print("megalm: error:", failure, file=sys.stderr, flush=True)
    os._exit(failure.code)


def _of_network(error: BaseException | None) -> bool:
    """Whether a collective failed, which says nothing of this rank."""
    if error is None:
        return False
    from_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return isinstance(error, dist.DistError) or from_gloo or _of_network(error.__cause__)


def compare(starts: list[dict[str, Any]]) -> str:
    """One line on the first thing in which ranks differ, naming the odd ones; empty if all are alike."""
    mistakes = {rank: start["mistake"] for rank, start in enumerate(starts) if start["mistake"]}
    if mistakes:
        rank, mistake = min(mistakes.items())
        everyone = len(mistakes) == len(starts)
        return mistake if everyone else f"rank {rank} ({starts[rank]['host']}): {mistake}"
    for name in starts[0]["facts"]:
        values = [start["facts"].get(name, "") for start in starts]
        common, count = Counter(values).most_common(1)[0]
        if count < len(values):
            rank = next(rank for rank, value in enumerate(values) if value != common)
            return (
                f"rank {rank} ({starts[rank]['host']}) has another {name} than {count} of {len(values)} ranks: "
                f"{_difference(values[rank], common)}: start all ranks alike"
            )
    return ""


def _difference(odd: str, common: str) -> str:
    """The first lines in which two texts differ."""
    for ours, theirs in zip(odd.splitlines(), common.splitlines(), strict=False):
        if ours != theirs:
            return f"{ours.strip()[:100]} instead of {theirs.strip()[:100]}"
    return "more or fewer lines"
