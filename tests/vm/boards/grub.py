"""amd64, SeaBIOS and GRUB with `packaging/boot/grub`, as it is shipped."""

import struct
from pathlib import Path

import disk as disks
from disk import Partition
from machine import Machine
from process import REPOSITORY, run

from boards import Board

SCRIPT = REPOSITORY / "packaging/boot/grub/grub.cfg"
GRUB = Path("/usr/lib/grub/i386-pc")
# Everything that the script uses is in the core image: nothing of GRUB is read from a file system
# that could be damaged.
MODULES = ("biosdisk part_gpt fat ext2 squash4 gzio normal configfile linux boot loadenv regexp probe"
           " test eval echo sleep reboot true serial terminal").split()
# What this board adds to the script.
BOARD_CFG = """\
serial --unit=0 --speed=115200
terminal_output serial
terminal_input serial
set arguments="console=ttyS0 systemd.machine_id=7477696e626f6f7430766d3100000001"
"""
BOOT_MIB = 8
# Where the core image lies: behind the partition table, in a partition of its own.
CORE_SECTOR = 34


def environment_block(**variables: str) -> bytes:
    """GRUB's environment block, as `grub-editenv` makes it."""
    lines = "".join(f"{name}={value}\n" for name, value in variables.items())
    return f"# GRUB Environment Block\n{lines}".encode().ljust(1024, b"#")


def parse_environment(block: bytes) -> dict[str, str]:
    """The variables of a block; raises ValueError where GRUB could not read it."""
    head = b"# GRUB Environment Block\n"
    if len(block) != 1024 or not block.startswith(head):
        raise ValueError(f"no environment block: {block[:40]!r}")
    lines = block[len(head):].decode().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


class Grub(Board):
    name = "grub"
    arch = "amd64"

    def agent_config(self) -> str:
        return """
[slots.a]
device = "/dev/disk/by-partlabel/rootfs-a"
[slots.b]
device = "/dev/disk/by-partlabel/rootfs-b"
[boot]
kind = "grub"
"""

    def mounts(self) -> list[str]:
        return ["/dev/disk/by-partlabel/boot /boot/grub vfat "
                "noatime,umask=0077,nofail,x-systemd.before=twinbootd.service 0 0"]

    def make_disk(self, path: Path, image: Path, data: dict[str, bytes]) -> None:
        work = self.work_folder(path)
        good = environment_block(ORDER="A B", A_OK="1", A_TRY="0", B_OK="0", B_TRY="0",
                                 GOOD="A")
        boot = disks.make_fat(work / "boot.img", BOOT_MIB, {
            "grub.cfg": SCRIPT,
            "board.cfg": BOARD_CFG.encode(),
            "grubenv": good,
            "grubenv.spare": good,
        })
        disks.make_gpt(path, [
            Partition(1, "boot", BOOT_MIB, "ef00", boot),
            Partition(2, "rootfs-a", self.slot_mib, "8300", image),
            Partition(3, "rootfs-b", self.slot_mib, "8300"),
            Partition(4, "data", self.data_mib, "8300", self.data_partition(data, work)),
        ])
        _install_grub(path, work)

    def machine(self, disk: Path, folder: Path, network: list[str] = (),
                drive: list[str] | None = None, extra: list[str] = ()) -> Machine:
        drive = drive or ["-drive", f"file={disk},format=raw,if=none,id=disk"]
        return Machine([
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2",
            "-m", "512", "-machine", "q35", "-nodefaults", "-no-user-config",
            *drive, "-device", "virtio-blk-pci,drive=disk",
            *network, "-device", "virtio-rng-pci", "-device", "i6300esb",
            *extra,
        ], folder)

    def variables(self, disk: Path) -> dict[str, str]:
        return parse_environment(disks.read_fat(disk, "boot", "grubenv"))

    def next_slot(self, disk: Path) -> str | None:
        try:
            variables = self.variables(disk)
        except ValueError:
            spare = parse_environment(disks.read_fat(disk, "boot", "grubenv.spare"))
            tries = {name: spare.get(name, "0") for name in ("A_TRY", "B_TRY")}
            variables = {"A_OK": "1", "B_OK": "1", **tries}
        order = variables.get("ORDER", "A B").split()
        ok = [slot for slot in order if variables.get(f"{slot}_OK") == "1"]
        good = [slot for slot in ok if slot == variables.get("GOOD")]
        left = [slot for slot in ok
                if variables.get(f"{slot}_TRY", "0") in (("0", "1", "2") if slot in good else ("0",))]
        other = [slot for slot in "AB" if slot not in good]
        # The confirmed slot begins anew alone, once.
        alone = good if len(other) == 1 and variables.get(f"{other[0]}_TRY") == "1" else []
        return next(iter(left or alone or ok or ["A"]))


def _install_grub(disk: Path, work: Path) -> None:
    """What `grub-install` does on a machine: the core image behind the partition table, and the
    boot sector that loads it."""
    core = work / "core.img"
    run(["grub-mkimage", "-O", "i386-pc", "-p", "(,gpt1)/", "-o", core, *MODULES])
    image = bytearray(core.read_bytes())
    # The block list in the core's first sector: where the rest of it lies.
    struct.pack_into("<Q", image, 500, CORE_SECTOR + 1)
    run(["sgdisk", "--set-alignment=1", f"--new=128:{CORE_SECTOR}:2047", "--typecode=128:ef02",
         disk])
    if CORE_SECTOR * disks.SECTOR + len(image) > disks.MIB:
        raise ValueError("GRUB's core image does not fit before the first partition")
    sector = bytearray((GRUB / "boot.img").read_bytes())
    # The address of the core, and no guess of the drive for broken BIOSes (grub-bios-setup).
    struct.pack_into("<Q", sector, 0x5C, CORE_SECTOR)
    struct.pack_into("<H", sector, 0x66, 0x9090)
    with open(disk, "r+b") as file:
        file.write(sector[:440])
        file.seek(CORE_SECTOR * disks.SECTOR)
        file.write(image)
