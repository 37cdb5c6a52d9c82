#!/bin/sh
# A bootloader of two variables, as twinbootd calls it with boot.kind = "custom".
#
#   default   the slot that boots
#   try       the slot that boots once instead, or empty
#
# Usage: bootloader.sh FOLDER VERB [SLOT]; the folder holds the variables, and the kernel's command
# line of the present boot in sysroot/proc/cmdline.
set -eu
folder=$1 verb=$2 slot=${3:-}
variables=$folder/bootloader.env

. "$variables"
running=$(sed -n 's/.*twinboot\.slot=\([AB]\).*/\1/p' "$folder/sysroot/proc/cmdline")
case $slot in A) other=B ;; B) other=A ;; *) other= ;; esac

boot() { cat "$folder/sysroot/proc/sys/kernel/random/boot_id"; }
begun_in=$(boot)

# Replaced as a whole, and on the medium before the call ends. Not after the power went: then the
# machine is in another boot, which this call is not of.
store() {
    printf 'default=%s\ntry=%s\n' "$default" "$try" >"$variables.new"
    sync "$variables.new"
    [ "$(boot)" = "$begun_in" ]
    mv "$variables.new" "$variables"
    sync "$folder"
}

echo "$verb${slot:+ $slot}" >>"$folder/bootloader.log"
if [ -e "$folder/bootloader.fails" ] && grep -qx "$verb" "$folder/bootloader.fails"; then
    echo "the environment is read-only" >&2
    exit 1
fi
case $verb in
    running) echo "$running" ;;
    next) echo "${try:-$default}" ;;
    retire | cancel)
        [ "$try" != "$slot" ] || try=
        [ "$default" != "$slot" ] || default=$other
        store
        ;;
    try)
        try=$slot
        store
        ;;
    confirm)
        default=$running try=
        store
        ;;
    *)
        echo "unknown verb $verb" >&2
        exit 64
        ;;
esac
