"""The saved state as the agent would load it (src/store.rs), and what it says (src/update/state.rs)."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any


class NotUnderstood(Exception):
    """The agent would set the file aside and begin anew."""


@dataclass(frozen=True)
class Saved:
    """A state that the agent would load."""

    text: bytes
    content: dict[str, Any]

    @staticmethod
    def load(text: bytes) -> "Saved":
        """Checks what the agent checks: it is JSON, whole, and carries its own digest."""
        try:
            wrapper = json.loads(text)
            content, digest = wrapper["saved"], wrapper["sha256"]
            raw = text[text.index(b'"saved":') + len(b'"saved":') : text.rindex(b"}")]
        except (ValueError, KeyError, TypeError) as error:
            raise NotUnderstood(f"the state file is not a saved state: {error!r}") from error
        found = f"sha256:{hashlib.sha256(raw).hexdigest()}"
        if found != digest:
            raise NotUnderstood(f"the state file has {found}, but says {digest}")
        return Saved(text, content)

    @property
    def kind(self) -> str:
        """`idle`, `fetching`, `verifying`, `switching`, `trial` or `rollingBack`."""
        state = self.content["state"]
        return state if isinstance(state, str) else next(iter(state))

    @property
    def inner(self) -> dict[str, Any]:
        """The members of the present state."""
        state = self.content["state"]
        return {} if isinstance(state, str) else next(iter(state.values()))

    @property
    def run(self) -> dict[str, Any] | None:
        """The update under way, or else the last one."""
        if "run" in self.inner:
            return self.inner["run"]
        last = self.content.get("last")
        return last.get("run") if last else None

    @property
    def home(self) -> str | None:
        """The slot last known good."""
        return self.content.get("home")

    @property
    def outcome(self) -> str | None:
        """How the last update ended: `succeeded`, `failed`, `rolledBack`, `upToDate`."""
        last = self.content.get("last")
        if not last:
            return None
        kind = last["kind"]
        return kind if isinstance(kind, str) else next(iter(kind))

    @property
    def failure(self) -> str | None:
        """The name of the failure that the last update ended with."""
        last = self.content.get("last")
        if not last or isinstance(last["kind"], str):
            return None
        return next(iter(last["kind"].values()))["kind"]

    def __str__(self) -> str:
        flags = [name for name in ("armed", "healthy", "began") if self.inner.get(name)]
        ended = f", last {self.outcome}" if self.outcome else ""
        return f"{self.kind}{' ' + ' '.join(flags) if flags else ''}{ended}, home {self.home}"


def other(slot: str) -> str:
    """The slot that a slot is not."""
    return "B" if slot == "A" else "A"


def lies(saved: Saved, chosen: str) -> list[str]:
    """What the state says that is not so, if the machine starts now and takes slot `chosen`."""
    run = saved.run
    origin = run["from"] if run else saved.home
    wrong = []
    match saved.kind:
        case "idle" if saved.outcome == "succeeded" and run:
            if chosen != other(origin):
                wrong.append(f"an update to {other(origin)} is told to have succeeded")
        case "idle" if saved.outcome in ("failed", "rolledBack") and run:
            # A machine that is stuck in the new slot says so, and stays there.
            if chosen != origin and saved.failure != "stuck":
                wrong.append(f"an update from {origin} is told to have {saved.outcome}")
        case "idle":
            if saved.home not in (None, chosen):
                wrong.append(f"slot {saved.home} is told to be good, and nothing to go on")
        case "fetching" | "verifying":
            if chosen != origin:
                wrong.append(f"slot {other(origin)} is being written")
        case "switching" | "trial" | "rollingBack":
            # On the way: the new slot or the old one, and the agent goes on from either.
            pass
        case kind:
            wrong.append(f"state {kind} is not known to the oracle")
    return [f"{what}, but slot {chosen} boots ({saved})" for what in wrong]
