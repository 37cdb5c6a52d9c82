#!/bin/bash
# Installs the Debian packages that building, testing and showing twinboot needs.
# Quick and without network when nothing is missing. As root, or with sudo.
#
# Usage: packaging/setup/debian.sh [SET...]
#   arm64      also what building for that architecture needs
#   vm         also what tests/vm needs for the amd64 machine
#   vm-arm64   also what it needs for the arm64 machines
set -euo pipefail

packages=(
    # The build: Paho's C library, OpenSSL's headers.
    gcc libc6-dev make cmake pkg-config libssl-dev git ca-certificates
    # The image: a Debian root file system, laid out and compressed.
    mmdebstrap e2fsprogs zstd xz-utils gzip
    # The demo, the tests and the bench: slots on loop devices, an HTTPS server, what we compare to.
    nginx curl openssl mount util-linux iproute2 procps
    # The tests of RAUC: its service on a bus of its own, bundles, GRUB's environment block.
    rauc rauc-service dbus squashfs-tools grub-common
    # The checks: the units are read by systemd's own parser. The tests: journals of failed boots.
    systemd systemd-journal-remote
    # Microsoft's SDKs.
    python3 python3-venv
)
for set in "$@"; do
    case $set in
    # A cargo that builds the standard library, with its source; beside any cargo that is here.
    arm64) packages+=(cargo-web rustc-web rust-web-src gcc-aarch64-linux-gnu uidmap) ;;
    # The machine, its disk and its network; kmod reads the kernel's modules for an image.
    vm)
        packages+=(qemu-system-x86 qemu-system-common qemu-system-data seabios qemu-utils
            python3 gdisk mtools dosfstools squashfs-tools cpio kmod socat grub-common grub-pc-bin)
        ;;
    # The machine, programs of another architecture while its images are made, U-Boot and its tools.
    vm-arm64)
        packages+=(qemu-system-arm qemu-user-static arch-test u-boot-qemu u-boot-tools
            libubootenv-tool device-tree-compiler)
        ;;
    *)
        echo "setup: there is no set \"$set\"; there are: arm64, vm, vm-arm64" >&2
        exit 2
        ;;
    esac
done
# Debian's node, unless another is there already (its npm comes with it).
command -v npm >/dev/null || packages+=(nodejs npm)

say() { echo "setup: $*"; }
fail() {
    echo "setup: $*" >&2
    exit 1
}

if ! command -v dpkg-query >/dev/null; then
    fail "this needs Debian 12 (dpkg is not here); elsewhere install the like of: ${packages[*]}"
fi

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f '${db:Status-Status} ' "$package" 2>/dev/null || true)
    [[ " $status" = *" installed "* ]] || missing+=("$package")
done
if [ "${#missing[@]}" = 0 ]; then
    say "all Debian packages are there"
    exit 0
fi

if [ "$(id -u)" = 0 ]; then
    as_root=()
elif command -v sudo >/dev/null; then
    as_root=(sudo)
else
    fail "missing: ${missing[*]}. Run this as root, or install sudo"
fi

renew_lists() { "${as_root[@]}" apt-get update --quiet; }

# All packages of QEMU must have one version. Where one of them came from bookworm-backports, so must
# the others, by name, and from a source that may not be there yet.
named=("${missing[@]}")
if dpkg-query -W -f '${Version}\n' 'qemu-*' 2>/dev/null | grep -q 'bpo12'; then
    for i in "${!named[@]}"; do
        case ${named[$i]} in
        qemu-system-* | qemu-utils | seabios) named[i]+=/bookworm-backports ;;
        esac
    done
    case " ${named[*]} " in */bookworm-backports*)
        if ! apt-cache policy | grep -q 'n=bookworm-backports'; then
            mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' \
                'Codename: bookworm' | head -n 1)
            say "adding bookworm-backports, where this machine's QEMU comes from"
            echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror" \
                "bookworm-backports main" |
                "${as_root[@]}" tee /etc/apt/sources.list.d/bookworm-backports.list >/dev/null
            renew_lists
        fi
        ;;
    esac
fi
install=(apt-get install --yes --quiet --no-install-recommends -o Dpkg::Use-Pty=0 "${named[@]}")
install_missing() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive "${install[@]}"; }

# The package starts a web server on port 80, now and at every boot, and nobody asked for that: its
# service is kept from starting while it is installed, and is disabled afterwards. An nginx that
# was here before is not touched.
new_nginx=no
policy=/usr/sbin/policy-rc.d
case " ${missing[*]} " in *" nginx "*)
    new_nginx=yes
    if [ ! -e "$policy" ]; then
        trap '"${as_root[@]}" rm -f "$policy"' EXIT
        printf '#!/bin/sh\n[ "$1" != nginx ] || exit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
        "${as_root[@]}" chmod 755 "$policy"
    fi
    ;;
esac

say "installing: ${missing[*]}"
"${install[@]}" --simulate >/dev/null 2>&1 || renew_lists
if ! install_missing; then
    say "the package lists may be old: renewing them, then once more"
    renew_lists
    install_missing
fi
if [ "$new_nginx" = yes ] && [ -x /usr/sbin/update-rc.d ]; then
    "${as_root[@]}" update-rc.d nginx disable
fi
say "done"
