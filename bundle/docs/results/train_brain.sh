#!/usr/bin/env bash
# Train the weights `brain` from label maps alone, from known correspondences: bash train_brain.sh DATASET_DIR OUTPUT_DIR
set -euo pipefail
dataset=$(realpath "$1")
output=$(realpath -m "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python docs/results/brain_attention.py "$dataset" "$output/model.pt" --steps 3000
