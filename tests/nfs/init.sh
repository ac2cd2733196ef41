#!/bin/bash
# The first process of a user-mode Linux. It prepares the file system for guest.sh, and runs guest.sh.
# The root is that of this machine, read-only. Only the directory of vm.py is writable.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
ln -s /proc/self/fd /dev/fd
for directory in /dev/shm /run /tmp /srv /var/lib/nfs /var/log /var/tmp; do
    mkdir -p "$directory"
    mount -t tmpfs -o mode=1777 tmpfs "$directory"
done
dir=$(sed -n 's/.*guest=\([^ ]*\).*/\1/p' /proc/cmdline)
mkdir -p "$dir"
mount -t hostfs -o "$dir" none "$dir"
# shellcheck source=/dev/null
. "$dir/environment"
cd "$ROOT" || exit

# The kernel loads modules with this program, because the machine has no modules of this kernel.
printf '#!/bin/sh\nexec modprobe -d %q "$@"\n' "$ROOT/.cache/vm/kernel" >/run/modprobe
chmod +x /run/modprobe
echo /run/modprobe >/proc/sys/kernel/modprobe
ip link set lo up
exec bash tests/nfs/guest.sh "$dir"
