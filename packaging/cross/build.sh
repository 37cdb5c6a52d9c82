#!/bin/bash
# Builds both programs for another architecture of Debian 12, in target/TRIPLE/release.
#
#   packaging/cross/build.sh arm64
#
# Rust's own standard library for that architecture need not be there: Debian's cargo builds it
# from Debian's source of it. The C libraries come from a folder with Debian's packages, so that
# this machine's package database does not have to know the architecture.
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() {
    echo "cross: $*" >&2
    exit 1
}

arch=${1:-}
case $arch in
arm64) triple=aarch64-unknown-linux-gnu gnu=aarch64-linux-gnu libraries=aarch64-linux-gnu ;;
*) fail "the architecture must be arm64, not \"$arch\": packaging/cross/build.sh arm64" ;;
esac

# The newest cargo and rustc in Debian 12, which bring the source of the standard library. Not the
# ones that rustup would choose here.
cargo=/usr/bin/cargo rustc=/usr/bin/rustc
for tool in "$cargo" "$rustc" "$gnu-gcc" mmdebstrap; do
    command -v "$tool" >/dev/null || fail "$tool is missing: make packages ARCH=$arch"
done
[ -d "$("$rustc" --print sysroot)/lib/rustlib/src/rust/library/std" ] ||
    fail "the source of Rust's standard library is missing: make packages ARCH=$arch"

# Made once; a folder that is there is whole, because it gets its name last.
sysroot=$PWD/build/cross/$arch
if [ ! -d "$sysroot" ]; then
    echo "cross: Debian's C libraries for $arch, into ${sysroot#"$PWD"/}"
    rm -rf "$sysroot.new"
    mkdir -p "${sysroot%/*}"
    mmdebstrap --quiet --mode="$([ "$(id -u)" = 0 ] && echo root || echo unshare)" \
        --variant=extract --architectures="$arch" --include=libc6-dev,libgcc-s1,libssl-dev \
        bookworm "$sysroot.new"
    mv "$sysroot.new" "$sysroot"
fi

lower=${triple//-/_}
upper=${lower^^}
export RUSTC=$rustc
# For `-Z build-std`, which the stable cargo refuses otherwise.
export RUSTC_BOOTSTRAP=1
export "CC_$lower=$gnu-gcc" "AR_$lower=$gnu-ar" "CFLAGS_$lower=--sysroot=$sysroot"
export "CARGO_TARGET_${upper}_LINKER=$gnu-gcc"
export "CARGO_TARGET_${upper}_RUSTFLAGS=-C link-arg=--sysroot=$sysroot"
export PKG_CONFIG_ALLOW_CROSS=1
export "PKG_CONFIG_SYSROOT_DIR_$lower=$sysroot"
export "PKG_CONFIG_LIBDIR_$lower=$sysroot/usr/lib/$libraries/pkgconfig:$sysroot/usr/share/pkgconfig"

"$cargo" build --locked --release --bins --target "$triple" -Z build-std=std,panic_abort

# What would only be noticed on the device: a wrong machine, or a library that Debian 12 lacks.
for program in twinbootd twinboot; do
    "$gnu-readelf" --dynamic --wide "target/$triple/release/$program" |
        sed -n "s/.*(NEEDED).*\[\(.*\)\]/cross: $program for $arch needs \1/p"
done
