"""The parts of this folder, tried without a machine; above all: an oracle that can fail."""

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import unittest
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import disk as disks  # noqa: E402
from boards import uboot  # noqa: E402
from process import RigError  # noqa: E402

from cuts import bootscript, nbd, oracle, soak  # noqa: E402
from cuts import enumerate as enumerate_  # noqa: E402
from cuts.fat import Damaged, Fat  # noqa: E402
from cuts.layout import SECTOR, partitions  # noqa: E402
from cuts.oracle import TOOLS, Oracle, Verdict, grub  # noqa: E402
from cuts.trials import run_all  # noqa: E402
from cuts.truth import Brick, Tally, Untruth, WrongEnd  # noqa: E402
from cuts.writelog import FLUSH, FUA, MAGIC, Cut, Disk, Sampling, WriteLog, states  # noqa: E402

MIB = 1 << 20
# The boot script as it is shipped, and one that gives up where it cannot read its variables.
SHIPPED = Path(__file__).resolve().parents[3] / "packaging/boot/grub/grub.cfg"
GIVES_UP = """
set A_OK=0
set B_OK=0
load_env
if [ "$A_OK" = 1 ]; then linux /vmlinuz twinboot.slot=A; boot; fi
reboot
"""


def tool(*words: object) -> bytes:
    """Runs a tool that must succeed."""
    run = subprocess.run([str(word) for word in words], env=TOOLS, capture_output=True, check=False)
    if run.returncode:
        raise AssertionError(f"{words}: {(run.stdout + run.stderr).decode()}")
    return run.stdout


class Recorder:
    """Writes a log as blklogwrites does."""

    def __init__(self, path: Path) -> None:
        self.path, self.body, self.count = path, b"", 0

    def add(self, flags: int, offset: int, data: bytes) -> None:
        """One request."""
        head = struct.pack("<QQQQ", offset // SECTOR, len(data) // SECTOR, flags, 0)
        self.body += head.ljust(SECTOR, b"\0") + data
        self.count += 1

    def write(self, offset: int, data: bytes) -> None:
        """A write into the cache."""
        self.add(0, offset, data)

    def flush(self) -> None:
        """What was written is safe."""
        self.add(FLUSH, 0, b"")

    def log(self) -> WriteLog:
        """What was recorded."""
        head = struct.pack("<QQQI", MAGIC, 1, self.count, SECTOR).ljust(SECTOR, b"\0")
        self.path.write_bytes(head + self.body)
        return WriteLog(self.path)


def block(**variables: object) -> bytes:
    """An environment block of GRUB."""
    text = "".join(f"{name}={value}\n" for name, value in variables.items())
    return (bootscript.SIGNATURE + text.encode()).ljust(1024, b"#")


def state(kind: object, *, home: str = "A", last: object = None) -> bytes:
    """A state file as the agent writes it."""
    saved = json.dumps({"state": kind, "last": last, "home": home}, separators=(",", ":"))
    digest = hashlib.sha256(saved.encode()).hexdigest()
    return f'{{"schema":1,"sha256":"sha256:{digest}","saved":{saved}}}\n'.encode()


RUN = {"from": "A"}
IDLE = state("idle")
FETCHING = state({"fetching": {"run": RUN}})
TRIAL = state({"trial": {"run": RUN, "healthy": False}})
SUCCEEDED = state("idle", home="B", last={"kind": "succeeded", "run": RUN})
FAILED = state("idle", last={"kind": {"failed": {"kind": "network"}}, "run": RUN})
A_ALONE = block(ORDER="A B", A_OK=1, A_TRY=0, B_OK=0, B_TRY=0, GOOD="A")
TRY_B = block(ORDER="B A", A_OK=1, A_TRY=0, B_OK=1, B_TRY=0, GOOD="A")
TRIED_B = block(ORDER="B A", A_OK=1, A_TRY=0, B_OK=1, B_TRY=1, GOOD="A")


class MadeDisk(unittest.TestCase):
    """A small disk with all that the oracle looks at."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        cls.at = Path(cls.folder.name)
        cls.base = cls.at / "base.img"
        cls.base.touch()
        os.truncate(cls.base, 32 * MIB)
        tool("sgdisk", "-n1:0:+4M", "-c1:boot", "-n2:0:+1M", "-c2:rootfs-a", "-n3:0:+1M",
             "-c3:rootfs-b", "-n4:0:+16M", "-c4:data", cls.base)  # fmt: skip
        content = cls.base.read_bytes()
        cls.parts = partitions(lambda at, length: content[at : at + length])
        cls.images = []
        for name in ("one", "two"):
            image = cls.at / name
            image.write_bytes(os.urandom(300_000))
            cls.images.append(image)
        cls.put(cls.base, cls.parts["rootfs-a"].offset, cls.images[0].read_bytes())
        cls.put(cls.base, cls.parts["boot"].offset, cls.fat(A_ALONE))
        cls.put(cls.base, cls.parts["data"].offset, cls.ext4(IDLE))

    @staticmethod
    def put(path: Path, offset: int, data: bytes) -> None:
        """Writes into a file."""
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    @classmethod
    def fat(cls, environment: bytes) -> bytes:
        """A boot partition with an environment block."""
        image, env = cls.at / "fat", cls.at / "grubenv"
        image.write_bytes(b"")
        os.truncate(image, 4 * MIB)
        env.write_bytes(environment)
        tool("mkfs.vfat", "-i", "12345678", image)
        tool("mcopy", "-i", image, env, "::/grubenv")
        env.write_bytes(A_ALONE)
        tool("mcopy", "-i", image, env, "::/grubenv.spare")
        return image.read_bytes()

    @classmethod
    def ext4(cls, saved: bytes | None) -> bytes:
        """A data partition with a state."""
        image, tree = cls.at / "ext4", cls.at / "tree"
        tree.mkdir(exist_ok=True)
        (tree / "state.json").unlink(missing_ok=True)
        (tree / "credential").write_text("secret")
        if saved is not None:
            (tree / "state.json").write_bytes(saved)
        image.write_bytes(b"")
        os.truncate(image, 16 * MIB)
        tool("mkfs.ext4", "-q", "-d", tree, "-U", "6b1e3c6a-7a47-4b5c-9c3e-0e6f2f0a9b11", image)
        return image.read_bytes()

    def judge(self, *writes: tuple[str, int, bytes], script: str | None = None) -> list[Verdict]:
        """What the oracle says before and after the writes, each of which is flushed."""
        recorder = Recorder(self.at / "log")
        for name, offset, data in writes:
            recorder.write(self.parts[name].offset + offset, data)
            recorder.flush()
        disk = Disk.of(self.base, recorder.log())
        with self.oracle(disk, script) as judge:
            return [judge.judge(cut) for cut in states(disk, Sampling(seed=1, losses=0))]

    def oracle(self, disk: Disk, script: str | None = None) -> Oracle:
        """The oracle of this disk."""
        path = SHIPPED
        if script is not None:
            path = self.at / "script"
            path.write_text(script)
        slots = {"A": "rootfs-a", "B": "rootfs-b"}
        return Oracle(
            disk, grub(path), self.parts, slots, "data", self.images, keeps=("/credential",)
        )


class TheOracle(MadeDisk):
    """Says what is wrong where something is wrong, and nothing else."""

    def last(self, *writes: tuple[str, int, bytes], script: str | None = None) -> Verdict:
        verdict = self.judge(*writes, script=script)[-1]
        return verdict

    def test_a_good_update_is_good(self) -> None:
        image = self.images[1].read_bytes()
        image += bytes(-len(image) % SECTOR)
        verdicts = self.judge(
            ("data", 0, self.ext4(FETCHING)),
            ("rootfs-b", 0, image[: len(image) // 2 // SECTOR * SECTOR]),
            ("rootfs-b", 0, image),
            ("boot", 0, self.fat(TRY_B)),
            ("boot", 0, self.fat(TRIED_B)),
            ("data", 0, self.ext4(TRIAL)),
            ("boot", 0, self.fat(TRY_B)),
            ("data", 0, self.ext4(SUCCEEDED)),
        )
        # Between the boot loader and the save the old state names a slot that is being written,
        # which a real agent never leaves so: it is the one thing that may be told here.
        told = [text for verdict in verdicts[:4] for text in verdict.bricks + verdict.untruths]
        self.assertEqual(told, [])
        self.assertTrue(verdicts[-1].is_good, verdicts[-1])
        self.assertEqual(verdicts[0].chosen, "A")
        self.assertEqual(verdicts[-1].chosen, "B")

    def test_a_corrupt_slot_that_boots_is_a_brick(self) -> None:
        verdict = self.last(("rootfs-a", 100 * SECTOR, bytes(SECTOR)))
        self.assertIn("slot A boots and is not whole", verdict.bricks)

    def test_a_corrupt_slot_that_does_not_boot_is_none(self) -> None:
        self.assertTrue(self.last(("rootfs-b", 0, b"x" * SECTOR)).is_good)

    def test_the_last_sector_of_an_image_counts(self) -> None:
        length = self.images[0].stat().st_size
        at = length // SECTOR * SECTOR
        rest = bytearray(self.images[0].read_bytes()[at:].ljust(SECTOR, b"x"))
        # Behind its end anything may stand.
        self.assertTrue(self.last(("rootfs-a", at, bytes(rest))).is_good)
        rest[length - at - 1] ^= 1
        self.assertTrue(self.last(("rootfs-a", at, bytes(rest))).bricks)

    def test_lost_variables_brick_a_script_that_gives_up(self) -> None:
        empty = ("boot", 0, self.fat(b""))
        self.assertIn("nothing boots", str(self.last(empty, script=GIVES_UP).bricks))
        verdict = self.last(empty)
        self.assertEqual((verdict.bricks, verdict.chosen), ([], "A"))
        self.assertIn("unreadable: grubenv", verdict.notes)

    def test_lost_variables_lead_to_either_slot_in_turn(self) -> None:
        # Slot B may be the only whole one: the spare block, made in the factory, knows slot A alone.
        content = self.fat(b"")
        found = grub(SHIPPED).starts(lambda at, length: content[at : at + length])
        self.assertEqual(found, (list("ABABABAB"), ["grubenv"]))

    def test_a_success_that_does_not_boot_is_untrue(self) -> None:
        self.assertIn("succeeded", str(self.last(("data", 0, self.ext4(SUCCEEDED))).untruths))

    def test_a_failure_while_the_new_slot_boots_is_untrue(self) -> None:
        image = self.images[1].read_bytes()
        verdict = self.last(
            ("rootfs-b", 0, image + bytes(-len(image) % SECTOR)),
            ("boot", 0, self.fat(TRY_B)),
            ("data", 0, self.ext4(FAILED)),
        )
        self.assertIn("failed", str(verdict.untruths))

    def test_a_slot_that_is_written_must_not_boot(self) -> None:
        verdict = self.last(
            ("boot", 0, self.fat(TRY_B)),
            ("data", 0, self.ext4(FETCHING)),
        )
        self.assertIn("slot B boots and is not whole", verdict.bricks)
        self.assertIn("is being written", str(verdict.untruths))

    def test_an_unconfirmed_slot_that_boots_for_ever_is_a_brick(self) -> None:
        image = self.images[1].read_bytes()
        verdict = self.last(
            ("rootfs-b", 0, image + bytes(-len(image) % SECTOR)),
            ("data", 0, self.ext4(TRIAL)),
            script="linux /vmlinuz twinboot.slot=B\nboot\n",
        )
        self.assertIn("boots for ever", str(verdict.bricks))

    def test_a_state_that_was_flipped_is_told(self) -> None:
        flipped = IDLE.replace(b'"home":"A"', b'"home":"B"')
        self.assertIn("but says", str(self.last(("data", 0, self.ext4(flipped))).untruths))

    def test_an_old_state_that_comes_back_is_told(self) -> None:
        recorder = Recorder(self.at / "log")
        recorder.write(self.parts["data"].offset, self.ext4(FETCHING))
        recorder.flush()
        recorder.write(self.parts["rootfs-b"].offset, bytes(SECTOR))
        disk = Disk.of(self.base, recorder.log())
        with self.oracle(disk) as judge:
            for cut in states(disk, Sampling(seed=1, losses=0)):
                self.assertTrue(judge.judge(cut).is_good)
            old = self.ext4(IDLE)
            path = self.at / "old"
            path.write_bytes(old)
            # As if the flush had not been honoured.
            judge.data.version += 1
            disk.durable = {}
            judge._durable_at = judge.data.version
            verdict = judge.judge(Cut("lie", 3, lost=1))
            self.assertIn("comes back", str(verdict.untruths))

    def test_a_state_that_is_gone_is_told(self) -> None:
        verdicts = self.judge(("data", 0, self.ext4(FETCHING)), ("data", 0, self.ext4(None)))
        self.assertEqual([bool(verdict.untruths) for verdict in verdicts[:2]], [False] * 2)
        self.assertIn("is gone", str(verdicts[-1].untruths))
        # Whatever is saved after that, it was gone.
        self.assertIn("is gone", str(self.last(("data", 0, self.ext4(None))).untruths))

    def test_a_device_that_never_saved_anything_has_no_state(self) -> None:
        new = self.at / "new.img"
        new.write_bytes(self.base.read_bytes())
        self.put(new, self.parts["data"].offset, self.ext4(None))
        recorder = Recorder(self.at / "log")
        recorder.write(self.parts["data"].offset, self.ext4(IDLE))
        disk = Disk.of(new, recorder.log())
        with self.oracle(disk) as judge:
            for cut in states(disk, Sampling(seed=1, losses=20)):
                # Torn at any sector the file system may be repaired, but nobody lies.
                self.assertNotIn("is gone", str(judge.judge(cut).untruths))

    def test_a_data_partition_without_its_superblock_is_counted(self) -> None:
        verdict = self.last(("data", 1024, bytes(1024)))
        self.assertIn("full repair (code 8)", str(verdict.notes))
        self.assertTrue(verdict.is_good, verdict)

    def test_a_data_partition_without_any_superblock_is_a_brick(self) -> None:
        size = self.parts["data"].bytes
        verdict = self.last(("data", 0, bytes(size)))
        self.assertIn("cannot be repaired", str(verdict.bricks))

    def test_the_device_s_own_files_must_stay(self) -> None:
        with_files = self.at / "tree" / "credential"
        with_files.write_text("secret")
        spoilt = bytearray(self.ext4(IDLE))
        at = spoilt.index(b"secret")
        spoilt[at] ^= 1
        verdict = self.last(("data", 0, bytes(spoilt)))
        self.assertIn("lost /credential", str(verdict.bricks))


class TheLog(unittest.TestCase):
    """Replays what was recorded."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.at = Path(folder.name)
        self.base = self.at / "base"
        self.base.write_bytes(bytes(64 * SECTOR))

    def test_qemu_writes_what_we_read(self) -> None:
        log, disk = self.at / "qemu.log", self.at / "disk"
        log.touch()
        disk.write_bytes(self.base.read_bytes())
        tool("qemu-io", "-c", "write -P 1 0 4096", "-c", "flush", "-c", "write -f -P 2 512 1024",
             "-c", "write -z 1024 512", "--image-opts", f"driver=blklogwrites,file.driver=file,"
             f"file.filename={disk},log.driver=file,log.filename={log}")  # fmt: skip
        replayed = Disk.of(self.base, WriteLog(log))
        for cut in states(replayed, Sampling(seed=1)):
            self.assertTrue(cut.is_prefix or cut.lost or cut.torn)
        replayed.save(self.at / "saved")
        self.assertEqual((self.at / "saved").read_bytes(), disk.read_bytes())
        self.assertEqual(replayed.read(0, 64 * SECTOR), disk.read_bytes())
        self.assertEqual(replayed.read(300, 1000), disk.read_bytes()[300:1300])

    def test_what_was_flushed_is_never_lost(self) -> None:
        recorder = Recorder(self.at / "log")
        recorder.write(0, b"a" * 4 * SECTOR)
        recorder.flush()
        recorder.write(SECTOR, b"b" * 4 * SECTOR)
        recorder.add(FUA, 2 * SECTOR, b"c" * SECTOR)
        recorder.write(9 * SECTOR, b"d" * SECTOR)
        disk = Disk.of(self.base, recorder.log())
        seen = set()
        for cut in states(disk, Sampling(seed=7, losses=200)):
            content = disk.read(0, 10 * SECTOR)
            if cut.after > 2:
                self.assertIn(content[0:1], b"a")
                self.assertIn(content[SECTOR : SECTOR + 1], b"ab")
            if cut.after > 4:
                self.assertEqual(content[2 * SECTOR : 2 * SECTOR + 1], b"c")
            seen.add(content)
        # Each of the four sectors of the second write, lost or not, and more.
        self.assertGreater(len(seen), 20)

    def test_bulk_is_sampled(self) -> None:
        recorder = Recorder(self.at / "log")
        for number in range(32):
            recorder.write(number * SECTOR, b"x" * SECTOR)
        disk = Disk.of(self.base, recorder.log())
        sampling = Sampling(seed=1, losses=0, bulk=[range(16, 32)])
        self.assertEqual(sum(1 for _ in states(disk, sampling)), 1 + 16 + 1 + 1)


class TheVolatileDisk(unittest.TestCase):
    """Keeps what was flushed, and only that for sure."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.at = Path(folder.name)
        self.image = self.at / "disk"
        self.image.write_bytes(bytes(MIB))
        self.disk = nbd.Disk(self.image)

    def io(self, *commands: str) -> str:
        """Lets qemu-io work with the disk; it flushes at its end."""
        words = [word for command in commands for word in ("-c", command)]
        address = f"nbd+unix:///?socket={self.at}/socket"
        run = subprocess.run(
            ["qemu-io", "-f", "raw", *words, address],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        return run.stdout + run.stderr

    def test_a_client_reads_what_it_wrote_and_flushes(self) -> None:
        with nbd.Server(self.disk, self.at / "socket"):
            said = self.io("write -P 1 0 8k", "write -f -P 2 4k 512", "read -P 2 4k 512")
        self.assertNotIn("failed", said)
        content = self.image.read_bytes()
        self.assertEqual(content[:4096], b"\1" * 4096)
        self.assertEqual(content[4096 : 4096 + 513], b"\2" * 512 + b"\1")

    def test_what_is_not_flushed_is_kept_torn_or_lost_by_the_seed(self) -> None:
        outcomes = {self.cut(f"{seed}") for seed in range(12)}
        self.assertEqual(len(outcomes & {self.cut(f"{seed}") for seed in range(12)}), len(outcomes))
        self.assertGreater(len(outcomes), 3)

    def cut(self, seed: str) -> bytes:
        """What three unflushed writes leave."""
        self.image.write_bytes(bytes(MIB))
        disk = nbd.Disk(self.image)
        disk.write(0, b"f" * 4096, through=False)
        disk.flush()
        for number in range(3):
            disk.write(512 + number * 4096, bytes([number + 1]) * 4096, through=False)
        disk.write(0, b"t" * 512, through=True)
        disk.settle(seed)
        content = self.image.read_bytes()[: 4 * 4096]
        self.assertEqual(content[:512], b"t" * 512)
        return content

    def test_the_cut_comes_at_the_write(self) -> None:
        called = threading.Event()
        self.disk.cut_after(2, called.set)
        with nbd.Server(self.disk, self.at / "socket"):
            commands = ("write -P 1 0 512", "write -P 2 512 512", "write -P 3 1k 512")
            # As a machine would, it waits for an answer that never comes.
            client = subprocess.Popen(
                ["qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)),
                 f"nbd+unix:///?socket={self.at}/socket"],
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                self.assertTrue(called.wait(60))
            finally:
                client.kill()
                client.wait()
        self.assertEqual(self.disk.writes, 2)
        self.assertEqual(self.disk.read(512, 1), b"\2")
        self.assertEqual(self.disk.read(1024, 1), b"\0")

    def test_a_client_that_ends_in_order_leaves_nothing_in_the_cache(self) -> None:
        # The firmware of the tryboot machine then reads the image, not the cache.
        with nbd.Server(self.disk, self.at / "socket"):
            self.io("write -P 1 0 8k")
            self.assertEqual(self.image.read_bytes()[:8192], b"\1" * 8192)

    def test_it_fails_where_it_is_told_to(self) -> None:
        self.disk.faults = [
            nbd.Fault(nbd.WRITE, range(4096, 8192), skip=1, count=1),
            nbd.Fault(nbd.READ, range(65536, 65537)),
        ]
        with nbd.Server(self.disk, self.at / "socket"):
            said = self.io(
                "write 4k 512", "write 4k 512", "write 4k 512", "write 0 512", "read 64k 512"
            )
        self.assertEqual(said.count("write failed: Input/output error"), 1)
        self.assertEqual(said.count("read failed: Input/output error"), 1)
        self.assertEqual([fault.hits for fault in self.disk.faults], [1, 1])


class Fats(unittest.TestCase):
    """All three kinds, with long names and with damage."""

    def test_reads_what_mtools_wrote(self) -> None:
        for bits, mib in (("12", 4), ("16", 32), ("32", 64)):
            with self.subTest(bits=bits), tempfile.TemporaryDirectory() as folder:
                image, file = Path(folder, "image"), Path(folder, "file")
                image.touch()
                os.truncate(image, mib * MIB)
                tool("mkfs.vfat", "-F", bits, image)
                file.write_bytes(os.urandom(300_000))
                tool("mmd", "-i", image, "::/grub")
                tool("mcopy", "-i", image, file, "::/grub/A long name.conf")
                content = image.read_bytes()
                fat = Fat(lambda at, length, c=content: c[at : at + length])
                self.assertEqual(fat.bits, int(bits))
                self.assertEqual(fat.file("/GRUB/a long name.conf"), file.read_bytes())
                with self.assertRaisesRegex(Damaged, "there is no grubenv"):
                    fat.file("grub/grubenv")

    def test_no_signature(self) -> None:
        with self.assertRaises(Damaged):
            Fat(lambda at, length: bytes(length))


class Environments(unittest.TestCase):
    """GRUB's block, as GRUB reads it."""

    def test_blocks(self) -> None:
        self.assertEqual(bootscript.grub_block(A_ALONE)["ORDER"], "A B")
        self.assertEqual(bootscript.grub_block(block(x="a\\\\b\\\nc", y=1)), {"x": "a\\b\nc", "y": "1"})
        for none in (b"", bytes(1024), block()[5:], b"#" * 1024):
            self.assertIsNone(bootscript.grub_block(none))

    def test_a_confirmed_slot_boots_three_times(self) -> None:
        self.assertEqual(self.starts(order="B A", a=(1, 0), b=(1, 0), good="B"), "BBBABBBB")
        self.assertEqual(self.starts(order="A B", a=(1, 0), b=(1, 1), good="A"), "AAAAAAAA")
        self.assertEqual(self.starts(order="A B", a=(1, 2), b=(0, 0), good="A"), "AAAAAAAA")

    def test_a_slot_that_failed_is_not_tried_soon_again(self) -> None:
        self.assertEqual(self.starts(order="B A", a=(1, 0), b=(1, 0), good="A"), "BAAAAAAB")
        # Cut on the way back, three times.
        self.assertEqual(self.starts(order="B A", a=(1, 3), b=(1, 1), good="A"), "AAABAAAA")
        # Before the confirmed slot had a name.
        self.assertEqual(self.starts(order="B A", a=(1, 0), b=(1, 0)), "BABABABA")
        self.assertEqual(self.starts(order="B A", a=(1, 0), b=(1, 0), good="x"), "BABABABA")

    def test_nothing_good_tries_both(self) -> None:
        self.assertIn("B", self.starts(order="B A", a=(0, 0), b=(0, 0), good="A"))
        self.assertIn("A", self.starts(order="", a=(0, 3), b=(0, 3), good="B"))

    def test_a_boot_that_is_not_counted_is_one_of_the_confirmed_slot(self) -> None:
        trial = {"order": "B A", "a": (1, 0), "b": (1, 0)}
        self.assertEqual(self.starts(**trial, good="A", writes=False), "AAAAAAAA")
        self.assertEqual(self.starts(**trial, good="B", writes=False), "BBBBBBBB")
        self.assertEqual(self.starts(**trial, writes=False), "BBBBBBBB")

    @staticmethod
    def starts(
        order: str, a: tuple[int, int], b: tuple[int, int], good: str = "", writes: bool = True
    ) -> str:
        """What boots, by `x_OK` and `x_TRY` of the slots, if nobody confirms anything."""
        variables = {"ORDER": order, "A_OK": a[0], "A_TRY": a[1], "B_OK": b[0], "B_TRY": b[1]}
        variables |= {"GOOD": good} if good else {}
        found = bootscript.starts(
            SHIPPED,
            {"grubenv": {name: str(value) for name, value in variables.items()}},
            {"A", "B"},
            writes=writes,
        )
        return "".join(slot or "-" for slot in found)

    def test_an_unknown_command_is_not_guessed_at(self) -> None:
        with self.assertRaisesRegex(bootscript.NotRun, "frobnicate"):
            bootscript.grub("frobnicate\nboot\n", {"grubenv": {}}, {"A"})


class UBoots(unittest.TestCase):
    """The two copies of the environment, and what boot.cmd makes of them."""

    @staticmethod
    def copy(number: int, **variables: str) -> bytes:
        text = b"".join(f"{name}={value}\0".encode() for name, value in variables.items())
        data = text.ljust(uboot.COPY_SIZE - 5, b"\0")
        return struct.pack("<IB", zlib.crc32(data), number) + data

    def starts(self, first: bytes, second: bytes) -> tuple[str, list[str]]:
        content = first.ljust(uboot.COPIES[1], b"\0") + second
        slots, unreadable = oracle.uboot().starts(lambda at, length: content[at : at + length])
        return "".join(slots), unreadable

    def test_the_newer_copy_counts(self) -> None:
        a = {"BOOT_ORDER": "A", "BOOT_A_LEFT": "3", "BOOT_B_LEFT": "0"}
        b = {"BOOT_ORDER": "B A", "BOOT_A_LEFT": "3", "BOOT_B_LEFT": "1"}
        for old, new in ((1, 2), (255, 0)):
            tried = "BAAABBBA"
            self.assertEqual(self.starts(self.copy(old, **a), self.copy(new, **b)), (tried, []))
            self.assertEqual(self.starts(self.copy(new, **b), self.copy(old, **a)), (tried, []))
        torn = bytearray(self.copy(2, **b))
        torn[600] ^= 1
        self.assertEqual(self.starts(self.copy(1, **a), bytes(torn)), ("A" * 8, ["copy 1"]))

    def test_an_environment_without_variables(self) -> None:
        data = b"\0".ljust(uboot.COPY_SIZE - 5, b"\xff")
        empty = struct.pack("<IB", zlib.crc32(data), 2) + data
        full = self.copy(1, BOOT_ORDER="B", BOOT_B_LEFT="1")
        self.assertEqual(self.starts(empty, full), ("AAABBBAA", []))

    def test_without_a_copy_both_slots_are_tried(self) -> None:
        nothing = bytes(uboot.COPY_SIZE)
        self.assertEqual(self.starts(nothing, nothing), ("AAABBBAA", ["copy 0", "copy 1"]))

    def test_the_oracle_and_the_board_foretell_the_same(self) -> None:
        # What the board says is compared with the real U-Boot (test_uboot_script.py).
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "disk")
            disks.make_gpt(path, [disks.Partition(1, "ubootenv", uboot.ENVIRONMENT_MIB, "8300")])
            offset, _ = disks.where(path, "ubootenv")
            for order in ("A B", "B A", "B", "rescue B A", "rescue", ""):
                for a, b in (("3", "1"), ("0", "1"), ("0", "0"), ("zz", "2"), ("", ""), ("a", "zz")):
                    with self.subTest(order=order, a=a, b=b):
                        variables = {"BOOT_ORDER": order, "BOOT_A_LEFT": a, "BOOT_B_LEFT": b}
                        copy = self.copy(1, **variables)
                        MadeDisk.put(path, offset, copy)
                        foretold = uboot.UBoot().next_slot(path)
                        self.assertEqual(self.starts(copy, b"")[0][0], foretold)


class TheVolatileRig(unittest.TestCase):
    """Leaves nothing behind, also where the machine cannot be started."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.board = mock.Mock()
        self.rig = soak.VolatileRig(self.board, mock.Mock(events=[]), Path(folder.name))
        self.rig.disk.write_bytes(bytes(MIB))

    def test_a_cut_loses_what_was_not_flushed(self) -> None:
        self.rig.on()
        socket = Path(self.rig._socket.name, "disk")
        drive = self.board.machine.call_args.kwargs["drive"]
        self.assertTrue(socket.is_socket() and drive[1].endswith(f"server.path={socket}"), drive)
        self.rig.device.write(0, b"f" * SECTOR, through=False)
        self.rig.device.flush()
        self.rig.device.write(SECTOR, b"x" * SECTOR, through=False)
        lost = self.rig.off("1")
        self.assertEqual(lost.kept + lost.torn + lost.lost, 1)
        self.assertEqual(self.rig.disk.read_bytes()[:SECTOR], b"f" * SECTOR)
        self.assertFalse(socket.parent.exists())
        self.assertIsNone(self.rig.off())

    def test_a_machine_that_does_not_start(self) -> None:
        self.board.machine.side_effect = RigError("the firmware finds nothing to boot")
        with self.assertRaises(RigError):
            self.rig.on()
        socket = Path(self.rig._socket.name)
        self.rig.off()
        self.assertFalse(socket.exists())


class TheEnumeration(unittest.TestCase):
    """Keeps what a recording left that did not succeed."""

    def test_a_recording_that_fails_is_kept(self) -> None:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()) as said:
            at = Path(folder)
            (at / "recorded").mkdir()
            (at / "recorded/base.img").write_bytes(b"base")
            cloud = mock.MagicMock()
            cloud.__enter__().reported.side_effect = OSError("no hub")
            cloud.__enter__().folder = at / "cloud"
            with mock.patch.multiple(
                enumerate_, boards=mock.DEFAULT, packages=mock.DEFAULT, images=mock.DEFAULT,
                Cloud=mock.Mock(return_value=cloud), BUILD=at / "build",
                record=mock.Mock(side_effect=KeyError("twinboot")),
            ):  # fmt: skip
                code = enumerate_.run("grub", at, enumerate_.Choice(1), boots=1)
            kept = at / "build/failed/recording"
            self.assertEqual(code, 1)
            self.assertEqual((kept / "base.img").read_bytes(), b"base")
            self.assertIn("KeyError: 'twinboot'", said.getvalue())
            self.assertTrue(said.getvalue().rstrip().splitlines()[-1].startswith("cuts 0, bricks"))


class TheSoak(unittest.TestCase):
    """Takes no end of an update for good that the cut does not explain."""

    TRIED = "restarting into slot B\nreboot: Restarting system\nbooting slot B\n"

    def test_ends(self) -> None:
        back = "rolledBack (fellBack)"
        for console, ends in (
            ("fetching version 2", {"succeeded"}),
            ("restarting into slot B", {"succeeded"}),
            (self.TRIED, {"succeeded", back}),
            (f"{self.TRIED}runs 2 on trial", {"succeeded", back}),
            (f"{self.TRIED}on trial\nthe last update to 2 is confirmed", {"succeeded"}),
            (f"the last update to 1 is confirmed\n{self.TRIED}", {"succeeded", back}),
        ):
            with self.subTest(console=console):
                self.assertEqual(soak.ends("grub", soak.HEALTHY, console), ends)
        for console in ("fetching", self.TRIED):
            self.assertEqual(soak.ends("grub", soak.UNHEALTHY, console), {"rolledBack (unhealthy)", back})

    def test_a_flag_for_one_start_is_lost_on_the_way_down(self) -> None:
        leaves = "restarting into slot B\ntwinbootd[1]: restarting the machine\n"
        for board, ends in (("grub", 1), ("uboot", 1), ("tryboot", 2)):
            self.assertEqual(len(soak.ends(board, soak.HEALTHY, leaves)), ends, board)

    def test_another_end_is_a_failure(self) -> None:
        moment = soak.MOMENTS[0]
        made = soak.Made("1", True, frozenset({"succeeded"}))
        soak.need_end(moment, made, {"lastUpdate": {"result": "succeeded"}})
        for last in ({"result": "failed", "code": "network"}, {"result": "rolledBack"}, {}):
            with self.assertRaisesRegex(WrongEnd, "must end with succeeded"):
                soak.need_end(moment, made, {"lastUpdate": last})
        sick = replace(made, ends=soak.ends("grub", soak.UNHEALTHY, ""))
        with self.assertRaises(WrongEnd):
            soak.need_end(moment, sick, {"lastUpdate": {"result": "rolledBack"}})

    def test_downloads_must_be_resumed(self) -> None:
        cut = Counter({(soak.DOWNLOAD, "succeeded"): soak.MANY_DOWNLOADS})
        few = Counter({(soak.DOWNLOAD, "succeeded"): soak.MANY_DOWNLOADS - 1, ("switch", "succeeded"): 9})
        self.assertTrue(soak.never_resumed(Tally(ends=cut)))
        self.assertFalse(soak.never_resumed(Tally(ends=cut, resumed=1)))
        self.assertFalse(soak.never_resumed(Tally(ends=few)))

    def test_a_cut_that_never_came_is_none(self) -> None:
        for gone in (False, True):
            rig = PlayedRig(gone)
            limit, soak.AT_REST_S = soak.AT_REST_S, 0
            try:
                made = soak.cut_once(rig, soak.Moment("switch", "restarting into", 3), PLAYED_SEED)
            finally:
                soak.AT_REST_S = limit
            self.assertEqual(made, soak.Made("7", gone, frozenset({"succeeded"})))


# Of the random numbers 0 to 3 this one brings none that cuts at once.
PLAYED_SEED = "1"


class PlayedRig:
    """A machine whose update is over at once, with or without a cut before that."""

    def __init__(self, cuts: bool) -> None:
        self.machine = self.device = self.cloud = self.board = self
        self.name = "grub"
        self.cuts, self.console = cuts, "idle; the last update to 1 is confirmed\n"

    def running(self) -> tuple[str, str]:
        return "A", "1.0.0"

    def send(self, *_: object) -> str:
        self.console += "restarting into slot B\n"
        return "7"

    def wait_for(self, pattern: str, limit: float) -> None:
        assert pattern in self.console and limit

    def cut_after(self, writes: int, then: object) -> None:
        assert writes > 0
        if self.cuts:
            then()

    def reported(self) -> dict:
        return {"twinboot": {"lastUpdate": {"id": "7"}}}

    def off(self, seed: str) -> nbd.Lost:
        return nbd.Lost(1, 2, 3)

    def say(self, text: str) -> None:
        self.said = text


class Trials(unittest.TestCase):
    """Whatever happens in one, the others are counted, and the evidence is kept."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.at = Path(folder.name)
        self.tally = Tally()
        self.machines = 0
        # From which machine on none comes up any more.
        self.broken_from = 99

    @contextmanager
    def machine(self, first: str) -> Iterator["Trials"]:
        """A rig: this test itself."""
        self.machines += 1
        self.folder = self.at / first
        self.folder.mkdir()
        (self.folder / "disk.img").write_bytes(b"disk")
        (self.folder / "console.log").write_text("Linux")
        yield self

    @property
    def cloud(self) -> "Trials":
        return self

    def factory(self) -> None:
        if self.machines >= self.broken_from:
            raise RigError("no space left")

    def keep(self, to: Path) -> None:
        raise ConnectionError(f"no hub, so nothing in {to}")

    def run_them(self, *ends: Exception | None) -> list[str]:
        """Trials that end so."""

        def trial(_: object, number: int) -> None:
            self.tally.cuts += 1
            if ends[number]:
                raise ends[number]

        # What it shows of each failure is not this test's.
        with redirect_stdout(io.StringIO()):
            return run_all(list(range(len(ends))), self.machine, trial, "trial {}".format,
                           self.tally, self.at / "kept")  # fmt: skip

    def test_each_kind_of_failure_is_counted(self) -> None:
        failures = self.run_them(
            None, Brick("b"), Untruth("u"), WrongEnd("e"), None, KeyError("twinboot"),
            TimeoutError("t"), ValueError("v"),
        )  # fmt: skip
        tally = self.tally
        self.assertEqual((tally.cuts, tally.bricks, tally.untruths, len(failures)), (8, 4, 1, 6))
        # The last one was the last trial.
        self.assertEqual(self.machines, 6)

    def test_the_evidence_is_kept_without_a_hub(self) -> None:
        (failure,) = self.run_them(KeyError("twinboot"))
        kept = self.at / "kept/trial-0"
        self.assertIn("KeyError: 'twinboot'", failure)
        self.assertIn("no hub", failure)
        self.assertIn(str(kept), failure)
        self.assertEqual((kept / "disk.img").read_bytes(), b"disk")
        self.assertEqual((kept / "console.log").read_text(), "Linux")
        self.assertIn("Traceback", (kept / "error.txt").read_text())

    def test_it_ends_where_no_machine_comes_up_any_more(self) -> None:
        self.broken_from = 2
        failures = self.run_them(None, Brick("b"), None, None)
        self.assertEqual(self.machines, 2)
        self.assertIn("first boot: RigError: no space left", failures[1])
        self.assertEqual(failures[2], "2 trials are not run")
        self.assertEqual((self.tally.cuts, self.tally.bricks), (2, 1))

    def test_the_last_line_stays(self) -> None:
        self.assertEqual(
            str(Tally(2, 0, 0, 1, 5)),
            "cuts 2, bricks 0, untruthful reports 0, updates resumed 1, bytes saved by resume 5",
        )


if __name__ == "__main__":
    unittest.main()
