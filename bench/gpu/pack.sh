#!/usr/bin/env bash
# Prepare, on a machine without a GPU, what bench/gpu.sh first and second take along: bench/gpu.sh pack DIR
# PYTHON   an interpreter with the very versions of Python, torch and triton of the target, and nvcc of its CUDA
# DATA_DIR cifar10-jpeg.tar.gz (or the published archive) and multi30k/*.gz
# KFAC     a source tree of kfac-pytorch, which no package index has
# What is missing is named and left out: it is built there, or its figures are not taken.
set -euo pipefail
pack=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
export PYTHONPATH=.:python PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=/tmp/fngd-triton TORCH_CUDA_ARCH_LIST=9.0
device=cpu most=$((60 << 20)) log=$pack.log
source bench/gpu/stage.sh

# part NAME FUNCTION: say what was packed, or that it was not; the first command that fails ends it
part() {
    local name=$1 start=$SECONDS status
    set +e
    (
        set -e
        "$2"
    ) >"$log" 2>&1
    status=$?
    set -e
    if ((status == 0)); then
        echo "$name: $((SECONDS - start)) s"
    else
        echo "$name: LEFT OUT"
        tail -n 8 "$log"
    fi
}

extension() {
    local folder=$pack/extension suffix
    rm -rf "$folder"
    suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    "$python" setup.py build_ext --inplace
    "$python" -m bench.tools.environment
    mkdir -p "$folder"
    cp "fngd_kernels/_C$suffix" "$folder"
    sha256sum setup.py csrc/* >"$folder/sources.sha256"
    target >"$folder/target"
}

kernels() {
    rm -rf "$TRITON_CACHE_DIR"
    "$python" -m bench.gpu.precompile gate quick steps training
    # Triton needs the machine code and its description only.
    find "$TRITON_CACHE_DIR" \( -name '*.ttir' -o -name '*.ttgir' -o -name '*.llir' -o -name '*.source' \) -delete
    tar -czf "$pack/triton.tar.gz" -C "$TRITON_CACHE_DIR" .
}

wheels() {
    rm -rf "$pack/wheels"
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$pack/wheels" pytorch_optimizer
}

kfac() {
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$pack/wheels" "${KFAC:?a source tree of kfac-pytorch}"
}

data() {
    : "${DATA_DIR:?the folder of the data sets}"
    mkdir -p "$pack/data/multi30k"
    cp "$DATA_DIR"/cifar-10-python.tar.gz "$pack/data" || cp "$DATA_DIR"/cifar10-jpeg.tar.gz "$pack/data"
    cp "$DATA_DIR"/multi30k/*.gz "$pack/data/multi30k"
}

tokenizer() {
    "$python" -c "
from pathlib import Path
from bench import workloads
workloads.load('multi30k', data_dir=Path('$pack/data'), cache_dir=Path('$pack/cache'))"
}

# The copy there comes without its history: which commit it is, and what to tell a changed one by.
commit() {
    local tree
    tree=$(mktemp -d)
    git rev-parse --short=12 HEAD >"$pack/commit"
    git archive HEAD | tar -x -C "$tree"
    (cd "$tree" && find . -type f ! -path './bench/results/*' -print0 | xargs -0 sha256sum) >"$pack/tree.sha256"
    rm -r "$tree"
}

part extension extension
part kernels kernels
part wheels wheels
part kfac kfac
part data data
part tokenizer tokenizer
part commit commit
rm -f "$log"
du -sh "$pack"/* | sed 's/^/  /'
size=$(du -sb "$pack" | cut -f1)
((size <= most)) || { echo "$((size >> 20)) MiB, over $((most >> 20))" && exit 1; }
