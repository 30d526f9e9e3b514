#!/usr/bin/env bash
# Build, check, time and profile the package on a machine with a CUDA device:
#     bench/gpu.sh kernels|steps|compiled|equations|profile|check|sanitize|all [RESULTS_FOLDER]
# kernels  each kernel against float64, then timed over real layer shapes        -> kernels.jsonl
# steps    training steps, eager and as CUDA graphs; batched solves               -> gpu.jsonl
# compiled training steps under torch.compile                                    -> gpu.jsonl
# equations Gauss-Newton steps and their phases                                  -> gpu.jsonl
# profile  where the time of a step goes: tables and Chrome traces               -> profile/
# check    tests that need a device
# sanitize compute-sanitizer's memcheck, racecheck, synccheck and initcheck over the CUDA and Triton kernels
# Needs torch with CUDA, triton, nvcc and a C++ compiler; no network. A part takes 9 minutes at most: each stage
# has a limit, one that fails leaves its log and does not stop the others. Exits non-zero if anything failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
case ${1-} in
    kernels | steps | compiled | equations | profile | check | sanitize) parts=("$1") ;;
    all) parts=(kernels steps compiled equations profile check sanitize) ;;
    *) sed -n '2,13s/^# \?//p' "$0" >&2 && exit 2 ;;
esac
results=$(mkdir -p "${2:-bench/results}" && cd "${2:-bench/results}" && pwd)
logs=$results/logs
mkdir -p "$logs"
export PYTHONPATH=.:python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-16}
python=${PYTHON:-python3}
# The options in pyproject.toml need plugins that may be missing here.
pytest=("$python" -m pytest -q -o addopts= -p no:cacheprovider)
outcome=passed

# stage NAME SECONDS COMMAND...
stage() {
    local name=$1 seconds=$2 start=$SECONDS status=ok
    shift 2
    timeout "$seconds" "$@" >"$logs/$name.log" 2>&1 || status="FAILED ($?)"
    echo "== $name: $status, $((SECONDS - start)) s, $logs/$name.log"
    [[ $status == ok ]] && return
    tail -n 15 "$logs/$name.log"
    outcome=failed
    return 1
}
has() { "$python" -c "import $1" 2>/dev/null; }

build() {
    local sources=build/sources.sha256
    mkdir -p build
    sha256sum --check --status "$sources" 2>/dev/null && has fngd_kernels._C && return
    stage build 130 "$python" setup.py build_ext --inplace && sha256sum setup.py csrc/* >"$sources"
}

kernels() {
    local left
    # Every kernel in every dtype against float64, at tiny sizes; needs nothing but torch and triton.
    stage gate 100 "$python" -m bench.kernels --tiny --gate --dtypes bfloat16 float16 float32
    if has pytest; then
        # Compiling is most of it: a process for each file.
        find tests/fused -name 'test_*.py' ! -name test_offline_compile.py -print0 >"$logs/fused-tests"
        stage tests-fused 150 xargs -0 -n 1 -P 12 -a "$logs/fused-tests" "${pytest[@]}"
    fi
    # At least 110 of 540 seconds.
    left=$((490 - SECONDS + begun))
    stage kernels $((left + 20)) "$python" -m bench.kernels --quick --seconds "$left" \
        --output "$results/kernels.jsonl"
    sed -n '/ cases, /,$p' "$logs/kernels.log"
    if has matplotlib; then
        stage plots 30 "$python" -m bench.kernels.plot "$results/kernels.jsonl" "$results/plots"
    fi
}

steps() {
    time_steps 170 eager graphed
    stage solves 60 "$python" -m bench.solves --device cuda --output "$results/gpu.jsonl"
    cat "$logs/solves.log"
}

compiled() { time_steps 200 compiled; }

equations() {
    stage gauss-newton 300 "$python" -m bench.gauss_newton --device cuda --output "$results/gpu.jsonl"
    cat "$logs/gauss-newton.log"
}

# time_steps SECONDS MODE...: a network each SECONDS at most
time_steps() {
    local seconds=$1 name network
    shift
    # A process for each network: a kernel that faults takes its process with it, not the other's figures.
    for network in resnet transformer; do
        name=steps-$network-$1
        stage "$name" "$seconds" "$python" -m bench.steps --device cuda --size gpu --network "$network" \
            --mode "$@" --seconds $((seconds - 40)) --output "$results/gpu.jsonl"
        cat "$logs/$name.log"
    done
}

profile() {
    local mode network seconds=45
    for mode in eager graphed compiled; do
        [[ $mode == compiled ]] && seconds=115
        for network in resnet transformer; do
            stage "profile-$network-$mode" "$seconds" "$python" -m bench.profile --device cuda --size gpu \
                --network "$network" --mode "$mode" --output "$results/profile"
        done
    done
}

check() {
    local marked=()
    if ! has pytest; then
        echo "== check: needs pytest, which is missing"
        outcome=failed
        return
    fi
    mapfile -t marked < <(grep -lr --include='test_*.py' 'mark\.gpu' tests)
    ((${#marked[@]})) && stage tests-gpu 400 "${pytest[@]}" -m gpu "${marked[@]}"
}

sanitize() {
    local tool
    local native=(tests/test_solve.py tests/test_coefficients.py tests/test_scaling.py tests/test_finite.py)
    if ! command -v compute-sanitizer >/dev/null || ! has pytest; then
        echo "== sanitize: needs compute-sanitizer and pytest"
        outcome=failed
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
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

# under TOOL NAME SECONDS COMMAND...
under() {
    local tool=$1 name=$2 seconds=$3
    shift 3
    stage "$name" "$seconds" compute-sanitizer --tool "$tool" --error-exitcode 1 "$@"
}

"$python" -c 'import torch; assert torch.cuda.is_available(); print(torch.cuda.get_device_name())' || exit 2
if [[ -z ${TORCH_CUDA_ARCH_LIST:-} ]]; then
    # Only this machine's architecture: a third of the build.
    TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    export TORCH_CUDA_ARCH_LIST
fi
begun=0
build
for part in "${parts[@]}"; do
    "$part"
    begun=$SECONDS
done
echo "$outcome, $SECONDS s in all"
[[ $outcome == passed ]]
