"""What workers tell arrives once, whole, and whoever tells it."""

from retrieval_aug.memory import ledger
from retrieval_aug.memory.ledger import Ledger, Reader, Ticks


def test_a_reader_gets_each_line_once_and_waits_for_the_end_of_a_line(tmp_path):
  book = Ledger.new(tmp_path)
  book.deal("a", ["x", "y"], size=20)
  reader = Reader(book)
  assert list(reader.new()) == [{"phase": "a", "size": 20}]
  (path,) = book.folder.glob("*.jsonl")
  line = b'{"phase": "a", "did": 3}\n'
  with open(path, "ab") as f:
    f.write(line[:9])
  assert list(reader.new()) == []
  with open(path, "ab") as f:
    f.write(line[9:])
  assert list(reader.new()) == [{"phase": "a", "did": 3}]
  assert list(reader.new()) == []


def test_a_unit_that_was_ever_done_is_done(tmp_path):
  book = Ledger.new(tmp_path)
  book.end("a", "x", "bad", 1)
  book.end("a", "x", None, 1)
  book.end("a", "y", None, 1)
  book.end("a", "y", "bad", 1)
  book.end("b", "x", "worse", 1)
  book.end("b", "x", "worst", 1)
  assert book.ended() == {
    ("a", "x"): None,
    ("a", "y"): None,
    ("b", "x"): "worst",
  }


def test_a_new_ledger_knows_nothing_of_an_old_run(tmp_path):
  old = Ledger.new(tmp_path)
  old.end("a", "x", None, 1)
  new = Ledger.new(tmp_path)
  assert new.ended() == {} and not old.folder.exists()
  ledger.remove(tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_a_phase_is_dealt_once(tmp_path):
  book = Ledger.new(tmp_path)
  assert book.dealt("a") is None
  book.deal("a", ["x", "y"], size=20)
  assert book.dealt("a") == ["x", "y"] and book.dealt("b") is None


def test_ticks_are_told_once_a_second(tmp_path, monkeypatch):
  now = 100.0
  monkeypatch.setattr(ledger.time, "monotonic", lambda: now)
  book = Ledger.new(tmp_path)
  ticks = Ticks(book, "a")
  for _ in range(7):  # at 100.25, 100.5, ...
    now += 0.25
    ticks(3)
  assert list(Reader(book).new()) == [{"phase": "a", "did": 12}]
  assert ticks.told == 12
