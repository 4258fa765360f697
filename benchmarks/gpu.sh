#!/usr/bin/env bash
# Everything that is worth knowing of a GPU, in less than 8 minutes: benchmarks/gpu.sh [options of gpu.py]
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v nvidia-smi > /dev/null; then
    echo "benchmarks/gpu.sh: there is no nvidia-smi on this machine, so no GPU to measure." >&2
    exit 2
fi
nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv
exec timeout 480 python benchmarks/gpu.py "$@"
