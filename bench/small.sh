#!/usr/bin/env bash
# Every workload end to end in miniature, in a few minutes on two CPU cores:
#     bench/small.sh [DATA_DIR]
# Without DATA_DIR: step times of all optimizers on random data, training on digits with and without label noise.
# With it, CIFAR-10 and Multi30k as well. Results, pictures and REPORT.md go to runs/small.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1-}
out=runs/small
python=${PYTHON:-python3}
rm -rf "$out"

train() {
    local name=$1
    shift
    "$python" -m bench.train --output "$out/$name" --rows "$out/training.jsonl" --seeds 1 --threads 1 "$@"
}

"$python" -m bench.peers --size tiny --rounds 2 --output "$out/peers.jsonl"
train digits --optimizer all --epochs 3 --width 4 --lr sgd=0.03 --lr adamw=0.01
train noise --epochs 3 --width 4 --lr 0.03 --label-noise 0.4
if [[ -n $data ]]; then
    train cifar10 --data cifar10 --data-dir "$data" --model resnet18 --width 16 --train-size 2000 --epochs 1 \
        --batch-size 128 --lr sgd=0.1 --lr fngd=0.1 --optimizer sgd --optimizer fngd
    train multi30k --data multi30k --data-dir "$data" --width 2 --train-size 500 --epochs 2 --lr 0.003 \
        --optimizer adamw --optimizer fngd-adamw
fi
"$python" -m bench.report --results "$out"
