#!/bin/bash
# Trains several recipes, each in an array task on one node; arguments after -- apply to all of them.
#   sbatch --array 0-6%2 launch/slurm/array.sh launch/recipes/digits-*.yaml -- [--section.key value ...]
# See launch/README.md, and the settings in common.sh.
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
    echo "error: $common does not exist: submit from the repository, or set REPO=/path/to/it sbatch ..." >&2
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
((${#recipes[@]} > 0)) || fail 2 "a recipe is missing: sbatch --array 0-1 launch/slurm/array.sh RECIPE RECIPE"
count=${#recipes[@]} task=${SLURM_ARRAY_TASK_ID:--1}
((0 <= task && task < count)) ||
    fail 2 "array task ${SLURM_ARRAY_TASK_ID:-(none)} has no recipe: use sbatch --array 0-$((count - 1)) ... for $count recipes"
[[ $count -eq 1 || " $*" != *" --trainer.run_dir"* ]] ||
    fail 2 "--trainer.run_dir would be the same folder for $count recipes: leave it out (runs/RECIPE), or set it in each recipe"
say "recipe $task: ${recipes[task]}"
run_job --config "${recipes[task]}" "$@"
