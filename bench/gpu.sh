#!/usr/bin/env bash
# What a bare GPU machine without network can tell about this checkout: its environment, the test suite on CUDA, a
# memory sanitizer over every kernel, and the benchmark of every op. Leaves DIR/gpu.log and DIR/gpu.jsonl, and in them
# whatever there is when a step fails or runs out of time; the next step runs all the same.
#
#     bash bench/gpu.sh [--dry-run] [--out DIR] [--budget SECONDS]
#
# --dry-run walks the same steps on the CPU, over a subset of the tests and the quick benchmark.
# Environment: PYTHON (python3), WHEELS (wheels, filled by `make gpu-wheels`), and STEP_ENVIRONMENT, STEP_SUITE,
# STEP_SANITIZER, STEP_BENCH: a command line to run in place of a step's own.
# Exit status: 0 when no step failed (a skipped one has not), 1 when one did, 2 when nothing could start.
set -uo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
}

root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
out=$root/out/gpu
budget=540
dry_run=0
while (($#)); do
  case $1 in
    --dry-run) dry_run=1 ;;
    --out | --budget)
      (($# > 1)) || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
      if [[ $1 == --out ]]; then out=$2; else budget=$2; fi
      shift
      ;;
    -h | --help) usage; exit 0 ;;
    *) echo "gpu.sh: $1 is no option; see --help" >&2; exit 2 ;;
  esac
  shift
done
[[ $budget =~ ^[1-9][0-9]*$ ]] || { echo "gpu.sh: --budget is $budget; accepted is a number of seconds" >&2; exit 2; }

# Paths as the caller meant them, before the directory changes; and the interpreter itself rather than a wrapper script,
# since the sanitizer watches the process that it starts.
PYTHON=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)') || { echo "gpu.sh: no Python" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$root" || exit 2
WHEELS=${WHEELS:-wheels}
DEPS=$(mktemp -d) || exit 2
log=$out/gpu.log
JSONL=$out/gpu.jsonl
export PYTHON WHEELS DEPS JSONL
export PYTHONPATH="$PWD:$DEPS${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 # what was printed before a crash or a kill must be in the log
unset TRITON_INTERPRET
rm -f "$log" "$JSONL"

say() { echo "$*" | tee -a "$log"; }

# --- running a step -------------------------------------------------------------------------------------------------

grace=10 # seconds between asking a step to stop (pytest then reports its failures so far) and killing it
began=$SECONDS
deadline=$((SECONDS + budget - grace))
weights_left=100
failed=0
table=()

finish() {
  say ""
  say "$(printf '%-14s %7s  %s' step seconds status)"
  ((${#table[@]})) && say "$(printf '%s\n' "${table[@]}")"
  say "$(printf '%-14s %7d  %s' total $((SECONDS - began)) "log: $log")"
  if [[ -s $JSONL ]]; then say "$(wc -l <"$JSONL") results: $JSONL"; else say "no results"; fi
  rm -rf "$DEPS"
}
trap finish EXIT

# step NAME WEIGHT COMMAND: a step may take its weight's share of the time that is left, so that what one does not use
# falls to the next. A command that exits 77 has been skipped, and its last line says why.
step() {
  local name=$1 weight=$2 command=$3 start=$SECONDS before rc status
  local limit=$(((deadline - SECONDS) * weight / weights_left))
  weights_left=$((weights_left - weight))
  ((limit > 0)) || limit=1
  say ""
  say "=== $name (at most $limit s)"
  before=$(wc -l <"$log")
  { # the outer redirection is for the shell's own word on a killed child
    timeout --signal=INT --kill-after=$grace "$limit" bash -c "trap 'exit 130' INT; $command" >>"$log" 2>&1 </dev/null
  } 2>/dev/null
  rc=$?
  case $rc in
    0) status=passed ;;
    77) status=$(tail -n 1 "$log") ;;
    *) status="failed: exit status $rc" ;;
  esac
  if ((rc == 124 || (rc == 137 && SECONDS - start >= limit))); then status="failed: stopped after $limit s"; fi
  if [[ $status == failed* ]]; then
    failed=1
    tail -n "+$((before + 1))" "$log" | tail -n 20
  fi
  say "--- $name: $status"
  table+=("$(printf '%-14s %7d  %s' "$name" $((SECONDS - start)) "$status")")
}

# --- the steps ------------------------------------------------------------------------------------------------------

# Nothing that is there is replaced, least of all torch and triton; but for numpy, where it is too new for this triton.
dependencies() {
  local lacking name file found=() absent=()
  lacking=$("$PYTHON" - <<'END'
import importlib.metadata
import importlib.util

# What one package needs comes with it: the ones already there may be too old for it.
GROUPS = (
    ("pytest", "pluggy", "iniconfig", "packaging", "pygments"),
    ("xdist", "execnet"),
    ("hypothesis", "sortedcontainers"),
    ("safetensors",),
    ("numpy",),
    ("pillow",),
    ("tqdm",),
    ("mlxtend",),
)
MODULES = {"pillow": "PIL"}
FILES = {"xdist": "pytest_xdist"}


def version(package):
    try:
        return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


for group in GROUPS:
    lacks = any(importlib.util.find_spec(MODULES.get(name, name)) is None for name in group)
    if group == ("numpy",) and version("triton") and version("numpy"):
        lacks = lacks or (version("triton") < (3, 7) and version("numpy") >= (2, 4))
    if lacks:
        print(*(FILES.get(name, name) for name in group), sep="\n")
END
  ) || return
  for name in $lacking; do
    file=$(compgen -G "$WHEELS/${name}-*.whl") && found+=("$file") || absent+=("$name")
  done
  echo "lacking: ${lacking//$'\n'/ }"
  local install=("$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile
    --no-cache-dir --root-user-action=ignore --target "$DEPS")
  if ((${#found[@]})) && ! "${install[@]}" "${found[@]}"; then
    for file in "${found[@]}"; do # one that does not fit this machine must not keep the others out
      "${install[@]}" --upgrade "$file" || absent+=("$(basename "$file")")
    done
  fi
  ((${#absent[@]})) || return 0
  echo "incomplete: no wheel for ${absent[*]}"
  return 77
}

environment() {
  git log -1 --format='commit: %H' 2>/dev/null
  "$PYTHON" -m dyreg_triton env || return
  nvidia-smi --query-gpu=driver_version,clocks.max.sm,clocks.max.mem --format=csv,noheader 2>/dev/null
  [[ $DRY_RUN == 1 ]] && return 0
  # the rest would pass on the CPU just as well
  "$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no GPU here")'
}

suite() {
  local pytest=("$PYTHON" -m pytest -p no:cacheprovider --tb=short -rfE)
  if [[ $DRY_RUN == 1 ]]; then
    "${pytest[@]}" tests/test_testing.py -k "rounding or identical"
  else
    # a new shape compiles for seconds, which is what the suite waits for: on eight cores
    "$PYTHON" -c 'import xdist' 2>/dev/null && pytest+=(-n 8)
    "${pytest[@]}" --maxfail=20 --durations=10 -m "not slow and not compiled"
  fi
}

sanitizer() {
  local check=("$PYTHON" -m bench.sanitize) tool rc
  if [[ $DRY_RUN == 1 ]]; then
    TRITON_INTERPRET=1 "${check[@]}"
    return
  fi
  tool=$(command -v compute-sanitizer || compgen -G '/usr/local/cuda*/bin/compute-sanitizer' | tail -n 1)
  if [[ -z $tool ]]; then
    echo "skipped: no compute-sanitizer"
    return 77
  fi
  # Without torch's caching allocator every tensor is an allocation of its own, whose bounds the tool knows.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool memcheck --error-exitcode 1 "${check[@]}" |& tee "$DEPS/sanitizer"
  rc=${PIPESTATUS[0]}
  if ((rc)) && grep -q "Device not supported" "$DEPS/sanitizer"; then # as on some virtual machines
    echo "skipped: compute-sanitizer does not support this device"
    return 77
  fi
  return "$rc"
}

bench() {
  if [[ $DRY_RUN == 1 ]]; then
    "$PYTHON" -m bench run all --quick --out "$JSONL"
  else
    "$PYTHON" -m bench run all --out "$JSONL"
  fi
}

export DRY_RUN=$dry_run
((dry_run)) && export CUDA_VISIBLE_DEVICES=
export -f dependencies environment suite sanitizer bench

say "$(date -u +%FT%TZ)  at most $budget s$( ((dry_run)) && echo ', a dry run on the CPU')"
step dependencies 10 dependencies
step environment 10 "${STEP_ENVIRONMENT:-environment}"
step suite 40 "${STEP_SUITE:-suite}"
step sanitizer 17 "${STEP_SANITIZER:-sanitizer}"
step bench 23 "${STEP_BENCH:-bench}"
exit "$failed"
