#!/usr/bin/env bash
# The main job on the few real radiographs that packages hold, and on radiographs computed from a
# real CT: ingest, some hundred steps of pre-training, features, and the page with its pictures.
# Interrupted, the same command goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
selfray() { .venv/bin/python -m selfray "$@"; }

files=demo-real/files data=demo-real/radiographs run=demo-real/continued
[ -f "$files/table.csv" ] || .venv/bin/python scripts/real_radiographs.py "$files"
[ -f "$data/dataset.json" ] || selfray ingest "$files" "$data" --table "$files/table.csv" --size 224
selfray pretrain demo --data "$data" --out "$run" --steps 300 --evaluate-every 0 \
  --init selfray/phantom --optimizer.learning-rate 2e-3
selfray features "$run" --data "$data" --out demo-real/features
selfray summary "$run"
