#!/usr/bin/env bash
# Debian's own kernel below the directory $1, for the VM: boot/vmlinuz-VERSION and the modules that it needs.
# It is unpacked, not installed: nothing of this machine changes, and no root is needed.
set -euo pipefail
target=$1

if [[ $(uname -m) != x86_64 ]] || ! command -v apt-get >/dev/null; then
    echo "tests/nfs/kernel.sh: the VM needs Debian on x86-64" >&2
    exit 1
fi
image() { # the package that the newest of them depends on; nothing when the lists do not have it
    apt-cache depends linux-image-amd64 2>/dev/null | sed -n '/Depends: linux-image-[0-9]/{s/.*: //p;q}' || true
}
if [[ -z $(image) && $(id -u) == 0 ]]; then
    apt-get update -qq >&2
fi
image=$(image)
[[ $image ]] || { echo "tests/nfs/kernel.sh: no linux-image-amd64 in the package lists: apt-get update" >&2; exit 1; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch" "$target.part"' EXIT
(cd "$scratch" && apt-get download -qq "$image" 2>&1 | { grep -v unsandboxed || true; }) >&2
mkdir -p "$target" && rm -rf "$target" && mkdir "$target.part"
dpkg-deb --fsys-tarfile "$scratch"/*.deb | tar -x -C "$target.part" --wildcards './boot/vmlinuz-*' './lib/modules/*/modules.*' \
    './lib/modules/*/kernel/'{fs,lib,crypto,net}'/*' './lib/modules/*/kernel/arch/*/crypto/*' \
    './lib/modules/*/kernel/drivers/'{block/virtio_blk.ko,char/virtio_console.ko,net/veth.ko,virtio/*}
PATH=$PATH:/usr/sbin:/sbin depmod -b "$target.part" "${image#linux-image-}"
mv "$target.part" "$target"
