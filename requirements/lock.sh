#!/usr/bin/env bash
# Lock pyproject.toml's development set for every supported Python and platform, with the sha256 of each file:
#     requirements/lock.sh             keep the versions that still fit
#     requirements/lock.sh --upgrade   take the newest
# torch.txt is torch and what its CUDA builds need, dev.txt everything else, torch-cpu.txt kept by hand. Needs uv.
set -euo pipefail
cd "$(dirname "$0")"
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
# The pins without their hashes, which uv would take over unseen.
sed -n 's/^\([a-z].*==.*\) \\$/\1/p' torch.txt dev.txt >"$folder/lock"
sed -n 's/^\(torch==.*\)+cpu .*/\1/p' torch-cpu.txt >"$folder/constraints"
uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-header --no-annotate \
    --extra dev --constraint "$folder/constraints" --output-file "$folder/lock" "$@" ../pyproject.toml
for part in torch dev; do
    echo "# Written by requirements/lock.sh, which also renews it." >$part.txt
done
awk '/^[a-z]/ { part = /^(torch==|cuda-|nvidia-)/ ? "torch.txt" : "dev.txt" } { print >> part }' "$folder/lock"
