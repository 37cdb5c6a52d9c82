"""arm64 like a Raspberry Pi: QEMU's `virt` for the board, this module for the closed firmware.

The rules are those of "autoboot.txt" and "TRYBOOT boot flow" in the Raspberry Pi documentation: the
firmware reads `autoboot.txt` on the first FAT partition, at most 512 bytes of it; a restart with the
argument `0 tryboot` makes the section `[tryboot]` count, for one start; with `tryboot_a_b=1` that
start loads the usual files from the other partition; the kernel finds both in the device tree. Where
nothing can be loaded, a watchdog or a person switches the machine off and on, which loses the flag.
"""

import re
import shutil
from pathlib import Path

import disk as disks
from disk import Partition
from machine import Machine
from process import REPOSITORY, RigError, run, say

from boards import Board

SHIPPED = REPOSITORY / "packaging/boot/tryboot"
# In every image, the same for both slots.
CMDLINE = ("console=ttyAMA0 rootwait ro init=/sbin/init panic=5 fsck.repair=yes"
           " systemd.machine_id=7477696e626f6f7430766d3100000003\n")
CONFIG = "arm_64bit=1\nauto_initramfs=1\n"
AUTOBOOT_MIB = 4
BOOT_MIB = 64
SLOT_OF_PARTITION = {2: "A", 3: "B"}
# What the firmware reads of autoboot.txt.
AUTOBOOT_BYTES = 512
ONE_SHOT = re.compile(r"reboot: Restarting system with command '0 tryboot'")
# The board itself; the same arguments make its device tree.
BOARD = ["qemu-system-aarch64", "-accel", "tcg,thread=multi", "-cpu", "cortex-a57", "-smp", "2",
         "-m", "512", "-nodefaults", "-no-user-config"]


def boot_partition(autoboot: bytes, one_shot: bool) -> int:
    """The partition that the firmware boots."""
    section, found = "[all]", {}
    for line in autoboot[:AUTOBOOT_BYTES].decode("ascii", errors="replace").splitlines():
        line = line.strip()
        if line.startswith("["):
            section = line
        elif "=" in line and (section == "[all]" or section == "[tryboot]" and one_shot):
            key, value = line.split("=", 1)
            found[key.strip()] = value.strip()
    if one_shot and found.get("tryboot_a_b") != "1":
        raise ValueError("a one-shot start without tryboot_a_b=1 looks for tryboot.txt")
    return int(found.get("boot_partition", "1"))


class Pi(Machine):
    """A machine whose firmware is played: it chooses at power on and after every restart."""

    def __init__(self, disk: Path, folder: Path, devices: list[str]):
        self._disk, self._folder, self._devices = disk, folder, devices
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(self._firmware(one_shot=False), folder)

    def restarted(self, console: str) -> list:
        if not console:
            raise RigError("QEMU ended before it showed anything")
        # A log of the drive's writes goes on, with the sectors that it has.
        self._devices = [str(word).replace("log-append=off,log-sector-size=512", "log-append=on")
                         for word in self._devices]
        return self._firmware(bool(ONE_SHOT.search(console)))

    def _firmware(self, one_shot: bool) -> list:
        """What the firmware starts."""
        try:
            autoboot = disks.read_fat(self._disk, "boot", "autoboot.txt")
            partition = boot_partition(autoboot, one_shot)
            return self._load(partition, one_shot)
        except (RigError, ValueError) as error:
            if not one_shot:
                raise RigError(f"the firmware finds nothing to boot: {error}") from error
            say(f"the firmware cannot do the one-shot start and is switched off and on: {error}")
            return self._firmware(one_shot=False)

    def _load(self, partition: int, one_shot: bool) -> list:
        if partition not in SLOT_OF_PARTITION:
            raise ValueError(f"partition {partition} holds no boot files")
        label = f"boot-{SLOT_OF_PARTITION[partition].lower()}"
        loaded = disks.empty_folder(self._folder / "firmware")
        for name in ("cmdline.txt", "kernel8.img", "initramfs8"):
            (loaded / name).write_bytes(disks.read_fat(self._disk, label, name))
        tree = loaded / "board.dtb"
        run([*BOARD, "-machine", f"virt,dumpdtb={tree}"])
        run(["fdtput", "-p", "-t", "u", tree, "/chosen/bootloader", "partition", partition])
        run(["fdtput", "-p", "-t", "u", tree, "/chosen/bootloader", "tryboot", int(one_shot)])
        return [
            *BOARD, "-machine", "virt", "-no-reboot", "-dtb", tree,
            "-kernel", loaded / "kernel8.img", "-initrd", loaded / "initramfs8",
            "-append", (loaded / "cmdline.txt").read_text().strip(),
            *self._devices,
        ]


class Tryboot(Board):
    name = "tryboot"
    arch = "arm64"
    slot_mib = 96
    refused = {"kernel-missing": "kernel8.img"}
    # The firmware says nothing on the console; the kernel's first words do.
    slot_seen = r"Kernel command line: .*\btwinboot\.slot=([AB])"

    def agent_config(self) -> str:
        return """
[slots.a]
device = "/dev/disk/by-partlabel/rootfs-a"
[slots.b]
device = "/dev/disk/by-partlabel/rootfs-b"
[install]
kind = "command"
command = ["/usr/share/twinboot/boot/tryboot/write-slot", "/dev/disk/by-partlabel/boot-a", "/dev/disk/by-partlabel/boot-b"]
[boot]
kind = "tryboot"
"""

    def recipe(self) -> str:
        return super().recipe() + (SHIPPED / "write-slot").read_text()

    def mounts(self) -> list[str]:
        return ["/dev/disk/by-partlabel/boot /boot/autoboot vfat "
                "noatime,umask=0077,nofail,x-systemd.before=twinbootd.service 0 0"]

    def customise(self, tree) -> None:
        tree.write("boot/firmware/cmdline.txt", CMDLINE)
        tree.write("boot/firmware/config.txt", CONFIG)
        tree.link("boot/firmware/kernel8.img", "../vmlinuz")
        tree.link("boot/firmware/initramfs8", "../initrd.img")

    def make_disk(self, path: Path, image: Path, data: dict[str, bytes]) -> None:
        work = self.work_folder(path)
        autoboot = disks.make_fat(work / "autoboot.img", AUTOBOOT_MIB, {
            "autoboot.txt": SHIPPED / "autoboot.txt",
        })
        # Slot A as the factory's programmer writes it, with the very files of the image.
        files = disks.empty_folder(work / "image")
        run(["unsquashfs", "-quiet", "-no-progress", "-force", "-dest", files, image, "boot"])
        boot = files / "boot/firmware"
        uuid = "7477696e-0000-4000-8000-00000000000a"
        content = {
            "kernel8.img": files / "boot/vmlinuz",
            "initramfs8": files / "boot/initrd.img",
            "config.txt": boot / "config.txt",
            "cmdline.txt": f"root=PARTUUID={uuid} twinboot.slot=A {CMDLINE}".encode(),
        }
        boot_a = disks.make_fat(work / "boot-a.img", BOOT_MIB, content)
        disks.make_gpt(path, [
            Partition(1, "boot", AUTOBOOT_MIB, "ef00", autoboot),
            Partition(2, "boot-a", BOOT_MIB, "ef00", boot_a),
            Partition(3, "boot-b", BOOT_MIB, "ef00"),
            Partition(4, "rootfs-a", self.slot_mib, "8300", image),
            Partition(5, "rootfs-b", self.slot_mib, "8300"),
            Partition(6, "data", self.data_mib, "8300", self.data_partition(data, work)),
        ])
        run(["sgdisk", f"--partition-guid=4:{uuid}", path])
        shutil.rmtree(files)

    def machine(self, disk: Path, folder: Path, network: list[str] = (),
                drive: list[str] | None = None, extra: list[str] = ()) -> Machine:
        drive = drive or ["-drive", f"file={disk},format=raw,if=none,id=disk"]
        return Pi(disk, folder, [*drive, "-device", "virtio-blk-pci,drive=disk", *network,
                                 "-device", "virtio-rng-pci", "-device", "i6300esb", *extra])

    def variables(self, disk: Path) -> dict[str, str]:
        autoboot = disks.read_fat(disk, "boot", "autoboot.txt")
        return {
            "usual": str(boot_partition(autoboot, one_shot=False)),
            "one_shot": str(boot_partition(autoboot, one_shot=True)),
        }

    def next_slot(self, disk: Path) -> str | None:
        return SLOT_OF_PARTITION.get(int(self.variables(disk)["usual"]))
