#!/bin/sh
# Figures of a search on this machine's GPU, or its CPU: benchmarks/device.py says what and how.
#
#     benchmarks/device.sh --output device.json
#     WHEELS=wheels PYTHON=python3.12 benchmarks/device.sh --parts search host
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" -m benchmarks.device "$@"
