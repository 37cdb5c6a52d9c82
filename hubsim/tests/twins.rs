//! Twins: merge, versions, metadata, ETags, notifications, and everything that is refused.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use hubsim::{Hub, HubError};
use proptest::prelude::*;
use serde_json::{Value, json};
use support::{DEVICE, Device, Service, hub};

fn desired(hub: &Hub) -> Value {
    without_metadata(&hub.twin(DEVICE).unwrap()["properties"]["desired"])
}

fn without_metadata(section: &Value) -> Value {
    let mut section = section.clone();
    section.as_object_mut().unwrap().remove("$metadata");
    section
}

#[tokio::test]
async fn a_fresh_twin_has_the_hubs_form() {
    let hub = hub().await;
    let answer = Service::of(&hub).get("/twins/pi-1").await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), "application/json; charset=utf-8");
    let mut twin = answer.json();
    assert_eq!(answer.header("etag"), format!("\"{}\"", twin["etag"].as_str().unwrap()));
    assert_eq!(twin["etag"], "AAAAAAAAAAE=");
    for section in ["desired", "reported"] {
        let stamp = twin["properties"][section]["$metadata"]["$lastUpdated"].take();
        let stamp = stamp.as_str().unwrap().to_owned();
        assert_eq!(
            (stamp.len(), stamp.ends_with('Z')),
            ("2024-06-12T09:11:03.1234567Z".len(), true)
        );
    }
    twin["deviceEtag"].take();
    assert_eq!(
        twin,
        json!({
            "deviceId": "pi-1",
            "etag": "AAAAAAAAAAE=",
            "deviceEtag": null,
            "status": "enabled",
            "statusUpdateTime": "0001-01-01T00:00:00Z",
            "connectionState": "Disconnected",
            "lastActivityTime": "0001-01-01T00:00:00Z",
            "cloudToDeviceMessageCount": 0,
            "authenticationType": "sas",
            "x509Thumbprint": { "primaryThumbprint": null, "secondaryThumbprint": null },
            "modelId": "",
            "version": 2,
            "tags": {},
            "properties": {
                "desired": { "$metadata": { "$lastUpdated": null }, "$version": 1 },
                "reported": { "$metadata": { "$lastUpdated": null }, "$version": 1 },
            },
            "capabilities": { "iotEdge": false },
        })
    );
    let unknown = Service::of(&hub).get("/twins/nobody").await;
    assert_eq!((unknown.status, unknown.header("iothub-errorcode")), (404, "DeviceNotFound"));
    assert!(unknown.json()["Message"].as_str().unwrap().starts_with("ErrorCode:DeviceNotFound;"));
}

#[tokio::test]
async fn desired_changes_are_told_as_they_were_sent() {
    let hub = hub().await;
    let service = Service::of(&hub);
    let mut device = Device::ready(&hub).await;
    for (method, body, told, content) in [
        (
            "PATCH",
            json!({ "a": 1, "o": { "x": 1, "y": [1, 2] } }),
            Some(json!({ "a": 1, "o": { "x": 1, "y": [1, 2] } })),
            json!({ "a": 1, "o": { "x": 1, "y": [1, 2] } }),
        ),
        // The same value again is told again.
        (
            "PATCH",
            json!({ "a": 1 }),
            Some(json!({ "a": 1 })),
            json!({ "a": 1, "o": { "x": 1, "y": [1, 2] } }),
        ),
        (
            "PATCH",
            json!({ "a": null, "o": { "y": [3] } }),
            Some(json!({ "a": null, "o": { "y": [3] } })),
            json!({ "o": { "x": 1, "y": [3] } }),
        ),
        // Deleting what is not there is not told.
        ("PATCH", json!({ "nothing": null }), None, json!({ "o": { "x": 1, "y": [3] } })),
        (
            "PATCH",
            json!({ "p": { "q": null } }),
            Some(json!({ "p": { "q": null } })),
            json!({ "o": { "x": 1, "y": [3] }, "p": {} }),
        ),
        ("PATCH", json!({ "o": 5 }), Some(json!({ "o": 5 })), json!({ "o": 5, "p": {} })),
        (
            "PATCH",
            json!({ "o": { "z": 1 } }),
            Some(json!({ "o": { "z": 1 } })),
            json!({ "o": { "z": 1 }, "p": {} }),
        ),
        // A replacement is told with nulls for what vanished, at every depth.
        (
            "PUT",
            json!({ "o": { "w": 2 }, "n": 1 }),
            Some(json!({ "o": { "z": null, "w": 2 }, "n": 1, "p": null })),
            json!({ "o": { "w": 2 }, "n": 1 }),
        ),
        ("PATCH", Value::Null, Some(json!({ "o": null, "n": null })), json!({})),
    ] {
        let before = desired(&hub)["$version"].as_u64().unwrap();
        let document = json!({ "properties": { "desired": body } }).to_string();
        let answer = service.send(method, "/twins/pi-1", &[], &document).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let version = before + u64::from(told.is_some());
        let mut expected = content;
        expected["$version"] = json!(version);
        assert_eq!(without_metadata(&answer.json()["properties"]["desired"]), expected, "{body}");
        if let Some(mut told) = told {
            let message = device.message().await;
            let topic = format!("$iothub/twin/PATCH/properties/desired/?$version={version}");
            assert_eq!(message.topic, topic);
            told["$version"] = json!(version);
            assert_eq!(serde_json::from_slice::<Value>(&message.payload).unwrap(), told);
        }
        // What the device reads agrees, and nothing else was told before this answer.
        assert_eq!(device.twin().await["desired"], expected);
    }
}

#[tokio::test]
async fn tags_are_the_services_own() {
    let hub = hub().await;
    let mut device = Device::ready(&hub).await;
    let tags = json!({ "tags": { "site": "north", "at": { "row": 1, "rack": 2 } } });
    hub.patch_twin(DEVICE, tags).unwrap();
    let twin = hub.patch_twin(DEVICE, json!({ "tags": { "at": { "row": null } } })).unwrap();
    assert_eq!(twin["tags"], json!({ "site": "north", "at": { "rack": 2 } }));
    assert_eq!(twin["etag"], "AAAAAAAAAAM=");
    let twin = hub.replace_twin(DEVICE, json!({ "tags": { "only": 1 } })).unwrap();
    assert_eq!(twin["tags"], json!({ "only": 1 }));
    // Not told to the device, not shown to it, and desired is as it was.
    assert_eq!(
        device.twin().await,
        json!({ "desired": {"$version": 1}, "reported": {"$version": 1} })
    );
}

#[tokio::test]
async fn a_whole_twin_sent_back_is_taken() {
    let hub = hub().await;
    hub.patch_desired(DEVICE, json!({ "a": 1 })).unwrap();
    let mut twin = hub.twin(DEVICE).unwrap();
    twin["properties"]["desired"]["a"] = json!(2);
    twin["properties"]["reported"]["b"] = json!("not the service's to write");
    let written = hub.replace_twin(DEVICE, twin).unwrap();
    assert_eq!(written["properties"]["desired"]["a"], 2);
    assert_eq!(written["properties"]["reported"]["b"], Value::Null);
}

#[tokio::test]
async fn etags_guard_writes_and_ignore_reports() {
    let hub = hub().await;
    let service = Service::of(&hub);
    let mut device = Device::ready(&hub).await;
    let patch = |n: u32| format!(r#"{{"properties":{{"desired":{{"n":{n}}}}}}}"#);
    let old = hub.twin(DEVICE).unwrap()["etag"].as_str().unwrap().to_owned();
    device.report(r#"{"r":1}"#).await;
    assert_eq!(hub.twin(DEVICE).unwrap()["etag"], old.as_str(), "reports do not move it");
    assert_eq!(hub.twin(DEVICE).unwrap()["version"], 3, "but they count");

    let quoted = format!("\"{old}\"");
    let answer = service.send("PATCH", "/twins/pi-1", &[("If-Match", &quoted)], &patch(1)).await;
    assert_eq!(answer.status, 200);
    for (stale, n) in [(quoted.as_str(), 2), (old.as_str(), 3), ("\"other\"", 4)] {
        for method in ["PATCH", "PUT"] {
            let answer =
                service.send(method, "/twins/pi-1", &[("If-Match", stale)], &patch(n)).await;
            assert_eq!(
                (answer.status, answer.header("iothub-errorcode")),
                (412, "PreconditionFailed")
            );
        }
        assert_eq!(desired(&hub), json!({ "n": 1, "$version": 2 }), "nothing was written");
    }
    let now = hub.twin(DEVICE).unwrap()["etag"].as_str().unwrap().to_owned();
    for (good, n) in [("*", 5), ("\"*\"", 6)] {
        let answer = service.send("PATCH", "/twins/pi-1", &[("If-Match", good)], &patch(n)).await;
        assert_eq!(answer.status, 200);
        assert_eq!(desired(&hub)["n"], n);
    }
    assert_ne!(hub.twin(DEVICE).unwrap()["etag"], now.as_str());
}

#[tokio::test]
async fn metadata_mirrors_the_tree() {
    let hub = hub().await;
    let mut device = Device::reporter(&hub).await;
    hub.patch_desired(DEVICE, json!({ "o": { "x": 1, "list": [{ "k": 1 }] }, "gone": 1 })).unwrap();
    hub.set_clock_offset(3600);
    let twin = hub.patch_desired(DEVICE, json!({ "o": { "x": 2 }, "gone": null })).unwrap();
    let metadata = &twin["properties"]["desired"]["$metadata"];
    let stamps = |value: &Value| {
        (value["$lastUpdated"].as_str().unwrap().to_owned(), value["$lastUpdatedVersion"].clone())
    };
    let (new, old) = (stamps(&metadata["o"]["x"]), stamps(&metadata["o"]["list"]));
    assert!(new.0 > old.0, "{metadata}");
    assert_eq!((&new.1, &old.1), (&json!(3), &json!(2)));
    assert_eq!(stamps(&metadata["o"]), new);
    assert_eq!(stamps(metadata), new);
    assert_eq!(metadata["gone"], Value::Null);
    assert_eq!(metadata["o"]["list"]["k"], Value::Null, "no metadata inside arrays");

    device.report(r#"{"state":{"phase":"idle"}}"#).await;
    let twin = hub.twin(DEVICE).unwrap();
    let metadata = &twin["properties"]["reported"]["$metadata"];
    assert!(metadata["state"]["phase"]["$lastUpdated"].is_string());
    assert_eq!(metadata["state"]["phase"]["$lastUpdatedVersion"], Value::Null);
}

/// Content that breaks a rule, one rule each.
fn forbidden() -> Vec<(&'static str, Value)> {
    let deep = |levels: usize| (0..levels).fold(json!(1), |inner, _| json!({ "d": inner }));
    let nested = |levels: usize| (0..levels).fold(json!(1), |inner, _| json!([inner]));
    let items: serde_json::Map<_, _> =
        (0..9).map(|n| (format!("k{n}"), json!("x".repeat(4000)))).collect();
    vec![
        ("$ in a key", json!({ "a$b": 1 })),
        ("$version", json!({ "deep": { "$version": 1 } })),
        (". in a key", json!({ "a.b": 1 })),
        ("space in a key", json!({ "a b": 1 })),
        ("# in a key", json!({ "a#": 1 })),
        ("control character in a key", json!({ "a\u{1}": 1 })),
        ("C1 control character in a key", json!({ "a\u{85}": 1 })),
        ("no-break space in a key", json!({ "a\u{a0}b": 1 })),
        ("empty key", json!({ "": 1 })),
        ("key in an array's object", json!({ "a": [{ "b.c": 1 }] })),
        ("key too long", json!({ "k".repeat(1025): 1 })),
        ("string too long", json!({ "a": "x".repeat(4097) })),
        ("string too long in an array", json!({ "a": ["x".repeat(4097)] })),
        ("integer too large", json!({ "a": 4_503_599_627_370_496_i64 })),
        ("integer too small", json!({ "a": -4_503_599_627_370_497_i64 })),
        ("integer over 64 bits", json!({ "a": u64::MAX })),
        ("null in an array", json!({ "a": [1, null] })),
        ("null in an object in an array", json!({ "a": [{ "b": null }] })),
        ("too deep", json!({ "d": deep(10).clone(), "e": deep(11) })),
        ("too deep by arrays", json!({ "a": nested(11) })),
        ("too large", Value::Object(items)),
    ]
}

/// Content at the edge of the rules.
fn allowed() -> Vec<(&'static str, Value)> {
    let deep = |levels: usize| (0..levels).fold(json!(1), |inner, _| json!({ "d": inner }));
    vec![
        ("nothing", json!({})),
        ("longest key", json!({ "k".repeat(1024): 1 })),
        ("longest string", json!({ "a": "x".repeat(4096) })),
        ("largest integer", json!({ "a": 4_503_599_627_370_495_i64 })),
        ("smallest integer", json!({ "a": -4_503_599_627_370_496_i64 })),
        ("a float of any size", json!({ "a": 1e300 })),
        ("arrays", json!({ "a": [1, "b", true, { "c": [1.5] }] })),
        ("null deletes", json!({ "a": null, "b": { "c": null } })),
        ("ten levels", json!({ "d": deep(10) })),
        ("other characters", json!({ "äß-_:/()": "\u{1}" })),
    ]
}

#[tokio::test]
async fn the_same_rules_hold_on_both_sides_and_nothing_is_half_applied() {
    let hub = hub().await;
    let service = Service::of(&hub);
    let mut device = Device::reporter(&hub).await;
    for (what, content) in allowed() {
        let (status, _, body) = device.report(&content.to_string()).await;
        assert_eq!((status, body.as_str()), (204, ""), "{what}");
        let document = json!({ "properties": { "desired": content } }).to_string();
        let answer = service.patch("/twins/pi-1", &document).await;
        assert_eq!(answer.status, 200, "{what}: {}", answer.text);
        hub.patch_desired(DEVICE, Value::Null).unwrap();
        let wipe: Value =
            content.as_object().unwrap().keys().map(|key| (key.clone(), Value::Null)).collect();
        assert_eq!(device.report(&wipe.to_string()).await.0, 204);
    }
    let (before_reported, before_desired) = (device.twin().await, desired(&hub));
    for (what, content) in forbidden() {
        let mut content = content;
        content["good"] = json!(1);
        let (status, _, body) = device.report(&content.to_string()).await;
        assert_eq!(status, 400, "{what}");
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["errorCode"], 400_004, "{what}");
        let document = json!({ "properties": { "desired": content } }).to_string();
        let answer = service.patch("/twins/pi-1", &document).await;
        assert_eq!(
            (answer.status, answer.header("iothub-errorcode")),
            (400, "ArgumentInvalid"),
            "{what}"
        );
        assert_eq!(device.twin().await, before_reported, "{what}");
        assert_eq!(desired(&hub), before_desired, "{what}");
    }
}

#[tokio::test]
async fn what_is_no_object_is_refused() {
    let hub = hub().await;
    let service = Service::of(&hub);
    let mut device = Device::ready(&hub).await;
    for body in ["", "[]", "1", "null", "{\"a\":1", "{a:1}", "{\"$version\":3,\"y\":1}", "\u{0}"] {
        let (status, _, answer) = device.report(body).await;
        assert_eq!(status, 400, "{body}");
        let answer: Value = serde_json::from_str(&answer).unwrap();
        for member in ["errorCode", "trackingId", "message", "timestampUtc"] {
            assert!(!answer[member].is_null(), "{member} after {body}");
        }
    }
    for body in [
        "[]",
        "{",
        r#"{"tags":1}"#,
        r#"{"properties":1}"#,
        r#"{"properties":{"desired":[]}}"#,
        r#"{"tags":{"a.b":1}}"#,
        r#"{"properties":{"desired":{"good":1}},"tags":{"a b":1}}"#,
    ] {
        let answer = service.patch("/twins/pi-1", body).await;
        assert_eq!(answer.status, 400, "{body}");
    }
    let big = json!({ "tags": { "a": "x".repeat(4096), "b": "x".repeat(4096) } }).to_string();
    assert_eq!(service.patch("/twins/pi-1", &big).await.status, 400, "tags over 8 KB");
    assert_eq!(
        device.twin().await,
        json!({ "desired": {"$version": 1}, "reported": {"$version": 1} })
    );
}

#[tokio::test]
async fn sizes_count_the_whole_section() {
    let hub = hub().await;
    let mut device = Device::ready(&hub).await;
    // 8 keys of 2 bytes with 4094 each: 32 KB to the byte.
    for n in 0..8 {
        let patch = json!({ format!("k{n}"): "x".repeat(4094) }).to_string();
        assert_eq!(device.report(&patch).await.0, 204, "{n}");
    }
    assert_eq!(device.report(r#"{"a":true}"#).await.0, 400, "over by five");
    assert_eq!(device.report(r#"{"k0":null,"a":true}"#).await.0, 204, "after making room");
    assert_eq!(hub.patch_desired(DEVICE, json!({ "a": 1 })).map(drop), Ok(()), "counted apart");
}

#[tokio::test]
async fn a_report_without_a_request_id_is_applied_and_not_answered() {
    let hub = hub().await;
    let mut device = Device::ready(&hub).await;
    device.publish("$iothub/twin/PATCH/properties/reported/", r#"{"a":1}"#).await;
    let twin = device.twin().await;
    assert_eq!(twin["reported"], json!({ "a": 1, "$version": 2 }));
}

#[tokio::test]
async fn an_answer_without_a_subscription_is_lost() {
    let hub = hub().await;
    let mut device = Device::connect(support::connect_options(&hub, DEVICE)).await.unwrap();
    device.publish("$iothub/twin/GET/?$rid=early", "").await;
    assert_eq!(device.subscribe(support::TWIN_RESPONSES, rumqttc::QoS::AtMostOnce).await, Some(0));
    // The next answer is the next question's.
    device.twin().await;
}

#[tokio::test]
async fn history_keeps_every_accepted_report() {
    let hub = hub().await;
    let mut device = Device::ready(&hub).await;
    for patch in [r#"{"a":1}"#, r#"{"$bad":1}"#, r#"{"a":null,"b":{"c":2}}"#] {
        device.report(patch).await;
    }
    let history = hub.reported_history(DEVICE);
    let seen: Vec<_> =
        history.iter().map(|change| (&change.patch, change.version, &change.reported)).collect();
    assert_eq!(
        seen,
        [
            (&json!({ "a": 1 }), 2, &json!({ "a": 1, "$version": 2 })),
            (&json!({ "a": null, "b": { "c": 2 } }), 3, &json!({ "b": { "c": 2 }, "$version": 3 })),
        ]
    );
    assert_eq!(hub.twin("nobody"), Err(HubError::NotFound("nobody".parse().unwrap())));
}

/// The merge of section 5.6 of the protocol notes, written a second time as the notes put it.
fn merged(target: &mut Value, patch: &Value) {
    for (key, value) in patch.as_object().unwrap() {
        match value {
            Value::Null => {
                target.as_object_mut().unwrap().remove(key);
            }
            Value::Object(_) => {
                if !target[key.as_str()].is_object() {
                    target[key.as_str()] = json!({});
                }
                merged(&mut target[key.as_str()], value);
            }
            _ => target[key.as_str()] = value.clone(),
        }
    }
}

fn any_patch() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![Just(Value::Null), (0..3).prop_map(|n| json!(n)), Just(json!([1]))];
    let object = |inner| {
        prop::collection::btree_map("[abc]", inner, 0..4)
            .prop_map(|map| map.into_iter().collect::<Value>())
    };
    object(leaf.prop_recursive(3, 12, 3, object).boxed())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// A device that merges what it is told holds what the service holds.
    #[test]
    fn a_device_that_merges_what_it_is_told_agrees_with_the_service(
        writes in prop::collection::vec((any::<bool>(), any_patch()), 1..8),
    ) {
        let runtime = runtime();
        let hub = runtime.block_on(hub());
        let mut told = json!({});
        let mut events = hub.events();
        for (replace, patch) in writes {
            let body = json!({ "properties": { "desired": patch } });
            let twin = if replace {
                hub.replace_twin(DEVICE, body).unwrap()
            } else {
                hub.patch_twin(DEVICE, body).unwrap()
            };
            while let Some(event) = events.try_next() {
                if let hubsim::EventKind::TwinWritten { patch: Some(patch), .. } = event.kind {
                    merged(&mut told, &patch);
                }
            }
            let held = without_metadata(&twin["properties"]["desired"]);
            told.as_object_mut().unwrap().remove("$version");
            let mut held_content = held;
            held_content.as_object_mut().unwrap().remove("$version");
            prop_assert_eq!(&told, &held_content);
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}
