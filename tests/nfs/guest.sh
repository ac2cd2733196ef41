#!/usr/bin/env bash
# The program of the VM. Its argument is the directory of vm.py. It starts the server, the clients, and pytest on alpha.
# The server is the VM itself: nfsd's record of its clients works in no other namespace. A restart needs the record.
dir=$1
exec >"$dir/guest" 2>&1
set -a
# shellcheck source=/dev/null
. "$dir/environment"
PATH=/usr/sbin:/usr/bin:$PATH
# shellcheck disable=SC2034  # exported by set -a
NFS_VM=$dir/reports TMPDIR=/run/scratch PYTHONDONTWRITEBYTECODE=1
set +a
mkdir -m 1777 /run/scratch
modules=(nfsd nfsv3 nfsv4 nfs_layout_flexfiles veth sch_ingress cls_u32 act_gact)
if [[ $KERNEL == uml ]]; then
    /run/modprobe -a "${modules[@]}"
else
    modprobe -a virtio_blk ext4 "${modules[@]}"
    # The host's programs. The VM caches them, so that it reads each only once. The disk is made by vm.py.
    mkdir -m 1777 /run/disk /run/host
    mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose host /run/host
    mount --bind /run/host/usr /usr
    mount -o ro /dev/vda /run/disk
    while read -r place; do
        mount --bind "/run/disk$place" "$place"
    done <"$dir/places"
    export XDG_CACHE_HOME=/run/disk/cache
fi

# Each client has a cable to the server. gamma also has one to the storage network.
cable() { # cable HOST NAME NETWORK
    ip link add "$2" type veth peer name eth0 netns "$1"
    ip -n "$1" link set eth0 name "$2" up
    ip -n "$1" address add "$3.2/24" dev "$2"
    ip link set "$2" up
    ip address add "$3.1/24" dev "$2"
}
number=0
for host in alpha beta gamma; do
    ip netns add "$host"
    ip -n "$host" link set lo up
    cable "$host" "$host" "10.9.$((++number))"
    ip -n "$host" route add default via "10.9.$number.1"
done
cable gamma storage 10.9.8
ip address add 10.9.9.9/32 dev lo # for the other hosts, an address behind routers

# shellcheck disable=SC2016  # the shell on alpha expands the variables
ip netns exec alpha unshare --uts --mount bash -c '
    hostname alpha
    exec "$PYTHON" -m pytest -p no:cacheprovider -p tests.nfs.reporter --confcutdir=tests/nfs --basetemp=/run/scratch/pytest \
        --timeout=2400 --timeout-method=thread -v -ra --durations=15 "@$1/cases"
' alpha "$dir"
echo "pytest ended with $?"
# Without a sync, which would wait for a server that a test has stopped.
echo 1 >/proc/sys/kernel/sysrq
echo o >/proc/sysrq-trigger
sleep 60
