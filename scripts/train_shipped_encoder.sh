#!/usr/bin/env bash
# The run behind the shipped encoder `selfray/phantom`: somewhat more than an hour on one CPU core.
# It ends by putting encoder, config and metrics into selfray/weights/phantom, and the curve of the
# probe against images seen into docs/images.
set -euo pipefail
cd "$(dirname "$0")/.."
selfray() { OMP_NUM_THREADS=1 .venv/bin/python -m selfray "$@"; }

data=scratch/phantom-abc run=scratch/phantom-run
[ -f "$data/dataset.json" ] || selfray phantom "$data" --patients 4000 --size 128 --seed 100
selfray pretrain demo --data "$data" --out "$run" --steps 10000 --evaluate-every 500 \
  --checkpoint-every 500 --evaluate-images 3000 --engine.loader-threads 1
selfray summary "$run"
.venv/bin/python scripts/ship_encoder.py "$run" phantom
.venv/bin/python scripts/draw_learning_curve.py "$run" docs/images/learning_curve.png
