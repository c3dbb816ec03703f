"""Where arrays live: a mesh of all devices, and rules for what is split.

Batches are split over the axis "data" of the mesh; parameters and what the
optimizer keeps of them follow ordered rules of (regex, action), of which the
first that fits a parameter's whole name decides.
"""

import collections
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from retrieval_aug.common.errors import UserError

AXES = ("data", "model")

PRESETS = ("replicate", "fsdp", "tensor")

Rules = tuple[tuple[str, str], ...]

_SETTING = "config.mesh.sharding"


def mesh(model: int = 1) -> Mesh:
  """All devices of all processes, as ("data", "model").

  Args:
    model: devices along "model"; neighbours of each other, where the network
      between devices has a shape.

  Raises:
    UserError: the number does not divide that of the devices.
  """
  devices = jax.devices()
  if model < 1 or len(devices) % model:
    raise UserError(
      f"config.mesh.model={model}: must divide the number of devices, "
      f"{len(devices)}."
    )
  return Mesh(_grid(devices, model), AXES, axis_types=(AxisType.Auto,) * 2)


def _grid(devices: Sequence[Any], model: int) -> np.ndarray:
  """Devices [data, model], ordered for the network between them."""
  shape = (len(devices) // model, model)
  # A slice is a set with a fast network: a slice of TPUs, the GPUs of a host.
  slices = collections.Counter(getattr(d, "slice_index", 0) for d in devices)
  if len(slices) == 1 or len(set(slices.values())) > 1:
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  # "model" talks most, so it stays inside a slice as far as it can.
  inside = math.gcd(model, len(devices) // len(slices))
  across = model // inside
  return mesh_utils.create_hybrid_device_mesh(
    (shape[0] * across // len(slices), inside),
    (len(slices) // across, across),
    devices,
    allow_split_physical_axes=True,
  )


def everywhere(on: Mesh) -> NamedSharding:
  """Of an array that each device has a copy of."""
  return NamedSharding(on, PartitionSpec())


def by_example(on: Mesh) -> NamedSharding:
  """Of an array whose first axis is split over the devices of "data"."""
  return NamedSharding(on, PartitionSpec("data"))


def replicate(tree: Any, on: Mesh) -> Any:
  """Puts a copy of every array on each device."""
  return jax.device_put(tree, everywhere(on))


def check_batch_size(name: str, size: int, on: Mesh, parts: int = 1) -> None:
  """Raises a `UserError` unless the devices can share `size` examples.

  Args:
    name: of the setting.
    size: examples.
    on: the mesh.
    parts: that they are cut into, each of which the devices share.
  """
  devices = on.shape["data"]
  if size < 1 or size % (parts * devices):
    in_parts = f" in {parts} parts" if parts > 1 else ""
    raise UserError(
      f"config.{name}={size}: must be a positive multiple of the {devices} "
      f"devices that share a batch{in_parts}."
    )


def local_positions(on: Mesh, batch_size: int) -> np.ndarray:
  """Which examples of a batch this process feeds.

  Args:
    on: the mesh.
    batch_size: B, of all processes together.

  Returns:
    Positions int64 [b] in 0..B-1, ascending, as `put_batch` takes them. A
    process has those of all its devices, each once; where devices along
    "model" belong to several processes, these have the same ones.
  """
  indices = by_example(on).addressable_devices_indices_map((batch_size,))
  parts = {part.indices(batch_size)[:2] for (part,) in indices.values()}
  return np.concatenate([np.arange(*p, dtype=np.int64) for p in sorted(parts)])


def put_batch(batch: Any, on: Mesh, batch_size: int, before: int = 0) -> Any:
  """Puts this process's part of a batch on its devices.

  Args:
    batch: tree of arrays [..., b, ...] of the examples at `local_positions`.
    on: the mesh.
    batch_size: B, of all processes together.
    before: how many axes stand before that of the examples.

  Returns:
    The same tree of global arrays [..., B, ...], split over "data". The
    transfer goes on while the caller does.
  """
  at = NamedSharding(on, PartitionSpec(*[None] * before, "data"))
  if jax.process_count() == 1:  # the same, and faster
    return jax.device_put(batch, at)
  shape = lambda x: (*x.shape[:before], batch_size, *x.shape[before + 1 :])
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(at, x, shape(x)), batch
  )


def constrain(tree: Any, on: Mesh) -> Any:
  """Keeps activations [B, ...] split by example; for use inside jit.

  How their other axes are split is left to the compiler, which knows how the
  parameters are.
  """

  def one(x):
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    at = NamedSharding(on, PartitionSpec("data", *rest))
    return jax.lax.with_sharding_constraint(x, at)

  return jax.tree.map(one, tree)


def fetch(tree: Any) -> Any:
  """Brings whole arrays to every process.

  All processes must call it, for arrays that are split over them are sent
  between them.

  Args:
    tree: of arrays on devices.

  Returns:
    The same tree of NumPy arrays: copies, whatever a later step overwrites.
  """

  def whole(x):
    if isinstance(x, jax.Array) and not (
      x.is_fully_addressable or x.is_fully_replicated
    ):
      return multihost_utils.process_allgather(x, tiled=True)
    return np.array(x)

  return jax.tree.map(whole, tree)


def parse_rules(value: str | Sequence[tuple[str, str]]) -> Rules:
  """Rules of what is split.

  Args:
    value: an action for all parameters, or pairs of (regex, action). Actions:
      "replicate"; "fsdp", which splits the largest dimension that the size of
      "data" divides over it; "tensor", which splits the last dimension that
      the size of "model" divides over it; or an axis for each dimension, such
      as "-,model" or "data+model,-", where "-" is not split. A parameter in
      which "fsdp" or "tensor" find nothing to split is replicated.

  Raises:
    UserError: no such action, or not a regex.
  """
  if isinstance(value, str):
    value = ((".*", value),)
  rules = []
  for pair in value:
    if len(pair) != 2 or not all(isinstance(x, str) for x in pair):
      raise UserError(
        f"{_SETTING}: {pair!r} is no pair of a regex and an action."
      )
    pattern, action = pair
    try:
      re.compile(pattern)
    except re.error as error:
      raise UserError(
        f"{_SETTING}: {pattern!r} is no regular expression: {error}."
      ) from error
    if action not in PRESETS:
      _parse_spec(action)
    rules.append((pattern, action))
  return tuple(rules)


def _parse_spec(action: str) -> list[tuple[str, ...]]:
  """The axes that each dimension is split over."""
  spec = [() if d == "-" else tuple(d.split("+")) for d in action.split(",")]
  axes = [axis for dimension in spec for axis in dimension]
  if set(axes) - set(AXES) or len(set(axes)) < len(axes):
    raise UserError(
      f"{_SETTING}: {action!r} is no action; take one of "
      f"{', '.join(PRESETS)}, or for each dimension one of -, data, model, "
      "data+model, such as '-,model', with each axis once."
    )
  return spec


def shardings(tree: Any, rules: Rules, on: Mesh) -> Any:
  """Where each array of a training state lives.

  A parameter's name is its path, such as `fusion/layer_0/query/kernel`; what
  an optimizer or an average keeps of it has the same name. What has none, such
  as the step, is replicated.

  Args:
    tree: of arrays or their shapes.
    rules: from `parse_rules`.
    on: the mesh.

  Returns:
    The same tree of shardings.

  Raises:
    UserError: a parameter that no rule matches; a rule that decides nothing; a
      rule that does not fit a parameter.
  """
  paths, structure = jax.tree.flatten_with_path(tree)
  named = [(_name(path), x) for path, x in paths]
  names = list(dict.fromkeys(name for name, _ in named if name))
  decides = {name: _first(name, rules) for name in names}
  missing = [name for name in names if decides[name] is None]
  if missing:
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    raise UserError(
      f"{_SETTING}: no regex matches the whole name of "
      f"{', '.join(missing[:3])}{more}; end with ('.*', 'replicate')."
    )
  used = set(decides.values())
  for number, (pattern, _) in enumerate(rules):
    # What is left over for the last one may be nothing.
    last = number == len(rules) - 1
    if names and number not in used:
      if last and any(re.fullmatch(pattern, name) for name in names):
        continue
      raise UserError(
        f"{_SETTING}: {pattern!r} matches no parameter's whole name, such as "
        f"{names[0]}, or only such as rules before it match."
      )

  def of(name, x):
    if not name:
      return everywhere(on)
    return NamedSharding(on, _spec(name, x.shape, rules[decides[name]], on))

  return jax.tree.unflatten(structure, [of(name, x) for name, x in named])


def _name(path: Sequence[Any]) -> str:
  """Keys of dicts alone, so that Adam's moments are named as parameters."""
  keys = [p.key for p in path if isinstance(p, jax.tree_util.DictKey)]
  return "/".join(str(key) for key in keys)


def _first(name: str, rules: Rules) -> int | None:
  """The number of the first rule that matches a name."""
  for number, (pattern, _) in enumerate(rules):
    if re.fullmatch(pattern, name):
      return number
  return None


def _spec(
  name: str, shape: tuple[int, ...], rule: tuple[str, str], on: Mesh
) -> PartitionSpec:
  """How one array is split."""
  pattern, action = rule
  if action == "replicate":
    return PartitionSpec()
  if action in PRESETS:
    axis = "data" if action == "fsdp" else "model"
    fits = [i for i, size in enumerate(shape) if size % on.shape[axis] == 0]
    if not fits:
      return PartitionSpec()
    chosen = max(fits, key=lambda i: shape[i]) if axis == "data" else fits[-1]
    return PartitionSpec(
      *(axis if i == chosen else None for i in range(len(shape)))
    )
  spec = _parse_spec(action)
  what = f"{_SETTING}: ({pattern!r}, {action!r}) does not fit {name} {shape}"
  if len(spec) != len(shape):
    raise UserError(
      f"{what}: give one of -, data, model for each of its {len(shape)} "
      "dimensions."
    )
  for size, axes in zip(shape, spec):
    devices = math.prod(on.shape[axis] for axis in axes)
    if size % devices:
      raise UserError(
        f"{what}: {size} is no multiple of the {devices} devices of "
        f"{'+'.join(axes)}."
      )
  return PartitionSpec(*(axes or None for axes in spec))
