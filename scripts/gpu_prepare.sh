#!/usr/bin/env bash
# The door to scripts/gpu_prepare.py, which builds and compiles what gpu_check.sh --prebuilt takes to a machine with a GPU.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_prepare.py" "$@"
