#!/bin/bash
# Replace the Java agent of a stock CloudStack secondary storage VM, or bring it back.
#
#   install.sh              install, or repeat the installation
#   install.sh --remove     bring the Java agent back; settings and state stay
#
# From CloudStack 4.22 on, it can be the user data of these VMs (secstorage.vm.userdata). Set BUNDLE first: the URL of an
# archive of /opt/ssvm-worker with its .venv, made with the Python of the system VM. docs/how-to/cloudstack.md says how.
# Without BUNDLE, /opt/ssvm-worker must exist.
set -euo pipefail

BUNDLE="${BUNDLE:-}"
BUNDLE_SHA256="${BUNDLE_SHA256:-}"
# Tests install below another directory.
ROOT="${ROOT:-}"

HOME_DIR="$ROOT/opt/ssvm-worker"
UNITS="$ROOT/etc/systemd/system"
CMDLINE="$ROOT/var/cache/cloud/cmdline"
FILES=(cloud.service.d/ssvm.conf ssvm-systemvm.service.d/cloudstack.conf ssvm-serve.service.d/cloudstack.conf ssvm.slice)

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

value_of() {
    tr ' ' '\n' < "$CMDLINE" | sed -n "s/^$1=//p" | head -n 1
}

fetch_bundle() {
    [ -n "$BUNDLE_SHA256" ] || fail "BUNDLE needs BUNDLE_SHA256"
    local archive
    archive="$(mktemp)"
    curl --fail --silent --show-error --location --retry 5 --output "$archive" "$BUNDLE" || fail "cannot fetch $BUNDLE"
    echo "$BUNDLE_SHA256  $archive" | sha256sum --check --status || fail "$BUNDLE has another checksum"
    mkdir -p "$ROOT/opt"
    tar --extract --gzip --file "$archive" --directory "$ROOT/opt"
    rm -f "$archive"
}

install_worker() {
    [ -r "$CMDLINE" ] || fail "$CMDLINE does not exist: this is no system VM of CloudStack"
    if [ "$(value_of type)" != secstorage ]; then
        echo "this system VM has the type $(value_of type): nothing to do"
        exit 0
    fi
    if [ -n "$BUNDLE" ]; then
        fetch_bundle
    fi
    [ -x "$HOME_DIR/.venv/bin/ssvm" ] || fail "$HOME_DIR/.venv/bin/ssvm does not exist: set BUNDLE"
    "$HOME_DIR/.venv/bin/ssvm" --version || fail "the bundle does not run here: make it with the Python of this VM"
    local from="$HOME_DIR/config/cloudstack/systemvm" each
    for each in "${FILES[@]}"; do
        install -D --mode 0644 "$from/$each" "$UNITS/$each"
    done
    for each in ssvm-systemvm.service ssvm-serve.service; do
        install -D --mode 0644 "$HOME_DIR/config/systemd/$each" "$UNITS/$each"
    done
    if [ ! -e "$ROOT/etc/ssvm/worker.toml" ]; then
        mkdir -p "$ROOT/etc/ssvm"
        sed "s/^zone = .*/zone = \"$(value_of zone)\"/" "$from/worker.toml" > "$ROOT/etc/ssvm/worker.toml"
        chmod 0600 "$ROOT/etc/ssvm/worker.toml"
    fi
    systemctl daemon-reload
    systemctl restart cloud.service
}

remove_worker() {
    local each
    systemctl stop cloud.service ssvm-serve.service ssvm-systemvm.service || true
    for each in "${FILES[@]}" ssvm-systemvm.service ssvm-serve.service; do
        rm -f "$UNITS/$each"
    done
    rmdir --ignore-fail-on-non-empty "$UNITS"/{cloud,ssvm-systemvm,ssvm-serve}.service.d 2> /dev/null || true
    systemctl daemon-reload
    systemctl start cloud.service
}

case "${1:-}" in
    "") install_worker ;;
    --remove) remove_worker ;;
    *) fail "unknown argument $1; give --remove or nothing" ;;
esac
