#!/bin/bash
# srun starts this on each node: `node.sh check` checks whether the node can train, `node.sh train ARGUMENTS` starts its
# processes. common.sh sets the environment.
set -euo pipefail

fail() {
    printf 'error: node %s: %s\n' "$SLURMD_NODENAME" "$1" >&2
    exit 1
}

check() {
    local found
    trap 'exit 75' USR1 TERM
    for ((i = 0; i < 10; i++)); do # a shared disk may take a moment
        [[ -n $SHARED && ! -e $SHARED ]] || break
        sleep 0.5
    done
    [ -z "$SHARED" ] || [ -e "$SHARED" ] || fail "$RUN_DIR is not the same folder as on the first node: set --trainer.run_dir to one on a \
disk that all nodes share"
    [ -x "$PYTHON" ] || fail "$PYTHON does not exist: the repository and its .venv must be on a disk that all nodes share"
    [ -z "$DATA_CACHE" ] || check_cache
    # Only is_available() asks the driver whether it is new enough for this PyTorch.
    found=$("$PYTHON" -c 'import accelerate, torch; print(torch.cuda.is_available() * torch.cuda.device_count())') ||
        fail "$PYTHON cannot import accelerate and torch: run make setup in $REPO"
    ((GPUS == 0 || GPUS == found)) || fail "PyTorch sees $found GPUs, and GPUS is $GPUS: request as many (sbatch \
--gpus-per-node), or check nvidia-smi there: its driver may be too old"
}

check_cache() { # anyone can make a folder of that name in /tmp
    (umask 077 && mkdir -p "$DATA_CACHE") || fail "DATA_CACHE is $DATA_CACHE, which cannot be made"
    local owner
    owner=$(stat -c %u "$DATA_CACHE")
    ((owner == UID || owner == 0)) || fail "DATA_CACHE is $DATA_CACHE, a folder of the user $(stat -c %U "$DATA_CACHE"), \
who could change the images in it: name another one"
}

train() {
    local world=$((SLURM_NNODES * PROCESSES)) launch=()
    if ((SLURM_NNODES > 1)); then
        # Static: process 0 is on the first node, and a launcher that has lost the others ends with its processes,
        # while the c10d rendezvous waits for ever.
        launch=(--multi_gpu --rdzv_backend static --machine_rank "$SLURM_NODEID")
        launch+=(--main_process_ip "$MASTER" --main_process_port "$PORT")
    elif ((world > 1)); then
        launch=(--multi_gpu --main_process_port 0) # any free one
    fi
    # A signal reaches every process of a step. USR1 would end the launcher, and so would TERM with a single process;
    # the trainer handles both, and exits after its checkpoint is saved.
    trap '' USR1 TERM
    export PET_SHUTDOWN_TIMEOUT=150 # seconds that a launcher gives its processes to exit
    exec "$PYTHON" -m accelerate.commands.launch --quiet --config_file "$ACCELERATE_CONFIG" --num_processes "$world" \
        --num_machines "$SLURM_NNODES" --num_cpu_threads_per_process "$THREADS" --max_restarts 0 "${launch[@]}" \
        "$REPO/trainer/main.py" "$@"
}

"$@"
