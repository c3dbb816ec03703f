"""Joining of neighbor texts."""

import logging

import pytest

from retrieval_aug.memory import rac

count_words = lambda text: len(text.split())


def join(texts, limit=100, **options):
  return rac.join_texts(texts, count_words, limit, **options)


def test_texts_are_joined_best_first():
  assert join([["red fox", "dog"], ["owl"]]).texts == ["red fox, dog", "owl"]


def test_separator_can_be_chosen():
  assert join([["a", "b"]], separator=" . ").texts == ["a . b"]


def test_empty_texts_are_left_out_and_examples_stay_in_place():
  assert join([["", " fox ", " "], [], ["owl"]]).texts == ["fox", "", "owl"]


@pytest.mark.parametrize(("limit", "cut"), [(4, 0), (3, 1), (2, 2)])
def test_texts_over_the_limit_are_counted_but_not_cut(limit, cut):
  joined = join([["a b", "c d"], ["e", "f g"], ["h"]], limit)
  assert joined.num_cut == cut
  assert joined.num_tokens == 8
  assert joined.texts[0] == "a b, c d"


def test_count_of_cut_texts_is_logged(caplog):
  with caplog.at_level(logging.INFO):
    join([["a b c"], ["d"]], limit=2)
  assert "1 of 2 joined neighbor texts" in caplog.text
