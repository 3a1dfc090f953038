#!/usr/bin/env bash
# Train the weights `brain` from label maps alone: bash train_brain.sh DATASET_DIR OUTPUT_DIR
# Attention from known correspondences, a U-Net on patches that are aligned already, and both put together.
set -euo pipefail
dataset=$(realpath "$1")
output=$(realpath -m "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python docs/results/brain_attention.py "$dataset" "$output/attention.pt" --steps 3000
python -m monai.bundle run training --config_file "['configs/train.json','configs/brain.json']" \
    --dataset_dir "$dataset" --output_dir "$output/unet" --seed 3 --epochs 60 --iterations 50 --val_pairs 8 --val_interval 5
python docs/results/brain_network.py "$output/attention.pt" "$output/unet/model.pt" "$output/model.pt"
