"""A view of a config that notes what was read, and questions about it."""

import copy
import difflib
import re
from collections.abc import Iterator
from typing import Any

import ml_collections

from retrieval_aug import config as configs
from retrieval_aug.common.errors import UserError


class Settings:
  """A read-only view of a ConfigDict that remembers which keys were read."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    _read: set[str] | None = None,
    _prefix: str = "",
  ):
    self._config = config
    self._names_read = set() if _read is None else _read
    self._prefix = _prefix

  def __getattr__(self, name: str) -> Any:
    if name.startswith("_"):
      raise AttributeError(name)
    return self._get(name)

  def _get(self, name: str) -> Any:
    """A setting or section, also if a method of this class is called so."""
    if name not in self._config:
      raise AttributeError(f"config has no {self._prefix}{name}")
    value = self._config[name]
    if isinstance(value, ml_collections.ConfigDict):
      return Settings(value, self._names_read, f"{self._prefix}{name}.")
    self._names_read.add(self._prefix + name)
    return value

  def options(self, *without: str) -> dict[str, Any]:
    """All keys of this section but `without`, each counted as read."""
    return {n: self._get(n) for n in self._config if n not in without}

  def replaced(self, values: dict[str, Any]) -> "Settings":
    """This section with other values; what is read there counts as read here.

    Args:
      values: by dotted name, each of a setting that there is.
    """
    config = copy.deepcopy(self._config)
    config.update_from_flattened_dict(values)
    return Settings(config, self._names_read, self._prefix)

  def names(self) -> list[str]:
    """Names of the keys and sections of this section."""
    return list(self._config)

  def as_dict(self) -> dict[str, Any]:
    """This section as a dict, for a fingerprint; nothing counts as read."""
    return self._config.to_dict()

  def mark_read(self) -> None:
    """Counts the whole section as read: a finished stage had read it."""
    self._names_read.update(self._prefix + n for n in _leaves(self._config))

  def unread(self) -> list[str]:
    """Names of leaf keys of the whole config that nobody has read."""
    return [n for n in _leaves(self._config) if n not in self._names_read]


def _leaves(config: ml_collections.ConfigDict) -> Iterator[str]:
  for name in config:
    value = config.get_ref(name).get()
    if isinstance(value, ml_collections.ConfigDict):
      yield from (f"{name}.{inner}" for inner in _leaves(value))
    else:
      yield name


def changed(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Leaves whose value is not the default, by their dotted names."""
  base = dict(_flat(configs.defaults()))
  return {n: v for n, v in _flat(config) if n not in base or base[n] != v}


def _flat(config: ml_collections.ConfigDict) -> Iterator[tuple[str, Any]]:
  for name in _leaves(config):
    value = config
    for part in name.split("."):
      value = value[part]
    yield name, value


def unknown_key_error(name: str, known: list[str]) -> UserError:
  """The error for a key that does not exist, naming the nearest that does."""
  # A setting of training that cannot be swept, or the nearest.
  near = [k for k in known if k.startswith("train.") and f"sweep.{k}" == name]
  near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  if not near:  # the right name in the wrong section
    last = name.rsplit(".", 1)[-1]
    # Of a setting and the list of it in a sweep, the setting.
    ordered = sorted(known, key=lambda k: not k.startswith("sweep."))
    tails = {k.rsplit(".", 1)[-1]: k for k in ordered}
    near = [tails[t] for t in difflib.get_close_matches(last, list(tails), n=1)]
  hint = f"did you mean config.{near[0]}?" if near else "see --help"
  return UserError(f"config.{name}: no such setting; {hint}")


def check_overrides(
  arguments: list[str], config: ml_collections.ConfigDict
) -> None:
  """Raises for a `--config.x.y=...` whose key the config does not have."""
  known = list(_leaves(config))
  for argument in arguments:
    match = re.match(r"--?config\.([\w.]+)", argument)
    if match and match[1] not in known:
      raise unknown_key_error(match[1], known)


def chosen_models(settings: Settings) -> list[str]:
  """The models that `model.name` asks for, in table order."""
  text = settings.model.name
  known = configs.MODELS
  names = known if text == "all" else re.split(r"[,\s]+", text.strip())
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
      hint = f"did you mean {near[0]}?" if near else f"one of {known}"
      raise UserError(f"config.model.name={text}: no model {name!r}; {hint}")
  return [name for name in known if name in names]


def train_settings(settings: Settings, model: str) -> dict[str, Any]:
  """The training section as `model` sees it: its own values first."""
  common = settings.train.options()
  own = getattr(settings.model, model).train.options()
  return common | {k: v for k, v in own.items() if v is not None}
