#!/bin/bash
# Starts a command again for as long as it ends with status 75, which says: stopped by a signal, and saved.
#
#   examples/spot.sh .venv/bin/python train_flow.py --dataset_name imagenet256 --save_dir /shared/runs/dit-b ...
#
# A signal to this script, as when its machine is taken away, is passed on to the command, and the script ends with its
# status: start it again when the machine is back.
set -u
if [ $# -eq 0 ]; then
  echo "usage: $0 COMMAND ..." >&2
  exit 2
fi

child=
stopped=
interrupted=
pass_on() {
  stopped=1
  interrupted=1
  [ -n "$child" ] && kill -TERM "$child" 2> /dev/null
}
trap pass_on INT TERM HUP USR1 USR2

while true; do
  "$@" &
  child=$!
  wait "$child"
  status=$?
  # A signal ends `wait`, but not the command, which is saving.
  while [ -n "$interrupted" ]; do
    interrupted=
    wait "$child"
    status=$?
  done
  if [ "$status" -ne 75 ] || [ -n "$stopped" ]; then
    exit "$status"
  fi
  sleep "${PAUSE:-1}"  # seconds: no more often, should a command end at once
done
