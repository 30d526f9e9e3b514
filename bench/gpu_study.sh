#!/usr/bin/env bash
# The studies of training and of all optimizers' steps on a machine with a CUDA device, a part a call:
#     bench/gpu_study.sh steps|cifar|translation|noise|report [RESULTS_FOLDER]
# steps        a step of every optimizer over SGD's: ResNet-18 and a 6+6 Transformer     -> peers.jsonl
# cifar        ResNet-18 on CIFAR-10: every optimizer tuned alike, time and epochs       -> training.jsonl
# translation  Transformer base on Multi30k: AdamW over its rates beside FNGD            -> training.jsonl
# noise        ResNet-18 on CIFAR-10 with 20 % and 40 % of the training labels replaced  -> training.jsonl
# report       REPORT.md and its pictures from both files
# RESULTS_FOLDER is runs/gpu_study; rows that are to stay are appended to the files of bench/results.
# A part stops after $SECONDS_A_PART (500) and is called again until it prints its table: a finished run is never
# repeated, also on another machine, as long as its two .jsonl files come along. Data is read from $DATA_DIR (runs/data:
# cifar10-jpeg.tar.gz or the published archive, multi30k/*.gz). Libraries of peers are taken from PYTHONPATH; those
# that are missing are named and left out. $DEVICE and $SIZE=small make the same calls in miniature.
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1-}
results=$(mkdir -p "${2:-runs/gpu_study}" && cd "${2:-runs/gpu_study}" && pwd)
data=${DATA_DIR:-runs/data}
seconds=${SECONDS_A_PART:-500}
device=${DEVICE:-cuda}
size=${SIZE:-gpu}
python=${PYTHON:-python3}
export PYTHONPATH=.:python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# study NAME OPTION...: goes on where the last call stopped
study() {
    local name=$1 left=$((seconds - SECONDS))
    shift
    ((left > 0)) || { echo "no time left for $name: call again" && return; }
    "$python" -m bench.train --device "$device" --data-dir "$data" --rows "$results/training.jsonl" --resume \
        --output "$results/studies/$name" --cache-dir "$results/cache" --seconds "$left" "$@"
}

if [[ $size == gpu ]]; then
    common=(--batch-size 128 --epochs 15 --precision bf16 --seeds 2)
    images=(--data cifar10 --model resnet18 --width 64 --warmup-epochs 1 "${common[@]}")
    sentences=(--data multi30k --width 16 --warmup-epochs 2 "${common[@]}")
    rounds=15
else
    common=(--batch-size 32 --epochs 1 --seeds 1 --train-size 80)
    images=(--data cifar10 --model resnet18 --width 2 "${common[@]}")
    sentences=(--data multi30k --width 1 "${common[@]}")
    rounds=2
fi
sgd=0.03,0.1,0.3
adam=0.0003,0.001,0.003

case $part in
    steps)
        "$python" -m bench.peers --device "$device" --size "${size/small/tiny}" --rounds "$rounds" \
            --output "$results/peers.jsonl"
        ;;
    cifar)
        study cifar10 "${images[@]}" --lr "sgd=$sgd" --lr "adamw=$adam" --lr "fngd=$sgd" --lr "fngd-exact=$sgd" \
            --lr "muon=$adam" --lr "soap=$adam" --lr "kfac=$sgd" --optimizer sgd --optimizer adamw \
            --optimizer fngd --optimizer fngd-exact --optimizer muon --optimizer soap --optimizer kfac
        ;;
    translation)
        study multi30k "${sentences[@]}" --lr adamw=0.0001,0.0003,0.001,0.003,0.01 \
            --lr sgd=0.03,0.1,0.3,1,3 --lr fngd=0.03,0.1,0.3,1,3 --lr fngd-adamw=0.0001,0.0003,0.001,0.003,0.01 \
            --optimizer adamw --optimizer fngd-adamw --optimizer fngd --optimizer sgd
        ;;
    noise)
        for fraction in 0.2 0.4; do
            study "cifar10-noise-$fraction" "${images[@]}" --label-noise "$fraction" --lr "sgd=$sgd" \
                --lr "fngd=$sgd" --lr "fngd-exact=$sgd" --optimizer sgd --optimizer fngd --optimizer fngd-exact
        done
        ;;
    report) "$python" -m bench.report --results "$results" ;;
    *) sed -n '2,14s/^# \?//p' "$0" >&2 && exit 2 ;;
esac
