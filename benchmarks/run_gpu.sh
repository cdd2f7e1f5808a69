#!/usr/bin/env bash
# Everything this project wants to know from one GPU, in under nine minutes, with jax, flax, optax and numpy alone.
#
#     benchmarks/run_gpu.sh            results in $OUT (default: benchmarks/results/gpu)
#     benchmarks/run_gpu.sh --smoke    the same parts at tiny shapes, on whatever device there is, in a minute or two
#
# A part that fails or runs out of its time does not stop the others. The exit code is the number of such parts, and run.log
# and the last lines printed say which. PYTHON names the interpreter (default: python3).

set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
OUT="${OUT:-benchmarks/results/gpu}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"
LOG="$OUT/run.log"
BENCH="-m cotgrpo.bench.command"
: >"$LOG"
failed=0

say() { echo "$*" | tee -a "$LOG"; }

# part NAME SECONDS ARGUMENTS...: runs the interpreter so; its output goes to the log, its result to NAME.json.
part() {
    local name="$1" limit="$2" code start=$SECONDS
    shift 2
    echo "== $name: $*" >>"$LOG"
    timeout --kill-after=10 "$limit" "$PYTHON" "$@" --json "$OUT/$name.json" >>"$LOG" 2>&1
    code=$?
    case $code in
        0) say "ok      $name ($((SECONDS - start)) s)" ;;
        124 | 137) say "TIMEOUT $name (more than $limit s)" ;;
        *) say "FAILED  $name (exit code $code, $((SECONDS - start)) s)" ;;
    esac
    [ "$code" -eq 0 ] || failed=$((failed + 1))
}

if [ "${1:-}" = --smoke ]; then
    part numerics 240 benchmarks/gpu_numerics.py --smoke --objectives pair_drawn
    part step_tiny 120 $BENCH step --shape tiny --batch 2 --seq 64 --repeats 3
    part compile 120 $BENCH compile --layers 1 2 --batch 1 --seq 16 --repeats 1
    part engine 120 $BENCH engine --shape tiny --vocab 4096 --objectives pair
elif [ $# -gt 0 ]; then
    echo "run_gpu.sh takes --smoke or nothing, got: $*" >&2
    exit 2
else
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >>"$LOG" 2>&1
    # The limits add up to 585 seconds. The memory of a long row is its attention scores, so steps recompute by layer (`remat` compares the policies).
    part numerics 150 benchmarks/gpu_numerics.py
    part step_smollm2-135m 60 $BENCH step --shape smollm2-135m --batch 16 --seq 2048 --remat full
    part step_qwen2.5-0.5b 60 $BENCH step --shape qwen2.5-0.5b --batch 8 --seq 2048 --remat full
    part step_llama-3.2-1b 75 $BENCH step --shape llama-3.2-1b --batch 4 --seq 2048 --remat full
    part remat 50 $BENCH remat --shape qwen2.5-0.5b --batch 4 --seq 2048 --repeats 5
    part compile 60 $BENCH compile --shape smollm2-135m --layers 4 32 --repeats 1
    part engine 40 $BENCH engine --shape smollm2-135m --batch 4 --seq 2048 --vocab 32768 131072 262144
    part attention 45 $BENCH attention --shape llama-3.2-1b --batch 4 --seq 2048 --lengths 2048 4096
    part generate 45 $BENCH generate --shape llama-3.2-1b --batches 1 64 256
fi

grep -hE '^(GRPO / SFT|total, last|[0-9]+ rows,)' "$LOG"
say "$failed of the parts failed; results in $OUT"
exit "$failed"
