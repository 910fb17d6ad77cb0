from __future__ import annotations

import socket

import pytest

from megalm.errors import UserError
from megalm.launch.deepspeed import is_here, meeting_place
from megalm.launch.ranks import Process
from megalm.launch.world import _listen as listen
from megalm.launch.world import own_address


def test_ranks_meet_where_the_first_host_was_reached_and_never_at_a_loopback_of_its() -> None:
    second = ["10.0.0.1", "50022", "10.0.0.2", "22"]
    assert meeting_place({"a": ["10.0.0.9", "50021", "10.0.0.1", "22"], "b": second}) == "10.0.0.1"
    assert meeting_place({"a": ["127.0.0.1", "50021", "127.0.1.1", "22"], "b": second}) == "10.0.0.1"
    assert meeting_place({"a": ["::1", "50021", "::1", "22"], "b": second}) == "10.0.0.1"


def test_only_a_name_of_this_machine_is_here() -> None:
    assert is_here("localhost")
    assert is_here(socket.gethostname())
    assert is_here("127.0.0.1")
    assert not is_here("192.0.2.1")
    assert not is_here("no-such-host.invalid")


def test_the_store_listens_at_the_meeting_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with listen(Process(0, 0, 2, "127.0.0.1", 0)) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
        with pytest.raises(UserError, match="cannot listen there: choose another one"):
            listen(Process(0, 0, 2, "127.0.0.1", listening.getsockname()[1]))
    with pytest.raises(UserError, match=r"192\.0\.2\.1: is no address of rank 0's host"):
        listen(Process(0, 0, 2, "192.0.2.1", 0))
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]  # as Debian's /etc/hosts has it
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(UserError, match="node1: other hosts would not find rank 0, as its host's name leads to 127"):
        listen(Process(0, 0, 2, "node1", 0))
    assert own_address("node1") == ""  # so that gloo chooses for itself
    assert own_address("localhost").startswith("127.")
