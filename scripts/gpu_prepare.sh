#!/usr/bin/env bash
# Runs scripts/gpu_prepare.py, which builds and compiles beforehand what `gpu_check.sh --prebuilt` needs on a machine with a GPU.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_prepare.py" "$@"
