# shellcheck shell=bash disable=SC2154
# Stages of bench/gpu.sh: each has a limit and a log, and costs itself alone when it fails. To be sourced.
# $deadline: the second of this script after which nothing begins and nothing goes on; $slow: a factor for all limits
# $out: rows, and logs.tar.gz with all else, which is collected in $work

# stage NAME SECONDS COMMAND...: whether COMMAND succeeded within SECONDS and the deadline
stage() {
    local name=$1 limit=$(($2 * slow)) left=$((deadline * slow - SECONDS)) start=$SECONDS status=0
    shift 2
    ((limit <= left)) || limit=$left
    if ((limit < 1)); then
        leave_out "$name" "no time left"
        return 1
    fi
    # In the background, so that a signal to this script is not kept waiting.
    timeout -k 10 "$limit" "$@" >"$logs/$name.log" 2>&1 &
    echo $! >"$work/running/$name"
    wait $! || status=$?
    rm "$work/running/$name"
    if ((status == 0)); then
        echo "== $name: ok, $((SECONDS - start)) s"
    else
        echo "== $name: FAILED ($status), $((SECONDS - start)) s"
        tail -n 12 "$logs/$name.log"
        echo "$name" >>"$work/failed"
    fi
    return "$status"
}

# leave_out NAME REASON
leave_out() {
    echo "== $1: left out, $2"
    echo "$1" >>"$work/failed"
}

# Pack logs and profiles into one file, whole or not at all: what lies there when this script is killed is complete.
archive() {
    tar -czf "$work.tar.gz" -C "$work" --exclude='*.pt' --exclude=./{cache,peers,running} . &&
        mv "$work.tar.gz" "$out/logs.tar.gz"
}

# What is done last, after a signal as well.
finish() {
    local status=$?
    trap - EXIT
    cat "$work/running"/* 2>/dev/null | xargs kill 2>/dev/null
    archive
    "$python" -m bench.report.digest "$out"
    if [[ -s $work/failed ]]; then
        echo "failed: $(sort -u "$work/failed" | tr '\n' ' ')"
        ((status > 128)) || status=1
    fi
    echo "$SECONDS s in all"
    exit "$status"
}

# What an extension is built for: versions, then the device's architecture, Hopper's where $device is the CPU.
target() {
    "$python" -c "
import sys, torch
major, minor = (9, 0)
if '$device' == 'cuda':
    assert torch.cuda.is_available(), 'no CUDA device'
    major, minor = torch.cuda.get_device_capability()
print(sys.implementation.cache_tag, torch.__version__, f'{major}.{minor}')"
}

has() { "$python" -c "import $1" 2>/dev/null; }
