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

# `loads` names the slots whose kernel can be read. Everything that a script may call is here: an
# unknown command ends the run with an error, so that the oracle never guesses.
GRUB = r"""
shopt -s expand_aliases
env_ok=__ENV_OK__
loads=" __LOADS__ "
declare -A block=( __BLOCK__ )
result() { builtin printf '%s\0' "$@" >&3; }
save_all() { for name in "${!block[@]}"; do result "env" "$name" "${block[$name]}"; done; }
set() {
    for word; do
        case $word in *=*) declare -g "${word%%=*}=${word#*=}" ;; esac
    done
}
unset() { for name; do declare -g "$name="; done; }
load_env() {
    [ "$env_ok" = 1 ] || return 1
    for name in "${!block[@]}"; do declare -g "$name=${block[$name]}"; done
}
save_env() {
    while [ "${1:0:1}" = - ]; do case $1 in -f | --file) shift 2 ;; *) shift ;; esac; done
    # GRUB refuses to write into what is no block.
    [ "$env_ok" = 1 ] || return 1
    for name; do block[$name]=${!name}; done
}
linux() {
    slot=
    for word; do case $word in rauc.slot=* | twinboot.slot=*) slot=${word#*=} ;; esac; done
    case $loads in *" $slot "*) loaded=$slot ;; *) return 1 ;; esac
}
initrd() { [ -n "$loaded" ]; }
boot() { [ -n "$loaded" ] || return 1; save_all; result boot "$loaded"; exit 0; }
reboot() { save_all; result reboot; exit 0; }
halt() { result halt; exit 0; }
search() {
    variable=root
    for word; do
        case $word in --set=*) variable=${word#--set=} ;; esac
    done
    declare -g "$variable=hd0,${!#}"
}
nothing() { :; }
for name in insmod serial terminal_input terminal_output terminal sleep echo probe configfile; do
    alias $name=nothing
done
prefix='(hd0,gpt1)/grub' root=hd0,gpt1 cmdpath= grub_platform=pc grub_cpu=i386
command_not_found_handle() { result unknown "$1"; exit 9; }
"""


class NotRun(Exception):
    """The script uses something that the oracle does not know."""


@dataclass(frozen=True)
class Start:
    """What one start of the machine does."""

    # The slot that boots; None: the machine resets at once, or stops.
    slot: str | None
    # What the boot loader says if it is no slot: `reboot`, `end`.
    how: str
    # The environment afterwards.
    environment: dict[str, str]


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


def grub(script: str, environment: dict[str, str] | None, loads: set[str]) -> Start:
    """One start with GRUB: what `script` does if the block holds `environment`."""
    block = environment or {}
    head = (
        GRUB.replace("__ENV_OK__", "0" if environment is None else "1")
        .replace("__LOADS__", " ".join(sorted(loads)))
        .replace("__BLOCK__", " ".join(f"[{_quoted(n)}]={_quoted(v)}" for n, v in block.items()))
    )
    # Without a `boot` at its end GRUB boots what was loaded when a menu entry ends; outside one it
    # shows its prompt and waits.
    return _run(f"{head}{script}\nsave_all\nresult end\n", block)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _run(text: str, before: dict[str, str]) -> Start:
    with tempfile.TemporaryFile() as out:
        run = subprocess.run(
            ["bash", "--norc", "-c", f"exec 3>&{out.fileno()}\n{text}"],
            pass_fds=[out.fileno()],
            env={"PATH": "/nonexistent", "LC_ALL": "C"},
            capture_output=True,
            check=False,
            timeout=60,
        )
        out.seek(0)
        words = out.read().decode().split("\0")[:-1]
    environment, slot, how = dict(before), None, ""
    at = 0
    while at < len(words):
        match words[at]:
            case "env":
                environment[words[at + 1]] = words[at + 2]
                at += 3
            case "boot":
                slot, how = words[at + 1], "boot"
                at += 2
            case "unknown":
                raise NotRun(f"the boot script calls {words[at + 1]}")
            case word:
                how = how or word
                at += 1
    if run.returncode or not how:
        raise NotRun(f"the boot script failed: {run.stderr.decode().strip()}")
    return Start(slot, how, environment)


def starts(
    script: Path, environment: dict[str, str] | None, loads: set[str], most: int = 6
) -> list[Start]:
    """So many starts one after the other, as if what boots never did anything."""
    text = script.read_text()
    found = []
    for _ in range(most):
        start = grub(text, environment, loads)
        found.append(start)
        # What could not be read still cannot be read: GRUB writes into a valid block only.
        environment = None if environment is None else start.environment
    return found

