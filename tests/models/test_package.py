"""The package as others import it."""

import subprocess
import sys

import pytest

from retrieval_aug import models


@pytest.mark.parametrize(
  "heavy", ["tensorflow", "scann", "apache_beam", "torch", "optax"]
)
def test_import_loads_nothing_heavy(heavy):
  code = f"import retrieval_aug.models, sys; print({heavy!r} in sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "False"


def test_import_loads_nothing_else_of_the_library():
  code = (
    "import retrieval_aug.models, sys; print(*[m for m in sys.modules if "
    "m.startswith('retrieval_aug.') and not "
    "m.startswith('retrieval_aug.models')])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", models.__all__)
def test_public_names_are_documented(name):
  assert len(getattr(models, name).__doc__ or "") > 20
