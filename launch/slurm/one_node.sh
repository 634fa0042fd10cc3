#!/bin/bash
# Trains on one node, one process per GPU.
#   sbatch --gpus-per-node 4 --time 8:00:00 launch/slurm/one_node.sh --config RECIPE [--section.key value ...]
#   sbatch --gpus-per-node 0 launch/slurm/one_node.sh --config launch/recipes/digits-vaegan-ternary.yaml
# See launch/README.md, and the settings in common.sh.
#SBATCH --job-name=vaegan
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail
common=${REPO:-${SLURM_SUBMIT_DIR:?submit this script with sbatch}}/launch/slurm/common.sh
[ -f "$common" ] || {
    echo "error: $common does not exist: submit from the repository, or set REPO=/path/to/it sbatch ..." >&2
    exit 2
}
# shellcheck source=launch/slurm/common.sh
. "$common"
run_job "$@"
