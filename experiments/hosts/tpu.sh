#!/usr/bin/env bash
# experiments/hosts/tpu.sh NAME ZONE CONFIG WORKDIR [options of experiments.main], from a machine with gcloud
# One process on each host of the slice NAME; JAX finds the others by itself. The checkout lies in ~/pdo_jax on every host, and
# WORKDIR on storage that all of them mount. When a host is lost JAX ends the others, and all start again from the last checkpoint.
set -euo pipefail
name=$1 zone=$2
shift 2
command=$(printf '%q ' "${PYTHON:-python3}" -m experiments.main --config "$1" --workdir "$2" "${@:3}" --distributed)
for attempt in 1 2 3; do
  if gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "cd ${CHECKOUT:-pdo_jax} && $command"; then
    exit 0
  fi
  echo "attempt $attempt has ended before the training; all start again from the last checkpoint" >&2
done
exit 1
