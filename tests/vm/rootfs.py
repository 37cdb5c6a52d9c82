"""Root file systems of the slots: a small Debian with a kernel and our package, and its variants.

The Debian is made once for an architecture (`base`, a tar in build/vm). A slot's image is that tree
with our .deb really installed, the board's configuration and the edits of one variant.
"""

import hashlib
import io
import os
import shutil
import stat
import subprocess
import tarfile
import textwrap
from pathlib import Path

from process import BUILD, RigError, run, say

SUITE = "bookworm"
PACKAGES = [
    "systemd-sysv", "udev", "dbus", "iproute2", "kmod", "e2fsprogs", "ca-certificates", "libssl3",
    "busybox-static", "util-linux",
]
# What only the boards of one architecture need: the tools of their boot loaders.
BOARD_PACKAGES = {"amd64": [], "arm64": ["libubootenv-tool", "dosfstools"]}
KERNEL = {"amd64": "linux-image-amd64", "arm64": "linux-image-arm64"}
# Modules of the kernel that the slot keeps, those that the initrd loads first. What they need in
# turn is kept as well.
INITRD_MODULES = ["virtio_pci", "virtio_mmio", "virtio_blk", "ext4", "squashfs", "i6300esb"]
SLOT_MODULES = ["virtio_net", "virtio_rng", "vfat", "nls_cp437", "nls_ascii", "nls_iso8859-1",
                "nls_utf8", "overlay", "dm-mod", "dm-verity", "loop", "button", "evdev"]
IMAGE_FILES = Path(__file__).parent / "image"
# What programs start in a tree ends with them, and so does what they mount.
JAIL = ["unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
# As it is loaded: the file may be edited while a run goes on.
_RECIPE = Path(__file__).read_text()
# What no story needs, taken out last: every byte of an image is decrypted and hashed by an emulated
# processor.
PRUNED = [
    "usr/lib/linux-image-*", "usr/lib/udev/hwdb*", "usr/share/doc", "usr/share/zoneinfo",
    "usr/share/perl*", "usr/bin/perl*", "usr/lib/*-linux-gnu/perl*", "usr/lib/*-linux-gnu/libperl*",
    "usr/bin/apt*", "usr/lib/apt", "usr/lib/*-linux-gnu/libapt*", "var/lib/dpkg/info", "var/cache/*",
    "usr/lib/*-linux-gnu/libdb-*", "usr/lib/*-linux-gnu/libstdc++*", "usr/lib/*-linux-gnu/gconv",
    "usr/bin/openssl",
]

# How long a new image has to become healthy, and when the guard looks, in seconds. Emulated
# machines are slow; images that are meant to fail need not be waited for that long.
TRIAL_LIMIT_S = 300
FAILING_TRIAL_LIMIT_S = 90
GUARD_S = 400
EARLY_GUARD_S = 45


class Tree:
    """A root file system being made."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        """Replaces a file. Never in place: the tree shares its files with others by hard links."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_text(textwrap.dedent(text))
        file.chmod(mode)

    def remove(self, name: str) -> None:
        """Removes a file that must be there."""
        (self.path / name).unlink()

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.symlink_to(target)

    def unit(self, name: str, text: str, wanted_by: str) -> None:
        """An enabled systemd unit."""
        self.write(f"etc/systemd/system/{name}", text)
        self.link(f"etc/systemd/system/{wanted_by}.wants/{name}", f"../{name}")

    def early_unit(self, name: str, command: str) -> None:
        """A unit that runs a shell command before the basic system is up."""
        self.unit(name, f"""\
            [Unit]
            Description={command}
            DefaultDependencies=no
            After=systemd-journald.service
            Before=sysinit.target
            [Service]
            Type=oneshot
            ExecStart=/bin/sh -c '{command}'
            """, "sysinit.target")

    def setting(self, section: str, line: str) -> None:
        """Adds a line at the head of a section of twinboot.toml."""
        file = self.path / "etc/twinboot/twinboot.toml"
        text = file.read_text()
        head = f"[{section}]\n"
        if head not in text:
            text += f"\n{head}"
        key = line.split("=")[0].strip()
        before, after = text.split(head, 1)
        section_lines, *rest = after.split("\n[", 1)
        kept = [kept for kept in section_lines.splitlines() if kept.split("=")[0].strip() != key]
        after = "\n".join(["\n".join([line, *kept]), *rest]) if not rest else \
            "\n".join([line, *kept]) + "\n\n[" + rest[0]
        self.write("etc/twinboot/twinboot.toml", before + head + after)


def _guard(tree: Tree, seconds: int) -> None:
    tree.write("etc/systemd/system/twinboot-trial.timer.d/rig.conf", f"""\
        [Timer]
        # Resets all the timers of the unit.
        OnBootSec=
        OnBootSec={seconds}
        OnUnitInactiveSec={seconds}
        """)


def _failing(tree: Tree) -> None:
    tree.setting("update", f"trial_limit_s = {FAILING_TRIAL_LIMIT_S}")


def _panic(tree: Tree) -> None:
    tree.early_unit("panic.service", "echo c >/proc/sysrq-trigger")


def _guard_after_journal(tree: Tree) -> None:
    """An early guard, which lets the failed boot write its journal: the twin is to show that."""
    _guard(tree, EARLY_GUARD_S)
    tree.write("etc/systemd/system/twinboot-trial.timer.d/journal.conf", """\
        [Unit]
        After=systemd-journal-flush.service
        """)


def _agent_missing(tree: Tree) -> None:
    tree.remove("usr/bin/twinbootd")
    _guard_after_journal(tree)


def _agent_crashes(tree: Tree) -> None:
    tree.write("usr/bin/twinbootd", "#!/bin/sh\nkill -SEGV $$\n", 0o755)
    _guard_after_journal(tree)


def _no_network(tree: Tree) -> None:
    tree.remove("etc/systemd/network/wired.network")
    _failing(tree)


def _wrong_credentials(tree: Tree) -> None:
    # Goes before the device's own, see LoadCredential= in the unit.
    key = "d3Jvbmcga2V5LCBidXQgYmFzZTY0IG9mIDMyIGJ5dGU="
    tree.write("etc/credstore/hub-credential",
               f"HostName=twinboot.azure-devices.net;DeviceId=vm-1;SharedAccessKey={key}", 0o600)
    _failing(tree)


def _health_fails(tree: Tree) -> None:
    tree.write("etc/twinboot/health.d/pump", """\
        #!/bin/sh
        echo "the pump does not answer"
        exit 1
        """, 0o755)
    _failing(tree)


def _freezes(tree: Tree) -> None:
    # systemd stops where it is, and with it what feeds the hardware watchdog.
    tree.early_unit("freeze.service", "kill -SEGV 1")


def _hangs(tree: Tree) -> None:
    # systemd is well and feeds the watchdog, but nothing of ours would be started in its turn.
    tree.early_unit("hang.service", "sleep infinity")
    _guard(tree, EARLY_GUARD_S)
    _failing(tree)


def _clock_unset(tree: Tree) -> None:
    tree.early_unit("no-clock.service", "date --set=@86400")
    _failing(tree)


# What can be different in an image, as edits of the good one.
VARIANTS = {
    "good": lambda tree: None,
    # Nothing is wrong with it, but its trial is short.
    "impatient": _failing,
    "kernel-missing": lambda tree: tree.remove("boot/vmlinuz"),
    "init-missing": lambda tree: tree.remove("usr/sbin/init"),
    "panic-at-boot": _panic,
    "agent-missing": _agent_missing,
    "agent-crashes": _agent_crashes,
    "no-network": _no_network,
    "wrong-credentials": _wrong_credentials,
    "health-fails": _health_fails,
    "freezes-early": _freezes,
    "hangs-early": _hangs,
    "clock-unset": _clock_unset,
}


def _digest(*parts) -> str:
    """A key for the cache, of texts and of files' contents."""
    total = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else str(part).encode()
        total.update(hashlib.sha256(data).digest())
    return total.hexdigest()[:16]


def _content(deb: Path) -> str:
    """What a package installs, whenever it was made; its documents do not count."""
    total = hashlib.sha256(run(["dpkg-deb", "--info", deb, "postinst"]).encode())
    data = io.BytesIO(run(["dpkg-deb", "--fsys-tarfile", deb], text=False))
    with tarfile.open(fileobj=data) as members:
        for member in members:
            if member.isfile() and "/usr/share/doc/" not in member.name:
                total.update(f"{member.name} {member.mode:o}\n".encode())
                total.update(members.extractfile(member).read())
    return total.hexdigest()


def _cached(path: Path, recipe: str, make) -> Path:
    """`path`, made by `make(partial path)` if it is not there. Nothing half done ever has its name.
    It begins with `recipe`, KIND-KEY; what was made by another recipe for that kind goes."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            make(partial)
            partial.rename(path)
            for former in path.parent.glob(f"{recipe.rpartition('-')[0]}-*"):
                if not former.name.startswith(recipe):
                    _remove(former)
        finally:
            _remove(partial)
    return path


def _remove(path: Path) -> None:
    """Removes a file or a tree that may not be there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# Run by mmdebstrap outside of the new system: fetches the kernel's package without installing it,
# because its scripts would make an initrd that nobody uses, and takes what we need out of it.
_KERNEL_HOOK = """\
set -e
root=$1
cd "$root"
APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get install --yes --quiet --download-only \
    --no-install-recommends {kernel}
dpkg-deb --fsys-tarfile "$root"/var/cache/apt/archives/linux-image-[0-9]*.deb |
    tar --extract --keep-directory-symlink --directory "$root"
rm -f "$root"/var/cache/apt/archives/*.deb
version=$(basename "$root"/lib/modules/*)
mv "$root"/boot/vmlinuz-* "$root"/boot/vmlinuz
rm -f "$root"/boot/System.map-* "$root"/boot/config-*
modules=$root/usr/lib/modules/$version
depmod --basedir "$root" "$version"
set_of() {{
    modprobe --dirname "$root" --set-version "$version" --show-depends --ignore-install "$@" |
        sed -n 's/^insmod \\([^ ]*\\).*/\\1/p'
}}
mkdir -p "$root/keep" "$root/boot/modules"
for name in {initrd}; do set_of $name; done | awk '!seen[$0]++' >"$root/keep/initrd"
for name in {initrd} {slot}; do set_of $name; done | sort -u >"$root/keep/all"
while read -r file; do cp "$file" "$root/boot/modules/"; basename "$file"; done \
    <"$root/keep/initrd" >"$root/boot/modules/order"
find "$modules/kernel" -name '*.ko*' | while read -r file; do
    grep -q "/$(basename "$file")\\$" "$root/keep/all" || rm -f "$file"
done
find "$modules/kernel" -type d -empty -delete
rm -rf "$root/keep"
depmod --basedir "$root" "$version"
"""


# The programs that Debian's qemu-user-static names for the kernel.
_EMULATED = {"arm64": Path("/usr/lib/binfmt.d/qemu-aarch64.conf")}
_BINFMT = Path("/proc/sys/fs/binfmt_misc")


def _emulate(arch: str) -> None:
    """Lets this machine run programs of `arch`, as systemd would have at its start: trees of
    another architecture run their packages' scripts."""
    if arch not in _EMULATED or not subprocess.run(["arch-test", arch], capture_output=True).returncode:
        return
    if not (_BINFMT / "register").exists():
        run(["mount", "-t", "binfmt_misc", "binfmt_misc", _BINFMT])
    for line in _EMULATED[arch].read_text().splitlines():
        if line.startswith(":"):
            (_BINFMT / "register").write_text(line)


def base(arch: str) -> Path:
    """The tar of the Debian that all images of `arch` share."""
    hook = _KERNEL_HOOK.format(kernel=KERNEL[arch], initrd=" ".join(INITRD_MODULES),
                               slot=" ".join(SLOT_MODULES))
    excluded = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"]
    command = [
        "mmdebstrap", "--quiet", f"--architectures={arch}", "--variant=essential",
        f"--include={','.join(PACKAGES + BOARD_PACKAGES[arch])}", "--aptopt=Acquire::Retries \"3\"",
        *(f"--dpkgopt=path-exclude={path}" for path in excluded),
    ]
    key = _digest(SUITE, command, hook)

    def make(partial: Path) -> None:
        _emulate(arch)
        say(f"Debian {SUITE} for {arch} is being made; this takes minutes, once")
        script = partial.with_suffix(".hook")
        script.write_text(hook)
        try:
            run([*JAIL, *command, f"--customize-hook=sh {script} \"$1\"", "--format=tar", SUITE, partial])
        finally:
            script.unlink()

    recipe = f"base-{arch}-{key}"
    return _cached(BUILD / f"{recipe}.tar", recipe, make)


def _packaged(board) -> Path:
    """The shared Debian with our package and the board's configuration, as a tree."""
    tar, deb = base(board.arch), board.deb()
    key = _digest(tar.name, _content(deb), _RECIPE, board.recipe(), *sorted(IMAGE_FILES.iterdir()))

    def make(partial: Path) -> None:
        _emulate(board.arch)
        say(f"{board.name}: installs {deb.name} into the tree")
        partial.mkdir()
        run(["tar", "--extract", "--numeric-owner", f"--directory={partial}", f"--file={tar}"])
        shutil.copy(deb, partial / "twinboot.deb")
        # Its scripts run; nothing is started, because nothing runs in a tree.
        run([*JAIL, "chroot", partial, "dpkg", "--install", "/twinboot.deb"],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"})
        (partial / "twinboot.deb").unlink()
        for pattern in PRUNED:
            for found in partial.glob(pattern):
                shutil.rmtree(found) if found.is_dir() else found.unlink()
        _configure(Tree(partial), board)
        _initrd(partial)

    recipe = f"{board.name}-{key}"
    return _cached(BUILD / "trees" / recipe, recipe, make)


def _configure(tree: Tree, board) -> None:
    """What every image of every board has: mounts, network, clock, journal, watchdog, agent."""
    for folder in ("data", "boot/grub", "boot/autoboot", "boot/firmware", "var/lib/twinboot",
                   "var/log/journal", "var/lib/systemd", "var/tmp"):
        (tree.path / folder).mkdir(parents=True, exist_ok=True)
    tree.write("etc/fstab", f"""\
        /dev/disk/by-partlabel/data /data ext4 noatime,nofail 0 2
        /data/twinboot /var/lib/twinboot none bind,nofail 0 0
        /data/journal /var/log/journal none bind,nofail 0 0
        tmpfs /tmp tmpfs nosuid,nodev 0 0
        tmpfs /var/tmp tmpfs nosuid,nodev 0 0
        tmpfs /var/lib/systemd tmpfs nosuid,nodev 0 0
        """ + "".join(f"{line}\n" for line in board.mounts()))
    tree.write("etc/hostname", "vm-1\n")
    tree.write("etc/hosts", """\
        127.0.0.1 localhost vm-1
        10.0.2.100 twinboot.azure-devices.net images.example.net
        """)
    tree.write("etc/systemd/network/wired.network", """\
        [Match]
        Name=en* eth*
        [Network]
        Address=10.0.2.15/24
        Gateway=10.0.2.2
        LinkLocalAddressing=no
        """)
    tree.write("etc/systemd/journald.conf.d/rig.conf", """\
        [Journal]
        Storage=persistent
        SyncIntervalSec=5s
        SystemMaxUse=16M
        ForwardToConsole=yes
        MaxLevelConsole=info
        """)
    tree.write("etc/systemd/system.conf.d/rig.conf", """\
        [Manager]
        RuntimeWatchdogSec=60
        RebootWatchdogSec=2min
        # A busy host takes its time; a data partition that comes too late would stay away.
        DefaultDeviceTimeoutSec=10min
        DefaultTimeoutStartSec=10min
        ShowStatus=no
        """)
    _guard(tree, GUARD_S)
    # Set for each device on the kernel's command line; the root is read-only.
    tree.write("etc/machine-id", "")
    link = "etc/systemd/system/multi-user.target.wants/systemd-networkd.service"
    tree.link(link, "/lib/systemd/system/systemd-networkd.service")
    for unit in ("systemd-firstboot.service", "e2scrub_all.timer", "e2scrub_reap.service",
                 "dpkg-db-backup.timer", "fstrim.timer", "systemd-update-utmp.service"):
        tree.link(f"etc/systemd/system/{unit}", "/dev/null")
    tree.write("etc/twinboot/twinboot.toml", textwrap.dedent(f"""\
        [hub]
        ca_file = "/data/rig/hub-ca.pem"
        retry_max_s = 5
        [fetch]
        ca_file = "/data/rig/images-ca.pem"
        retry_max_s = 5
        [update]
        trial_limit_s = {TRIAL_LIMIT_S}
        [report]
        progress_interval_s = 1
        [health]
        units = ["systemd-networkd.service"]
        """) + board.agent_config())
    # The images are no larger than the default, and nothing would ever be resumed.
    tree.setting("install", "checkpoint_mib = 8")
    board.customise(tree)


def _initrd(tree: Path) -> None:
    """boot/initrd.img: busybox, findfs and the modules that the root needs."""
    work = tree / "initrd"
    for folder in ("bin", "modules", "lib"):
        (work / folder).mkdir(parents=True)
    shutil.copy(IMAGE_FILES / "init", work / "init")
    (work / "init").chmod(0o755)
    shutil.copy(tree / "usr/bin/busybox", work / "bin/busybox")
    shutil.copy(tree / "usr/sbin/findfs", work / "bin/findfs")
    # The libraries of findfs, and the loader, where the loader looks for them.
    for library in ("libblkid.so.1", "libc.so.6"):
        shutil.copy(next((tree / "usr/lib").glob(f"*-linux-gnu/{library}")), work / "lib" / library)
    for name in ("lib64/ld-linux-x86-64.so.2", "lib/ld-linux-aarch64.so.1"):
        loader = tree / "usr" / name
        if not loader.exists():
            loader = tree / name
        if loader.exists():
            (work / name).parent.mkdir(exist_ok=True)
            shutil.copy(loader, work / name)
    for file in (tree / "boot/modules").iterdir():
        shutil.copy(file, work / "modules")
    shutil.rmtree(tree / "boot/modules")
    run(["sh", "-c", "find . | LC_ALL=C sort | cpio --quiet --create --format=newc --owner=0:0 |"
         " gzip -n -6 >../boot/initrd.img"], cwd=work)
    shutil.rmtree(work)


def tree(board, version: str, variant: str, path: Path) -> Path:
    """The tree of a slot at `path`, which must not exist; it shares its files with other trees, so
    a file is never written in place."""
    run(["cp", "--archive", "--link", _packaged(board), path])
    made = Tree(path)
    release = path / "usr/lib/os-release"
    made.write("usr/lib/os-release",
               f"{release.read_text()}IMAGE_ID=twinboot-vm\nIMAGE_VERSION={version}\n")
    VARIANTS[variant](made)
    return path


def slot_image(board, version: str, variant: str = "good") -> Path:
    """The image of a slot: what an update installs, byte for byte."""
    if variant not in VARIANTS:
        raise RigError(f"no variant {variant}; there are: {', '.join(VARIANTS)}")
    packaged = _packaged(board)
    path = BUILD / "images" / f"{packaged.name}-{version}-{variant}.{board.filesystem}"

    def make(partial: Path) -> None:
        say(f"{board.name}: image {version} {variant}")
        work = partial.with_suffix(".tree")
        try:
            tree(board, version, variant, work)
            lay_out(work, board.filesystem, board.slot_mib, partial)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    return _cached(path, packaged.name, make)


def lay_out(tree: Path, filesystem: str, slot_mib: int, path: Path) -> None:
    """The tree as a file system in a file."""
    if filesystem == "squashfs":
        # What the boot loader reads is compressed already, and boot loaders inflate slowly.
        run(["mksquashfs", tree, path, "-noappend", "-no-progress", "-quiet", "-comp", "gzip",
             "-Xcompression-level", "6", "-b", "128K",
             "-action", "uncompressed@subpathname(boot)"])
    elif filesystem == "ext4":
        with open(path, "wb") as image:
            image.truncate(slot_mib << 20)
        # Both slots hold the same file system, as they do on devices.
        uuid = "5c6f6a4e-3d0b-4b43-9f0e-7477696e6274"
        run(["mkfs.ext4", "-q", "-F", "-L", "rootfs", "-U", uuid, "-m", "0", "-O", "^has_journal",
             "-E", f"hash_seed={uuid},lazy_itable_init=0", "-d", tree, path],
            env={**os.environ, "E2FSPROGS_FAKE_TIME": os.environ["SOURCE_DATE_EPOCH"]})
    else:
        raise RigError(f"no file system {filesystem}")
    path.chmod(stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IROTH)
