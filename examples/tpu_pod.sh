#!/bin/bash
# Trains on a TPU pod slice from your own machine: a process on each host, all started by one command.
#
#   examples/tpu_pod.sh create          # the slice; on its hosts the code, and the file system of the runs
#   examples/tpu_pod.sh train           # again: goes on from the newest checkpoint
#   examples/tpu_pod.sh log
#   examples/tpu_pod.sh stop            # saved
#   examples/tpu_pod.sh delete
#   SPOT=1 examples/tpu_pod.sh keep     # all of it, until the training has ended: a preempted slice is made again
set -euo pipefail

# Set these.
TPU=${TPU:-dit-b}
ZONE=${ZONE:-us-central2-b}
TYPE=${TYPE:-v4-32}
SPOT=${SPOT:-}
REPOSITORY=https://github.com/USER/jax-flow-matching
SHARE=FILESTORE_IP:/share
TRAIN='.venv/bin/python train_flow.py --coordinator_address auto
  --dataset_name imagenet256 --data_dir gs://BUCKET/tensorflow_datasets
  --model.preset DiT-B/2 --batch_size 512 --save_dir /shared/runs/dit-b'

tpu_vm() {  # VERB [FLAG ...]
  gcloud compute tpus tpu-vm "$1" "$TPU" --zone "$ZONE" "${@:2}"
}

on_hosts() {  # all or a number, and a command for a shell there
  tpu_vm ssh --worker="$1" --command "$2"
}

create() {
  tpu_vm create --accelerator-type "$TYPE" --version tpu-ubuntu2204-base ${SPOT:+--spot}
}

# What is there already stays.
set_up() {
  on_hosts all "set -e
    test -d jax-flow-matching || git clone $REPOSITORY jax-flow-matching
    make -C jax-flow-matching setup DEVICE=tpu EXTRAS=tfds PYTHON=python3.11
    sudo mkdir -p /shared && (mountpoint -q /shared || sudo mount $SHARE /shared)"
}

# In the background of each host. What is in parentheses outlives the connection, and the training if that is stopped: it
# writes the exit status into a file.
train() {
  on_hosts all "cd jax-flow-matching && rm -f train.status || exit
    (trap '' HUP; trap : TERM; ${TRAIN//$'\n'/ }; echo \$? > train.status) > train.log 2>&1 < /dev/null &"
}

# The exit status of the training; or `running`; or `absent`, where it has not been started. Nothing if no host answers.
training_status() {
  on_hosts 0 "cd jax-flow-matching 2> /dev/null || { echo absent; exit; }
    cat train.status 2> /dev/null || { pgrep -f '[t]rain_flow.py' > /dev/null && echo running; } || echo absent" || true
}

keep() {
  while true; do
    state=$(tpu_vm describe --format 'value(state)' || echo ABSENT)
    case $state in
      READY)
        status=$(training_status)
        case $status in
          0) echo 'the training has ended' && return ;;
          75) train || true ;;                  # stopped by a signal, and saved
          absent) { set_up && train; } || true ;;
          '' | running) ;;
          *) echo "the training has ended with status $status: see $0 log" >&2 && return 1 ;;
        esac ;;
      ABSENT) create || true ;;                 # there may be none to be had for now
      PREEMPTED | TERMINATED) tpu_vm delete --quiet || true ;;
    esac
    sleep "${PAUSE:-60}"
  done
}

case ${1:-} in
  create) create && set_up ;;
  train) train ;;
  log) on_hosts 0 'tail -n 50 -f jax-flow-matching/train.log' ;;
  stop) on_hosts 0 "pkill -TERM -f '[t]rain_flow.py'" ;;  # a signal to one host is enough
  delete) tpu_vm delete --quiet ;;
  keep) keep ;;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
