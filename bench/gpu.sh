#!/usr/bin/env bash
# Build, check, time and profile the package on a machine with a CUDA device. bench/GPU.md is the manual.
#     bench/gpu.sh pack DIR     before, without a GPU: what the next three take along
#     bench/gpu.sh first OUT    in 6 minutes: every kernel checked; steps, solves, kernels, profiles
#     bench/gpu.sh second OUT   in 5 minutes: steps of other optimizers, device tests
#     bench/gpu.sh third OUT    in 4 minutes: training side by side
#     bench/gpu.sh PART [OUT]   one part in 9 minutes at most:
# gate      every kernel against float64, a process for each operator
# steps     training steps, eager and as CUDA graphs                          -> gpu.jsonl
# solves    batched solves                                                    -> gpu.jsonl
# kernels   kernels over real layer shapes                                    -> kernels.jsonl
# compiled  training steps under torch.compile                                -> gpu.jsonl
# equations Gauss-Newton steps and their phases                               -> gpu.jsonl
# profile   where the time of a step goes                                     -> profile/
# peers     steps of other optimizers over SGD's                              -> peers.jsonl
# train     ResNet-18 on CIFAR-10 and a Transformer on Multi30k, all at once  -> training.jsonl
# check     tests that need a device
# sanitize  compute-sanitizer's four tools over the CUDA and Triton kernels
# Needs torch with CUDA, triton, nvcc and a C++ compiler; no network. Each stage has a limit and a log; one that fails
# costs itself alone. Exits non-zero if any failed. OUT is bench/results, PACK (what `pack` made) runs/pack, DATA_DIR
# PACK/data; LIMIT is another number of seconds. DRY=1 rehearses it all on the CPU, in miniature.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
export PYTHON=${PYTHON:-python3}
python=$PYTHON part=${1-}
case $part in
    pack) exec bench/gpu/pack.sh "${2:?a folder to pack into}" ;;
    first) deadline=345 ;;
    second) deadline=285 ;;
    third) deadline=225 ;;
    gate | steps | solves | kernels | compiled | equations | profile | peers | train | check | sanitize) deadline=525 ;;
    *) sed -n '2,21s/^# \?//p' "$0" >&2 && exit 2 ;;
esac
deadline=${LIMIT:-$deadline}

# slow: what limits are multiplied by
if [[ -n ${DRY-} ]]; then
    device=cpu slow=4
    step_options=(--size small --mode eager --rounds 2)
    solve_options=(--batches 2 --orders 16 --rounds 2)
    kernel_options=(--tiny --rounds 1)
    profile_options=(--size small --mode eager --steps 2)
    peer_options=(--size tiny --rounds 1)
    training_options=(--train-size 80 --epochs 1)
    image_options=(--width 2)
    sentence_options=(--width 1)
else
    device=cuda slow=1
    step_options=(--size gpu --mode eager graphed --rounds 11)
    solve_options=(--dtypes float32 --rounds 9)
    kernel_options=(--quick)
    profile_options=(--size gpu --mode graphed eager)
    peer_options=(--size gpu --rounds 3)
    training_options=(--epochs 8)
    image_options=(--width 64)
    sentence_options=(--width 16)
fi
source bench/gpu/stage.sh
target=$(target) || exit 2
operators=(gram gram_conv gram_embedding gram_hadamard combine combine_conv combine_embedding scale_bias solve)
# Before the other networks: what the steps are made of.
foremost='ResNet-18 CIFAR/.*channels_last|Transformer 6\+6 T=32/|GPT-2'

out=$(mkdir -p "${2:-bench/results}" && cd "${2:-bench/results}" && pwd) work=$PWD/runs/gpu/$part
pack=$(realpath -m "${PACK:-runs/pack}") data=${DATA_DIR:-${PACK:-runs/pack}/data}
logs=$work/logs
rm -rf "$work"/{failed,running,passed}
mkdir -p "$logs" "$work/running"
export PYTHONPATH=.:python:$work/peers${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-16}
export TRITON_CACHE_DIR=/tmp/fngd-triton
# The options in pyproject.toml need plugins that may be missing here.
pytest=("$python" -m pytest -v -o addopts= -p no:cacheprovider)

# Put in place what was packed for this machine.
unpack() {
    if [[ -f $pack/commit ]]; then
        # What was packed is known by its files: the copy may lie in a repository whose HEAD is another commit.
        if sha256sum --check --status "$pack/tree.sha256"; then
            export FNGD_DIRTY=0 FNGD_COMMIT
        elif ! git rev-parse HEAD >/dev/null 2>&1; then
            export FNGD_DIRTY=1 FNGD_COMMIT
        fi
        FNGD_COMMIT=$(<"$pack/commit")
    fi
    if [[ -f $pack/triton.tar.gz ]]; then
        mkdir -p "$TRITON_CACHE_DIR" && tar -xzf "$pack/triton.tar.gz" -C "$TRITON_CACHE_DIR"
    fi
    if [[ -d $pack/wheels && $part =~ second|peers ]]; then
        "$python" -m pip install -q --no-index --no-deps --upgrade --target "$work/peers" "$pack"/wheels/*.whl
    fi
    if [[ -d $pack/cache ]]; then
        mkdir -p "$work/cache" && cp "$pack"/cache/* "$work/cache"
    fi
    if [[ -f $pack/extension/target && $(<"$pack/extension/target") == "$target" ]]; then
        mkdir -p build && cp "$pack"/extension/_C* fngd_kernels && cp "$pack/extension/sources.sha256" build
    fi
}

# Whether the native extension is there with its CUDA part: as packed, as built before, or built now.
extension() {
    local sources=build/sources.sha256
    sha256sum --check --status "$sources" 2>/dev/null && stage extension 60 "$python" -m bench.tools.environment && return
    rm -f "$sources"
    # Headers of torch's own packages, for a toolkit that lacks some.
    CPATH=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13/include${CPATH:+:$CPATH} \
        TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-${target##* }} \
        stage build 150 "$python" setup.py build_ext --inplace || return
    mkdir -p build && sha256sum setup.py csrc/* >"$sources"
    stage extension 60 "$python" -m bench.tools.environment
}

ceilings() {
    nvidia-smi >"$logs/nvidia-smi.txt" 2>&1
    stage ceilings 30 "$python" -m bench.kernels.ceilings --device "$device" --output "$out/ceilings.jsonl" &&
        cat "$logs/ceilings.log"
}

gate() {
    local op
    for op in "${operators[@]}"; do
        stage "gate-$op" 90 "$python" -m bench.kernels --tiny --gate --device "$device" \
            --dtypes bfloat16 float16 float32 --shapes "^$op( with bias)?/" && echo "$op" >>"$work/passed" &
    done
    wait
    if [[ -n ${DRY-} ]]; then
        stage compile 600 "$python" -m bench.gpu.precompile gate quick steps training && cat "$logs/compile.log"
    fi
}

# kernels SECONDS: the operators that passed the gate
kernels() {
    local seconds=$1
    time_kernels $((seconds * 25 / 100)) gram
    time_kernels $((seconds * 40 / 100)) gram_conv
    time_kernels $((seconds * 25 / 100)) combine combine_conv combine_embedding scale_bias
    time_kernels $((seconds * 5 / 100)) gram_embedding gram_hadamard
    time_kernels $((seconds * 5 / 100)) solve
}

# time_kernels SECONDS OPERATOR...: in a process of their own
time_kernels() {
    local seconds=$1 name=kernels-$2 chosen
    shift
    chosen=$(printf "%s\n" "$@" | grep -Fxf "$work/passed" | paste -sd '|')
    if [[ -z $chosen ]]; then
        leave_out "$name" "none of its operators passed the gate"
        return
    fi
    stage "$name" $((seconds + 15)) "$python" -m bench.kernels "${kernel_options[@]}" --device "$device" \
        --shapes "^($chosen)( with bias)?/" --first "$foremost" --seconds "$seconds" \
        --ceilings "$out/ceilings.jsonl" --output "$out/kernels.jsonl"
}

# time_steps NAME SECONDS OPTION...: a network each SECONDS at most, in processes of their own
time_steps() {
    local name=$1 seconds=$2 network
    for network in resnet transformer; do
        stage "$name-$network" "$seconds" "$python" -m bench.steps --device "$device" --network "$network" \
            --seconds $((seconds * 3 / 4)) --output "$out/gpu.jsonl" "${@:3}"
    done
}

solves() {
    stage solves 60 "$python" -m bench.kernels.solves --device "$device" "${solve_options[@]}" --output "$out/gpu.jsonl"
}

# profile SECONDS FOLDER OPTION...: a network each SECONDS at most
profile() {
    local network
    for network in resnet transformer; do
        stage "profile-$network" "$1" "$python" -m bench.steps.profile --device "$device" --network "$network" \
            "${profile_options[@]}" --output "$2" "${@:3}"
    done
}

# peers SECONDS METHOD...: those that decompose matrices, which may take too long, in processes of their own
peers() {
    local method
    time_peers peers "$1" adamw fngd muon
    for method in "${@:2}"; do
        time_peers "peers-$method" "$1" fngd "$method"
    done
}

# time_peers NAME SECONDS METHOD...: over SGD, a network each SECONDS at most
time_peers() {
    local name=$1 seconds=$2 network
    for network in resnet transformer; do
        stage "$name-$network" "$seconds" "$python" -m bench.peers --device "$device" "${peer_options[@]}" \
            --network "$network" --method "${@:3}" --output "$out/peers.jsonl"
    done
}

# Decode the images once, for all that train on them.
decode() {
    stage decode 90 "$python" -c "
from pathlib import Path
from bench import workloads
workloads.load('cifar10', data_dir=Path('$data'), cache_dir=Path('$work/cache'))"
}

# Each method at one preset rate, on the one device at a time: scores count, seconds do not.
train() {
    train_one images sgd 0.1 &
    train_one images adamw 0.001 &
    train_one images fngd 0.1 &
    train_one images fngd-exact 0.1 &
    train_one sentences adamw 0.001 &
    train_one sentences fngd-adamw 0.001 &
    wait
}

# train_one TASK METHOD RATE
train_one() {
    local task=("${image_options[@]}" --data cifar10 --model resnet18 --warmup-epochs 1)
    [[ $1 == sentences ]] && task=("${sentence_options[@]}" --data multi30k --warmup-epochs 2)
    stage "train-$1-$2" 600 "$python" -m bench.train --device "$device" --data-dir "$data" \
        --cache-dir "$work/cache" --batch-size 128 --precision bf16 --seeds 1 "${task[@]}" "${training_options[@]}" \
        --optimizer "$2" --lr "$3" --threads 2 --shared --rows "$out/training.jsonl" --output "$work/studies/$1-$2"
}

# check PROCESSES
check() {
    local files
    mapfile -t files < <(find tests -name 'test_*.py' ! -name test_offline_compile.py)
    has xdist && pytest+=(-n "$1")
    [[ -n ${DRY-} ]] && pytest+=(--collect-only)
    stage tests-device 400 "${pytest[@]}" -m gpu "${files[@]}"
    # These run on the device where there is one, without asking for it.
    stage tests-kernels 400 "${pytest[@]}" tests/kernels/triton_backend \
        --ignore tests/kernels/triton_backend/test_offline_compile.py
}

sanitize() {
    local tool
    local native=(tests/kernels/test_{solve,coefficients,scale_bias,finite}.py)
    if ! command -v compute-sanitizer >/dev/null; then
        leave_out sanitize "no compute-sanitizer"
        return
    fi
    for tool in racecheck synccheck; do
        under "$tool" "$tool" 85 "${pytest[@]}" -m gpu "${native[@]}"
        under "$tool" "$tool-fused" 45 "$python" -m bench.kernels --tiny --gate --dtypes bfloat16
    done
    # Without the caching allocator, which would hide accesses past the end of a tensor and reads of memory that was
    # never written, and which graphs need.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck initcheck; do
        under "$tool" "$tool" 85 "${pytest[@]}" -m gpu -k 'not graph and not capture' "${native[@]}"
        under "$tool" "$tool-fused" 45 "$python" -m bench.kernels --tiny --gate --dtypes bfloat16
    done
}

# under TOOL NAME SECONDS COMMAND...
under() {
    stage "$2" "$3" compute-sanitizer --tool "$1" --error-exitcode 1 "${@:4}"
}

# Figures without the extension would be those of its plain-torch stand-ins.
need_extension() {
    extension || { leave_out "$part" "the native extension is missing" && return 1; }
}

trap finish EXIT
trap 'exit 143' HUP INT TERM
unpack
case $part in
    first)
        ceilings
        extension && built=1
        gate
        archive
        if [[ -n ${built-} ]]; then
            time_steps steps 60 "${step_options[@]}" --base sgd
            archive
            solves
        else
            leave_out steps "the native extension is missing"
        fi
        kernels 90
        archive
        [[ -n ${built-} ]] && profile 45 "$work/profile" --no-traces
        ;;
    second)
        if need_extension; then
            peers 60 kfac shampoo
            archive
            check 12
        fi
        ;;
    gate) gate ;;
    kernels) need_extension && ceilings && gate && kernels 420 ;;
    steps) need_extension && time_steps steps 250 "${step_options[@]}" ;;
    compiled) need_extension && time_steps compiled 250 --size gpu --mode compiled ;;
    equations)
        need_extension && stage equations 500 "$python" -m bench.pinn.gauss_newton --device "$device" --output "$out/gpu.jsonl"
        ;;
    profile) need_extension && profile 250 "$out/profile" --mode graphed eager compiled ;;
    peers) need_extension && peers 120 kfac shampoo soap ;;
    third | train) need_extension && { decode; train; } ;;
    check) need_extension && check 8 ;;
    sanitize) need_extension && sanitize ;;
    solves) need_extension && solves ;;
esac
