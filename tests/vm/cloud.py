"""The cloud of the machines: hubsim as IoT Hub, nginx with the images, and the operator's calls."""

import base64
import hashlib
import hmac
import json
import os
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from process import REPOSITORY, RigError, run, spawn

HUBSIM = REPOSITORY / "target/debug/hubsim"
NGINX_TEMPLATE = REPOSITORY / "tests/https/nginx.conf.in"
DEVICE = "vm-1"
API = "api-version=2021-04-12"
# As the guest knows them: names in its /etc/hosts for an address that leads to two ports of ours.
IMAGES_NAME = "images.example.net"
GUEST_ADDRESS = "10.0.2.100"
MQTT_PORT, IMAGES_PORT = 8883, 8443
START_LIMIT_S = 30
CALL_LIMIT_S = 60
# The hub waits for the device to connect, and then for its answer.
ANSWER_LIMIT_S = 2 * CALL_LIMIT_S + 30


class HubError(RigError):
    """The hub refuses what was asked for."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


class Cloud:
    """A running hub and image server, for one device. They end with the `with` block."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.events = []
        self._news = threading.Condition()
        self._servers = []
        try:
            self._start_hub()
            self._start_images()
        except BaseException:
            self.end()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()

    def end(self) -> None:
        """Ends both servers."""
        for server in self._servers:
            server.terminate()
        for server in self._servers:
            server.wait()
        self._servers = []

    # The hub

    def _start_hub(self) -> None:
        if not HUBSIM.exists():
            raise RigError(f"{HUBSIM} is not there: run `python3 tests/vm build`")
        log = open(self.folder / "hubsim.log", "ab")
        hub = spawn([HUBSIM, "--device", DEVICE, "--state", self.folder / "hub", "--mqtt-port", 0,
                     "--https-port", 0, "--admin-port", 0, "--log", "json"],
                    stdout=subprocess.PIPE, stderr=log)
        self._servers.append(hub)
        first = hub.stdout.readline()
        if not first:
            raise RigError(f"hubsim does not start: see {log.name}")
        started = json.loads(first)
        self.connection_string = started["devices"][DEVICE]
        self.hub_ca = Path(started["ca"])
        self._mqtt_port = int(started["mqtt"].rsplit(":", 1)[1])
        self.https_port = int(started["https"].rsplit(":", 1)[1])
        self.admin_port = int(started["admin"].rsplit(":", 1)[1])
        self._service = dict(part.split("=", 1) for part in started["service"].split(";"))
        self._tls = ssl.create_default_context(cafile=self.hub_ca)
        threading.Thread(target=self._read_events, args=(hub,), daemon=True).start()

    def _read_events(self, hub) -> None:
        with open(self.folder / "events.json", "ab") as log:
            for line in hub.stdout:
                log.write(line)
                log.flush()
                with self._news:
                    self.events.append(json.loads(line))
                    self._news.notify_all()

    def _token(self) -> str:
        """A service token, <https://learn.microsoft.com/azure/iot-hub/authenticate-authorize-sas>."""
        resource = urllib.parse.quote_plus(self._service["HostName"])
        expiry = int(time.time()) + 3600
        key = base64.b64decode(self._service["SharedAccessKey"])
        digest = hmac.new(key, f"{resource}\n{expiry}".encode(), hashlib.sha256).digest()
        signature = urllib.parse.quote_plus(base64.b64encode(digest))
        name = self._service["SharedAccessKeyName"]
        return f"SharedAccessSignature sr={resource}&sig={signature}&se={expiry}&skn={name}"

    def _ask(self, method: str, path: str, body: dict | None = None) -> dict:
        request = urllib.request.Request(
            f"https://localhost:{self.https_port}/{path}?{API}", method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": self._token(), "Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, context=self._tls, timeout=ANSWER_LIMIT_S) as got:
                return json.load(got)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise HubError(error.code, f"the hub answers {error.code} to {method} {path}: {text}") from error
        except OSError as error:
            raise RigError(f"the hub does not answer to {method} {path}: {error}") from error

    def call(self, method: str, payload) -> tuple[int, dict]:
        """Calls a direct method; waits for the device to connect, too."""
        answer = self._ask("POST", f"twins/{DEVICE}/methods", {
            "methodName": method, "payload": payload,
            "connectTimeoutInSeconds": CALL_LIMIT_S, "responseTimeoutInSeconds": CALL_LIMIT_S})
        return answer["status"], answer["payload"]

    def wait_event(self, kind: str, since: int, limit: float, alive=lambda: True) -> None:
        """Waits until the hub has seen an event of this kind, after the first `since` events."""
        deadline = time.monotonic() + limit
        with self._news:
            while not any(event["event"] == kind for event in self.events[since:]):
                if (left := deadline - time.monotonic()) <= 0 or not alive():
                    why = "the machine is off" if left > 0 else f"not within {limit:.0f} s"
                    raise RigError(f"{why}: {kind} of {DEVICE}")
                self._news.wait(min(left, 2))

    def desire(self, desired: dict) -> None:
        """Patches the desired section of the twin."""
        self._ask("PATCH", f"twins/{DEVICE}", {"properties": {"desired": desired}})

    def reported(self) -> dict:
        """The reported section of the twin."""
        return self._ask("GET", f"twins/{DEVICE}")["properties"]["reported"]

    def wait_twin(self, predicate, limit: float, what: str, alive=lambda: True) -> dict:
        """Waits until `predicate` holds for the reported section, and returns that. `what` says in
        words what is waited for. Ends early with an error if `alive()` does not hold any more."""
        deadline = time.monotonic() + limit
        while True:
            with self._news:
                known = len(self.events)
            reported = self.reported()
            if predicate(reported):
                return reported
            with self._news:
                while not any(event["event"] == "reported" for event in self.events[known:]):
                    if (left := deadline - time.monotonic()) <= 0 or not alive():
                        why = "the machine is off" if left > 0 else f"not within {limit:.0f} s"
                        shown = json.dumps(reported.get("twinboot"), indent=1)
                        raise RigError(f"{why}: {what}. The twin is:\n{shown}")
                    known = len(self.events)
                    self._news.wait(min(left, 2))

    # The images

    def _start_images(self) -> None:
        self._root = self.folder / "images"
        self._root.mkdir(exist_ok=True)
        self._nginx = self.folder / "nginx"
        self._nginx.mkdir(exist_ok=True)
        _certificates(self._nginx)
        self.images_ca = self._nginx / "ca.pem"
        # nginx cannot be told to take any port: one is reserved and given free again, and somebody
        # may be quicker.
        for _ in range(5):
            if self._nginx_listens():
                return
        raise RigError(f"nginx does not start: {(self._nginx / 'nginx.log').read_text()}")

    def _nginx_listens(self) -> bool:
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))
            self._images_port = reserved.getsockname()[1]
        text = NGINX_TEMPLATE.read_text()
        for name, value in {
            "RUN": self._nginx, "ROOT": self._root, "LISTEN": f"127.0.0.1:{self._images_port}",
            "SERVER_NAME": IMAGES_NAME, "CERTIFICATE": self._nginx / "server.pem",
            "KEY": self._nginx / "server.key",
        }.items():
            text = text.replace(f"@{name}@", str(value))
        (self._nginx / "nginx.conf").write_text(text)
        pid = self._nginx / "nginx.pid"
        pid.unlink(missing_ok=True)
        with open(self._nginx / "nginx.log", "wb") as log:
            server = spawn(["nginx", "-e", "stderr", "-p", self._nginx,
                            "-c", self._nginx / "nginx.conf"], stdout=log, stderr=log)
        deadline = time.monotonic() + START_LIMIT_S
        while server.poll() is None and time.monotonic() < deadline:
            # It writes the file once it listens, and there is nothing else to wait for.
            if pid.exists() and pid.read_text().strip():
                self._servers.append(server)
                return True
            time.sleep(0.02)
        server.kill()
        server.wait()
        return False

    def publish(self, image: Path, name: str) -> str:
        """Serves a file under `name`, with its digest beside it; returns the URL for the guest."""
        link = self._root / name
        link.unlink(missing_ok=True)
        link.symlink_to(image)
        with open(image, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        (self._root / f"{name}.sha256").write_text(f"{digest}  {name}\n")
        return f"https://{IMAGES_NAME}:{IMAGES_PORT}/{name}"

    def transfers(self, name: str) -> list[dict]:
        """The responses that served the file so far."""
        log = self._nginx / "access.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [found for found in map(json.loads, lines) if found["path"] == f"/{name}"]

    # The machine's side

    def network(self) -> list[str]:
        """QEMU's arguments: the guest reaches these two ports of the host, and nothing else."""
        def forward(port: int, to: int) -> str:
            # One for each connection; the tether ends them with QEMU.
            program = f"setpriv --pdeathsig KILL socat - TCP:127.0.0.1:{to}"
            return f"guestfwd=tcp:{GUEST_ADDRESS}:{port}-cmd:{program}"
        forwards = [forward(MQTT_PORT, self._mqtt_port), forward(IMAGES_PORT, self._images_port)]
        return ["-netdev", ",".join(["user", "id=net", "restrict=on", *forwards]),
                "-device", "virtio-net-pci,netdev=net,id=nic,romfile="]

    def device_data(self) -> dict[str, bytes]:
        """What the device's data partition must hold to reach this cloud."""
        return {
            "twinboot/hub-credential": self.connection_string.encode(),
            "rig/hub-ca.pem": self.hub_ca.read_bytes(),
            "rig/images-ca.pem": self.images_ca.read_bytes(),
        }


def _certificates(folder: Path) -> None:
    """An authority in `ca.pem`, and its certificate for the image server in `server.pem`."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    ca = ["-CA", folder / "ca.pem", "-CAkey", folder / "ca.key"]
    run(["openssl", "req", "-x509", "-subj", "/CN=image server CA", *key,
         "-keyout", folder / "ca.key", "-out", folder / "ca.pem"])
    run(["openssl", "req", "-x509", "-subj", f"/CN={IMAGES_NAME}", *key, *ca,
         "-addext", f"subjectAltName=DNS:{IMAGES_NAME}",
         "-addext", "basicConstraints=critical,CA:FALSE",
         "-keyout", folder / "server.key", "-out", folder / "server.pem"])
