#!/bin/bash
# Trains on one machine of a run: the entry point of the container, and what launch/skypilot/ runs. `start.sh SETTINGS...`
#
# Settings are environment variables:
#   RUN_DIR                   the run's folder, on a disk that all machines share, or a URL such as s3://BUCKET/RUN
#   NODES, NODE_RANK          number of machines, and which of them this is, from 0; by default PET_NNODES and
#                             PET_NODE_RANK, which Kubeflow sets, or 1 and 0
#   MASTER_ADDR, MASTER_PORT  the first machine's address, and a free port of it; needed by several machines
#   PROCESSES                 processes on this machine; by default one per GPU, or one
#   PYTHON                    by default python of PATH
#
# Exit codes:
#   0   the run is finished
#   75  it was asked to stop (SIGTERM, SIGUSR1, trainer.time_limit) and has saved: start it again
#   2   its settings are refused, or it diverged: it would do so again
#   1   any other failure, such as a lost machine, or a network that is down: start it again
set -euo pipefail

REPO=$(cd "$(dirname "$0")/../.." && pwd)
PYTHON=${PYTHON:-python}
NODES=${NODES:-${PET_NNODES:-1}} NODE_RANK=${NODE_RANK:-${PET_NODE_RANK:-0}}
MASTER_ADDR=${MASTER_ADDR:-${PET_MASTER_ADDR:-}} MASTER_PORT=${MASTER_PORT:-${PET_MASTER_PORT:-29500}}

refuse() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

state() {
    case $RUN_DIR in
        *://*) "$PYTHON" -c 'import fsspec, sys; print(fsspec.open(sys.argv[1]).open().read().decode())' "$RUN_DIR/state" ;;
        *) cat "$RUN_DIR/state" ;;
    esac 2>/dev/null || true
}

written() { # when the state was written, and which file it is: another after each write; fails if that is not known
    case $RUN_DIR in
        *://*) "$PYTHON" - "$RUN_DIR/state" <<'END' ;;
import sys

import fsspec

try:
    files, path = fsspec.core.url_to_fs(sys.argv[1])
    print(sorted(map(str, files.info(path).items())))
except (FileNotFoundError, ImportError, ValueError):  # the trainer refuses what cannot be opened
    print("none")
except Exception as error:
    sys.exit(f"error: RUN_DIR: {sys.argv[1]} cannot be read: {error}")
END
        *) stat -c %i.%y "$RUN_DIR/state" 2>/dev/null || echo none ;;
    esac
}

[ -n "${RUN_DIR:-}" ] || refuse "RUN_DIR is not set: name the run's folder, a URL or on a disk that outlives this machine"
((NODES == 1)) || [ -n "$MASTER_ADDR" ] || refuse "NODES is $NODES, and MASTER_ADDR is not set: name the first machine"
# Only is_available() asks the driver whether it is new enough for this PyTorch.
GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.is_available() * torch.cuda.device_count())')
((GPUS > 0)) || [ ! -e /dev/nvidiactl ] || [ -n "${ACCELERATE_USE_CPU:-}" ] || refuse "this machine has an NVIDIA GPU, and \
PyTorch sees none: its driver may be too old (nvidia-smi), or CUDA_VISIBLE_DEVICES empty. ACCELERATE_USE_CPU=true trains \
on the CPU"
PROCESSES=${PROCESSES:-$((GPUS > 0 ? GPUS : 1))}
WORLD=$((NODES * PROCESSES)) CORES=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > PROCESSES ? CORES / PROCESSES : 1))}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-150} # seconds that a launcher gives its processes to save
fitting=cpu
((GPUS == 0)) || { ((NODES > 1)) && fitting=many_nodes || fitting=one_node; }
((GPUS > 0)) || export ACCELERATE_USE_CPU=true

run=("$PYTHON" "$REPO/trainer/main.py" "$@" --trainer.run_dir "$RUN_DIR")
before=$(written) || exit 1
# The first machine prints the resolved run. What is refused (2) would be refused each time.
((NODE_RANK > 0)) || "${run[@]}" --dry_run "$WORLD" || exit $(($? == 2 ? 2 : 1))
if ((WORLD == 1)); then
    ((GPUS == 0)) || export ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-bf16}
else
    launch=("$PYTHON" -m accelerate.commands.launch --quiet --config_file "$REPO/launch/accelerate/$fitting.yaml")
    launch+=(--multi_gpu --num_processes "$WORLD" --num_machines "$NODES" --machine_rank "$NODE_RANK" --max_restarts 0)
    launch+=(--num_cpu_threads_per_process "$OMP_NUM_THREADS" --main_process_port "$( ((NODES > 1)) && echo "$MASTER_PORT" || echo 0)")
    ((NODES == 1)) || launch+=(--rdzv_backend static --main_process_ip "$MASTER_ADDR")
    run=("${launch[@]}" "${run[@]:1}")
fi

# A signal reaches this script alone. A launcher passes TERM on to its processes, and dies of USR1.
# A PET_ variable for nodes would win over the launcher's arguments.
unset PET_NNODES PET_NODE_RANK PET_MASTER_ADDR PET_MASTER_PORT PET_NPROC_PER_NODE
"${run[@]}" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null || true' TERM USR1 INT
wait "$child" && code=0 || code=$?
while kill -0 "$child" 2>/dev/null; do # a signal ended the wait
    wait "$child" && code=0 || code=$?
done

# The first process writes the state, perhaps after those of this machine have ended.
for ((i = 0; i < 60 && NODE_RANK > 0; i++)); do
    [ "$(state)" = running ] || break
    sleep 1
done
state=$(state)
{ after=$(written) && [ "$after" != "$before" ]; } || state= # that of an earlier start
case $code,$state in
    0,finished) exit 0 ;;
    *,stopped) exit 75 ;;
    *,diverged | 2,*) exit 2 ;;
    *) exit 1 ;;
esac
