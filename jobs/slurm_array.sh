#!/usr/bin/env bash
# A job as a Slurm array: each task is a shard, and all commit to one output on the shared file system.
#
#   sbatch --array=0-7 slurm_array.sh jobs/nightly.toml /shared/prompts/day=2026-01-31 /shared/answers/day=2026-01-31
#
# Slurm sends SIGTERM five minutes before the time is up: running rows are finished and committed, and the task asks to
# be queued again. A task that was preempted or died is queued again as well, and goes on where it was.

#SBATCH --job-name=batchinfer
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -uo pipefail

if [ "$#" -ne 3 ]; then
    echo "usage: sbatch --array=0-N $0 JOB.toml INPUT OUTPUT" >&2
    exit 2
fi

srun --kill-on-bad-exit=0 batchinfer run "$1" --input "$2" --output "$3" --shard auto --set report.log_seconds=60 &
srun_pid=$!
trap 'kill -TERM "$srun_pid"' TERM # for schedulers that signal the batch script itself

code=0
wait "$srun_pid" || code=$?
if [ "$code" -gt 128 ]; then # the trap interrupted the wait
    code=0
    wait "$srun_pid" || code=$?
fi

case "$code" in
75 | 5) # stopped early, or an older try of this shard is still ending
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    ;;
esac
exit "$code"
