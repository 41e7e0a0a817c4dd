#!/bin/bash
# Trains a small model on digits under four settings, one after another, and compares them in a table.
#
#   examples/sweep.sh
#
# In a browser: python report.py --runs 'runs/sweep/*' --out sweep.html
#
# Stopped, it ends; given again, it continues where it was, and runs that are done are left as they are. PYTHON=python
# takes another Python than .venv's. Other values:
#   STEPS=500 RATES='3e-4 1e-3 3e-3' DEPTHS=2 FLAGS='--optimizer muon' RUNS=runs/muon examples/sweep.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
RUNS=${RUNS:-runs/sweep}
STEPS=${STEPS:-600}

for depth in ${DEPTHS:-2 4}; do
  for rate in ${RATES:-3e-4 1e-3}; do
    name=depth$depth-lr$rate
    echo "== $name"
    # shellcheck disable=SC2086  # FLAGS are words
    "$PYTHON" train_flow.py --dataset_name digits --codec pixels --save_dir "$RUNS/$name" --wandb.mode disabled \
      --model.hidden_size "${WIDTH:-64}" --model.depth "$depth" --model.num_heads 4 --model.mlp_ratio 4 \
      --model.patch_size 2 --model.num_classes 10 --model.lr "$rate" --model.target_update_rate 0.99 \
      --batch_size 128 --max_steps "$STEPS" --log_interval 100 --eval_interval "$STEPS" ${FLAGS:-}
  done
done

"$PYTHON" plot_metrics.py --runs "$RUNS/*" --table --out "$RUNS/table.md"
