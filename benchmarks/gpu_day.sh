#!/usr/bin/env bash
# What docs/speed.md still lacks of a GPU, each part one command of under nine minutes; figures go to OUT as JSON.
#
#   benchmarks/gpu_day.sh right OUT    correctness: nothing below is worth measuring before it passes
#   benchmarks/gpu_day.sh step OUT     training steps of B/2 and XL/2, by objective, and Inception
#   benchmarks/gpu_day.sh sample OUT   sampling, cached latents
#   benchmarks/gpu_day.sh train OUT    CIFAR-10, pixels, class-conditional, DiT-S/2: trains for TRAIN_MINUTES (8)
#   benchmarks/gpu_day.sh finish OUT   goes on for FINISH_MINUTES (4), then FID over 50,000 samples, 50 steps and one
#
# `train` reads PARTS (.parts), which benchmarks/pack.py makes of CIFAR-10, the Inception weights and the statistics:
#
#   python benchmarks/pack.py --dataset_name cifar10 --data_dir DIR --fid_stats STATS.npz --to .parts
#
# `train` and `finish` share runs/gpu_day, and each may be run again: it goes on from the newest checkpoint.
# Needs jax with CUDA, flax, optax, Orbax, Grain and ml_collections; PyTorch for its rows. No TensorFlow, no network.
# SMALL=1 runs the same on tiny sizes, to try it on a CPU.
set -eu
cd "$(dirname "$0")/.."
part=${1:?"give one of right, step, sample, train, finish"}
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

learn() {  # MINUTES: trains on for so long; a run that is stopped saves, and ends with 75
  timeout --preserve-status --signal INT "$1m" python3 train_flow.py --dataset_name "npz:$data/images.npz" --use_stable_vae 0 \
    --random_flip 1 $network --model.target_update_rate 0.9995 --ema_warmup 1 --max_steps 1000000 \
    --log_interval 100 --eval_interval 0 --save_minutes 2 --wandb.mode disabled --save_dir "$run" || [ $? -eq 75 ]
  cp "$run/metrics.jsonl" "$out/metrics.jsonl"
}

data=${DATA:-runs/gpu_day_data} run=${RUN:-runs/gpu_day}
if [ -n "${SMALL:-}" ]; then
  b="--model debug --patch_size 4 --batch 8 --rounds 1"
  xl=$b steps="--steps 2" inception="--batch 2 --rounds 1 --image_size 32"
  network="--model.patch_size 4 --batch_size 16" samples="--num_samples 8 --batch_size 8"
else
  b="--model B --batch 256 --repeats 10"
  xl="--model XL --batch 64 --repeats 10" steps="--steps 32" inception="--batch 128 --repeats 10"
  network="--model.preset DiT-S/2 --model.lr 3e-4 --batch_size 512" samples="--num_samples 50000 --batch_size 2000"
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
  train)
    [ -e "$data/images.npz" ] || python3 benchmarks/pack.py --unpack "${PARTS:-.parts}" --to "$data"
    learn "${TRAIN_MINUTES:-8}"
    ;;
  finish)
    learn "${FINISH_MINUTES:-4}"
    python3 eval_fid.py --load_dir "$run" --fid_stats "$data/fid_stats.npz" --inception_weights "$data/inception.pt" \
      --use_cfg 0 --denoise_timesteps 50,1 $samples --wandb.mode disabled --out "$out"
    ;;
  *)
    echo "error: $part is none of right, step, sample, train, finish" >&2
    exit 1
    ;;
esac
