#!/bin/bash
# Trains several recipes, each in a task of its own on one node; what follows -- is for all of them.
#   sbatch --array 0-5%2 launch/slurm/array.sh launch/recipes/digits-*.yaml -- [--section.key value ...]
# launch/README.md says more, and common.sh which settings there are.
#SBATCH --job-name=vaegan
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
set -euo pipefail
common=${REPO:-${SLURM_SUBMIT_DIR:?submit this script with sbatch}}/launch/slurm/common.sh
[ -f "$common" ] || {
    echo "error: there is no $common: submit from the repository, or name it: REPO=/path/to/it sbatch ..." >&2
    exit 2
}
# shellcheck source=launch/slurm/common.sh
. "$common"
recipes=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    recipes+=("$1")
    shift
done
[ $# -eq 0 ] || shift
((${#recipes[@]} > 0)) || fail 2 "no recipe is named: sbatch --array 0-1 launch/slurm/array.sh RECIPE RECIPE"
count=${#recipes[@]} task=${SLURM_ARRAY_TASK_ID:--1}
((0 <= task && task < count)) ||
    fail 2 "array task ${SLURM_ARRAY_TASK_ID:-(none)} has no recipe: $count are named, so sbatch --array 0-$((count - 1)) ..."
[[ $count -eq 1 || " $*" != *" --trainer.run_dir"* ]] ||
    fail 2 "--trainer.run_dir would be the same folder for $count recipes: leave it out (runs/RECIPE), or set it in each"
say "recipe $task: ${recipes[task]}"
run_job --config "${recipes[task]}" "$@"
