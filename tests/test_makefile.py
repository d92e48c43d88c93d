"""What `make` does about the environment, with a recording stub in place of conda, Python and pip."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# All that the Makefile itself may need, and cp for the stub.
BASICS = ("sh", "cat", "cksum", "cp", "cut", "echo", "find", "mkdir", "rm", "sed", "touch")
MAKE = shutil.which("make")

pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")

# Records how it was called; whatever names an environment's folder gets one with an interpreter, this stub again,
# and only then does it fail, if "$0 $*" contains $FAIL: what a failure leaves behind is a half-made environment.
STUB = """#!/bin/sh
name=${0#"$BIN"/}
case "$*" in
  "-c "*) [ -z "$TOO_OLD" ]; exit ;;
  --version) echo "Python 3.11.0"; exit ;;
esac
echo "$name $*" >> "$LOG"
echo "$name offline=$HF_HUB_OFFLINE index=$PIP_EXTRA_INDEX_URL yes=$CONDA_ALWAYS_YES$MAMBA_ALWAYS_YES" >> "$LOG.env"
case "$*" in
  *"$PWD/.conda "*) folder=.conda ;;
  "-m venv "*) folder=.venv ;;
esac
if [ -n "$folder" ]; then mkdir -p $folder/bin && cp "$STUB" $folder/bin/python; fi
case "$name $*" in *"${FAIL:-no such words}"*) echo "the stub fails" >&2; exit 1 ;; esac
"""


class Checkout:
    """A copy of the files that decide about the environment, and a PATH that holds only stubs and basic tools."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.log = folder / "a checkout", folder / "bin", folder / "log"
        self.stub = folder / "stub"
        self.folder.mkdir()
        self.bin.mkdir()
        for name in ("Makefile", "environment.yml", "pyproject.toml"):
            shutil.copy(ROOT / name, self.folder)
        shutil.copytree(ROOT / "experiments", self.folder / "experiments", ignore=shutil.ignore_patterns("records"))
        for tool in BASICS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.stub.write_text(STUB)
        self.stub.chmod(0o755)

    def install(self, *names: str) -> None:
        for name in names:
            shutil.copy(self.stub, self.bin / name)

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Runs make; `self.calls` and `self.environment` are then the stubs' records of this one run."""
        fixed = {"PATH": str(self.bin), "BIN": str(self.bin), "STUB": str(self.stub), "LOG": str(self.log)}
        records = [self.log, self.log.with_name("log.env")]
        for record in records:
            record.write_text("")
        done = subprocess.run(
            [MAKE, *arguments], cwd=self.folder, env=fixed | environment, capture_output=True, text=True, timeout=60
        )
        self.calls, self.environment = (record.read_text().splitlines() for record in records)
        return done

    def stamps(self) -> list[Path]:
        return list(self.folder.glob(".*/.ready-*"))

    def created_with(self, tool: str) -> str:
        return f"{tool} create --prefix {self.folder}/.conda --file environment.yml"


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


WORKERS = " --numprocesses 2 --dist loadgroup"
PYTEST = f".conda/bin/python -m pytest{WORKERS}"
PYTEST_IN_VENV = f".venv/bin/python -m pytest{WORKERS}"
VENV = ["python3 -m venv .venv", ".venv/bin/python -m pip install --no-input --editable ."]


def test_conda_environment_is_made_once_and_again_when_a_pin_changes(checkout):
    checkout.install("micromamba", "mamba", "conda", "python3")
    assert checkout.make("test").returncode == 0
    assert checkout.calls == [checkout.created_with("micromamba"), PYTEST]
    assert checkout.environment[0].endswith("yes=truetrue")  # nobody is asked to confirm
    assert "offline=1 " in checkout.environment[1]

    checkout.make("test", "ARGS=-k plan")
    assert checkout.calls == [PYTEST + " -k plan"]
    checkout.make("lint")
    assert checkout.calls == [".conda/bin/python -m ruff check .", ".conda/bin/python -m ruff format --check ."]
    assert all("offline= " in line for line in checkout.environment)

    pins = checkout.folder / "environment.yml"
    pins.write_text(pins.read_text().replace("tqdm==4.70.1", "tqdm==4.70.2"))
    checkout.make("test")
    assert checkout.calls == [checkout.created_with("micromamba"), PYTEST]
    assert len(checkout.stamps()) == 1

    (checkout.bin / "micromamba").unlink()
    checkout.make("test", PATH=f"{checkout.bin}:/nowhere")
    assert checkout.calls == [PYTEST], "a finished environment serves without the tool that made it"


@pytest.mark.parametrize(
    ("tools", "called"),
    [(("mamba", "conda"), "mamba env"), (("conda",), "conda env"), (("conda", "micromamba"), "micromamba")],
)
def test_micromamba_is_preferred_then_mamba_then_conda(checkout, tools, called):
    checkout.install(*tools, "python3")
    checkout.make("env")
    assert checkout.calls == [checkout.created_with(called)]


@pytest.mark.parametrize(
    ("tool", "failing"), [("micromamba", "micromamba create"), ("python3", "pip install"), ("python3", "-m venv")]
)
def test_a_half_made_environment_does_not_count_as_made(checkout, tool, failing):
    checkout.install(tool)
    failed = checkout.make("test", FAIL=failing)
    assert failed.returncode != 0
    assert "could not be made" in failed.stderr
    assert checkout.stamps() == []
    assert not any("-m pytest" in call for call in checkout.calls)
    assert list(checkout.folder.glob(".*/bin/python")), "the stub has left half an environment"

    leftover = next(checkout.folder.glob(".*/bin")) / "leftover"
    leftover.touch()
    assert checkout.make("test").returncode == 0
    assert len(checkout.calls) == (3 if tool == "python3" else 2)
    assert not leftover.exists()
    assert len(checkout.stamps()) == 1


def test_a_failed_rebuild_takes_the_old_stamp_away(checkout):
    checkout.install("micromamba")
    checkout.make("env")
    pins = checkout.folder / "pyproject.toml"
    good = pins.read_text()
    pins.write_text(good.replace("tqdm==4.70.1", "tqdm==4.70.2"))
    assert checkout.make("env", FAIL="micromamba").returncode != 0
    pins.write_text(good)
    checkout.make("env")
    assert checkout.calls == [checkout.created_with("micromamba")]


def test_venv_where_there_is_no_conda(checkout):
    checkout.install("python3")
    checkout.make("test")
    assert checkout.calls == [*VENV, PYTEST_IN_VENV]
    checkout.install("micromamba")
    checkout.make("test")
    assert checkout.calls == [PYTEST_IN_VENV], "a conda installed later changes nothing"


def test_venv_on_request_beside_an_installed_conda(checkout):
    checkout.install("python3", "conda")
    checkout.make(
        "env", "ENV_TOOL=venv", "TORCH_INDEX=https://example.org/cpu", PIP_EXTRA_INDEX_URL="https://example.org"
    )
    assert checkout.calls == VENV
    assert "index=https://example.org https://example.org/cpu " in checkout.environment[1]
    checkout.make("test")
    assert checkout.calls == [PYTEST_IN_VENV]


def test_torch_index_reaches_the_pip_that_conda_calls(checkout):
    checkout.install("micromamba")
    checkout.make("env", "TORCH_INDEX=https://example.org/cpu")
    assert "index=https://example.org/cpu " in checkout.environment[0]


@pytest.mark.parametrize("installed", [(), ("python3", "python3.12")])
def test_without_a_suitable_python_one_sentence_says_so(checkout, installed):
    checkout.install(*installed)
    failed = checkout.make("test", TOO_OLD="yes", python="python3")
    assert failed.returncode != 0
    said = [line for line in failed.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert said[0].startswith("No Python 3.11 or later")
    assert checkout.calls == []
    assert checkout.stamps() == []


def test_an_interpreter_that_the_user_names_is_used_as_it_is(checkout):
    checkout.install("micromamba", "my-python")
    for given in ({"arguments": ["test", "PYTHON=my-python"]}, {"arguments": ["test"], "PYTHON": "my-python"}):
        checkout.make(*given.pop("arguments"), **given)
        assert checkout.calls == [f"my-python -m pytest{WORKERS}"]
    assert not list(checkout.folder.glob(".[vc]*"))


def test_make_alone_lists_every_target_and_setting_and_makes_nothing(checkout):
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z][\w%-]*):.*##", makefile, re.MULTILINE)
    targets += re.search(r"^(.*bench-peers.*): ", makefile, re.MULTILINE)[1].split()
    done = checkout.make()
    listed = re.findall(r"^  ([a-z][\w%-]*) +\S", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and sorted(listed) == sorted(targets) and len(targets) > 15
    for setting in ("MODEL", "TEXT", "TP", "NPROC", "NNODES", "TASKS_DIR", "LIMIT", "STRATEGIES", "DRY_RUN", "PYTHON"):
        assert f"{setting}=" in done.stdout
    assert checkout.calls == []


def test_clean_keeps_the_environment_and_the_records(checkout):
    checkout.install("micromamba")
    checkout.make("env")
    for name in ("spd/__pycache__/a.pyc", ".conda/__pycache__/b.pyc", "runs/r.json", "mlruns/0/meta.yaml", "build/x"):
        (checkout.folder / name).parent.mkdir(parents=True)
        (checkout.folder / name).touch()
    assert checkout.make("clean").returncode == 0
    left = {path.relative_to(checkout.folder).as_posix() for path in checkout.folder.rglob("*.*") if path.is_file()}
    assert {".conda/__pycache__/b.pyc", "runs/r.json", "mlruns/0/meta.yaml"} <= left
    assert "spd/__pycache__/a.pyc" not in left
    assert not (checkout.folder / "build").exists()
    assert len(checkout.stamps()) == 1


def test_vllm_is_installed_by_its_own_target_alone_and_beside_the_environment(checkout):
    checkout.install("conda", "python3")
    pins = checkout.folder / "tests" / "vllm_requirements.txt"
    pins.parent.mkdir()
    pins.write_text("vllm==0.33.0\n")
    done = checkout.make("test")
    assert done.returncode == 0 and "make check-vllm" in done.stderr.splitlines()[-1]
    assert checkout.calls == [checkout.created_with("conda env"), PYTEST]

    (checkout.folder / ".vllm").mkdir()  # as pip would
    checks = ".conda/bin/python -m pytest -rP tests/vllm_check.py"
    install = ".conda/bin/python -m pip install --quiet --no-deps --upgrade --target .vllm -r tests/" + pins.name
    for expected in ([install, checks], [checks]):
        assert checkout.make("check-vllm").returncode == 0
        assert checkout.calls == expected
