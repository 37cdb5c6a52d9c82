"""Records every write and flush of a machine's life: first boot, an update, the confirmed boot."""

from pathlib import Path

import disk as disks
import rootfs
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
        self.machine = self.board.machine(
            self.disk, self.folder, self.cloud.network(), drive=drive
        )

    def shut(self) -> None:
        """Ends QEMU in order, so that its log is whole. The guest notices nothing."""
        self.machine.qmp("quit")
        self.machine.wait_end(60)
        self.machine.power_cut()
        self.machine = None


def record(rig: RecordedRig, version: str = "2.0.0") -> WriteLog:
    """First boot, one good update and its confirmed boot, without a break."""
    rig.factory()
    run_id = rig.send(version)
    rig.wait_boot("B", UPDATE_LIMIT_S)
    twin = rig.wait_over(run_id)
    need(twin["twinboot"]["lastUpdate"]["result"] == "succeeded", "the update succeeded", twin)
    rig.shut()
    log = WriteLog(rig.log)
    say(f"{len(log.requests)} requests are recorded")
    return log


def images(rig: Rig) -> list[Path]:
    """The whole images that a slot may hold."""
    return [rootfs.slot_image(rig.board, version) for version in ("1.0.0", "2.0.0")]
