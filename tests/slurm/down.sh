#!/bin/bash
# Stops the cluster that up.sh started in FOLDER, its jobs, namespaces and bridge; FOLDER stays.   usage: down.sh FOLDER
set -u
folder=$(cd "${1:?usage: down.sh FOLDER}" && pwd) || exit 1
[ -s "$folder/run/net" ] || exit 0 # never started, or stopped before
net=$(<"$folder/run/net")

# Without grace, for nothing of it is needed again. The controller first, so that it starts no job anew.
for daemon in slurmctld slurmd_n0 slurmd_n1 munged; do
    [ ! -s "$folder/run/$daemon.pid" ] || kill -KILL "$(<"$folder/run/$daemon.pid")" 2>/dev/null
done
for space in "slurm$net-n0" "slurm$net-n1"; do # jobs and their slurmstepd outlive slurmd
    ip netns pids "$space" 2>/dev/null | xargs --no-run-if-empty kill -KILL 2>/dev/null
    ip netns del "$space" 2>/dev/null
    ip link del "$space" 2>/dev/null
done
ip link del "slurm$net" 2>/dev/null
rm -f "$folder"/run/{net,*.pid}
