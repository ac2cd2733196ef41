#!/usr/bin/env bash
# Fetches a Debian kernel for the VM into the directory $1: user-mode Linux where it works, else a kernel for QEMU.
# It unpacks packages and installs none. So the machine does not change, and root is not needed.
set -euo pipefail
target=$1

if [[ $(uname -m) != x86_64 ]] || ! command -v apt-get >/dev/null; then
    echo "tests/nfs/kernel.sh: the VM needs Debian on x86-64" >&2
    exit 1
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch" "$target.part"' EXIT

unpack() { # unpack PACKAGE PATTERN...: the files of a package that match
    (cd "$scratch" && apt-get download -qq "$1" 2>&1 | { grep -v unsandboxed || true; }) >&2
    dpkg-deb --fsys-tarfile "$scratch/$1"_*.deb | tar -x -C "$target.part" --wildcards "${@:2}"
}
known() { # known PACKAGE: whether the package lists have it
    apt-cache show "$1" >/dev/null 2>&1
}
boots() { # whether the user-mode Linux runs a program of this machine: it needs ptrace, and must know the processor
    local said # the program's words, and those of a kernel whose first process has ended
    said=$(timeout 60 "$target.part/usr/bin/linux.uml" mem=64M root=none rootfstype=hostfs hostfs=/ ro quiet \
        con=null con0=null,fd:1 init=/bin/echo -- it works </dev/null 2>&1 | tr -d '\0') || true
    [[ $said == *"it works"* ]]
}

if ! known linux-image-amd64 && [[ $(id -u) == 0 ]]; then
    apt-get update -qq >&2
fi
rm -rf "$target" "$target.part"
mkdir -p "$target.part"
if known user-mode-linux && unpack user-mode-linux ./usr/bin/linux.uml './usr/lib/uml/modules/*' && boots; then
    mkdir "$target.part/lib"
    ln -s ../usr/lib/uml/modules "$target.part/lib/modules"
else
    echo "tests/nfs/kernel.sh: user-mode Linux does not run here; QEMU does its work, ten times slower" >&2
    image=$(apt-cache depends linux-image-amd64 2>/dev/null | sed -n '/Depends: linux-image-[0-9]/{s/.*: //p;q}')
    [[ $image ]] || { echo "tests/nfs/kernel.sh: no linux-image-amd64 in the package lists: apt-get update" >&2; exit 1; }
    unpack "$image" './boot/vmlinuz-*' './lib/modules/*/modules.*' './lib/modules/*/kernel/'{fs,lib,crypto,net}'/*' \
        './lib/modules/*/kernel/arch/*/crypto/*' \
        './lib/modules/*/kernel/drivers/'{block/virtio_blk.ko,char/virtio_console.ko,net/veth.ko,virtio/*}
    PATH=$PATH:/usr/sbin:/sbin depmod -b "$target.part" "${image#linux-image-}"
fi
mv "$target.part" "$target"
touch "$target"
