"""Processes meet at a port, or each says who is missing."""

import concurrent.futures
import json
import socket
import time

import pytest

from retrieval_aug.common import rendezvous
from retrieval_aug.common.errors import UserError


@pytest.fixture
def address():
  """Where nothing listens."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  return f"127.0.0.1:{port}"


def _one(address, index, count, timeout=10.0):
  """None when process `index` has met the others, or the error's text."""
  try:
    rendezvous.meet(address, count, index, timeout)
  except UserError as error:
    return str(error)


def _meet(address, *who, timeout=10.0):
  """As `_one`, of all the (process, count) at once."""
  with concurrent.futures.ThreadPoolExecutor(len(who)) as pool:
    calls = [pool.submit(_one, address, *x, timeout) for x in who]
    return [call.result() for call in calls]


def _say(address, text):
  """A connection to process 0 on which `text` was said."""
  end = time.monotonic() + 10
  while True:
    try:
      connection = socket.create_connection(rendezvous.parse(address))
      break
    except OSError:
      assert time.monotonic() < end
      time.sleep(0.02)
  connection.sendall(text)
  return connection


def _hello(index, count):
  return json.dumps({"process": index, "processes": count}).encode() + b"\n"


def test_all_go_on_when_process_0_opens_the_port_again(address):
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    others = [pool.submit(_one, address, i, 3) for i in (2, 1)]
    first = pool.submit(_one, address, 0, 3)
    assert first.result() is None
    time.sleep(0.2)
    assert not any(other.done() for other in others)
    with socket.create_server(rendezvous.parse(address)):
      assert [other.result() for other in others] == [None, None]


def test_a_missing_process_is_named_to_all_in_time(address):
  start = time.monotonic()
  found = _meet(address, (0, 4), (2, 4), timeout=0.4)
  assert time.monotonic() - start < 2
  assert (
    found
    == [
      f"waited 0.4 s for processes 1, 3 (of 4) at {address}; look at the log "
      "there, and start all again."
    ]
    * 2
  )


def test_a_process_0_that_is_missing_is_named_with_its_address(address):
  assert _one(address, 1, 2, timeout=0.3) == (
    "process 1 (of 2) waited 0.3 s for process 0 at "
    f"--coordinator={address} (Connection refused); start process 0 with the "
    "same address, and look whether its machine lets that port through."
  )


def test_another_program_at_the_port_is_not_taken_for_process_0(address):
  with socket.create_server(rendezvous.parse(address)) as server:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      call = pool.submit(_one, address, 1, 2, 0.4)
      while not call.done():
        server.settimeout(0.1)
        try:
          with server.accept()[0] as connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        except TimeoutError:
          pass
      assert "(what answers is not a process 0 that starts)" in call.result()
    taken = _one(address, 0, 2)
    assert "process 0 cannot listen at port" in taken
    assert "choose another port" in taken


@pytest.mark.parametrize(
  "who, text",
  [
    (
      [(0, 3), (1, 3), (1, 3)],
      "two processes were started with --process_id=1; give each its own, from "
      "0 to 2.",
    ),
    (
      [(0, 2), (1, 3)],
      "a process was started with --num_processes=3 --process_id=1, process 0 "
      "with --num_processes=2; give all the same number, and each an own id "
      "from 0.",
    ),
  ],
)
def test_processes_that_do_not_fit_together_all_say_so(address, who, text):
  assert _meet(address, *who) == [text] * len(who)


def test_strangers_and_processes_that_left_are_not_counted(address):
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first = pool.submit(_one, address, 0, 2)
    stranger = _say(address, b"GET / HTTP/1.1\r\n\r\n")
    assert stranger.recv(1) == b""  # hung up on
    stranger.close()
    _say(address, b"").close()
    _say(address, _hello(1, 3)[:-9]).close()
    with _say(address, _hello(1, 2)) as connection:
      assert connection.recv(100) == b"[]\n"
    assert first.result() is None


def test_a_process_that_was_restarted_takes_its_place(address):
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first = pool.submit(_one, address, 0, 3)
    with _say(address, _hello(1, 3)) as killed:
      assert killed.recv(100) == b"[2]\n"
    again = _say(address, _hello(1, 3))
    assert again.recv(100) == b"[2]\n"
    second = _say(address, _hello(2, 3))
    assert second.recv(100) == again.recv(100) == b"[]\n"
    assert first.result() is None
    again.close()
    second.close()


@pytest.mark.parametrize("wrong", ["host", "host:", ":80", "host:x", "h:70000"])
def test_an_address_without_host_or_port_is_refused(wrong):
  with pytest.raises(UserError, match=f"--coordinator={wrong}: not HOST:PORT"):
    rendezvous.parse(wrong)


def test_addresses_of_ipv6_have_brackets():
  assert rendezvous.parse("[::1]:80") == ("::1", 80)


def test_many_missing_processes_are_not_all_listed():
  assert rendezvous.names(range(3, 20)) == (
    "processes 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 7 more"
  )
