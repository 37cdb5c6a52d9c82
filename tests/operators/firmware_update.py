"""An operator's program as Microsoft's Python tutorial had it: calls the method firmwareUpdate and
then looks for pieces of text in the twin, "firmwareStatus":"standBy" and so on, without a space.

    IOTHUB_CONNECTION='HostName=...' firmware_update.py --device ID --uri URI --ca FILE

Needs Python alone. As the original does, it hands the URI over as it is, and ends at once if it
still reads an old "completed". Prints each new state; ends with 0 after completed, 2 if the method
was refused, 3 when the time is over.
"""

import argparse
import base64
import hashlib
import hmac
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

API = "api-version=2021-04-12"
STATES = ["standBy", "downloading", "applying", "completed"]


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--uri", required=True)
    parser.add_argument("--ca", required=True, help="PEM file with the hub's CA")
    parser.add_argument("--port", type=int, default=443, help="the hub's HTTPS port")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between two looks")
    parser.add_argument("--limit", type=float, default=600, help="seconds until it gives up")
    return parser.parse_args()


class Hub:
    """The service side of an IoT Hub."""

    def __init__(self, connection, port, ca):
        fields = dict(part.split("=", 1) for part in connection.split(";"))
        self.host = fields["HostName"]
        self.port = port
        self.policy = fields["SharedAccessKeyName"]
        self.key = base64.b64decode(fields["SharedAccessKey"])
        self.tls = ssl.create_default_context(cafile=ca)

    def token(self):
        resource = urllib.parse.quote_plus(self.host)
        expiry = int(time.time()) + 3600
        mac = hmac.new(self.key, f"{resource}\n{expiry}".encode(), hashlib.sha256).digest()
        signature = urllib.parse.quote_plus(base64.b64encode(mac))
        return f"SharedAccessSignature sr={resource}&sig={signature}&se={expiry}&skn={self.policy}"

    def ask(self, path, body=None):
        """The answer's text."""
        request = urllib.request.Request(
            f"https://{self.host}:{self.port}{path}?{API}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": self.token(), "Content-Type": "application/json; charset=utf-8"},
        )
        with urllib.request.urlopen(request, timeout=90, context=self.tls) as answer:
            return answer.read().decode()


def main():
    args = arguments()
    hub = Hub(os.environ["IOTHUB_CONNECTION"], args.port, args.ca)
    twin_path = f"/twins/{urllib.parse.quote(args.device)}"
    call = {"methodName": "firmwareUpdate", "payload": args.uri, "responseTimeoutInSeconds": 60}
    try:
        answer = json.loads(hub.ask(f"{twin_path}/methods", call))
    except urllib.error.HTTPError as error:
        print("firmwareUpdate failed:", error, error.read().decode(), file=sys.stderr)
        return 2
    print("answer", json.dumps(answer), flush=True)
    if answer["status"] >= 300:
        return 2

    last = None
    end = time.monotonic() + args.limit
    while time.monotonic() < end:
        twin = hub.ask(twin_path)
        state = next((s for s in STATES if f'"firmwareStatus":"{s}"' in twin), "unknown")
        if state != last:
            print("state", state, flush=True)
        last = state
        if state == "completed":
            return 0
        time.sleep(args.interval)
    print(f"no end within {args.limit} s", file=sys.stderr)
    return 3


sys.exit(main())
