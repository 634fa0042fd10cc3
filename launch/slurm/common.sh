# shellcheck shell=bash
# What the job scripts share: `run_job ARGUMENTS` runs trainer/main.py with these arguments on the nodes of this job.
#
# Settings are environment variables at submission:
#   REPO                this repository, on a disk that all nodes share; by default the folder of sbatch
#   PYTHON              its Python; by default REPO/.venv/bin/python
#   GPUS                GPUs per node; by default those of the job. 0 trains on CPUs
#   PROCESSES           processes per node; by default one per GPU, or one
#   DATA_CACHE          folder on each node's disk for remote shards; by default vaegan-cache-USER in TMPDIR or /tmp
#   ACCELERATE_CONFIG   by default the file of launch/accelerate/ that fits the job's nodes and GPUs
#   MASTER_PORT         port of the first node for the rendezvous; by default derived from the job's number

export REPO=${REPO:-$SLURM_SUBMIT_DIR}
export PYTHON=${PYTHON:-$REPO/.venv/bin/python}

say() { printf '%(%F %T)T  %s\n' -1 "$1"; }

fail() { # CODE MESSAGE
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

run_job() {
    # Name an array's task by its index, since the job's number may be that of the whole array.
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    choose_launch
    read_configuration "$@"
    dry_run "$@"
    check_nodes
    [[ " $* " != *" --dry_run "* ]] || exit 0
    train "$@"
}

choose_launch() {
    [ -x "$PYTHON" ] ||
        fail 2 "$PYTHON does not exist: run make setup in $REPO, or set PYTHON=/path/to/python sbatch ..."
    local asked=${SLURM_GPUS_PER_NODE:-} # 8, or a100:8
    export GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-${asked##*:}}}
    [[ $GPUS =~ ^[0-9]+$ ]] ||
        fail 2 "GPUS must be the number of GPUs per node; got '$GPUS': use sbatch --gpus-per-node 8 ..., or GPUS=8 sbatch \
... where SLURM does not manage GPUs; GPUS=0 sbatch ... trains on CPUs"
    export PROCESSES=${PROCESSES:-$((GPUS > 0 ? GPUS : 1))}
    local fitting=one_gpu
    ((PROCESSES == 1)) || fitting=one_node
    ((SLURM_NNODES == 1)) || fitting=many_nodes
    ((GPUS > 0)) || fitting=cpu
    export ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-$REPO/launch/accelerate/$fitting.yaml}
    [ -f "$ACCELERATE_CONFIG" ] || fail 2 "ACCELERATE_CONFIG is $ACCELERATE_CONFIG, which does not exist"
    ((GPUS > 0)) || export ACCELERATE_USE_CPU=true
    CPUS=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE} # of a node; srun does not inherit it
    export THREADS=$((CPUS > PROCESSES ? CPUS / PROCESSES : 1))
}

# Has the trainer's parser check the recipe and settings, and print the run folder.
read_configuration() {
    local lines
    export DATA_CACHE=${DATA_CACHE:-${TMPDIR:-/tmp}/vaegan-cache-$(id -un)}
    lines=$(tried print_configuration "$@") || exit $?
    mapfile -t lines <<<"$lines"
    export RUN_DIR=${lines[0]}
    unlimited=${lines[1]} remote=${lines[2]} defaults=("${lines[@]:4}")
    [ "${lines[3]}" = True ] || DATA_CACHE= # no shards are elsewhere
    ((${#defaults[@]} > 0)) || DATA_CACHE=  # the settings name another one
}

print_configuration() {
    PYTHONPATH=$REPO "$PYTHON" -P - "$@" <<'END'
import os, sys
from data.shards.remote import is_remote
from trainer.config.parser import configure

config = configure(sys.argv[1:])
print(config.run_dir, config.trainer.time_limit is None, is_remote(str(config.trainer.run_dir)), sep="\n")
sources = [*config.data.trains, *config.data.tests]
print(any(is_remote(source) or source.endswith(".json") for source in sources))
if config.data.cache is None:
    print("--data.cache", os.environ["DATA_CACHE"], sep="\n")
END
}

# Runs a command, up to three times if its failure may be temporary (any code but 2), and ends the job if all fail.
tried() { # COMMAND ARGUMENTS
    local code tries
    for tries in 1 2 3; do
        code=0
        "$@" || code=$?
        ((code != 0)) || return 0
        ((code != 2)) || break
        ((tries == 3)) || {
            say "the failure may be temporary: the command is tried again in a minute" >&2
            sleep 60
        }
    done
    fail $((code == 2 ? 2 : 1)) "the job does not start, for the reason above"
}

# Prints the resolved run into the job's output, and refuses what its processes would refuse.
dry_run() {
    tried "$PYTHON" "$REPO/trainer/main.py" "${defaults[@]}" "$@" --dry_run "$((SLURM_NNODES * PROCESSES))"
}

# Checks Python, GPUs and the run folder, which nodes share unless the run's is at a URL, on every node, before training.
check_nodes() {
    local code=0
    export SHARED=$RUN_DIR/.shared.$job
    { mkdir -p "$RUN_DIR/logs" && touch "$SHARED"; } || fail 2 "the run folder $RUN_DIR cannot be written"
    [ "$remote" = False ] || SHARED=
    on_nodes check || code=$?
    rm "$RUN_DIR/.shared.$job"
    ((code != 75)) || requeue "$(newest_step)" # a signal
    ((code == 0)) || fail 2 "the job does not start, for the reason above"
}

requeue() { # STEP
    say "stopped at step $1: requeued, to start in two minutes"
    scontrol requeue "$job" || fail 1 "job $job cannot be requeued: submit it again to resume from step $1"
    exit 0 # SLURM has ended this script before
}

# Trains until the run is finished, is requeued, or fails twice without a new checkpoint.
train() {
    local attempt=0 step failed_at=-1 logs wall
    while true; do
        attempt=$((attempt + 1)) step=$(newest_step)
        logs=$RUN_DIR/logs/job-$job.${SLURM_RESTART_COUNT:-0}.$attempt
        mkdir -p "$logs"
        (umask 077 && printf '%q ' "$@" >"$logs/.arguments") # hidden, as URLs may have credentials: it stays here
        say "attempt $attempt, from step $step, on $SLURM_JOB_NODELIST: its output is in $logs"
        set_rendezvous "$attempt"
        mapfile -t wall < <(time_limit)
        on_nodes train "${defaults[@]}" "${wall[@]}" "$@" || true # the state says more than the exit code
        if ! held; then # another run's checkpoints would look like progress of this one
            print_errors "$logs"
            ((failed_at < 0)) || fail 1 "failed again before it had the run folder: it is not tried again"
            failed_at=0
            continue
        fi
        step=$(newest_step)
        case $(state "$logs/.arguments") in
            finished)
                say "finished at step $step"
                exit 0
                ;;
            stopped)
                requeue "$step"
                ;;
            diverged)
                print_errors "$logs"
                fail 1 "the run diverged and would diverge again: it is not tried again"
                ;;
        esac
        print_errors "$logs"
        ((step > failed_at)) || fail 1 "failed again with no checkpoint after step $step: it is not tried again"
        failed_at=$step
        say "failed; the newest checkpoint is step $step's"
    done
}

# Runs node.sh on each node. When one node ends, the others have a minute to notice, to report it and to end: to kill
# them at once (--kill-on-bad-exit) could cut off a node that still saves.
on_nodes() { # MODE ARGUMENTS
    local output=()
    [ "$1" != train ] || output=(--output "$logs/%N.log")
    srun --nodes "$SLURM_NNODES" --ntasks "$SLURM_NNODES" --ntasks-per-node 1 --cpus-per-task "$CPUS" \
        --kill-on-bad-exit=0 --wait 60 "${output[@]}" bash "$REPO/launch/slurm/node.sh" "$@"
}

# Sets a rendezvous of its own for each attempt, which no launcher of another attempt or job joins.
set_rendezvous() { # ATTEMPT
    local first
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 10 + $1) % 10000))}
    export MASTER PORT PET_RDZV_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$1
}

# Prints --trainer.time_limit, the job's remaining time less two minutes to start and to requeue, unless the run has one.
time_limit() {
    [ "$unlimited" = True ] || return 0
    squeue --noheader --job "$job" --format %L | awk '/^[-:0-9]+$/ {
        n = split($0, left, /[-:]/)
        minutes = left[n - 1] + 60 * left[n - 2] + 24 * 60 * left[n - 3] - 2
        print "--trainer.time_limit"
        printf "%d:%02d\n", (minutes > 1 ? minutes : 1), left[n]
    }'
}

held() { # whether the run folder was locked last by this job
    grep -q "SLURM job $SLURM_JOB_ID," "$RUN_DIR/.lock" 2>/dev/null
}

newest_step() { # of the run's checkpoints; 0 where there are none
    local path step=0
    for path in "$RUN_DIR"/checkpoints/step_*; do
        [[ ${path##*/} =~ ^step_([0-9]{8,18})$ ]] || continue # arithmetic would run code in another name
        [ ! -e "$path/manifest.json" ] || step=$((10#${BASH_REMATCH[1]}))
    done
    echo "$step"
}

state() { # FILE; prints the run's status if it is newer than FILE, and so of this attempt
    ls "$RUN_DIR" >/dev/null # refreshes NFS: another node wrote it
    [ ! "$RUN_DIR/state" -nt "$1" ] || cat "$RUN_DIR/state"
}

print_errors() { # LOGS; prints the nodes' errors, or their last lines
    local errors
    # srun may have made no logs.
    errors=$(awk '/^error: / || (inside && /^  /) { inside = 1; print; next } { inside = 0 }' "$1"/*.log 2>/dev/null) || true
    printf '%s\n' "${errors:-$(tail -q -n 20 "$1"/*.log 2>/dev/null || true)}"
}
