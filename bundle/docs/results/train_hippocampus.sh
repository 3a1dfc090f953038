#!/usr/bin/env bash
# Train the weights `hippocampus` as they were trained: bash train_hippocampus.sh DATASET_DIR OUTPUT_DIR
# Four stages, each starting from the last weights of the one before. About 4,000 steps of one pair.
set -euo pipefail
dataset=$(realpath "$1")
output=$(realpath -m "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

stage() { # name, then overrides
    local name=$1
    shift
    python -m monai.bundle run training --config_file "['configs/train.json','configs/deck.json']" --dataset_dir "$dataset" \
        --output_dir "$output/$name" --val_pairs 16 --val_interval 4 "$@"
}

# 1. End to end from scratch under diffusion, with a learning rate that hardly decays yet.
stage 1 --epochs 9 --lr_scheduler#lr_lambda#epochs 40 --iterations 50 --regularity_weight 0.5 --consistency_weight 0
# 2. The same run under more diffusion and GradICON.
mkdir -p "$output/2" && cp "$output/1/checkpoint.pt" "$output/2/"
stage 2 --epochs 21 --lr_scheduler#lr_lambda#epochs 40 --iterations 50 --regularity_weight 1.5 --consistency_weight 1 \
    --resume True
# 3. The refinements alone, the attention kept.
stage 3 --epochs 19 --lr_scheduler#lr_lambda#epochs 30 --iterations 80 --regularity_weight 1.0 --learning_rate 0.0005 --train_attention False --seed 1 \
    --pretrained "$output/2/checkpoint.pt"
# 4. End to end again, with a wider window, the learning rate going to zero.
stage 4 --epochs 30 --iterations 50 --regularity_weight 1.0 --window_sigma 4.0 --seed 2 --pretrained "$output/3/checkpoint.pt"
