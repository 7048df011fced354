#!/usr/bin/env bash
# Everything there is to know of these kernels on this machine's NVIDIA GPU, in 9 minutes and without a network:
#   scripts/gpu_check.sh OUT_DIR [--only build,device,smoke,tests,sanitizer,endurance,bench] [--peer NAME=PATH] ...
# See scripts/gpu_check.py.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
