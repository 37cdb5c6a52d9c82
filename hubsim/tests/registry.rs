//! The identity registry and queries, as a service SDK calls them.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use serde_json::{Value, json};
use support::{DEVICE, Device, Service, connect_options, hub};

#[tokio::test]
async fn devices_are_created_read_changed_and_deleted() {
    let hub = hub().await;
    let service = Service::of(&hub);
    let created = service.put("/devices/pump-01", r#"{"deviceId":"pump-01"}"#).await;
    assert_eq!(created.status, 200);
    let device = created.json();
    assert_eq!(device["authentication"]["type"], "sas");
    for key in ["primaryKey", "secondaryKey"] {
        assert_eq!(device["authentication"]["symmetricKey"][key].as_str().unwrap().len(), 44);
    }
    assert_eq!(
        (&device["status"], &device["connectionState"]),
        (&json!("enabled"), &json!("Disconnected"))
    );
    assert_eq!(service.get("/devices/pump-01").await.json(), device);

    let again = service.put("/devices/pump-01", "{}").await;
    assert_eq!((again.status, again.header("iothub-errorcode")), (409, "DeviceAlreadyExists"));

    let key = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
    let change = json!({
        "deviceId": "pump-01",
        "status": "disabled",
        "authentication": { "symmetricKey": { "primaryKey": key } },
    });
    let tag = format!("\"{}\"", device["etag"].as_str().unwrap());
    let changed =
        service.send("PUT", "/devices/pump-01", &[("If-Match", &tag)], &change.to_string()).await;
    assert_eq!(changed.status, 200, "{}", changed.text);
    let keys = &changed.json()["authentication"]["symmetricKey"];
    assert_eq!(keys["primaryKey"], key);
    assert_eq!(keys["secondaryKey"], device["authentication"]["symmetricKey"]["secondaryKey"]);
    assert_eq!(changed.json()["generationId"], device["generationId"]);

    for method in ["PUT", "DELETE"] {
        let stale = service.send(method, "/devices/pump-01", &[("If-Match", &tag)], "{}").await;
        assert_eq!((stale.status, stale.header("iothub-errorcode")), (412, "PreconditionFailed"));
    }
    let gone = service.send("DELETE", "/devices/pump-01", &[("If-Match", "*")], "").await;
    assert_eq!((gone.status, gone.text.as_str()), (204, ""));
    assert_eq!(service.get("/devices/pump-01").await.status, 404);
    assert_eq!(service.get("/twins/pump-01").await.status, 404);
    let missing = service.send("PUT", "/devices/pump-01", &[("If-Match", "*")], "{}").await;
    assert_eq!((missing.status, missing.header("iothub-errorcode")), (404, "DeviceNotFound"));

    let reborn = service.put("/devices/pump-01", "{}").await.json();
    assert_ne!(reborn["generationId"], device["generationId"]);
}

#[tokio::test]
async fn bad_entries_are_refused() {
    let hub = hub().await;
    let service = Service::of(&hub);
    let too_long = format!("/devices/{}", "x".repeat(129));
    for (path, body) in [
        ("/devices/a", r#"{"deviceId":"b"}"#),
        ("/devices/a", "[]"),
        ("/devices/a", "{"),
        ("/devices/a", r#"{"status":"asleep"}"#),
        ("/devices/a", r#"{"authentication":{"type":"magic"}}"#),
        ("/devices/a", r#"{"authentication":{"symmetricKey":{"primaryKey":"short"}}}"#),
        (
            "/devices/a",
            r#"{"authentication":{"type":"selfSigned","x509Thumbprint":{"primaryThumbprint":"12"}}}"#,
        ),
        ("/devices/a%20b", "{}"),
        ("/devices/%C3%A4", "{}"),
        (&too_long, "{}"),
    ] {
        let answer = service.put(path, body).await;
        assert_eq!(
            (answer.status, answer.header("iothub-errorcode")),
            (400, "ArgumentInvalid"),
            "{path} {body}"
        );
    }
    assert_eq!(service.get("/devices/a").await.status, 404);
    // All characters that an id may have, escaped in the path.
    let odd = "/devices/a-%3A.%2B%25_%23*%3F!()%2C%3D%40%3B$'";
    assert_eq!(service.put(odd, "{}").await.json()["deviceId"], "a-:.+%_#*?!(),=@;$'");
}

#[tokio::test]
async fn lists_statistics_and_modules() {
    let hub = hub().await;
    let service = Service::of(&hub);
    hub.add_device("pi-2").unwrap();
    hub.add_device("pi-3").unwrap();
    hub.set_enabled("pi-3", false).unwrap();
    let _device = Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
    assert_eq!(
        service.get("/statistics/devices").await.json(),
        json!({ "totalDeviceCount": 3, "enabledDeviceCount": 2, "disabledDeviceCount": 1 })
    );
    assert_eq!(
        service.get("/statistics/service").await.json(),
        json!({ "connectedDeviceCount": 1 })
    );

    assert_eq!(service.put("/devices/nobody/modules/agent", "{}").await.status, 404);
    let module = service.put("/devices/pi-1/modules/agent", "{}").await;
    assert_eq!((module.status, &module.json()["moduleId"]), (200, &json!("agent")));
    assert_eq!(service.get("/twins/pi-1/modules/agent").await.json()["moduleId"], "agent");
    assert_eq!(service.get("/devices/pi-1/modules").await.json().as_array().unwrap().len(), 1);
    let missing = service.get("/devices/pi-1/modules/other").await;
    assert_eq!((missing.status, missing.header("iothub-errorcode")), (404, "ModuleNotFound"));

    let ids = |list: Value| -> Vec<String> {
        let devices = list.as_array().unwrap().clone();
        devices.iter().map(|device| device["deviceId"].as_str().unwrap().to_owned()).collect()
    };
    for path in ["/devices", "/devices/"] {
        assert_eq!(ids(service.get(path).await.json()), ["pi-1", "pi-2", "pi-3"]);
    }
    // Deleting a device takes its modules along.
    service.send("DELETE", "/devices/pi-1", &[("If-Match", "*")], "").await;
    assert_eq!(service.get("/twins/pi-1/modules/agent").await.status, 404);
}

#[tokio::test]
async fn bulk_import_does_what_it_can_and_lists_the_rest() {
    let hub = hub().await;
    let service = Service::of(&hub);
    let body = json!([
        { "id": "new", "importMode": "create" },
        { "id": "pi-1", "importMode": "create" },
        { "id": "pi-1", "importMode": "update", "status": "disabled" },
        { "id": "gone", "importMode": "delete" },
        { "id": "both", "importMode": "createOrUpdate" },
        { "id": "both", "importMode": "updateIfMatchETag", "etag": "stale" },
        { "id": "x", "importMode": "wish" },
    ]);
    let answer = service.post("/devices", &body.to_string()).await;
    assert_eq!(answer.status, 400);
    let failed: Vec<_> = answer.json()["errors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|error| {
            (error["deviceId"].as_str().unwrap().to_owned(), error["errorCode"].as_u64().unwrap())
        })
        .collect();
    let expected = [("pi-1", 409_001), ("gone", 404_001), ("both", 412_001), ("x", 400_004)];
    assert_eq!(failed, expected.map(|(id, code)| (id.to_owned(), code)));
    assert_eq!(service.get("/devices/pi-1").await.json()["status"], "disabled");
    assert_eq!(service.get("/devices/new").await.status, 200);
    let good = service.post("/devices/", r#"[{"id":"fine","importMode":"create"}]"#).await;
    assert_eq!((good.status, &good.json()["isSuccessful"]), (200, &json!(true)));
}

#[tokio::test]
async fn queries_come_in_pages() {
    let hub = hub().await;
    let service = Service::of(&hub);
    for n in 2..=7 {
        hub.add_device(&format!("pi-{n}")).unwrap();
        hub.patch_twin(&format!("pi-{n}"), json!({ "tags": { "n": n } })).unwrap();
    }
    let body = json!({ "query": "SELECT * FROM devices WHERE tags.n >= 3" }).to_string();
    let mut seen = Vec::new();
    let mut continuation = String::new();
    let mut pages = 0;
    loop {
        let headers = [("x-ms-max-item-count", "2"), ("x-ms-continuation", continuation.as_str())];
        let answer = service.send("POST", "/devices/query", &headers, &body).await;
        assert_eq!((answer.status, answer.header("x-ms-item-type")), (200, "Twin"));
        pages += 1;
        let page = answer.json();
        assert!(page.as_array().unwrap().len() <= 2);
        seen.extend(
            page.as_array().unwrap().iter().map(|twin| twin["tags"]["n"].as_u64().unwrap()),
        );
        continuation = answer.header("x-ms-continuation").to_owned();
        if continuation.is_empty() {
            break;
        }
    }
    assert_eq!((pages, seen), (3, vec![3, 4, 5, 6, 7]));

    hub.add_device("pi-1/agent").unwrap();
    let body = json!({ "query": "SELECT * FROM devices.modules" }).to_string();
    let modules = service.post("/devices/query", &body).await.json();
    assert_eq!(modules.as_array().unwrap().len(), 1);
    for body in ["{}", r#"{"query":"SELECT"}"#, r#"{"query":"DROP TABLE devices"}"#] {
        let answer = service.post("/devices/query", body).await;
        assert_eq!(
            (answer.status, answer.header("iothub-errorcode")),
            (400, "ArgumentInvalid"),
            "{body}"
        );
    }
}

#[tokio::test]
async fn the_page_and_its_document_need_no_token_and_hold_no_key() {
    let hub = hub().await;
    let mut service = Service::of(&hub);
    service.token = String::new();
    let mut device = Device::ready(&hub).await;
    device.publish("devices/pi-1/messages/events/", "hello").await;
    device.report(r#"{"phase":"idle"}"#).await;
    let view = service.get("/api/view").await;
    let entry = &view.json()[0];
    assert_eq!(entry["deviceId"], DEVICE);
    assert_eq!(entry["connectionState"], "Connected");
    assert_eq!(entry["telemetryCount"], 1);
    assert_ne!(entry["lastActivityTime"], "0001-01-01T00:00:00Z");
    assert_eq!(entry["twin"]["properties"]["reported"]["phase"], "idle");
    assert!(!view.text.contains(&support::device_key(&hub, DEVICE)));
    let page = service.get("/").await;
    assert_eq!((page.status, page.header("content-type")), (200, "text/html; charset=utf-8"));
    assert!(page.text.contains("/api/view"));
    assert_eq!(service.get("/twins/pi-1").await.status, 401);
    assert_eq!(service.get("/no/such/thing").await.status, 404);
}
