"""The boards: what differs between them, behind one interface."""

import importlib
from abc import ABC, abstractmethod
from pathlib import Path

import disk as disks
from machine import Machine
from process import REPOSITORY, RigError

# Name on the command line: module and class.
_BOARDS = {
    "grub": ("boards.grub", "Grub"),
    "uboot": ("boards.uboot", "UBoot"),
    "tryboot": ("boards.tryboot", "Tryboot"),
}


def board(name: str) -> "Board":
    """The board with this name."""
    if name not in _BOARDS:
        raise RigError(f"no board {name}; there are: {', '.join(_BOARDS)}")
    module, kind = _BOARDS[name]
    return getattr(importlib.import_module(module), kind)()


class Board(ABC):
    """A machine with a boot loader and two slots.

    A subclass sets the attributes and fills in the methods. Partitions are found by their labels
    `boot`, `rootfs-a`, `rootfs-b` and `data` everywhere.
    """

    name: str
    # As Debian names it.
    arch: str
    # "squashfs" or "ext4".
    filesystem = "squashfs"
    slot_mib = 64
    data_mib = 64
    # Variants of images that are not even tried, because the board's installer does not take them,
    # and what the reason tells (a pattern).
    refused: dict[str, str] = {}
    # What the console shows when slot A or B is being booted (group 1 is the slot), and when a
    # system is up.
    slot_seen = r"twinboot: booting slot ([AB])"
    up = r"vm-1 login:"

    def deb(self) -> Path:
        """Our package for this architecture."""
        debs = sorted((REPOSITORY / "target/debian").glob(f"twinboot_*_{self.arch}.deb"),
                      key=lambda path: path.stat().st_mtime)
        if not debs:
            raise RigError(f"no package for {self.arch} in target/debian: run `make deb`")
        return debs[-1]

    def recipe(self) -> str:
        """A text that differs when images of this board differ; `agent_config`, `mounts` and the
        class's source file need not be in it."""
        source = Path(importlib.import_module(type(self).__module__).__file__).read_text()
        return "\n".join([source, self.agent_config(), *self.mounts()])

    @abstractmethod
    def agent_config(self) -> str:
        """The sections `slots` and `boot` of twinboot.toml."""

    @abstractmethod
    def mounts(self) -> list[str]:
        """Lines of fstab, beside the data partition's."""

    def customise(self, tree) -> None:
        """What an image of this board holds besides (`rootfs.Tree`)."""

    @abstractmethod
    def make_disk(self, path: Path, image: Path, data: dict[str, bytes]) -> None:
        """A disk as it leaves the factory: `image` in slot A, slot B empty, and `data` (names and
        contents) in the data partition."""

    @abstractmethod
    def machine(self, disk: Path, folder: Path, network: list[str] = (),
                drive: list[str] | None = None, extra: list[str] = ()) -> Machine:
        """Switches the machine on. `drive` replaces QEMU's arguments that define the drive with the
        id `disk`; console and logs go to `folder`."""

    @abstractmethod
    def variables(self, disk: Path) -> dict[str, str]:
        """The boot loader's variables on a disk that is off; raises if they cannot be read."""

    @abstractmethod
    def next_slot(self, disk: Path) -> str | None:
        """The slot that the boot loader takes next, by its own rules, from a disk that is off."""

    def data_partition(self, data: dict[str, bytes], work: Path) -> Path:
        """A data partition as the images mount it, as a file."""
        tree = disks.empty_folder(work / "data")
        for folder, mode in (("twinboot", 0o700), ("journal", 0o755), ("rig", 0o755)):
            (tree / folder).mkdir(mode=mode)
        for name, content in data.items():
            file = tree / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            file.chmod(0o600)
        return disks.make_ext4(work / "data.img", self.data_mib, tree, "data")

    def work_folder(self, disk: Path) -> Path:
        """A folder for what is made on the way to `disk`."""
        folder = disk.parent / "factory"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
