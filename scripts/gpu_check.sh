#!/usr/bin/env bash
# Runs scripts/gpu_check.py, which checks and measures the kernels on this machine's NVIDIA GPU.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
