"""arm64, QEMU's `virt`, Debian's stock U-Boot and `packaging/boot/uboot`, as it is shipped."""

import itertools
import zlib
from pathlib import Path

import disk as disks
from disk import Partition
from machine import Machine
from process import REPOSITORY, run

from boards import Board

SHIPPED = REPOSITORY / "packaging/boot/uboot"
FIRMWARE = Path("/usr/lib/u-boot/qemu_arm64/u-boot.bin")
# What this board adds to the kernel's command line.
BOARD_ENV = "board_args=console=ttyAMA0 systemd.machine_id=7477696e626f6f7430766d3100000002\n"
BOOT_MIB = 8
ENVIRONMENT_MIB = 2
# Where the copies of the environment lie in their partition, and the size of each, as the shipped
# fw_env.config says.
COPIES = (0, disks.MIB)
COPY_SIZE = 0x2000


def parse_copy(copy: bytes) -> tuple[int, dict[str, str]] | None:
    """The number and the variables of one copy; None if its checksum is wrong."""
    if len(copy) != COPY_SIZE or zlib.crc32(copy[5:]) != int.from_bytes(copy[:4], "little"):
        return None
    # The first empty string is the end.
    texts = itertools.takewhile(bool, copy[5:].split(b"\0"))
    return copy[4], dict(text.decode().split("=", 1) for text in texts)


def parse_environment(partition: bytes) -> dict[str, str]:
    """The variables of the newer copy; raises ValueError if neither can be read."""
    first, second = (parse_copy(partition[at:at + COPY_SIZE]) for at in COPIES)
    if not first and not second:
        raise ValueError("neither copy of the environment has the right checksum")
    if not first or not second:
        return (first or second)[1]
    # The larger number is the newer one, and 0 comes after 255.
    wrapped = {first[0], second[0]} == {0, 255}
    newer = min(first, second, key=lambda copy: copy[0]) if wrapped else \
        max(first, second, key=lambda copy: copy[0])
    return newer[1]


def left(variables: dict[str, str], slot: str) -> int:
    """Boots that a slot has left, as the boot script counts."""
    try:
        return int(variables.get(f"BOOT_{slot}_LEFT") or "3", 16)
    except ValueError:
        return 0


class UBoot(Board):
    name = "uboot"
    arch = "arm64"
    # Debian's build does not read squashfs.
    filesystem = "ext4"
    slot_mib = 176

    def agent_config(self) -> str:
        return """
[slots.a]
device = "/dev/disk/by-partlabel/rootfs-a"
[slots.b]
device = "/dev/disk/by-partlabel/rootfs-b"
[boot]
kind = "uboot"
"""

    def mounts(self) -> list[str]:
        return []

    def customise(self, tree) -> None:
        tree.write("etc/fw_env.config", (SHIPPED / "fw_env.config").read_text())

    def recipe(self) -> str:
        return super().recipe() + (SHIPPED / "fw_env.config").read_text()

    def make_disk(self, path: Path, image: Path, data: dict[str, bytes]) -> None:
        work = self.work_folder(path)
        script = work / "boot.scr"
        run(["mkimage", "-A", "arm64", "-T", "script", "-C", "none", "-d", SHIPPED / "boot.cmd", script])
        boot = disks.make_fat(work / "boot.img", BOOT_MIB, {
            "boot.scr": script,
            "board.env": BOARD_ENV.encode(),
        })
        # The environment is left empty: the first start fills it.
        disks.make_gpt(path, [
            Partition(1, "boot", BOOT_MIB, "ef00", boot),
            Partition(2, "ubootenv", ENVIRONMENT_MIB, "8300"),
            Partition(3, "rootfs-a", self.slot_mib, "8300", image),
            Partition(4, "rootfs-b", self.slot_mib, "8300"),
            Partition(5, "data", self.data_mib, "8300", self.data_partition(data, work)),
        ])

    def machine(self, disk: Path, folder: Path, network: list[str] = (),
                drive: list[str] | None = None, extra: list[str] = ()) -> Machine:
        drive = drive or ["-drive", f"file={disk},format=raw,if=none,id=disk"]
        return Machine([
            "qemu-system-aarch64", "-accel", "tcg,thread=multi", "-machine", "virt",
            "-cpu", "cortex-a57", "-smp", "2", "-m", "512", "-nodefaults", "-no-user-config",
            "-bios", FIRMWARE,
            *drive, "-device", "virtio-blk-pci,drive=disk",
            *network, "-device", "virtio-rng-pci", "-device", "i6300esb",
            *extra,
        ], folder)

    def variables(self, disk: Path) -> dict[str, str]:
        offset, size = disks.where(disk, "ubootenv")
        with open(disk, "rb") as file:
            file.seek(offset)
            return parse_environment(file.read(size))

    def next_slot(self, disk: Path) -> str | None:
        try:
            variables = self.variables(disk)
        except ValueError:
            return "A"
        order = (variables.get("BOOT_ORDER") or "A B").split()
        ours = [slot for slot in order if slot in ("A", "B")]
        fresh = [slot for slot in ours if left(variables, slot) > 0]
        # All counters are full again where none is left, also where the order names no slot.
        return next(iter(fresh or ours or ["A"]))
