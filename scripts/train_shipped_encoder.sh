#!/usr/bin/env bash
# The run behind the shipped encoder `selfray/phantom`: about half an hour on two free CPU cores.
# It ends by putting encoder, config and metrics into selfray/weights/phantom.
set -euo pipefail
cd "$(dirname "$0")/.."
selfray() { .venv/bin/python -m selfray "$@"; }

data=scratch/phantom-abc run=scratch/phantom-run
[ -f "$data/dataset.json" ] || selfray phantom "$data" --patients 2000 --size 128 --seed 100
selfray pretrain demo --data "$data" --out "$run" --steps 2000 \
  --evaluate-every 250 --checkpoint-every 250 --engine.loader-threads 1
selfray summary "$run"
.venv/bin/python scripts/ship_encoder.py "$run" phantom
