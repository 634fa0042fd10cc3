#!/bin/bash
# Starts a real SLURM cluster of two nodes, n0 and n1, on this machine.   usage: up.sh FOLDER
#
# Each node is a slurmd in its own network, UTS and mount namespace: its own address, host name and /etc/hosts, as two
# machines have. State, logs and configuration go into FOLDER; `export SLURM_CONF=FOLDER/slurm.conf` afterwards. Several
# clusters may run at once, each on a subnet of its own. Needs root and what install.sh installs. Stop it with down.sh.
set -euo pipefail
folder=$(mkdir -p "${1:?usage: up.sh FOLDER}" && cd "$1" && pwd)
host=$(hostname -s)
mkdir -p "$folder"/{run,log,state,spool}
trap 'echo "up.sh: the cluster did not start: see $folder/log" >&2; bash "$(dirname "$0")/down.sh" "$folder"' ERR

# The first subnet that is free: to make its bridge is to have it.
for ((net = 0; net < 200; net++)); do
    ! ip link add "slurm$net" type bridge 2>/dev/null || break
done
echo "$net" >"$folder/run/net"
subnet=10.77.$net
ip addr add "$subnet.254/24" dev "slurm$net"
ip link set "slurm$net" up
for node in 0 1; do
    space=slurm$net-n$node
    ip netns add "$space"
    ip link add "$space" type veth peer name eth0 netns "$space"
    ip link set "$space" master "slurm$net" up
    ip -n "$space" addr add "$subnet.$((node + 1))/24" dev eth0
    ip -n "$space" link set eth0 up
    ip -n "$space" link set lo up
done

printf '%s\n' "127.0.0.1 localhost" "$subnet.1 n0" "$subnet.2 n1" "$subnet.254 $host" >"$folder/run/hosts"
cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host($subnet.254)
SlurmctldPort=$((16817 + net))
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.sock
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd_%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd_%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=500000,bf_interval=3
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobRequeue=1
KillWait=5
InactiveLimit=0
NodeName=n0 NodeHostname=n0 NodeAddr=$subnet.1 Port=17001 CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n1 NodeHostname=n1 NodeAddr=$subnet.2 Port=17002 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
CONF
export SLURM_CONF=$folder/slurm.conf

(umask 077 && head -c 1024 /dev/urandom >"$folder/run/munge.key")
munged --force --key-file="$folder/run/munge.key" --socket="$folder/run/munge.sock" --pid-file="$folder/run/munged.pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/run/munge.seed" --num-threads=2
slurmctld -c
for node in 0 1; do
    # Not `ip netns exec`, which hides /sys/fs/cgroup and with it slurmd's life.
    # shellcheck disable=SC2016 # expanded by the inner shell
    nsenter --net="/run/netns/slurm$net-n$node" unshare --uts --mount bash -euc '
        mount --bind "$1/run/hosts" /etc/hosts
        hostname "n$2"
        exec slurmd -N "n$2"' - "$folder" "$node"
done
for ((i = 0; i < 100; i++)); do
    [ "$(sinfo --noheader --responding --states=idle --format=%D 2>/dev/null)" != 2 ] || exit 0
    sleep 0.1
done
echo "up.sh: the nodes are not idle after 10 s: $(sinfo --noheader --Node --format='%N %T %E')" >&2
false
