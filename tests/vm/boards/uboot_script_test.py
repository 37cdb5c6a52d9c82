"""The shipped U-Boot script, on Debian's U-Boot in QEMU, up to the moment where a kernel would start.

There is none in the slots, so each start ends with the reset that the script owes us. The environment
is written and read by libubootenv's tools, as the agent does it. Run it with `python3 FILE`; it takes
three seconds a start.
"""

import ctypes
import pathlib
import re
import signal
import subprocess
import tempfile
import unittest

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
SCRIPT = REPOSITORY / "packaging/boot/uboot/boot.cmd"
START_LIMIT_S = 120
MIB = 1 << 20
# Of the environment's two copies, as in the shipped fw_env.config; and where the partition begins.
ENV_AT, ENV_DISTANCE, ENV_SIZE = 8 * MIB, MIB, 0x2000

BOARDS = {
    "arm64": ("qemu-system-aarch64", "cortex-a57", "qemu_arm64"),
    "arm": ("qemu-system-arm", "cortex-a15", "qemu_arm"),
}


def run(*command, **more):
    """Runs a tool; its output if it worked, all that it said if not."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **more)
    if done.returncode:
        raise AssertionError(f"{command}: {done.stdout}{done.stderr}")
    return done.stdout


def die_with_parent():
    """No QEMU outlives this test, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Disk:
    """A disk with the partitions of the README, without kernels."""

    def __init__(self, folder, arch):
        self.arch = arch
        self.folder = pathlib.Path(folder)
        self.path = self.folder / "disk.img"
        self.path.write_bytes(b"")
        with self.path.open("r+b") as disk:
            disk.truncate(16 * MIB)
        run("sgdisk", "-n1:1M:+6M", "-c1:boot", "-A1:set:2", "-n2:8M:+2M", "-c2:ubootenv",
            "-n3:10M:+1M", "-c3:rootfs-a", "-n4:11M:+1M", "-c4:rootfs-b", self.path)
        boot = self.folder / "boot.fat"
        with boot.open("wb") as image:
            image.truncate(6 * MIB)
        run("mkfs.vfat", boot)
        run("mkimage", "-A", arch, "-T", "script", "-C", "none", "-d", SCRIPT, self.folder / "boot.scr")
        run("mcopy", "-i", boot, self.folder / "boot.scr", "::boot.scr")
        self.write(MIB, boot.read_bytes())
        copies = "".join(
            f"{self.path} {ENV_AT + copy * ENV_DISTANCE:#x} {ENV_SIZE:#x}\n" for copy in (0, 1)
        )
        self.config = self.folder / "fw_env.config"
        self.config.write_text(copies)

    def write(self, at, data):
        with self.path.open("r+b") as disk:
            disk.seek(at)
            disk.write(data)

    def copies(self):
        """Both copies of the environment, as bytes."""
        with self.path.open("rb") as disk:
            data = disk.read()
        return [data[at:at + ENV_SIZE] for at in (ENV_AT, ENV_AT + ENV_DISTANCE)]

    def newer(self):
        """Which copy has the larger number (small ones only)."""
        return max((0, 1), key=lambda copy: self.copies()[copy][4])

    def tear(self, copy):
        self.write(ENV_AT + copy * ENV_DISTANCE + 0x30, b"\xff" * 0x200)

    def fill(self):
        """A first environment. fw_setenv cannot make one, it changes what is there."""
        empty, copy = self.folder / "empty", self.folder / "copy"
        empty.write_bytes(b"")
        run("mkenvimage", "-r", "-s", ENV_SIZE, "-o", copy, empty)
        self.write(ENV_AT, copy.read_bytes())

    def set(self, order, left_a, left_b):
        values = f"BOOT_ORDER={order}\nBOOT_A_LEFT={left_a}\nBOOT_B_LEFT={left_b}\n"
        run("fw_setenv", "-c", self.config, "-s", "-", input=values)

    def get(self):
        """Order, boots left of A, boots left of B."""
        printed = dict(line.split("=", 1) for line in run("fw_printenv", "-c", self.config).splitlines())
        if set(printed) != {"BOOT_ORDER", "BOOT_A_LEFT", "BOOT_B_LEFT"}:
            raise AssertionError(f"the environment holds {printed}")
        return printed["BOOT_ORDER"], printed["BOOT_A_LEFT"], printed["BOOT_B_LEFT"]

    def start(self, read_only=False):
        """One start, up to the reset: what the script said."""
        qemu, processor, firmware = BOARDS[self.arch]
        drive = f"file={self.path},format=raw,if=none,id=disk" + (",readonly=on" if read_only else "")
        said = self.folder / "serial.log"
        subprocess.run(
            [qemu, "-M", "virt", "-accel", "tcg", "-cpu", processor, "-m", "256", "-display", "none",
             "-bios", f"/usr/lib/u-boot/{firmware}/u-boot.bin", "-no-reboot", "-net", "none",
             "-drive", drive, "-device", "virtio-blk-device,drive=disk",
             "-serial", f"file:{said}", "-monitor", "none"],
            stdin=subprocess.DEVNULL, check=True, timeout=START_LIMIT_S, preexec_fn=die_with_parent,
        )
        text = said.read_text(errors="replace")
        if "syntax error" in text or "Unknown command 'setexpr" in text:
            raise AssertionError(text)
        return re.findall(r"^twinboot: (.*?)\r?$", text, re.MULTILINE)


class Script(unittest.TestCase):
    """What the README promises."""

    arch = "arm64"

    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.disk = Disk(self.folder.name, self.arch)
        self.disk.fill()

    def start(self, **how):
        """One start: the slot that was taken, and what stands in the environment afterwards."""
        self.said = self.disk.start(**how)
        slots = [line[13] for line in self.said if line.startswith("booting slot ")]
        self.assertEqual(self.said[-1], f"slot {slots[0]} does not boot")
        return slots[0], *self.disk.get()

    def test_an_empty_partition_is_filled_at_the_first_start(self):
        self.disk.write(ENV_AT, bytes(2 * MIB))
        self.assertEqual(self.start(), ("A", "A B", "2", "3"))
        self.assertIn("no copy of the environment can be read", self.said[0])
        self.assertEqual(self.start(), ("A", "A B", "1", "3"))
        self.assertTrue(self.said[0].startswith("booting slot A"), self.said)

    def test_a_trial_is_tried_once_and_counters_end_in_new_ones(self):
        self.disk.set("B A", "2", "1")
        starts = [self.start() for _ in range(4)]
        self.assertEqual(starts, [
            ("B", "B A", "2", "0"), ("A", "B A", "1", "0"), ("A", "B A", "0", "0"),
            ("B", "B A", "3", "2"),
        ])
        self.assertIn("no slot has boots left", self.said[0])

    def test_a_slot_that_is_not_in_the_order_never_boots(self):
        self.disk.set("B", "3", "1")
        starts = [self.start()[0] for _ in range(3)]
        self.assertEqual(starts, ["B", "B", "B"])

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
        for at, number in zip((ENV_AT, ENV_AT + ENV_DISTANCE), self.numbers(254, 255)):
            self.disk.write(at + 4, bytes([number]))
        self.assertEqual(self.start(), ("B", "B A", "3", "7"))
        self.assertEqual(self.start(), ("B", "B A", "3", "6"))
        for at, number in zip((ENV_AT, ENV_AT + ENV_DISTANCE), self.numbers(254, 255)):
            self.disk.write(at + 4, bytes([number]))
        self.disk.set("B A", "3", "5")
        self.assertEqual(self.start(), ("B", "B A", "3", "4"))

    def numbers(self, older, newer):
        return (older, newer) if self.disk.newer() == 1 else (newer, older)

    def test_a_medium_that_cannot_be_written_still_boots(self):
        self.disk.set("B A", "3", "0")
        self.assertEqual(self.start(read_only=True), ("A", "B A", "3", "0"))
        self.assertIn("this boot is not counted", self.said[0])


class ScriptOn32Bits(Script):
    """The same on 32 bits."""

    arch = "arm"


if __name__ == "__main__":
    unittest.main()
