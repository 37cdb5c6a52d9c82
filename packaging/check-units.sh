#!/bin/bash
# Has systemd's own parser read the units, as they will stand on a device, and guards their
# hardening. Works without a running systemd.
set -euo pipefail
cd "$(dirname "$0")/.."

# systemd's exposure level of each service, times ten: more is an error. Lower it when the hardening
# gets better. The daemon writes block devices and runs installers, so it cannot go near 0.
readonly EXPOSURE_LIMIT=60

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root/usr/bin" "$root/etc/systemd/system"
# The units of this machine, for the targets that ours name.
mkdir -p "$root/lib/systemd" && cp -a /lib/systemd/system "$root/lib/systemd/"
install -m 755 /bin/true "$root/usr/bin/twinbootd"
cp systemd/* "$root/etc/systemd/system/"
mkdir -p "$root/usr/share/doc/twinboot" && cp README.md "$root/usr/share/doc/twinboot/" 2>/dev/null || true

# A file to copy that adds to a unit.
mkdir "$root/etc/systemd/system/multi-user.target.d"
cp packaging/watchdog/10-twinboot-boot-limit.conf "$root/etc/systemd/system/multi-user.target.d/"

names="$(cd systemd && ls) multi-user.target"
# It warns about what it does not understand and still says yes: here a word is an error.
if ! said=$(systemd-analyze verify --man=no --root="$root" $names 2>&1) || [ -n "$said" ]; then
    echo "$said" >&2
    exit 1
fi

for service in $(cd systemd && ls ./*.service); do
    systemd-analyze security --offline=true --no-pager --threshold="$EXPOSURE_LIMIT" "systemd/$service" | tail -1
done

# What devices rely on, and a well-meant line would break.
fail() {
    echo "$1" >&2
    exit 1
}
for unit in systemd/*.service; do
    # fw_setenv writes below /sys; slots are block devices; grubenv and autoboot.txt lie in /boot.
    ! grep -E '^(ProtectKernelTunables|ProtectSystem|PrivateDevices|ProtectClock|DeviceAllow)=' "$unit" ||
        fail "$unit: that closes what updates need, see its list of what is left out on purpose"
done
# The trial guard must run without a configuration and without the mount of the state folder.
! grep -E '^(Condition|Assert|After|Requires|Wants|[A-Za-z]*Directory|PrivateTmp|RootImage)' systemd/twinboot-trial.* ||
    fail "systemd/twinboot-trial.*: the guard must not wait for what a new image may lack"
for unit in systemd/twinboot-trial.*; do
    for line in DefaultDependencies=no Conflicts=shutdown.target Before=shutdown.target; do
        grep -qx "$line" "$unit" || fail "$unit: needs $line, to run where the boot hangs and end where it ends"
    done
done
grep -qx WantedBy=sysinit.target systemd/twinboot-trial.timer ||
    fail "systemd/twinboot-trial.timer: must be there before the first target that a unit can block"
grep -q '^OnUnitInactiveSec=' systemd/twinboot-trial.timer || fail "systemd/twinboot-trial.timer: must come again"
grep -qx TimeoutStartSec=5min systemd/twinboot-trial.service ||
    fail "systemd/twinboot-trial.service: a oneshot has no limit of its own, and the guard must end"
for code in 126 127 203 226 228; do
    grep -q "^RestartPreventExitStatus=.*\<$code\>" systemd/twinboot-trial.service ||
        fail "systemd/twinboot-trial.service: where the guard cannot run ($code), the machine must restart"
done
# At shutdown the agent asks RAUC, and systemd starts nothing any more.
grep -qx 'After=dbus.service rauc.service' systemd/twinbootd.service ||
    fail "systemd/twinbootd.service: must stop before RAUC and its bus"
# The tools that it asks then are not to be ended together with it.
grep -qx KillMode=mixed systemd/twinbootd.service ||
    fail "systemd/twinbootd.service: the agent's tools must outlive the order to stop it"
# Without these the clock of chrony and ntpd counts as not set.
grep -q '^SystemCallFilter=.*clock_adjtime' systemd/twinbootd.service || fail "systemd/twinbootd.service: must let adjtimex through"
