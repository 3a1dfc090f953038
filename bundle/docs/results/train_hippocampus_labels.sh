#!/usr/bin/env bash
# Train the weights `hippocampus_labels` as they were trained: bash train_hippocampus_labels.sh DATASET_DIR OUTPUT_DIR
# Stages from the shipped `hippocampus` on, with the labels of the training subjects in the loss. The first two saw flips
# alone and were stopped before their learning rate was down; the last two both go on from the third, and their average
# is what is shipped, in half precision (`equireg.weights.save_weights`).
set -euo pipefail
dataset=$(realpath "$1")
output=$(realpath -m "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
flips="[{'_target_':'RandAxisFlipd','keys':['moving','fixed','moving_label','fixed_label'],'prob':0.5}]"

stage() { # name, weights to start from, then overrides
    local name=$1 start=$2
    shift 2
    python -m monai.bundle run training --config_file "['configs/train.json','configs/deck.json','configs/labels.json']" \
        --dataset_dir "$dataset" --output_dir "$output/$name" --num_labels 2 --autocast bfloat16 --iterations 100 \
        --val_pairs 16 --pretrained "$start" "$@"
}

stage 1 hippocampus --epochs 24 --lr_scheduler#lr_lambda#epochs 30 --val_interval 3 --label_weight 1 --learning_rate 0.0005 --seed 3 \
    --train#random_transforms "$flips"
stage 2 "$output/1/model.pt" --epochs 37 --lr_scheduler#lr_lambda#epochs 40 --val_interval 4 --learning_rate 0.0005 --seed 4 \
    --train#random_transforms "$flips"
stage 3 "$output/2/model.pt" --epochs 20 --val_interval 2 --learning_rate 0.0004 --regularity_weight 0.6 --seed 5
stage 4 "$output/3/model.pt" --epochs 42 --val_interval 3 --learning_rate 0.0004 --regularity_weight 0.4 \
    --max_gradient_norm 20 --seed 6
stage 5 "$output/3/model.pt" --epochs 36 --val_interval 3 --learning_rate 0.0004 --regularity_weight 0.4 \
    --max_gradient_norm 20 --seed 7 --train#random_transforms#0#prob 0
python -c "import sys; from scripts.weights import average_weights; average_weights(sys.argv[2:], sys.argv[1])" \
    "$output/model.pt" "$output/4/model.pt" "$output/5/model.pt"
