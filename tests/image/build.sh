#!/bin/bash
# Builds the root file system images of the demo, the tests and the bench: two releases of a real
# Debian system, as ext4 images that fill a 512 MiB slot, plain and compressed.
#
#   rootfs-1.0.0.img  .zst                  what a device runs
#   rootfs-2.0.0.img  .zst  .gz  .xz        what it is updated to
#
# Each has its SHA-256 beside it, as `sha256sum` prints it. They are kept in build/images between
# runs, until this file changes.
#
# Usage: tests/image/build.sh [FOLDER]   (root, or sudo for the parts that need it). Interrupted at
# any moment, it leaves nothing half done behind.
set -euo pipefail

here=$(realpath "$(dirname "$0")")
images=$(realpath -m "${1:-$here/../../build/images}")
recipe=$(sha256sum "$0" | cut -d' ' -f1)
PATH=$PATH:/usr/sbin:/sbin

readonly SUITE=bookworm
readonly SLOT_SIZE=512M
# The tree, both images plain and compressed, and what mmdebstrap needs on its way.
readonly NEEDED_MIB=3000
# What a small connected device carries: an init, a network, TLS, remote access, a script language.
readonly PACKAGES=systemd-sysv,udev,dbus,iproute2,kmod,e2fsprogs,ca-certificates,curl,openssl,openssh-server,python3,perl,git,locales,tzdata,vim-tiny
# What release 2 has and release 1 has not.
readonly NEW_IN_2=less,nano,file,libmagic1,libmagic-mgc
# The same in both, so that they differ where their content does.
readonly FS_UUID=5c6f6a4e-3d0b-4b43-9f0e-7477696e6274
export SOURCE_DATE_EPOCH=1735689600 E2FSPROGS_FAKE_TIME=1735689600
export LC_ALL=C.UTF-8

as_root=()
if [ "$(id -u)" != 0 ]; then
    as_root=(sudo --preserve-env=SOURCE_DATE_EPOCH,E2FSPROGS_FAKE_TIME,LC_ALL,PATH)
fi

fail() {
    echo "image: $*" >&2
    exit 1
}

# `run PROGRAM ARGUMENTS...`: as PROGRAM, but a signal is heeded at once and ends it.
job=
run() {
    local code=0
    "$@" &
    job=$!
    wait "$job" || code=$?
    job=
    return "$code"
}

clean_up() {
    # mmdebstrap itself would finish its packages first.
    [ ! -s "${jail:-}" ] || "${as_root[@]}" kill -KILL "$(cat "$jail")" 2>/dev/null || true
    if [ -n "$job" ]; then
        # The shell would tell everybody that it was killed.
        { kill "$job" && wait "$job"; } 2>/dev/null || true
    fi
    "${as_root[@]}" rm -rf "$images"/.building.*
}

say() { printf 'image: %4ds  %s\n' "$SECONDS" "$*"; }

# `release VERSION`: names the release in the tree, then lays the tree out as an image.
release() {
    say "release $1: making the file system"
    "${as_root[@]}" sed -i '/^IMAGE_/d' "$tree/usr/lib/os-release"
    printf 'IMAGE_ID=twinboot-demo\nIMAGE_VERSION=%s\n' "$1" | "${as_root[@]}" tee -a "$tree/usr/lib/os-release" >/dev/null
    truncate -s "$SLOT_SIZE" "$work/rootfs-$1.img"
    run "${as_root[@]}" mkfs.ext4 -q -F -L rootfs -U "$FS_UUID" -E "hash_seed=$FS_UUID,lazy_itable_init=0" \
        -m 0 -d "$tree" "$work/rootfs-$1.img"
}

mkdir -p "$images"
# The tests and the demo may ask at the same time: one builds, the others wait for it.
exec 9>"$images/.lock"
flock 9
if [ "$(cat "$images/.recipe" 2>/dev/null)" = "$recipe" ]; then
    say "the images in $images are up to date"
    exit 0
fi

[ "$(id -u)" = 0 ] || command -v sudo >/dev/null ||
    fail "a root file system needs root to be made: run this as root, or install sudo"
free_mib=$(df --output=avail --block-size=1M "$images" | tail -n 1)
[ "$free_mib" -ge "$NEEDED_MIB" ] ||
    fail "$images has $free_mib MiB free and needs $NEEDED_MIB: make room, or make build/images a" \
        "link to a folder elsewhere"

trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
# A run that was killed may have left one.
clean_up
work=$(mktemp -d "$images/.building.XXXXXX")
chmod 755 "$work"
tree=$work/tree
rm -f "$images/.recipe"

say "building two releases of Debian $SUITE; this takes a minute or two, once"
# In namespaces of its own: what it starts and mounts in the tree ends with it, however it ends.
jail=$work/jail.pid
run "${as_root[@]}" sh -c 'echo $$ >"$0"; exec "$@"' "$jail" \
    unshare --mount --pid --mount-proc --fork --kill-child \
    mmdebstrap --quiet --variant=minbase --include="$PACKAGES,$NEW_IN_2" "$SUITE" "$tree" ||
    fail "mmdebstrap failed and says why above; it needs to reach Debian's package servers"
rm -f "$jail"
say "the packages are unpacked: $("${as_root[@]}" du -sm "$tree" | cut -f1) MB"

release 2.0.0
"${as_root[@]}" chroot "$tree" dpkg --purge ${NEW_IN_2//,/ } >/dev/null
release 1.0.0

cd "$work"
for plain in rootfs-1.0.0.img rootfs-2.0.0.img; do
    say "$plain: zstd"
    run zstd -q -3 -T0 "$plain" -o "$plain.zst"
done
say "rootfs-2.0.0.img: gzip, xz"
run gzip -1 -n -k rootfs-2.0.0.img
run xz -1 -T2 -k rootfs-2.0.0.img
say "digests"
for file in rootfs-*; do
    sha256sum "$file" >"$file.sha256"
done
mv rootfs-* "$images/"
echo "$recipe" >"$images/.recipe"
say "done: $images"
