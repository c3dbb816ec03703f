"""A trace holds the steps of its window, and no others."""

import jax
import jax.numpy as jnp
import pytest

from retrieval_aug.common.errors import UserError
from retrieval_aug.training import profiler


@pytest.mark.parametrize(
  "window", ["3", "3:", ":3", "5:4", "0:4", "-1:4", "a:b", "1:2:3", " 1:2"]
)
def test_malformed_windows_are_named(window, tmp_path):
  with pytest.raises(UserError, match="FIRST:LAST") as caught:
    profiler.Profiler(window, tmp_path)
  assert f"config.log.profile={window}:" in str(caught.value)


@pytest.mark.parametrize("window, expected", [("3:3", (3, 3)), ("", None)])
def test_windows_are_parsed(window, expected):
  assert profiler.parse_window(window) == expected


def test_the_trace_holds_the_window_and_says_where_it_is(tmp_path, capsys):
  trace = profiler.Profiler("2:3", tmp_path)
  product = jax.jit(lambda x: x @ x)
  x = jnp.eye(3)
  for number in range(1, 6):
    trace.step(number, x)
    with jax.profiler.TraceAnnotation(f"step {number} of 5"):
      x = product(x)
  trace.close(x)
  (path,) = tmp_path.rglob("*.xplane.pb")
  names = {
    event.name
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes
    for line in plane.lines
    for event in line.events
  }
  assert {n for n in names if n.endswith(" of 5")} == {
    "step 2 of 5",
    "step 3 of 5",
  }
  assert f"xprof --logdir {tmp_path}" in capsys.readouterr().err


class _Array:
  """Says when it is waited for."""

  def __init__(self, events):
    self.block_until_ready = lambda: events.append("ready")


@pytest.fixture
def events(monkeypatch):
  """What happens, in order, while nothing is traced really."""
  events = []
  monkeypatch.setattr(
    jax.profiler, "start_trace", lambda folder: events.append("start")
  )
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
  return events


def _run(trace, events, first, last):
  for number in range(first, last + 1):
    trace.step(number, _Array(events))
    events.append(number)
  trace.close(_Array(events))


@pytest.mark.parametrize(
  "window, first, last, expected",
  [
    ("2:3", 1, 4, [1, "ready", "start", 2, 3, "ready", "stop", 4]),
    # The run ends inside, or begins there.
    ("2:9", 1, 3, [1, "ready", "start", 2, 3, "ready", "stop"]),
    ("2:5", 4, 6, ["ready", "start", 4, 5, "ready", "stop", 6]),
    ("", 1, 3, [1, 2, 3]),
  ],
)
def test_steps_are_waited_for_at_both_ends(
  window, first, last, expected, events, tmp_path
):
  _run(profiler.Profiler(window, tmp_path), events, first, last)
  assert events == expected


@pytest.mark.parametrize("first, last", [(6, 8), (1, 3)])
def test_a_run_without_steps_of_the_window_traces_nothing_and_says_so(
  first, last, events, tmp_path, capsys
):
  _run(profiler.Profiler("4:5", tmp_path), events, first, last)
  assert events == list(range(first, last + 1))
  assert capsys.readouterr().err.count("profile=4:5: none of these") == 1
