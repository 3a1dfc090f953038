#!/usr/bin/env bash
# Train a network for brain MR from label maps alone: bash train_brain.sh DATASET_DIR OUTPUT_DIR
# Two stages: at half resolution from scratch, then a second U-Net at full resolution on top, the rest kept.
set -euo pipefail
dataset=$(realpath "$1")
output=$(realpath -m "$2")
results=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$results/../.."

stage() { # name and configs, then overrides
    local name=$1 configs=$2
    shift 2
    python -m monai.bundle run training --config_file "['configs/train.json','configs/brain.json'$configs]" --dataset_dir "$dataset" \
        --output_dir "$output/$name" --seed 1 "$@"
}

stage coarse ",'configs/brain_coarse.json'" --epochs 50 --iterations 50 --val_pairs 8 --val_interval 5 --learning_rate 0.0006 --warmup_epochs 8
python "$results/brain_start.py" "$output/coarse/model.pt" "$output/start.pt"
stage fine "" --pretrained "$output/start.pt" --epochs 20 --iterations 50 --val_pairs 8 --val_interval 5
