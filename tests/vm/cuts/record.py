"""Records every write and flush of a machine's life: first boot, an update, the confirmed boot."""

from pathlib import Path

import disk as disks
import rootfs
from boards import Board
from process import say
from stories import UPDATE_LIMIT_S, Rig, need

from cuts.writelog import WriteLog

# Sent together, so that each request of the guest is one in the log.
UNMERGED = ["-global", "virtio-blk-device.request-merging=off"]


class RecordedRig(Rig):
    """A machine whose drive is behind QEMU's write log."""

    @property
    def base(self) -> Path:
        """The disk before the first write."""
        return self.folder / "base.img"

    @property
    def log(self) -> Path:
        """What was written."""
        return self.folder / "writes.log"

    def on(self) -> None:
        """Switches the machine on; from the first time on its writes are recorded."""
        if not self.base.exists():
            disks.copy(self.disk, self.base)
            self.log.touch()
        blocks = (
            f"driver=blklogwrites,node-name=disk,file.driver=file,file.filename={self.disk},"
            f"log.driver=file,log.filename={self.log},log-append=off,log-sector-size=512"
        )
        drive = ["-blockdev", blocks, *UNMERGED]
        self._before = len(self.cloud.events)
        self.machine = self.board.machine(
            self.disk, self.folder, self.cloud.network(), drive=drive
        )

    def shut(self) -> None:
        """Ends QEMU in order, so that its log is whole. The guest notices nothing."""
        self.machine.quit()
        self.machine = None


# The versions of a good update and of one that is rolled back.
OLD, NEW, SICK = "1.0.0", "2.0.0", "6.6.6"


def record(rig: RecordedRig, variant: str = "good") -> WriteLog:
    """First boot, one update and the boot after it that is confirmed, without a break: the new
    slot's, or the old one's if the image is a bad one."""
    rig.factory(OLD)
    run_id = rig.send(NEW if variant == "good" else SICK, variant)
    rig.wait_boot("B", UPDATE_LIMIT_S)
    if variant != "good":
        rig.wait_boot("A", UPDATE_LIMIT_S)
    twin = rig.wait_over(run_id)
    ends = "succeeded" if variant == "good" else "rolledBack"
    need(twin["twinboot"]["lastUpdate"]["result"] == ends, f"the update {ends}", twin)
    rig.shut()
    log = WriteLog(rig.log)
    say(f"{len(log.requests)} requests are recorded")
    return log


def images(board: Board, variant: str | None = None) -> dict[str, Path]:
    """The whole images that a slot may hold, by their versions."""
    known = {version: rootfs.slot_image(board, version) for version in (OLD, NEW)}
    if variant not in (None, "good"):
        known[SICK] = rootfs.slot_image(board, SICK, variant)
    return known
