#!/usr/bin/env bash
# Images alone against language supervision, on synthetic radiographs: encoders of one architecture
# that saw as many images, by several seeds, beside random weights and the pixels themselves, on
# findings, records, segmentation and reports. Interrupted, the same command goes on.
# SEEDS="0 1 2" are the seeds of pre-training.
set -euo pipefail
cd "$(dirname "$0")/.."
selfray() { "${PYTHON:-.venv/bin/python}" -m selfray "$@"; }

data=demo/new-site
out=study-language
[ -f "$data/dataset.json" ] ||
  selfray phantom "$data" --patients 1600 --size 128 --seed 20 --sites D
runs=()
for seed in ${SEEDS:-0 1 2}; do
  selfray pretrain demo --data "$data" --out "$out/images-$seed" --seed "$seed"
  selfray pretrain clip-demo --data "$data" --out "$out/reports-$seed" --seed "$seed"
  runs+=("$out/images-$seed" "$out/reports-$seed")
done
[ -f "$out/evaluation/results.jsonl" ] ||
  selfray evaluate "${runs[@]}" random:vit_pico/16@128 pixels:pca --data "$data" \
    --out "$out/evaluation" --tasks classification metadata segmentation reports \
    --report.candidates 4
selfray summary "$out"
"${PYTHON:-.venv/bin/python}" scripts/draw_language_study.py "$out/evaluation" "$out/study.png"
