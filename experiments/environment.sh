#!/bin/sh
# Makes the environment: environment.sh TOOL STAMP, where TOOL is venv, or micromamba, mamba or conda, and STAMP the file
# .venv/... or .conda/... that is written last. TORCH_INDEX names an index where pip also looks (CPU builds).
set -e
tool=$1 stamp=$2 folder=${2%%/*}
if [ -n "$TORCH_INDEX" ]; then
  export PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:+$PIP_EXTRA_INDEX_URL }$TORCH_INDEX"
fi
failed() {
  echo "$folder could not be made, for the reason above; the next make starts it afresh$1." >&2
  exit 1
}
if [ "$tool" = venv ]; then
  for python in python3.11 python3 python3.12 python3.13 python3.14 none; do
    if [ $python = none ]; then
      echo "No Python 3.11 or later with its venv module was found on PATH (Debian and Ubuntu: packages python3 and" \
        "python3-venv); install one, or conda, or name one that has all of environment.yml with PYTHON=..." >&2
      exit 1
    fi
    $python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break
  done
  echo "Making .venv with $($python --version); this happens once and downloads a few GB at most."
  rm -rf .venv
  { $python -m venv .venv && .venv/bin/python -m pip install --no-input --editable .; } || failed
else
  echo "Making .conda with $tool; this happens once and downloads a few GB at most."
  rm -rf .conda
  env=env
  case ${tool##*/} in *micromamba*) env= ;; esac
  CONDA_ALWAYS_YES=true MAMBA_ALWAYS_YES=true "$tool" $env create --prefix "$PWD/.conda" --file environment.yml \
    || failed " (make ENV_TOOL=venv uses pip alone)"
fi
touch "$stamp"
