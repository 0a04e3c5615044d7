#!/usr/bin/env bash
# The main job on synthetic radiographs, twice: pre-training from scratch in a few minutes, and
# continuing from the encoder that this project ships on the unlabelled images of a new site.
# Interrupted, the same command goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
selfray() { .venv/bin/python -m selfray "$@"; }

data=demo/new-site
[ -f "$data/dataset.json" ] ||
  selfray phantom "$data" --patients 1600 --size 128 --seed 20 --sites D
selfray pretrain demo --data "$data" --out demo/from-scratch
# Continuing asks for smaller steps than beginning: the start is worth keeping.
selfray pretrain demo --data "$data" --out demo/continued --init selfray/phantom \
  --optimizer.learning-rate 4e-3 --teacher.momentum 0.99 1
[ -f demo/evaluation/results.jsonl ] ||
  selfray evaluate demo/continued selfray/phantom demo/from-scratch random:vit_pico/16@128 \
    pixels:pca --data "$data" --out demo/evaluation --tasks classification metadata segmentation
# Fewer drafts of a report than usual: what is kept of four reads nearly as what is kept of ten.
[ -f demo/reports/results.jsonl ] ||
  selfray evaluate demo/continued --data "$data" --out demo/reports --tasks reports \
    --report.candidates 4
selfray summary demo
