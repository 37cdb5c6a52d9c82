"""A device that does what the checks ask of it by methods, built on azure-iot-device.

Its environment: HUB_CA (path), DEVICE_TRANSPORT (mqtt or websocket), and either DEVICE_CONNECTION
(a connection string) or HUB_HOST, DEVICE_ID, DEVICE_CERT and DEVICE_KEY (paths). TOKEN_SECONDS is
the life of its tokens; the SDK renews 120 s before their end. device.js is the same device.
"""

import json
import os
import queue
import sys

from azure.iot.device import IoTHubDeviceClient, Message, MethodResponse, X509


def connect():
    with open(os.environ["HUB_CA"], encoding="ascii") as file:
        ca = file.read()
    options = {
        "server_verification_cert": ca,
        "websockets": os.environ["DEVICE_TRANSPORT"] == "websocket",
        "connection_retry_interval": 1,
    }
    if "DEVICE_CONNECTION" in os.environ:
        if "TOKEN_SECONDS" in os.environ:
            options["sastoken_ttl"] = int(os.environ["TOKEN_SECONDS"])
        return IoTHubDeviceClient.create_from_connection_string(
            os.environ["DEVICE_CONNECTION"], **options
        )
    return IoTHubDeviceClient.create_from_x509_certificate(
        x509=X509(os.environ["DEVICE_CERT"], os.environ["DEVICE_KEY"]),
        hostname=os.environ["HUB_HOST"],
        device_id=os.environ["DEVICE_ID"],
        **options,
    )


client = connect()
finished = queue.Queue()


def answer(request):
    """The status and payload for a method; None for no answer at all."""
    payload = request.payload
    if request.name == "echo":
        return 200, {"echo": payload}
    if request.name == "refuse":
        return 418, {"why": "asked to"}
    if request.name == "silent":
        return None
    if request.name == "readTwin":
        return 200, client.get_twin()
    if request.name == "report":
        try:
            client.patch_twin_reported_properties(payload)
        except Exception as error:  # The checks want to know how the SDK tells it.
            return 500, {"error": repr(error)}
        return 200, {"ok": True}
    if request.name == "send":
        message = Message(json.dumps(payload), content_type="application/json", content_encoding="utf-8")
        message.custom_properties["a key"] = "a value / with signs & more"
        client.send_message(message)
        return 200, {"ok": True}
    if request.name == "quit":
        finished.put(True)
        return 200, {"ok": True}
    return 404, {"error": "no such method"}


def on_method(request):
    print("method", request.name, json.dumps(request.payload)[:200], flush=True)
    answered = answer(request)
    if answered is not None:
        client.send_method_response(MethodResponse.create_from_method_request(request, *answered))


def on_patch(patch):
    print("desired", json.dumps(patch), flush=True)
    client.patch_twin_reported_properties({"lastPatch": json.dumps(patch)})


client.connect()
client.on_background_exception = lambda error: print("background", repr(error), flush=True)
client.on_connection_state_change = lambda: print("connected:", client.connected, flush=True)
client.on_method_request_received = on_method
client.on_twin_desired_properties_patch_received = on_patch
twin = client.get_twin()
client.patch_twin_reported_properties({"ready": {"desiredVersion": twin["desired"]["$version"]}})
finished.get()
client.shutdown()
sys.exit(0)
