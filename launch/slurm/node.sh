#!/bin/bash
# What common.sh has srun start on each node: `node.sh check` says whether the node can train, `node.sh train ARGUMENTS`
# starts its processes. Settings come by environment.
set -euo pipefail

fail() {
    printf 'error: node %s: %s\n' "$SLURMD_NODENAME" "$1" >&2
    exit 1
}

check() {
    local found
    for ((i = 0; i < 10; i++)); do # a shared disk may take a moment
        [ ! -e "$SHARED" ] || break
        sleep 0.5
    done
    [ -e "$SHARED" ] || fail "$RUN_DIR is not the folder that the first node sees: name one on a disk that all nodes \
share, with --trainer.run_dir"
    [ -x "$PYTHON" ] || fail "there is no $PYTHON: the repository and its .venv must be on a disk that all nodes share"
    found=$("$PYTHON" -c 'import accelerate, torch; print(torch.cuda.device_count())') ||
        fail "$PYTHON cannot import accelerate and torch: run make setup in $REPO"
    ((GPUS == 0 || GPUS == found)) || fail "PyTorch sees $found GPUs, and GPUS is $GPUS: ask SLURM for as many (sbatch \
--gpus-per-node), or look at nvidia-smi there"
}

train() {
    local world=$((SLURM_NNODES * PROCESSES)) launch=()
    if ((SLURM_NNODES > 1)); then
        # Static: process 0 is on the first node, and a launcher that has lost the others ends with its processes. The
        # c10d rendezvous would ask them for ever.
        launch=(--multi_gpu --rdzv_backend static --machine_rank "$SLURM_NODEID")
        launch+=(--main_process_ip "$MASTER" --main_process_port "$PORT")
    elif ((world > 1)); then
        launch=(--multi_gpu --main_process_port 0) # any free one
    fi
    # A signal goes to every process of a step. The launcher would die of USR1, and one that has a single process to
    # wait for also of TERM; the trainer takes both, and ends when everything is saved.
    trap '' USR1 TERM
    export PET_SHUTDOWN_TIMEOUT=150 # seconds that a launcher which is told to end leaves its processes for that
    exec "$PYTHON" -m accelerate.commands.launch --quiet --config_file "$ACCELERATE_CONFIG" --num_processes "$world" \
        --num_machines "$SLURM_NNODES" --num_cpu_threads_per_process "$THREADS" --max_restarts 0 "${launch[@]}" \
        "$REPO/trainer/main.py" "$@"
}

"$@"
