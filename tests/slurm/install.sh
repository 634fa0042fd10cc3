#!/bin/sh
# Has what the tests of SLURM need, or says what to install.
set -eu
packages="slurmctld slurmd slurm-client munge iproute2"
missing=
for command in slurmctld slurmd sbatch munged ip; do
    PATH=$PATH:/usr/sbin command -v "$command" >/dev/null || missing="$missing $command"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not found:$missing. The tests of SLURM run as root, with Debian's packages $packages or their like" >&2
    exit 1
fi
apt-get update -qq
# shellcheck disable=SC2086 # several words
apt-get install -y -qq --no-install-recommends $packages
