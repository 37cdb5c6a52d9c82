"""The shipped GRUB script, on GRUB itself in QEMU, up to the moment where a kernel would start.

There is none in the slots, so each start ends with the restart that the script owes us. Each time
`boards.grub`, which says what boots from disks that are off, and the oracle, which runs the script in
a shell, must have foretold the slot. A few seconds a start: `python3 tests/vm/test_grub_script.py`.
"""

import re
import tempfile
import unittest
from pathlib import Path

import disk as disks
from boards import grub
from cuts import oracle
from disk import Partition
from machine import Machine

START_LIMIT_S = 120


class Script(unittest.TestCase):
    """What the README promises."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.disk = self.folder / "disk.img"

    def make(self, **variables: str) -> None:
        """A disk with these variables, or with a grubenv that is lost."""
        factory = grub.environment_block(ORDER="A B", A_OK="1", A_TRY="0", B_OK="0", B_TRY="0",
                                         GOOD="A")
        boot = disks.make_fat(self.folder / "boot.img", grub.BOOT_MIB, {
            "grub.cfg": grub.SCRIPT,
            "board.cfg": grub.BOARD_CFG.encode(),
            "grubenv": grub.environment_block(**variables) if variables else b"",
            "grubenv.spare": factory,
        })
        disks.make_gpt(self.disk, [
            Partition(1, "boot", grub.BOOT_MIB, "ef00", boot),
            Partition(2, "rootfs-a", 1),
            Partition(3, "rootfs-b", 1),
        ])
        grub._install_grub(self.disk, self.folder)

    def start(self, readonly: bool = False) -> str:
        """One start, up to the restart: the slot that was taken."""
        how = ",readonly=on" if readonly else ""
        drive = ["-drive", f"file={self.disk},format=raw,if=none,id=disk{how}"]
        machine = grub.Grub().machine(self.disk, self.folder, drive=drive, extra=["-no-reboot"])
        with machine:
            machine.wait_end(START_LIMIT_S)
            self.said = machine.console
        taken = re.findall(r"twinboot: booting slot ([AB])", self.said)
        self.assertEqual(len(taken), 1, self.said)
        self.assertIn(f"slot {taken[0]} cannot be loaded, the machine restarts", self.said)
        return taken[0]

    def starts(self, count: int) -> str:
        """What so many starts take, which was foretold each time."""
        found = ""
        for _ in range(count):
            content = self.disk.read_bytes()
            read = lambda at, length, content=content: content[at : at + length]  # noqa: E731
            foretold = [grub.Grub().next_slot(self.disk), oracle.next_slots("grub", read)[0]]
            taken = self.start()
            self.assertEqual(foretold, [taken, taken])
            found += taken
        return found

    def test_the_confirmed_slot_boots_three_times_and_the_other_one_once(self):
        self.make(ORDER="B A", A_OK="1", A_TRY="0", B_OK="1", B_TRY="0", GOOD="B")
        self.assertEqual(self.starts(5), "BBBAB")

    def test_a_slot_that_failed_is_left_alone_while_the_way_back_is_cut(self):
        self.make(ORDER="B A", A_OK="1", A_TRY="2", B_OK="1", B_TRY="0", GOOD="A")
        self.assertEqual(self.starts(3), "BAA")
        self.assertIn("slot A begins anew", self.said)
        self.assertEqual(grub.Grub().variables(self.disk)["B_TRY"], "2")

    def test_a_lost_environment_lets_the_slots_take_turns(self):
        self.make()
        self.assertEqual(self.starts(3), "ABA")
        self.assertIn("the spare block is used", self.said)

    def test_a_trial_that_cannot_be_counted_is_not_begun(self):
        self.make(ORDER="B A", A_OK="1", A_TRY="0", B_OK="1", B_TRY="0", GOOD="A")
        self.assertEqual(self.start(readonly=True), "A")
        self.assertIn("this boot is not counted", self.said)
        self.assertEqual(self.starts(2), "BA")
        self.assertNotIn("not counted", self.said)


if __name__ == "__main__":
    unittest.main()
