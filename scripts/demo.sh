#!/usr/bin/env bash
# The main job on synthetic radiographs, twice: pre-training from scratch in a few minutes, and
# continuing from the encoder that this project ships on the unlabelled images of a new site.
# Interrupted, the same command goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
selfray() { .venv/bin/python -m selfray "$@"; }

data=demo/new-site
[ -f "$data/dataset.json" ] ||
  selfray phantom "$data" --patients 1200 --size 128 --seed 20 --sites D
selfray pretrain demo --data "$data" --out demo/from-scratch
selfray pretrain demo-continue --data "$data" --init selfray/phantom --out demo/continued
[ -f demo/evaluation/results.jsonl ] ||
  selfray evaluate demo/continued demo/from-scratch selfray/phantom random:vit_nano/16@96 \
    pixels:pca --data "$data" --out demo/evaluation
selfray summary demo
