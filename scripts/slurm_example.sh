#!/usr/bin/env bash
# Two nodes of four GPUs under Slurm; change what is in capitals, then: sbatch scripts/slurm_example.sh
# Not run on a cluster yet. runs_dir must lie on a file system that both nodes see.
#SBATCH --job-name=elmd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=elmd-%j.out
# --signal: two minutes before the time is up the step in progress is finished and saved; submit again to resume from it.
# --requeue: after a failure of a node Slurm does that itself.
# One task per node is one launcher per node, which starts that node's four processes.
set -euo pipefail

if [[ -z "${SLURM_JOB_NODELIST:-}" ]]; then
  echo "error: this is a Slurm job, and no Slurm runs it; change what is in capitals, then: sbatch $0" >&2
  exit 1
fi

# shellcheck disable=SC1091
source .venv/bin/activate
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
settings=(
  experiment=table2_m3ed
  data.path=/DATA/M3ED data.video_root=/DATA/M3ED/videos
  llm.path=/WEIGHTS/chatglm2-6b vision.path=/WEIGHTS/visualglm-vision
  runs_dir=/SHARED/runs
)

# SLURM_NODEID is each node's own, so it is read there: inside the quotes.
on_every_node() {
  # shellcheck disable=SC2016
  srun --kill-on-bad-exit=1 bash -c '
    head=$1 module=$2
    shift 2
    exec accelerate launch --config_file configs/accelerate/ddp.yaml \
      --num_machines "$SLURM_NNODES" --num_processes "$((4 * SLURM_NNODES))" --machine_rank "$SLURM_NODEID" \
      --main_process_ip "$head" --main_process_port 29500 \
      -m "$module" "$@"
  ' on_every_node "$head" "$@"
}

on_every_node elmd.train "${settings[@]}" stage=all
on_every_node elmd.evaluate "${settings[@]}"

# A sweep in place of the last two lines, in one of two ways (neither run on a cluster yet). elmd.sweep launches each of
# its jobs itself, so it is one task on one node; on a signal to stop it lets every job save and says how to resume.
#
# Under one allocation, its GPUs as slots (--nodes=1, --gpus-per-node=8: eight jobs at a time, or with launcher.gpus=4 two
# of four GPUs):
#   srun --ntasks=1 python -m elmd.sweep experiment=table3_m3ed seed=0,1,2 "${settings[@]:1}"
#
# As an array, one allocation a seed (--nodes=1, --array=0-2); all keep one sweep.json, and who comes second to a shared
# stage waits for the first, so start the array when one task has made the features:
#   srun --ntasks=1 python -m elmd.sweep experiment=table3_m3ed seed="$SLURM_ARRAY_TASK_ID" "${settings[@]:1}"
