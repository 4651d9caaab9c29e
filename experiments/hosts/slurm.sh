#!/usr/bin/env bash
#SBATCH --job-name=pdo_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --requeue
#SBATCH --time=04:00:00
# sbatch experiments/hosts/slurm.sh CONFIG WORKDIR [options of experiments.main]
# One process a node drives all its devices. WORKDIR lies where all nodes see it. When a node or a process is lost, all end and
# start again from the last checkpoint, to the same bits; --requeue does so where the job itself is lost.
set -euo pipefail
config=$1 workdir=$2
shift 2
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
host=${hosts%%$'\n'*}
for attempt in 1 2 3; do
  export COORDINATOR=$host:$((61440 + (SLURM_JOB_ID + attempt) % 4096))
  # shellcheck disable=SC2016 — these are variables of each task
  if srun --kill-on-bad-exit=1 bash -c 'exec "${PYTHON:-python}" -m experiments.main "$@" --distributed \
      --coordinator "$COORDINATOR" --num-processes "$SLURM_NTASKS" --process-id "$SLURM_PROCID"' \
      task --config "$config" --workdir "$workdir" "$@"; then
    exit 0
  fi
  echo "attempt $attempt has ended before the training; all start again from the last checkpoint" >&2
done
exit 1
