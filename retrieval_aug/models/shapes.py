"""Shape and option checks whose messages say what was expected and what came.

Letters used in this package:

  B    examples in a batch
  k    neighbors of an example
  d    width of the query, of the keys and of the refined embedding
  d_v  width of the values
  L    fusion layers
  C    classes
"""

import difflib
from collections.abc import Iterable
from typing import Any

# letter -> (size, name of the argument that fixed it, that argument's shape)
Sizes = dict[str, tuple[int, str, tuple[int, ...]]]


def bind(name: str, array: Any, letters: str, sizes: Sizes) -> None:
  """Checks one argument's shape and records the sizes that it fixes.

  Args:
    name: the argument's name, for the message.
    array: anything with a `shape`.
    letters: the dimensions, such as "B k d".
    sizes: sizes fixed by earlier arguments; new letters are added in place.

  Raises:
    ValueError: the rank differs, or a letter has another size already.
  """
  wanted = letters.split()
  shape = tuple(array.shape)
  agrees = len(shape) == len(wanted) and all(
    letter not in sizes or sizes[letter][0] == size
    for letter, size in zip(wanted, shape, strict=False)
  )
  if not agrees:
    known = [letter for letter in wanted if letter in sizes]
    expected = ", ".join(
      str(sizes[letter][0]) if letter in sizes else letter for letter in wanted
    )
    sources = dict.fromkeys(sizes[letter][1:] for letter in known)
    because = ", ".join(f"`{who}` has shape {what}" for who, what in sources)
    raise ValueError(
      f"`{name}` has shape {shape}; expected [{', '.join(wanted)}] = "
      f"({expected})" + (f", because {because}" if because else "")
    )
  for letter, size in zip(wanted, shape, strict=True):
    sizes.setdefault(letter, (size, name, shape))


def check_inputs(query: Any, keys: Any, values: Any, mask: Any) -> Sizes:
  """Checks the four arguments that every fusion takes.

  Args:
    query: `[B, d]`.
    keys: `[B, k, d]`, or None for a fusion that does not look at them.
    values: `[B, k, d_v]`, or a tuple of such, each with its own d_v.
    mask: `[B, k]` of bool, or None.

  Returns:
    The size of each letter.

  Raises:
    ValueError: a shape or the mask's type is wrong.
  """
  sizes: Sizes = {}
  bind("query", query, "B d", sizes)
  if keys is not None:
    bind("keys", keys, "B k d", sizes)
  if isinstance(values, (tuple, list)):
    for index, array in enumerate(values):
      bind(f"values[{index}]", array, f"B k d_v{index}", sizes)
  elif values is not None:
    bind("values", values, "B k d_v", sizes)
  if mask is not None:
    bind("mask", mask, "B k", sizes)
    if mask.dtype != bool:
      # A float mask is usually an additive bias, whose zeros mean "use".
      raise ValueError(
        f"`mask` has type {mask.dtype}; expected bool, True where a neighbor "
        "counts"
      )
  return sizes


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
  """Raises a ValueError that names the nearest choice if `value` is none."""
  choices = list(choices)
  if value not in choices:
    texts = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value), texts, n=1)
    raise ValueError(
      f"unknown {name} {value!r}; "
      + (f"did you mean {near[0]!r}? " if near else "")
      + f"known: {', '.join(texts)}"
    )


def check_at_least(name: str, value: float, least: float) -> None:
  """Raises a ValueError if `value` is below `least`."""
  if value < least:
    raise ValueError(f"`{name}` is {value}; expected at least {least}")


def check_rate(name: str, value: float) -> None:
  """Raises a ValueError unless `value` is a dropout rate, in [0, 1)."""
  if not 0.0 <= value < 1.0:
    raise ValueError(f"`{name}` is {value}; expected a rate in [0, 1)")


def check_divides(name: str, value: int, width: int) -> None:
  """Raises a ValueError unless `value` splits the query's width evenly."""
  check_at_least(name, value, 1)
  if width % value:
    raise ValueError(
      f"`{name}` is {value}, which does not divide the query's width {width}"
    )
