#!/usr/bin/env bash
# What docs/speed.md still lacks of a GPU, each part one command of under nine minutes; figures go to OUT as JSON.
#
#   benchmarks/gpu_day.sh right OUT    correctness: nothing below is worth measuring before it passes
#   benchmarks/gpu_day.sh step OUT     training steps of B/2 and XL/2, by objective, and Inception
#   benchmarks/gpu_day.sh sample OUT   sampling, cached latents
#
# Needs jax with CUDA, flax, optax, Orbax, Grain and ml_collections; PyTorch for its rows. No TensorFlow, no network.
# SMALL=1 runs the same on tiny sizes, to try it on a CPU.
set -eu
cd "$(dirname "$0")/.."
part=${1:?"give one of right, step, sample"}
out=${2:?"give a folder for the figures"}
mkdir -p "$out"
export XLA_PYTHON_CLIENT_PREALLOCATE=false

measure() {  # NAME PROGRAM WORDS...: the table to the terminal and OUT/NAME.txt; another part goes on after a failure
  local name=$1 program=$2
  shift 2
  echo "== $name: $program $*"
  python3 "benchmarks/$program" "$@" --json "$out/$name.json" 2>"$out/$name.log" | tee "$out/$name.txt" ||
    tail -n 5 "$out/$name.log"
}

if [ -n "${SMALL:-}" ]; then
  b="--model debug --patch_size 4 --batch 8 --rounds 1"
  xl=$b steps="--steps 2" inception="--batch 2 --rounds 1 --image_size 32"
else
  b="--model B --batch 256 --repeats 10"
  xl="--model XL --batch 64 --repeats 10" steps="--steps 32" inception="--batch 128 --repeats 10"
fi
ours="ours,ours: diffusion,ours: shortcut,ours: mean_flow"
case $part in
  right)
    python3 benchmarks/correctness.py ${SMALL:+--model debug} --json "$out/right.json"
    ;;
  step)
    measure step_b train_step.py $b --rows "jax-flow baseline,ours,ours: float32,PyTorch"
    measure step_xl train_step.py $xl --rows "jax-flow baseline,ours,PyTorch"
    measure objectives train_step.py $b --rows "$ours"
    measure inception inception.py $inception
    ;;
  sample)
    measure sample_b sample.py $b $steps
    measure sample_xl sample.py $xl $steps
    [ -n "${SMALL:-}" ] || measure latents latents.py --model.preset big --batch_size 64 --steps 10
    ;;
  *)
    echo "error: $part is none of right, step, sample" >&2
    exit 1
    ;;
esac
