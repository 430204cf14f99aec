"""How processes find each other: flags, variables, a scheduler; and what is said if not."""

import dataclasses
import os
import re
import signal
import socket

import jax
import pytest
from jax._src.distributed import State

from bn_jax.train.launch import ALONE, Launch, join

VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:7788",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


@pytest.fixture
def calls(monkeypatch):
    """What jax.distributed.initialize is asked for."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    return calls


def test_alone():
    assert ALONE.with_environment({}) == ALONE
    assert ALONE.is_alone
    for given in (
        {"coordinator": "a:1"},
        {"processes": 2},
        {"process_id": 0},
        {"distributed": True},
    ):
        assert not Launch(**given).is_alone


def test_variables_give_what_flags_do_not():
    assert ALONE.with_environment(VARIABLES).given == ("10.0.0.1:7788", 4, 3)
    flags = Launch(coordinator="[::1]:1", process_id=0)
    assert flags.with_environment(VARIABLES).given == ("[::1]:1", 4, 0)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two: must be an integer of at least 0"),
        ({"JAX_PROCESS_ID": "²"}, "JAX_PROCESS_ID=²: must be an integer of at least 0"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1: must be an integer of at least 0"),
        ({"JAX_PROCESS_ID": "4"}, "--process-id 4: must be from 0 to 3, one for each process"),
        ({"JAX_NUM_PROCESSES": "0"}, "--processes 0: must be a positive integer"),
        ({"JAX_COORDINATOR_ADDRESS": "here"}, "--coordinator 'here': must be HOST:PORT, e.g. "),
    ],
)
def test_a_variable_that_makes_no_sense(variables, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        ALONE.with_environment(VARIABLES | variables)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "here"}, "--coordinator 'here': must be HOST:PORT"),
        ({"coordinator": ":7788"}, "--coordinator ':7788': must be HOST:PORT"),
        ({"coordinator": "a:\u0667"}, "--coordinator 'a:\u0667': must be HOST:PORT"),
        ({"coordinator": "a:7²"}, "--coordinator 'a:7²': must be HOST:PORT"),
        ({"coordinator": "a:65536"}, "--coordinator 'a:65536': must be HOST:PORT"),
        ({"processes": 0}, "--processes 0: must be a positive integer"),
        ({"process_id": -1}, "--process-id -1: must be an integer of at least 0"),
        ({"process_id": 2, "processes": 2}, "--process-id 2: must be from 0 to 1, one"),
    ],
)
def test_a_flag_that_makes_no_sense(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Launch(**fields).with_environment({})


@pytest.mark.usefixtures("heeded")
def test_what_jax_is_asked(calls):
    given = Launch(coordinator="127.0.0.1:1", processes=2, process_id=1)
    join(given)
    join(dataclasses.replace(given, distributed=True))
    (a, by_hand), (b, by_scheduler) = calls
    assert a == b == ("127.0.0.1:1", 2, 1)
    assert by_hand["cluster_detection_method"] == "deactivate"
    assert by_scheduler["cluster_detection_method"] is None
    assert by_hand["heartbeat_timeout_seconds"] == 30
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"processes": 2}, "coordinator_address should be defined."),
        ({"coordinator": "127.0.0.1:1", "process_id": 1}, "Number of processes must be defined."),
        ({"coordinator": "127.0.0.1:1", "processes": 2}, "The process id of the current process"),
        ({"processes": 2, "distributed": True}, "coordinator_address should be defined."),
    ],
)
def test_what_is_missing(fields, reason, monkeypatch):
    """In JAX's words, which come before anything is started; and what to do."""
    # Without the check that JAX is not in use yet, which it is here.
    monkeypatch.setattr(jax.distributed, "initialize", State().initialize)
    message = rf"^the processes of this run cannot meet \({reason}.*\); start each with its own"
    with pytest.raises(ValueError, match=rf"{message}.*; with a scheduler, --distributed"):
        join(Launch(**fields))


def test_no_place_to_meet(monkeypatch):
    def initialize(*_, **__):
        raise RuntimeError("UNKNOWN: port taken\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    message = r"^the processes of this run cannot meet \(UNKNOWN: port taken\); start each"
    with pytest.raises(ValueError, match=message):
        join(Launch(coordinator="10.0.0.1:1", processes=2, process_id=1))


def test_a_port_that_is_taken(calls):
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        message = f"--coordinator {address}: process 0 cannot listen there"
        with pytest.raises(ValueError, match=f"^{re.escape(message)} .*; choose a port"):
            join(Launch(coordinator=address, processes=2, process_id=0))
        join(Launch(coordinator=address, processes=2, process_id=1))
    assert len(calls) == 1


def test_a_host_that_nobody_knows(calls):
    """At once, and not after five minutes of silence."""
    for address in ("host.invalid:1", "a..b:1"):
        message = f"--coordinator {address}: the host is not known here"
        with pytest.raises(
            ValueError, match=f"^{re.escape(message)} .*; give a name or an address"
        ):
            join(Launch(coordinator=address, processes=2, process_id=1))
    assert calls == []


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost", "0.0.0.0", "[::]"])
def test_an_address_of_this_machine_is_open_to_this_machine(host, calls):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"{host}:{free.getsockname()[1]}"
    join(Launch(coordinator=address, processes=2, process_id=0))
    bound = None if host in ("0.0.0.0", "[::]") else address
    assert calls[0][1]["coordinator_bind_address"] == bound


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX locks")
def test_one_process_has_an_id_on_a_machine(tmp_path, monkeypatch):
    """A second one would end the run of the first."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = Launch(coordinator="127.0.0.1:1", processes=3, process_id=1)
    message = "--process-id 1: another process here has it in the run at 127.0.0.1:1; give each"
    with mine.claimed():
        with pytest.raises(BlockingIOError, match=f"^{message}"), mine.claimed():
            raise AssertionError("both are in")
        with dataclasses.replace(mine, process_id=2).claimed():
            pass
        with dataclasses.replace(mine, coordinator="127.0.0.1:2").claimed():
            pass
    with mine.claimed():  # it is free again
        pass
