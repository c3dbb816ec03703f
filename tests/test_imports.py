"""Imports go one way, weigh little, and what is public says what it is.

The floors are those of DESIGN section 2.
"""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "retrieval_aug"

FLOORS = {
  "common": 0,
  "models": 1,
  "encoders": 1,
  "datasets": 1,
  "evaluation": 1,
  "config": 1,
  "memory": 2,
  "presets": 2,
  "settings": 2,
  "retrieval": 3,
  "training": 3,
  "report": 4,
  "serving": 4,
  "sweep": 4,
  "experiment": 5,
  "main": 5,
}
# The top floor is the two files of the main job; one imports the other.
TOP = {"experiment", "main"}

FILES = sorted(PACKAGE.rglob("*.py"))


def _module(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in FILES}


def _room(module):
  parts = module.split(".")
  return parts[1] if len(parts) > 1 else None


@functools.cache
def _imports(module, *, lazy=True):
  """Our modules that a module imports; without `lazy`, as it is imported."""
  tree = ast.parse(MODULES[module].read_text())
  inside = set()
  if not lazy:
    for node in ast.walk(tree):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        inside.update(id(n) for n in ast.walk(node))
  found = set()
  for node in ast.walk(tree):
    if id(node) in inside:
      continue
    if isinstance(node, ast.Import):
      found.update(alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{module}: relative import"
      for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        found.add(inner if inner in MODULES else node.module)
  return {n for n in found if n.split(".")[0] == "retrieval_aug"} - {module}


def test_every_room_has_a_floor():
  rooms = {_room(m) for m in MODULES} - {None}
  assert rooms <= set(FLOORS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
  room = _room(module)
  for other in _imports(module):
    target = _room(other)
    if target in (room, None) or {room, target} <= TOP:
      continue
    assert FLOORS[target] < FLOORS[room], f"{module} imports {other}"


def test_models_import_nothing_of_ours():
  for module in MODULES:
    if _room(module) == "models":
      assert {_room(m) for m in _imports(module)} <= {"models"}


def test_no_circle_of_files():
  done, path = set(), []

  def visit(module):
    assert module not in path, " -> ".join([*path, module])
    if module in done or module not in MODULES:
      return
    path.append(module)
    for other in sorted(_imports(module)):
      visit(other)
    path.pop()
    done.add(module)

  for module in MODULES:
    visit(module)
  assert done == set(MODULES)


def _loaded(statement):
  """Top-level modules that are loaded after a statement."""
  code = (
    f"import sys\n{statement}\nprint(*{{m.split('.')[0] for m in sys.modules}})"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    cwd=ROOT,
  )
  return set(done.stdout.split())


@pytest.mark.parametrize("room", ["models", "encoders", "datasets"])
def test_import_is_light(room):
  heavy = {"tensorflow", "scann", "apache_beam", "torch", "orbax", "matplotlib"}
  assert not heavy & _loaded(f"import retrieval_aug.{room}")


def test_the_main_job_loads_tensorflow_and_scann_only_when_it_needs_them():
  loaded = _loaded("import retrieval_aug.main")
  assert not {"tensorflow", "scann", "apache_beam"} & loaded


_LAZY_ONLY = (
  "tensorflow",
  "scann",
  "resvg_py",
  "apache_beam",
  "faiss",
  "tensorstore",
  "sentencepiece",
  "clu",
  "wandb",
)


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_heavy_packages_are_imported_inside_functions(path):
  tree = ast.parse(path.read_text())
  for node in tree.body:
    names = []
    if isinstance(node, ast.Import):
      names = [a.name for a in node.names]
    if isinstance(node, ast.ImportFrom):
      names = [node.module]
    assert not [n for n in names if n.split(".")[0] in _LAZY_ONLY]


def test_tensorflow_is_imported_in_one_place():
  users = [
    path.relative_to(PACKAGE).as_posix()
    for path in FILES
    for node in ast.walk(ast.parse(path.read_text()))
    if (
      isinstance(node, ast.Import)
      and any(a.name.split(".")[0] == "tensorflow" for a in node.names)
    )
    or (
      isinstance(node, ast.ImportFrom)
      and (node.module or "").split(".")[0] == "tensorflow"
    )
  ]
  assert users == ["common/tf.py"]


def _public(tree):
  """Public functions, classes and methods that need a docstring."""
  kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
  for node in tree.body:
    if not isinstance(node, kinds) or node.name.startswith("_"):
      continue
    yield node.name, node
    if isinstance(node, ast.ClassDef):
      for inner in node.body:
        if not isinstance(inner, kinds) or inner.name.startswith("_"):
          continue
        # A property's name is its documentation among the attributes, and
        # what a base class names, its docstring explains.
        decorators = [ast.unparse(d) for d in inner.decorator_list]
        if "property" not in decorators and not node.bases:
          yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize(
  "path", [p for p in FILES if p.read_text().strip()], ids=_module
)
def test_what_is_public_has_a_docstring(path):
  tree = ast.parse(path.read_text())
  assert ast.get_docstring(tree), f"{path.name} has no docstring"
  missing = [n for n, node in _public(tree) if not ast.get_docstring(node)]
  assert missing == []
