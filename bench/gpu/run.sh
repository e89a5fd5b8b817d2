#!/bin/bash
# Everything that needs a GPU, on a machine that has one: build, tests, sanitizers, benchmarks, one table at the end.
#
#   bench/gpu/run.sh [--dry-run]
#
# Needs python3 with torch for CUDA, transformers, pybind11, scikit-build-core, pytest and hypothesis, and nvcc; no
# network. Every stage has a time limit, and a stage that fails costs no other. Logs (all.log) and numbers (*.json) go to
# $OUT if that is set, else to build/gpu. Environment: PYTHON (python3), BUDGET seconds for all stages (570), COSPADI_SITE a folder that
# holds an installed cospadi already (nothing is built then).
# --dry-run: toy sizes on the CPU with the cospadi that PYTHON finds.
set -u
cd "$(dirname "$0")/../.." || exit 1
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-570}
RESULTS=${OUT:-build/gpu}
DRY=""
[ "${1:-}" = "--dry-run" ] && DRY="--dry-run"
mkdir -p "$RESULTS" || exit 1
STAGES="$RESULTS/stages.tsv"
: >"$STAGES"
: >"$RESULTS/all.log"
LOGS=$(mktemp -d) || exit 1
trap 'rm -rf "$LOGS"' EXIT
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
command -v nvcc >/dev/null || export PATH="$PATH:/usr/local/cuda/bin"
BEGIN=$SECONDS

# stage NAME LIMIT COMMAND...: run with the smaller of its limit and what is left of the budget
stage() {
  local name=$1 limit=$2 left start code
  shift 2
  left=$((BUDGET - (SECONDS - BEGIN)))
  if [ "$left" -lt 10 ]; then
    printf '%s\t%s\t%s\n' "$name" 0 "not started: the time is up" >>"$STAGES"
    return 1
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  echo "== $name (at most $limit s)"
  start=$SECONDS
  timeout --kill-after=10 "$limit" "$@" >"$LOGS/$name.log" 2>&1
  code=$?
  { echo "== $name"; cat "$LOGS/$name.log"; } >>"$RESULTS/all.log"
  case $code in
    0) printf '%s\t%s\tok\n' "$name" $((SECONDS - start)) ;;
    124 | 137) printf '%s\t%s\tstopped at its limit of %s s\n' "$name" $((SECONDS - start)) "$limit" ;;
    *) printf '%s\t%s\tFAILED with %s\n' "$name" $((SECONDS - start)) "$code" ;;
  esac | tee -a "$STAGES"
  [ "$code" -eq 0 ] || tail -n 15 "$LOGS/$name.log"
  return $code
}

machine() {
  nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm --format=csv || true
  nvcc --version | tail -n 2
  "$PYTHON" -c 'import sys, torch, transformers; print(sys.version); print(torch.__version__, transformers.__version__,
torch.version.cuda, torch.cuda.is_available() and torch.cuda.get_device_capability())'
  nproc
  free -g
}

# For the card's architecture alone, into a folder of its own: the system's packages stay as they are.
build() {
  local arch
  arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return 1
  "$PYTHON" -m pip install -q --no-build-isolation --no-deps --no-index --no-compile --upgrade \
    --target "$COSPADI_SITE" -C "build-dir=$COSPADI_SITE.build" \
    -C "cmake.define.CMAKE_CUDA_ARCHITECTURES=$arch-real" -C cmake.define.COSPADI_CUDA=ON . &&
    "$PYTHON" -c 'from cospadi import native; print(native.runtime_info()); assert native.has_cuda_kernels()'
}

sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here"; return 0; }
  local code
  # our kernels alone; where the option is not known, all of them
  compute-sanitizer --tool "$1" --error-exitcode 9 --kernel-name kernel_substring=cospadi \
    "$PYTHON" bench/gpu/exercise.py "${@:2}"
  code=$?
  { [ $code -eq 0 ] || [ $code -eq 9 ]; } && return $code
  compute-sanitizer --tool "$1" --error-exitcode 9 "$PYTHON" bench/gpu/exercise.py "${@:2}"
}
export -f machine build sanitize
export PYTHON

if [ -n "$DRY" ]; then
  stage machine 60 "$PYTHON" -c 'import torch; print(torch.__version__)'
else
  stage machine 40 bash -c machine
  if [ -z "${COSPADI_SITE:-}" ]; then
    export COSPADI_SITE=${TMPDIR:-/tmp}/cospadi_site
    export PYTHONPATH=$COSPADI_SITE${PYTHONPATH:+:$PYTHONPATH}
    stage build 240 bash -c build
  else
    export PYTHONPATH=$COSPADI_SITE${PYTHONPATH:+:$PYTHONPATH}
  fi
  # warnings of other versions of torch and transformers are no failures here
  stage tests_fit 100 "$PYTHON" -m pytest -q -W default -p no:cacheprovider tests/gpu/test_fit_cuda.py
  [ -f tests/gpu/test_inference_cuda.py ] &&
    stage tests_inference 80 "$PYTHON" -m pytest -q -W default -p no:cacheprovider tests/gpu/test_inference_cuda.py
fi
stage bench_fit 230 "$PYTHON" bench/gpu/bench_fit.py $DRY --seconds 215 --json "$RESULTS/fit.json"
[ -f bench/gpu/bench_inference.py ] &&
  stage bench_inference 130 "$PYTHON" bench/gpu/bench_inference.py $DRY --seconds 110 --json "$RESULTS/inference.json"
if [ -z "$DRY" ]; then
  stage memcheck 60 bash -c "sanitize memcheck"
  stage racecheck 60 bash -c "sanitize racecheck fits"
fi

echo
echo "stage  seconds  result"
column -t -s "$(printf '\t')" "$STAGES" 2>/dev/null || cat "$STAGES"
for name in bench_fit bench_inference; do
  [ -f "$LOGS/$name.log" ] || continue
  echo
  echo "$name"
  cat "$LOGS/$name.log"
done
! grep -qv "ok$" "$STAGES"
