"""The shipped U-Boot script, on Debian's U-Boot in QEMU, up to the moment where a kernel would start.

There is none in the slots, so each start ends with the reset that the script owes us. The environment
is written and read by libubootenv's tools, as the agent does it; and each time `boards.uboot`, which
says what boots from disks that are off, must have foretold the slot. Three seconds a start:
`python3 tests/vm/test_uboot_script.py`.
"""

import re
import tempfile
import unittest
from pathlib import Path

import disk as disks
from boards import uboot
from disk import MIB, Partition
from machine import Machine
from process import run

START_LIMIT_S = 120
BOARDS = {
    "arm64": ["qemu-system-aarch64", "-cpu", "cortex-a57", "-bios", uboot.FIRMWARE],
    "arm": ["qemu-system-arm", "-cpu", "cortex-a15", "-bios", "/usr/lib/u-boot/qemu_arm/u-boot.bin"],
}


class Disk:
    """A disk with the partitions of the README, without kernels."""

    def __init__(self, folder: Path, arch: str):
        self.arch, self.folder = arch, folder
        self.path = folder / "disk.img"
        script = folder / "boot.scr"
        run(["mkimage", "-A", arch, "-T", "script", "-C", "none", "-d", uboot.SHIPPED / "boot.cmd",
             script])
        disks.make_gpt(self.path, [
            Partition(1, "boot", 4, "ef00", disks.make_fat(folder / "boot.img", 4, {"boot.scr": script})),
            Partition(2, "ubootenv", uboot.ENVIRONMENT_MIB),
            Partition(3, "rootfs-a", 1),
            Partition(4, "rootfs-b", 1),
        ])
        partition, _ = disks.where(self.path, "ubootenv")
        self.places = [partition + at for at in uboot.COPIES]
        self.config = folder / "fw_env.config"
        self.config.write_text("".join(
            f"{self.path} {place:#x} {uboot.COPY_SIZE:#x}\n" for place in self.places))

    def write(self, at: int, data: bytes) -> None:
        with open(self.path, "r+b") as disk:
            disk.seek(at)
            disk.write(data)

    def clear(self) -> None:
        """As on a new medium."""
        self.write(self.places[0], bytes(2 * MIB))

    def fill(self) -> None:
        """A first environment: fw_setenv cannot make one, it changes what is there."""
        empty, copy = self.folder / "empty", self.folder / "copy"
        empty.write_bytes(b"")
        run(["mkenvimage", "-r", "-s", uboot.COPY_SIZE, "-o", copy, empty])
        self.write(self.places[0], copy.read_bytes())

    def newer(self) -> int:
        """Which copy has the larger number."""
        with open(self.path, "rb") as disk:
            numbers = []
            for place in self.places:
                disk.seek(place + 4)
                numbers.append(disk.read(1))
        return numbers.index(max(numbers))

    def number(self, newer: int) -> None:
        """Gives the newer copy this number, and the other one the number before it."""
        copy = self.newer()
        self.write(self.places[copy] + 4, bytes([newer]))
        self.write(self.places[1 - copy] + 4, bytes([newer - 1]))

    def tear(self, copy: int) -> None:
        self.write(self.places[copy] + 0x30, b"\xff" * 0x200)

    def set(self, order: str, left_a: str, left_b: str) -> None:
        values = f"BOOT_ORDER={order}\nBOOT_A_LEFT={left_a}\nBOOT_B_LEFT={left_b}\n"
        run(["fw_setenv", "-c", self.config, "-s", "-"], input=values, stdin=None)

    def get(self) -> tuple[str, str, str]:
        """Order, boots left of A, boots left of B."""
        printed = run(["fw_printenv", "-c", self.config]).splitlines()
        variables = dict(line.split("=", 1) for line in printed)
        assert set(variables) == {"BOOT_ORDER", "BOOT_A_LEFT", "BOOT_B_LEFT"}, variables
        return variables["BOOT_ORDER"], variables["BOOT_A_LEFT"], variables["BOOT_B_LEFT"]

    def start(self, drive: str = "") -> list[str]:
        """One start, up to the reset: what the script said."""
        command = [*BOARDS[self.arch], "-M", "virt", "-accel", "tcg", "-m", "256", "-nodefaults",
                   "-no-reboot", "-drive", f"file={self.path},format=raw,if=none,id=disk{drive}",
                   "-device", "virtio-blk-device,drive=disk"]
        with Machine(command, self.folder) as machine:
            machine.wait_end(START_LIMIT_S)
            text = machine.console
        assert "syntax error" not in text, text
        return re.findall(r"^twinboot: (.*?)\r?$", text, re.MULTILINE)


class Script(unittest.TestCase):
    """What the README promises."""

    arch = "arm64"

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.disk = Disk(Path(folder.name), self.arch)
        self.disk.fill()

    def start(self, drive: str = "") -> tuple[str, str, str, str]:
        """One start: the slot that was taken, and what stands in the environment afterwards."""
        foretold = uboot.UBoot().next_slot(self.disk.path)
        self.said = self.disk.start(drive)
        taken = [line.split()[2].rstrip(";") for line in self.said if line.startswith("booting slot ")]
        self.assertEqual(taken, [foretold])
        self.assertEqual(self.said[-1], f"slot {foretold} does not boot")
        return foretold, *self.disk.get()

    def test_an_empty_partition_is_filled_at_the_first_start(self):
        self.disk.clear()
        self.assertEqual(self.start(), ("A", "A B", "2", "3"))
        self.assertIn("no copy of the environment can be read", self.said[0])
        self.assertEqual(self.start(), ("A", "A B", "1", "3"))
        self.assertEqual(len(self.said), 2, self.said)

    def test_a_trial_is_tried_once_and_counters_end_in_new_ones(self):
        self.disk.set("B A", "2", "1")
        self.assertEqual([self.start() for _ in range(4)], [
            ("B", "B A", "2", "0"), ("A", "B A", "1", "0"), ("A", "B A", "0", "0"),
            ("B", "B A", "3", "2"),
        ])
        self.assertIn("no slot has boots left", self.said[0])

    def test_a_slot_that_is_not_in_the_order_never_boots(self):
        self.disk.set("B", "3", "1")
        self.assertEqual([self.start()[0] for _ in range(3)], ["B", "B", "B"])

    def test_odd_values(self):
        for given, taken in [
            (("B A", "3", "zz"), ("A", "B A", "2", "zz")),
            (("A B", "a", "1"), ("A", "A B", "9", "1")),
            (("A B", "10", "1"), ("A", "A B", "f", "1")),
            (("rescue B A", "3", "3"), ("B", "rescue B A", "3", "2")),
            (("rescue", "0", "0"), ("A", "A B", "2", "3")),
            (("A", "", ""), ("A", "A", "2", "3")),
            (("", "0", "2"), ("B", "A B", "0", "1")),
        ]:
            with self.subTest(given=given):
                self.disk.set(*given)
                self.assertEqual(self.start(), taken)

    def test_a_torn_copy_leaves_the_other_one(self):
        self.disk.set("B A", "3", "2")
        self.assertEqual(self.start(), ("B", "B A", "3", "1"))
        self.disk.tear(self.disk.newer())
        # The start before is forgotten, nothing else.
        self.assertEqual(self.start(), ("B", "B A", "3", "1"))
        # The torn one was written anew.
        self.disk.tear(1 - self.disk.newer())
        self.assertEqual(self.start(), ("B", "B A", "3", "0"))
        self.disk.tear(0)
        self.disk.tear(1)
        self.assertEqual(self.start(), ("A", "A B", "2", "3"))

    def test_the_number_goes_from_255_to_0_in_both_programs(self):
        self.disk.set("B A", "3", "9")
        self.disk.set("B A", "3", "8")
        self.disk.number(255)
        self.assertEqual(self.start(), ("B", "B A", "3", "7"))
        self.assertEqual(self.start(), ("B", "B A", "3", "6"))
        self.disk.number(255)
        self.disk.set("B A", "3", "5")
        self.assertEqual(self.start(), ("B", "B A", "3", "4"))

    def test_a_medium_that_cannot_be_written_still_boots(self):
        self.disk.set("B A", "3", "0")
        self.assertEqual(self.start(",readonly=on"), ("A", "B A", "3", "0"))
        self.assertIn("this boot is not counted", self.said[0])

    def test_a_trial_that_cannot_be_counted_is_not_begun(self):
        for given, taken in [(("B A", "3", "1"), "A"), (("A B", "1", "3"), "B"),
                             (("B A", "3", "2"), "B"), (("B A", "0", "1"), "B"),
                             (("B", "3", "1"), "B")]:
            with self.subTest(given=given):
                self.disk.set(*given)
                said = self.disk.start(",readonly=on")
                self.assertEqual(said[-1], f"slot {taken} does not boot", said)
                self.assertEqual(self.disk.get(), given)


class ScriptOn32Bits(Script):
    """The same on 32 bits."""

    arch = "arm"


if __name__ == "__main__":
    unittest.main()
