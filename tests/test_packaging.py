"""The pins, the environment that was installed from them, and what importing the package may not do."""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
PINS = PROJECT["project"]["dependencies"]

IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys, threading
import spd

names = ["spd"] + [m.name for m in pkgutil.walk_packages(spd.__path__, "spd.", onerror=print)]
for name in names:
    importlib.import_module(name)

import psutil, torch

tracked = [run.info.run_id for run in [sys.modules["mlflow"].active_run()] if run] if "mlflow" in sys.modules else []
print(json.dumps({
    "modules": names,
    "process_group": torch.distributed.is_available() and torch.distributed.is_initialized(),
    "cuda": torch.cuda.is_initialized(),
    "children": [child.name() for child in psutil.Process().children()],
    "tracked_runs": tracked,
}))
"""


def test_environment_yml_and_pyproject_have_the_same_pins():
    *conda, pip = ENVIRONMENT["dependencies"]
    assert conda == ["python=3.11", "pip"]
    assert pip == {"pip": [*PINS, "-e ."]}
    assert PROJECT["project"]["requires-python"] == ">=3.11"


@pytest.mark.parametrize("pin", [*PINS, *PROJECT["build-system"]["requires"]])
def test_pin_is_one_exact_version_without_local_label_or_hash(pin):
    assert re.fullmatch(r"[A-Za-z0-9_-]+==\d+(\.\d+)*", pin)


@pytest.mark.parametrize("pin", PINS)
def test_installed_version_is_the_pinned_one(pin):
    name, pinned = pin.split("==")
    if name == "gguf" and not list(metadata.distributions(name=name)):
        pytest.skip("gguf, which only GGUF files want, is not installed")
    installed = metadata.version(name).partition("+")[0]  # torch may be 2.x.y+cpu or +cu130
    assert installed == pinned


def test_importing_every_module_starts_nothing_and_writes_nothing(tmp_path):
    """One fresh process in an empty folder: any file, process, process group or output is an import's doing."""

    def files() -> set[Path]:
        return {path for path in ROOT.joinpath("spd").rglob("*") if "__pycache__" not in path.parts}  # others' caches

    before = files()
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{IMPORT_EVERYTHING}"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, f"an import printed:\n{done.stdout}"
    found = json.loads(done.stdout)
    assert {"spd", "spd.tiny", "spd.tiny.corpus", "spd.cli"} <= set(found.pop("modules"))
    assert found == {"process_group": False, "cuda": False, "children": [], "tracked_runs": []}
    assert list(tmp_path.iterdir()) == []
    assert files() == before


def test_model_files_of_spd_tiny_and_profiles_are_package_data():
    assert PROJECT["tool"]["setuptools"]["package-data"] == {"spd": ["profiles/*"], "spd.tiny": ["model/*"]}
    for folder in ("spd/tiny/model", "spd/profiles"):
        assert all(path.is_file() for path in (ROOT / folder).iterdir()), "the pattern takes no subfolders"
