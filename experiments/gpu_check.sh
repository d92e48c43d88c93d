#!/bin/sh
# Within ten minutes on one GPU: parity with the CPU, decoding against the bandwidth of memory, the memory of a repair, a
# long prompt, rank 0's share of 70B. One JSON document on stdout, its record in runs/gpu_check.
set -e
cd "$(dirname "$0")/.."
for python in "$PYTHON" .conda/bin/python .venv/bin/python python3; do command -v "$python" >/dev/null 2>&1 && break; done
export PYTHONPATH="$PWD:$PWD/experiments"
exec "$python" experiments/gpu_check.py --records runs/gpu_check --no-mlflow "$@"
