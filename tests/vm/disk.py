"""Disks and file systems in plain files: no mounts, no loop devices, no root."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from process import run

SECTOR = 512
MIB = 1 << 20
# Where the first partition that is counted in MiB begins; below it is GRUB's own.
FIRST_MIB = 1


@dataclass(frozen=True)
class Partition:
    """One partition of a GPT: `number`, `label`, size, type (as sgdisk names it), and the file that
    is laid into it."""

    number: int
    label: str
    mib: int
    kind: str = "8300"
    content: Path | None = None
    # Fixed, so that two disks of one recipe are alike.
    start_mib: int | None = None


def make_gpt(path: Path, partitions: list[Partition]) -> None:
    """A sparse disk with these partitions, one behind the other, and their content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    end_mib = FIRST_MIB + sum(partition.mib for partition in partitions) + 1
    with open(path, "wb") as disk:
        disk.truncate(end_mib * MIB)
    arguments = ["sgdisk", "--clear"]
    start_mib = FIRST_MIB
    places = []
    for partition in partitions:
        number = partition.number
        arguments += [
            f"--new={number}:{start_mib}M:+{partition.mib}M",
            f"--typecode={number}:{partition.kind}",
            f"--change-name={number}:{partition.label}",
        ]
        places.append((start_mib * MIB, partition))
        start_mib += partition.mib
    run([*arguments, path])
    for offset, partition in places:
        if partition.content:
            if partition.content.stat().st_size > partition.mib * MIB:
                raise ValueError(f"{partition.content} does not fit into {partition.label}")
            write_at(path, offset, partition.content)


def write_at(path: Path, offset: int, content: Path) -> None:
    """Copies a file into the disk; its holes stay holes."""
    run(["dd", f"if={content}", f"of={path}", "bs=1M", f"seek={offset}", "oflag=seek_bytes",
         "conv=notrunc,sparse", "status=none"])


def where(path: Path, label: str) -> tuple[int, int]:
    """Offset and size, in bytes, of the partition with this label."""
    for line in run(["sgdisk", "--print", path]).splitlines():
        words = line.split()
        if words and words[0].isdigit() and words[-1] == label:
            first, last = int(words[1]), int(words[2])
            return first * SECTOR, (last - first + 1) * SECTOR
    raise ValueError(f"{path} has no partition {label}")


def extract(path: Path, label: str, to: Path) -> Path:
    """A copy of the partition, for tools that want a file."""
    offset, size = where(path, label)
    run(["dd", f"if={path}", f"of={to}", "bs=1M", f"skip={offset}", f"count={size}",
         "iflag=skip_bytes,count_bytes", "conv=sparse", "status=none"])
    return to


def insert(path: Path, label: str, content: Path) -> None:
    """Writes a file over the partition, holes as zeros."""
    offset, size = where(path, label)
    if content.stat().st_size > size:
        raise ValueError(f"{content} does not fit into {label}")
    run(["dd", f"if={content}", f"of={path}", "bs=1M", f"seek={offset}", "oflag=seek_bytes",
         "conv=notrunc", "status=none"])


def copy(path: Path, to: Path) -> Path:
    """A sparse copy."""
    run(["cp", "--sparse=always", "--reflink=auto", path, to])
    return to


def make_fat(path: Path, mib: int, files: dict[str, Path | bytes]) -> Path:
    """A FAT file system with these files; folders are made as they are needed."""
    path.unlink(missing_ok=True)
    with open(path, "wb") as image:
        image.truncate(mib * MIB)
    run(["mkfs.vfat", "-n", "BOOT", "-i", "7477696e", "--invariant", path])
    folders = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    for folder in sorted(folders):
        run(["mmd", "-i", path, f"::{folder}"])
    for name, content in files.items():
        if isinstance(content, bytes):
            run(["mcopy", "-i", path, "-", f"::{name}"], input=content, stdin=None, text=False)
        else:
            run(["mcopy", "-i", path, content, f"::{name}"])
    return path


def read_fat(path: Path, label: str, name: str) -> bytes:
    """A file of a FAT partition of a disk that no machine uses at the moment."""
    offset, _ = where(path, label)
    return run(["mtype", "-i", f"{path}@@{offset}", f"::{name}"], text=False)


def write_fat(path: Path, label: str, name: str, content: bytes) -> None:
    """Replaces a file of a FAT partition of a disk that no machine uses at the moment."""
    offset, _ = where(path, label)
    run(["mcopy", "-o", "-i", f"{path}@@{offset}", "-", f"::{name}"],
        input=content, stdin=None, text=False)


def make_ext4(path: Path, mib: int, tree: Path, label: str) -> Path:
    """An ext4 file system with the content of `tree`, which belongs to root in it."""
    path.unlink(missing_ok=True)
    with open(path, "wb") as image:
        image.truncate(mib * MIB)
    run(["mkfs.ext4", "-q", "-F", "-L", label, "-m", "0", "-E", "lazy_itable_init=0,root_owner=0:0",
         "-d", tree, path])
    return path


def empty_folder(path: Path) -> Path:
    """`path` as a folder with nothing in it."""
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
    return path
