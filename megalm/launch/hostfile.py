"""Which hosts a run uses, and the variables that its ranks are given: DeepSpeed's files, by DeepSpeed's grammar.

    hostfile            node1 slots=8            name and processes, which are numbered 0 to 7; `#` begins a comment
    --include           node1@node2:0,2          these hosts, or these of their processes, alone
    --exclude           node2:1                  all others
    .deepspeed_env      NCCL_DEBUG=WARN          in the home directory, then in the working directory, whose lines win

DeepSpeed's launcher ends with a traceback on what is wrong in them, on blank lines of `.deepspeed_env` too; here each
mistake is one line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from megalm.errors import UserError, nearest
from megalm.launch.ranks import LAUNCHED, STARTED

Hosts = dict[str, list[int]]
"""The numbers of the processes that each host runs, in the order of the ranks."""

HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PLACES = (*LAUNCHED, STARTED, "GROUP_RANK", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE")
"""What tells each rank who it is: not the same for all."""
MOST = 2**16  # processes of a host
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.IGNORECASE)


def read_hostfile(path: Path) -> Hosts:
    """All hosts that a hostfile names. Raises UserError with the number of the line that is wrong."""
    hosts: Hosts = {}
    for number, line in enumerate(_read(path).splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        name, where = words[0], f"{path}:{number}"
        if not HOST.fullmatch(name):
            raise UserError(f"{where}: {name!r} is no host name: letters, digits, '.', '_' and '-' make one")
        slots = re.fullmatch(r"slots=([0-9]+)", words[1]) if len(words) > 1 else None
        if slots is None:
            raise UserError(f"{where}: no number of processes after {name}: write `{name} slots=8`")
        if len(slots[1]) > 9 or int(slots[1]) > MOST:
            raise UserError(f"{where}: {name} has slots={slots[1][:20]}: a host runs at most {MOST} processes")
        if int(slots[1]) == 0:
            raise UserError(f"{where}: {name} has slots=0: give it a process or leave it out")
        if name in hosts:
            raise UserError(f"{where}: {name} is named twice: add up its slots in one line")
        hosts[name] = list(range(int(slots[1])))
    if not hosts:
        raise UserError(f"{path}: names no host: write a line such as `node1 slots=8` for each")
    return hosts


def selected(hosts: Hosts, include: str = "", exclude: str = "") -> Hosts:
    """The hosts and processes that are left; in the hostfile's order, as ranks are counted in it."""
    if include and exclude:
        raise UserError(f"--include={include}, --exclude={exclude}: only one of them can be given")
    named = _filter(hosts, "--include" if include else "--exclude", include or exclude)
    if include:
        chosen = {name: named[name] for name in hosts if name in named}
    else:
        chosen = {name: [slot for slot in slots if slot not in named.get(name, [])] for name, slots in hosts.items()}
    chosen = {name: slots for name, slots in chosen.items() if slots}
    if not chosen:
        raise UserError(f"--exclude={exclude}: leaves no host: exclude fewer")
    return chosen


def _filter(hosts: Hosts, option: str, text: str) -> Hosts:
    found: Hosts = {}
    for part in text.split("@") if text else []:
        name, colon, slots = part.partition(":")
        if name not in hosts:
            known = ", ".join(list(hosts)[:8])
            raise UserError(f"{option}={text}: the hostfile has no '{name}': it has {known}.{nearest(name, hosts)}")
        numbers = slots.split(",") if colon else [str(slot) for slot in hosts[name]]
        for number in numbers:
            if not (number.isascii() and number.isdigit()) or int(number) not in hosts[name]:
                raise UserError(f"{option}={text}: {name} has no process '{number}': 0 to {hosts[name][-1]}")
        found[name] = sorted({*found.get(name, []), *map(int, numbers)})
    return found


def read_variables(environment: Mapping[str, str], home: Path, here: Path) -> dict[str, str]:
    """What `.deepspeed_env`, or what DS_ENV_FILE names instead, sets for all ranks."""
    found: dict[str, str] = {}
    name = environment.get("DS_ENV_FILE") or ".deepspeed_env"
    for path in dict.fromkeys([home / name, here / name]):
        if path.is_file():
            found |= _variables(path)
    return found


def _variables(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(_read(path).splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not VARIABLE.fullmatch(key):  # what the line says may be a secret: it is not shown
            raise UserError(f"{path}:{number}: is no NAME=value: correct it, or begin it with # to make it a comment")
        if key in PLACES:
            raise UserError(
                f"{path}:{number}: {key} is not the same for all ranks, and the launcher sets it: remove it"
            )
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        if "\0" in value:
            raise UserError(f"{path}:{number}: the value of {key} has a NUL in it: remove it")
        found[key] = value
    secret = next((key for key in found if SECRET.search(key)), None)
    if secret and path.stat().st_mode & 0o077:
        raise UserError(f"{path}: holds {secret} and may be read by others: chmod 600 {path}")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: name the hostfile, with lines such as `node1 slots=8`") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory: name a file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no text: name a file with lines such as `node1 slots=8`") from None
