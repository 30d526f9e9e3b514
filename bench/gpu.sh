#!/usr/bin/env bash
# Build, gate and time the package on a machine with a CUDA device: bench/gpu.sh [RESULTS_FOLDER]
# Needs torch with CUDA, triton, nvcc and a C++ compiler; no network. Under 10 minutes: each stage has a limit,
# a stage that fails leaves its log and does not stop the others. Exits non-zero if the gate failed.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(mkdir -p "${1:-bench/results}" && cd "${1:-bench/results}" && pwd)
logs=$results/logs
mkdir -p "$logs"
export PYTHONPATH=.:python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-16}
python=${PYTHON:-python3}
gate=passed

# stage NAME SECONDS COMMAND...
stage() {
    local name=$1 seconds=$2 start=$SECONDS status=ok
    shift 2
    timeout "$seconds" "$@" >"$logs/$name.log" 2>&1 || status="FAILED ($?)"
    echo "== $name: $status, $((SECONDS - start)) s, $logs/$name.log"
    [[ $status == ok ]] || tail -n 15 "$logs/$name.log"
    [[ $status == ok ]]
}
has() { "$python" -c "import $1" 2>/dev/null; }

"$python" -c 'import torch; assert torch.cuda.is_available(); print(torch.cuda.get_device_name())' || exit 2
if [[ -z ${TORCH_CUDA_ARCH_LIST:-} ]]; then
    # Only this machine's architecture: a third of the build.
    TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    export TORCH_CUDA_ARCH_LIST
fi
stage build 130 "$python" setup.py build_ext --inplace

# Every kernel in every dtype against float64, at tiny sizes; needs nothing but torch and triton.
stage gate 100 "$python" -m bench.kernels --tiny --gate --dtypes bfloat16 float16 float32 || gate=failed
if has pytest; then
    # The options in pyproject.toml need plugins that may be missing here.
    pytest=("$python" -m pytest -q -o addopts= -p no:cacheprovider)
    # Compiling is most of it: a process for each file.
    find tests/fused -name 'test_*.py' ! -name test_offline_compile.py -print0 >"$logs/fused-tests"
    stage tests-fused 150 xargs -0 -n 1 -P 12 -a "$logs/fused-tests" "${pytest[@]}" || gate=failed
    mapfile -t marked < <(grep -lr --include='test_*.py' 'mark\.gpu' tests)
    if ((${#marked[@]})); then
        stage tests-gpu 60 "${pytest[@]}" -m gpu "${marked[@]}" || gate=failed
    fi
fi
if command -v compute-sanitizer >/dev/null; then
    # Without the caching allocator, which would hide accesses past the end of a tensor.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage memcheck 45 compute-sanitizer --tool memcheck --error-exitcode 1 \
        "$python" -m bench.kernels --tiny --gate --dtypes bfloat16 || gate=failed
fi

# At least 55 of 600 seconds: the limits above sum to 485.
left=$((540 - SECONDS))
stage kernels $((left + 20)) "$python" -m bench.kernels --quick --seconds "$left" --output "$results/kernels.jsonl"
sed -n '/ cases, /,$p' "$logs/kernels.log"
if has matplotlib; then
    stage plots 30 "$python" -m bench.kernels.plot "$results/kernels.jsonl" "$results/plots"
fi
echo "gate $gate, $SECONDS s in all"
[[ $gate == passed ]]
