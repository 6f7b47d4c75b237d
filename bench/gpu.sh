#!/usr/bin/env bash
# What a bare GPU machine without network can tell about this checkout: its environment, the test suite on CUDA, a
# memory sanitizer over every kernel, the launch configs that are fastest there, the benchmark of every op with them,
# and a report of it. A step that fails or runs out of time leaves what it has; the next one runs all the same.
#
#     bash bench/gpu.sh [--dry-run] [--out DIR] [--budget SECONDS]
#
# Into DIR (out/gpu), in place of a former run's: gpu.log, what was said; tuning.json, what was tuned, as
# `dt.tuning.use` takes it; gpu.jsonl, what was measured, one row a line; REPORT.md with plots/, and report.html.
# --budget is for all steps together (540).
# --dry-run walks the same steps on the CPU: over a subset of the tests, a tuning by the interpreter's own time, and the
# quick benchmark.
# Environment: PYTHON (python3); WHEELS (wheels, filled by `make gpu-wheels`); TUNED, a tuning file to go on from; and
# STEP_ENVIRONMENT, STEP_SUITE, STEP_SANITIZER, STEP_TUNE, STEP_BENCH, STEP_REPORT: a command line to run in place of a
# step's own. It finds its seconds in STEP_LIMIT, and the files in TUNING, JSONL and RESULTS.
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
if [[ -n ${TUNED:-} ]]; then
  [[ -f $TUNED ]] || { echo "gpu.sh: TUNED is $TUNED; accepted is a tuning file" >&2; exit 2; }
  TUNED=$(realpath "$TUNED")
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$root" || exit 2
WHEELS=${WHEELS:-wheels}
DEPS=$(mktemp -d) || exit 2
log=$out/gpu.log
RESULTS=$out
JSONL=$out/gpu.jsonl
TUNING=$out/tuning.json
export PYTHON WHEELS DEPS RESULTS JSONL TUNING
export PYTHONPATH="$PWD:$DEPS${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 # what was printed before a crash or a kill must be in the log
unset TRITON_INTERPRET DYREG_TRITON_TUNING
[[ -n ${TUNED:-} ]] && { cp "$TUNED" "$DEPS/tuned" || exit 2; } # it may be one of the files that are removed now
rm -f "$log" "$JSONL" "$TUNING" "$out/REPORT.md" "$out/report.html"
[[ -n ${TUNED:-} ]] && cp "$DEPS/tuned" "$TUNING"

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
  rm -rf "$DEPS" "$TUNING.lock"
}
trap finish EXIT

# step NAME WEIGHT COMMAND: a step may take its weight's share of the time that is left, so that what one does not use
# falls to the next. STEP_LIMIT tells the command its share. One that exits 77 has been skipped, and its last line says
# why.
step() {
  local name=$1 weight=$2 command=$3 start=$SECONDS before rc status
  local limit=$(((deadline - SECONDS) * weight / weights_left))
  weights_left=$((weights_left - weight))
  ((limit > 0)) || limit=1
  say ""
  say "=== $name (at most $limit s)"
  before=$(wc -l <"$log")
  { # the outer redirection is for the shell's own word on a killed child
    STEP_LIMIT=$limit timeout --signal=INT --kill-after=$grace "$limit" \
      bash -c "trap 'exit 130' INT; $command" >>"$log" 2>&1 </dev/null
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

# What the first of each needs comes with it: the ones already there may be too old for it.
GROUPS = (
    ("pytest", "pluggy", "iniconfig", "packaging", "pygments"),
    ("xdist", "execnet"),
    ("hypothesis", "sortedcontainers"),
    ("safetensors",),
    ("numpy",),
    ("pillow",),
    ("tqdm",),
    ("mlxtend",),
    ("matplotlib", "contourpy", "cycler", "fonttools", "kiwisolver", "pyparsing", "python_dateutil", "six"),
)
MODULES = {"pillow": "PIL"}
FILES = {"xdist": "pytest_xdist"}


def version(package):
    try:
        return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


for group in GROUPS:
    lacks = importlib.util.find_spec(MODULES.get(group[0], group[0])) is None
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

# After how many seconds a step shall begin nothing new: the kernel or the row that is in progress takes a while.
begin_within() { echo $((STEP_LIMIT > 60 ? STEP_LIMIT - 30 : (STEP_LIMIT + 1) / 2)); }

tune() {
  local seconds
  seconds=$(begin_within)
  echo "tuning for $seconds s"
  if [[ $DRY_RUN == 0 ]]; then
    # the dtype that networks run in on such a machine; another command tunes the rest
    "$PYTHON" -m dyreg_triton tune --ops region --dtype bfloat16 --budget "$seconds" --out "$TUNING"
    return
  fi
  TRITON_INTERPRET=1 BUDGET=$seconds "$PYTHON" - <<'END'
import os
import sys
import time

from dyreg_triton import cli, tuning
from dyreg_triton.tuning.calls import TunedCall


def interpreted(work):
    """Seconds that the interpreter takes: they tell nothing of a GPU, but a search can be made by them."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def tensor(*shape):
    return {"shape": shape, "dtype": "float32", "layout": "contiguous"}


call = TunedCall("region_pool", {"x": tensor(1, 32, 4, 4), "regions": tensor(1, 2, 4)}, {}, backward=False)
budget, path = float(os.environ["BUDGET"]), os.environ["TUNING"]
print(tuning.tune([call], budget=budget, path=path, device="cpu", timer=interpreted))
tuning.use(path)
sys.exit(cli.main("tune --show --shapes quick --ops region --dtype float32 --device cpu".split()))
END
}

bench() {
  local options=(--budget "$(begin_within)" --out "$JSONL")
  [[ $DRY_RUN == 1 ]] && options+=(--quick)
  echo "launch configs: ${DYREG_TRITON_TUNING:-none were tuned here}"
  "$PYTHON" -m bench run all "${options[@]}"
}

report() {
  if [[ ! -s $JSONL ]]; then
    echo "skipped: nothing was measured"
    return 77
  fi
  if ! "$PYTHON" -c 'import matplotlib'; then
    echo "skipped: no matplotlib"
    return 77
  fi
  "$PYTHON" -m bench report --results "$JSONL" --out "$RESULTS/REPORT.md" --html "$RESULTS/report.html"
}

export DRY_RUN=$dry_run
((dry_run)) && export CUDA_VISIBLE_DEVICES=
export -f dependencies environment suite sanitizer begin_within tune bench report

say "$(date -u +%FT%TZ)  at most $budget s$( ((dry_run)) && echo ', a dry run on the CPU')"
step dependencies 10 dependencies
step environment 10 "${STEP_ENVIRONMENT:-environment}"
step suite 28 "${STEP_SUITE:-suite}"
step sanitizer 9 "${STEP_SANITIZER:-sanitizer}"
step tune 14 "${STEP_TUNE:-tune}"
# however far it came: every config in the file was checked and is faster than the default, or is the default
if [[ -s $TUNING ]]; then export DYREG_TRITON_TUNING=$TUNING; fi
step bench 26 "${STEP_BENCH:-bench}"
step report 3 "${STEP_REPORT:-report}"
exit "$failed"
