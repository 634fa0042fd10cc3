# shellcheck shell=bash
# What the job scripts share: `run_job ARGUMENTS` trains, on the nodes of this job, as trainer/main.py is told to.
#
# Settings, by environment variables when the job is submitted:
#   REPO                this repository, on a disk that all nodes see; unset: the folder where sbatch is called
#   PYTHON              its Python; unset: REPO/.venv/bin/python
#   GPUS                GPUs a node; unset: those that the job is given. 0: train on CPUs
#   PROCESSES           processes a node; unset: one a GPU, or one
#   DATA_CACHE          folder on each node's own disk for remote shards; unset: vaegan-cache-USER in TMPDIR or /tmp
#   ACCELERATE_CONFIG   unset: the one of launch/accelerate/ that fits the job's nodes and GPUs
#   MASTER_PORT         where the nodes meet on the first one; unset: one made of the job's number

export REPO=${REPO:-$SLURM_SUBMIT_DIR}
export PYTHON=${PYTHON:-$REPO/.venv/bin/python}

say() { printf '%(%F %T)T  %s\n' -1 "$1"; }

fail() { # CODE MESSAGE
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

run_job() {
    # A task of an array goes by this name, for one of them has the whole array's number.
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    choose_launch
    read_configuration "$@"
    plan "$@"
    check_nodes
    [[ " $* " != *" --dry_run "* ]] || exit 0
    train "$@"
}

choose_launch() {
    [ -x "$PYTHON" ] ||
        fail 2 "there is no $PYTHON: run make setup in $REPO, or name another: PYTHON=/path/to/python sbatch ..."
    local asked=${SLURM_GPUS_PER_NODE:-} # 8, or a100:8
    export GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-${asked##*:}}}
    [[ $GPUS =~ ^[0-9]+$ ]] ||
        fail 2 "it is not said how many GPUs a node has (GPUS is '$GPUS'): sbatch --gpus-per-node 8 ... asks SLURM for \
them; GPUS=8 sbatch ... tells where SLURM does not know of them; GPUS=0 sbatch ... trains on CPUs"
    export PROCESSES=${PROCESSES:-$((GPUS > 0 ? GPUS : 1))}
    local fitting=one_gpu
    ((PROCESSES == 1)) || fitting=one_node
    ((SLURM_NNODES == 1)) || fitting=many_nodes
    ((GPUS > 0)) || fitting=cpu
    export ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-$REPO/launch/accelerate/$fitting.yaml}
    [ -f "$ACCELERATE_CONFIG" ] || fail 2 "ACCELERATE_CONFIG is $ACCELERATE_CONFIG, and there is no such file"
    ((GPUS > 0)) || export ACCELERATE_USE_CPU=true
    CPUS=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE} # a node's, which srun does not hand on by itself
    export THREADS=$((CPUS > PROCESSES ? CPUS / PROCESSES : 1))
}

# Asks the trainer's own parser where the run goes. It tells of a missing recipe, and of a setting that cannot be.
read_configuration() {
    local told
    export DATA_CACHE=${DATA_CACHE:-${TMPDIR:-/tmp}/vaegan-cache-$(id -un)}
    told=$(PYTHONPATH=$REPO "$PYTHON" - "$@" <<'END'
import os, sys
from trainer.config.parser import configure

config = configure(sys.argv[1:])
print(config.run_dir, config.trainer.time_limit is None, sep="\n")
if config.data.cache is None:
    print("--data.cache", os.environ["DATA_CACHE"], sep="\n")
END
    ) || fail 2 "the job does not start, for the reason above"
    mapfile -t told <<<"$told"
    export RUN_DIR=${told[0]}
    unlimited=${told[1]} defaults=("${told[@]:2}")
}

# What the run will do and take, into the job's output; refuses what its processes would refuse.
plan() {
    "$PYTHON" "$REPO/trainer/main.py" "${defaults[@]}" "$@" --dry_run "$((SLURM_NNODES * PROCESSES))" ||
        fail 2 "the job does not start, for the reason above"
}

# Every node, before any trains: its Python, its GPUs, and whether it sees the same run folder.
check_nodes() {
    export SHARED=$RUN_DIR/.shared.$job
    { mkdir -p "$RUN_DIR/logs" && touch "$SHARED"; } || fail 2 "the run folder $RUN_DIR cannot be written"
    on_nodes check || {
        rm "$SHARED"
        fail 2 "the job does not start, for the reason above"
    }
    rm "$SHARED"
}

# Until the run is finished, is to be requeued, or fails twice without a new checkpoint between.
train() {
    local attempt=0 step failed_at=-1 logs wall
    while true; do
        attempt=$((attempt + 1)) step=$(newest_step)
        logs=$RUN_DIR/logs/job-$job.${SLURM_RESTART_COUNT:-0}.$attempt
        mkdir -p "$logs"
        (umask 077 && printf '%q ' "$@" >"$logs/arguments") # URLs may have credentials in them
        say "attempt $attempt, from step $step, on $SLURM_JOB_NODELIST: its output is in $logs"
        meet_at "$attempt"
        mapfile -t wall < <(time_limit)
        on_nodes train "${defaults[@]}" "${wall[@]}" "$@" || true # the launcher's code: the state says more
        step=$(newest_step)
        case $(state "$logs/arguments") in
            finished)
                say "finished at step $step"
                exit 0
                ;;
            preempted)
                say "preempted at step $step: requeued, which SLURM holds back for two minutes"
                scontrol requeue "$job" ||
                    fail 1 "job $job cannot be requeued: submit it again, and it goes on from step $step"
                exit 0 # SLURM has ended this script before
                ;;
            diverged)
                tell "$logs"
                fail 1 "the run diverged, and would again: it is not tried again"
                ;;
        esac
        tell "$logs"
        ((step > failed_at)) || fail 1 "failed again with no checkpoint after step $step: it is not tried again"
        failed_at=$step
        say "failed; the newest checkpoint is step $step's"
    done
}

# One process on each node, which starts those that train. A node that ends leaves the others a minute to notice, to say
# what they miss and to end, too; that SLURM kills at once (--kill-on-bad-exit) would cut off a node that still saves.
on_nodes() { # MODE ARGUMENTS
    local output=()
    [ "$1" != train ] || output=(--output "$logs/%N.log")
    srun --nodes "$SLURM_NNODES" --ntasks "$SLURM_NNODES" --ntasks-per-node 1 --cpus-per-task "$CPUS" \
        --kill-on-bad-exit=0 --wait 60 "${output[@]}" bash "$REPO/launch/slurm/node.sh" "$@"
}

# Each attempt meets anew, where no launcher of another attempt or job can be taken for one of this.
meet_at() { # ATTEMPT
    local first
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 10 + $1) % 10000))}
    export MASTER PORT PET_RDZV_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$1
}

# What is left of the job's time, less two minutes to start and to be requeued, where the run has no limit of its own.
time_limit() {
    [ "$unlimited" = True ] || return 0
    squeue --noheader --job "$job" --format %L | awk '/^[-:0-9]+$/ {
        n = split($0, left, /[-:]/)
        minutes = left[n - 1] + 60 * left[n - 2] + 24 * 60 * left[n - 3] - 2
        print "--trainer.time_limit"
        printf "%d:%02d\n", (minutes > 1 ? minutes : 1), left[n]
    }'
}

newest_step() { # of the run's checkpoints; 0 where there are none
    local path step=0
    for path in "$RUN_DIR"/checkpoints/step_*; do
        [[ ${path##*/} =~ ^step_([0-9]{8,18})$ ]] || continue # arithmetic would run what another name has in it
        [ ! -e "$path/manifest.json" ] || step=$((10#${BASH_REMATCH[1]}))
    done
    echo "$step"
}

state() { # of the run, if it is newer than FILE: what an earlier attempt left says nothing of this one
    ls "$RUN_DIR" >/dev/null # another node wrote it: have NFS look anew
    [ ! "$RUN_DIR/state" -nt "$1" ] || cat "$RUN_DIR/state"
}

tell() { # what the nodes said of an error, or last
    local said
    said=$(awk '/^error: / || (told && /^  /) { told = 1; print; next } { told = 0 }' "$1"/*.log)
    printf '%s\n' "${said:-$(tail -q -n 20 "$1"/*.log)}"
}
