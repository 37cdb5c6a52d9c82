"""One virtual machine: a QEMU, its serial console, its plug."""

import json
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from process import RigError, spawn

# How much of the console an error shows.
TAIL_CHARACTERS = 1500


class MachineError(RigError):
    """The machine did not do what was waited for; the text has the end of its console."""


class Machine:
    """A running QEMU. `power_cut` or the end of a `with` block ends it; so does the driver's end.

    `command` is QEMU's command line without console and QMP. The console is appended to
    `folder/console.log`, also over several machines with one folder; what is waited for is searched
    from where the last match of this machine ended.
    """

    def __init__(self, command: list, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "console.log"
        # Not in the folder: the path of a socket must be short.
        self._sockets = tempfile.TemporaryDirectory(prefix="twinboot-vm-")
        self._qmp_path = Path(self._sockets.name) / "qmp"
        self._text = ""
        self._seen = 0
        self._end = False
        self._news = threading.Condition()
        self._console = ["-display", "none", "-chardev", "stdio,id=console,signal=off",
                         "-serial", "chardev:console",
                         "-qmp", f"unix:{self._qmp_path},server=on,wait=off"]
        self._errors = open(folder / "qemu.log", "ab")
        self._plug = threading.Lock()
        self._off = False
        self._spawn(command)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _spawn(self, command: list) -> None:
        self._qmp = None
        self._process = spawn([*command, *self._console], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=self._errors)

    def restarted(self, console: str) -> list | None:
        """QEMU ended by itself, having shown `console`: the command line of the one that follows,
        for machines whose firmware is not in QEMU; None leaves the machine off."""
        return None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.power_cut()

    def _read(self) -> None:
        with open(self.log, "ab") as log:
            on = True
            while on:
                begun = len(self._text)
                while data := self._process.stdout.read1(65536):
                    log.write(data)
                    log.flush()
                    with self._news:
                        self._text += data.decode(errors="replace")
                        self._news.notify_all()
                self._process.stdout.close()
                self._process.wait()
                on = self._start_again(self._text[begun:])
        with self._news:
            self._end = True
            self._news.notify_all()

    def _start_again(self, console: str) -> bool:
        try:
            following = None if self._off else self.restarted(console)
        except (RigError, OSError, ValueError) as error:
            self._errors.write(f"the machine could not be started again: {error}\n".encode())
            self._errors.flush()
            return False
        with self._plug:
            if following is None or self._off:
                return False
            self._spawn(following)
            return True

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def console(self) -> str:
        """All that the console has shown."""
        return self._text

    def unseen(self) -> str:
        """What the console has shown after what was waited for."""
        with self._news:
            return self._text[self._seen:]

    def wait_for(self, pattern: str, limit: float) -> re.Match:
        """Waits until the console shows `pattern`, after what was waited for before."""
        wanted = re.compile(pattern)
        deadline = time.monotonic() + limit
        with self._news:
            while not (match := wanted.search(self._text, self._seen)):
                if self._end:
                    raise MachineError(f"QEMU ended before {pattern!r}:\n{self.tail()}")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise MachineError(f"no {pattern!r} within {limit:.0f} s:\n{self.tail()}")
                self._news.wait(left)
            self._seen = match.end()
            return match

    def tail(self) -> str:
        """The end of the console, and what QEMU itself complained about."""
        complaint = (self.log.parent / "qemu.log").read_text(errors="replace").strip()
        return f"{self._text[-TAIL_CHARACTERS:]}\n{complaint[-TAIL_CHARACTERS:]}".rstrip()

    def mark(self) -> None:
        """What the console has shown so far does not count for `wait_for` any more."""
        with self._news:
            self._seen = len(self._text)

    def type(self, text: str) -> None:
        """Types on the console."""
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()

    def ended(self) -> bool:
        """Whether QEMU is gone."""
        return self._end

    def wait_end(self, limit: float) -> None:
        """Waits until QEMU ends by itself (`-no-reboot`)."""
        self._reader.join(limit)
        if not self._end:
            raise MachineError(f"still runs after {limit:.0f} s:\n{self.tail()}")

    def power_cut(self) -> None:
        """Pulls the plug. The host keeps what the guest had handed to it."""
        with self._plug:
            self._off = True
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGKILL)
        self._reader.join()
        if self._qmp:
            self._qmp.close()
            self._qmp = None
        self._process.stdin.close()
        self._errors.close()
        self._sockets.cleanup()

    def quit(self) -> None:
        """Ends QEMU in order, so that the files of its drives are whole. The guest notices nothing."""
        with self._plug:
            self._off = True
        self.qmp("quit")
        self.wait_end(60)
        self.power_cut()

    def qmp(self, command: str, **arguments) -> dict:
        """Asks QEMU's monitor; for instance `system_reset`, `quit`, `set_link`."""
        if not self._qmp:
            connection = socket.socket(socket.AF_UNIX)
            deadline = time.monotonic() + 20
            while True:
                try:
                    connection.connect(str(self._qmp_path))
                    break
                except (FileNotFoundError, ConnectionRefusedError):
                    # QEMU makes the socket when it starts, and tells nobody.
                    if self.ended() or time.monotonic() > deadline:
                        raise MachineError(f"no QMP socket:\n{self.tail()}") from None
                    time.sleep(0.05)
            self._qmp = connection.makefile("rw")
            connection.close()
            json.loads(self._qmp.readline())
            self._ask("qmp_capabilities", {})
        return self._ask(command, arguments)

    def _ask(self, command: str, arguments: dict) -> dict:
        self._qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._qmp.flush()
        while line := self._qmp.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise MachineError(f"QEMU refuses {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise MachineError(f"QEMU closed its monitor:\n{self.tail()}")
