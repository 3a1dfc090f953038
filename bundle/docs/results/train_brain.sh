#!/usr/bin/env bash
# Train a network for brain MR from label maps alone: bash train_brain.sh DATASET_DIR OUTPUT_DIR
# Attention from known correspondences: the weights `brain`. Then what is to refine it, of which none is shipped yet: a
# U-Net at half resolution, and a second one at full resolution.
set -euo pipefail
dataset=$(realpath "$1")
output=$(realpath -m "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python docs/results/brain_attention.py "$dataset" "$output/attention.pt" --steps 3000
python docs/results/brain_start.py "$output/attention.pt" "$output/model.pt" --nesting attention
python -m monai.bundle run training --config_file "['configs/train.json','configs/brain.json','configs/brain_coarse.json']" \
    --dataset_dir "$dataset" --output_dir "$output/coarse" --seed 2 --epochs 60 --iterations 50 --val_pairs 8 --val_interval 5 \
    --learning_rate 0.0006 --train_attention False --pretrained "$output/attention.pt"
python docs/results/brain_start.py "$output/coarse/model.pt" "$output/start.pt"
python -m monai.bundle run training --config_file "['configs/train.json','configs/brain.json']" \
    --dataset_dir "$dataset" --output_dir "$output/fine" --seed 1 --epochs 20 --iterations 50 --val_pairs 8 --val_interval 5 \
    --pretrained "$output/start.pt"
