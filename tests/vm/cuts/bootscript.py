"""Runs the shipped boot scripts (packaging/boot) without their boot loaders, to ask what they choose.

GRUB's script language and U-Boot's are near enough to the shell's: the very file that is shipped is
run by bash, in which the boot loader's commands are functions. So the oracle cannot drift from what
a machine runs. What the boot loader reads and writes is handed in and out.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SIGNATURE = b"# GRUB Environment Block\n"

# `loads` names the slots whose kernel can be read, `readable` the environment blocks that GRUB can
# read, and whether it can write them. An unknown command ends the run with an error, so that the oracle never guesses.
GRUB = r"""
loads=" __LOADS__ "
declare -A readable=( __READABLE__ ) block=( __BLOCK__ )
result() { builtin printf '%s\0' "$@" >&3; }
finish() {
    for name in "${!block[@]}"; do result env "$name" "${block[$name]}"; done
    result "$@"
    exit 0
}
set() {
    for word; do
        case $word in *=*) declare -g "${word%%=*}=${word#*=}" ;; *) result unknown "set $word"; exit 9 ;; esac
    done
}
take_file() {
    file=grubenv
    case $1 in -f | --file) file=${2##*/}; return 2 ;; --file=*) file=${1##*/}; return 1 ;; esac
}
load_env() {
    take_file "$@"; shift $?
    [ -n "${readable[$file]}" ] || return 1
    for name in "${!block[@]}"; do
        [ "${name%%:*}" = "$file" ] || continue
        for wanted in "$@" $(( $# ? 0 : 1 )); do
            # Without names all are loaded.
            if [ $# = 0 ] || [ "${name#*:}" = "$wanted" ]; then
                declare -g "${name#*:}=${block[$name]}"
            fi
        done
    done
}
save_env() {
    take_file "$@"; shift $?
    # GRUB refuses to write into what is no block.
    [ "${readable[$file]}" = written ] || return 1
    for name; do block[$file:$name]=${!name}; done
}
linux() {
    slot=
    for word; do case $word in rauc.slot=* | twinboot.slot=*) slot=${word#*=} ;; esac; done
    case $loads in *" $slot "*) loaded=$slot ;; *) return 1 ;; esac
}
initrd() { [ -n "$loaded" ]; }
boot() { [ -n "$loaded" ] || return 1; finish boot "$loaded"; }
reboot() { finish reboot; }
halt() { finish halt; }
regexp() { :; }
probe() { :; }
insmod() { :; }
sleep() { :; }
echo() { :; }
prefix='(hd0,gpt1)' root=hd0,gpt1
command_not_found_handle() { result unknown "$1"; exit 9; }
"""


class NotRun(Exception):
    """The script uses something that the oracle does not know."""


@dataclass(frozen=True)
class Start:
    """What one start of the machine does."""

    # The slot that boots; None: the machine resets at once, or stops.
    slot: str | None
    # How the script ended: `boot`, `reboot`, `halt`, or `end`, which is GRUB's prompt.
    how: str
    # The environment afterwards.
    environment: "Blocks"


def grub_block(content: bytes) -> dict[str, str] | None:
    """The variables of an environment block as GRUB's lib/envblk.c reads them; None: it refuses."""
    if len(content) < len(SIGNATURE) or not content.startswith(SIGNATURE):
        return None
    variables: dict[str, str] = {}
    rest = content[len(SIGNATURE) :]
    while rest:
        if rest[:1] == b"#":
            # A comment, or the padding: GRUB looks on behind the next line break.
            rest = rest.partition(b"\n")[2]
            continue
        line, found, rest = _line(rest)
        if not found:
            break
        name, equals, value = line.partition(b"=")
        if equals:
            variables[name.decode("utf-8", "replace")] = re.sub(
                rb"\\(.)", rb"\1", value, flags=re.DOTALL
            ).decode("utf-8", "replace")
    return variables


def _line(text: bytes) -> tuple[bytes, bool, bytes]:
    escaped = False
    for index, byte in enumerate(text):
        if byte == 0x0A and not escaped:
            return text[:index], True, text[index + 1 :]
        escaped = byte == 0x5C and not escaped
    return text, False, b""


# What the blocks hold, by the names of their files; None where GRUB cannot read one.
Blocks = dict[str, dict[str, str] | None]


def grub(script: str, blocks: Blocks, loads: set[str], writes: bool = True) -> Start:
    """One start with GRUB: what `script` does if the blocks hold that, and GRUB can write or not."""
    held = {
        f"{file}:{name}": value
        for file, variables in blocks.items()
        for name, value in (variables or {}).items()
    }
    how = "written" if writes else "read"
    readable = {file: how for file, variables in blocks.items() if variables is not None}
    head = (
        GRUB.replace("__LOADS__", " ".join(sorted(loads)))
        .replace("__READABLE__", _table(readable))
        .replace("__BLOCK__", _table(held))
    )
    # Without a `boot` at its end GRUB shows its prompt and waits.
    slot, how, saved = _run(f"{head}{script}\nfinish end\n")
    after: Blocks = {file: None if v is None else dict(v) for file, v in blocks.items()}
    for name, value in saved.items():
        file, _, variable = name.partition(":")
        (after.get(file) or {})[variable] = value
    return Start(slot, how, after)


def _table(values: dict[str, str]) -> str:
    return " ".join(f"[{_quoted(name)}]={_quoted(value)}" for name, value in values.items())


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _run(text: str) -> tuple[str | None, str, dict[str, str]]:
    """The slot that boots, how the script ended, and the variables that it left."""
    with tempfile.TemporaryFile() as out:
        run = subprocess.run(
            ["/bin/bash", "--norc", "-c", f"exec 3>&{out.fileno()}\n{text}"],
            pass_fds=[out.fileno()],
            env={"PATH": "/nonexistent", "LC_ALL": "C"},
            capture_output=True,
            check=False,
            timeout=60,
        )
        out.seek(0)
        words = out.read().decode().split("\0")[:-1]
    if "unknown" in words:
        raise NotRun(f"the boot script calls {words[words.index('unknown') + 1]}")
    saved: dict[str, str] = {}
    while len(words) > 2 and words[0] == "env":
        saved[words[1]] = words[2]
        words = words[3:]
    match words:
        case ["boot", slot]:
            return slot, "boot", saved
        case ["reboot" | "halt" | "end" as how] if not run.returncode:
            return None, how, saved
    raise NotRun(f"the boot script failed: {run.stderr.decode().strip()}")


def starts(
    script: Path, blocks: Blocks, loads: set[str], most: int = 8, writes: bool = True
) -> list[str | None]:
    """The slots of so many starts one after the other, if what boots never does anything."""
    text = script.read_text()
    found = []
    for _ in range(most):
        start = grub(text, blocks, loads, writes)
        found.append(start.slot)
        blocks = start.environment
    return found
