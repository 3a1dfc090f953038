#!/usr/bin/env bash
# Train the weights `vessels` as they were trained: bash train_vessels.sh DATASET_DIR OUTPUT_DIR
# Three stages, each starting from the best weights of the one before. 2,000 steps of four pairs.
set -euo pipefail
dataset=$(realpath "$1")
output=$(realpath -m "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

stage() { # name, then overrides
    local name=$1
    shift
    python -m monai.bundle run training --config_file "['configs/train.json','configs/vessels.json']" --dataset_dir "$dataset" \
        --output_dir "$output/$name" "$@"
}

# 1. From scratch.
stage 1
# 2. More diffusion.
stage 2 --epochs 8 --learning_rate 0.0001 --regularity_weight 0.5 --seed 1 --pretrained "$output/1/model.pt"
# 3. GradICON as well: it halves the folded cells, and Dice rises.
stage 3 --epochs 8 --learning_rate 0.0001 --regularity_weight 0.5 --consistency_weight 1 --seed 2 --pretrained "$output/2/model.pt"
