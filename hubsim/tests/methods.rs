//! Direct methods: what the caller is told, whatever the device does.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::time::Duration;

use hubsim::{EventKind, HubError, Options};
use rumqttc::{Publish, QoS};
use serde_json::{Value, json};
use support::{
    DEVICE, Device, LIMIT, METHODS, Service, connect_options, device_token, hub, hub_with, now,
};

const CALL: &str = "/twins/pi-1/methods";

fn rid(request: &Publish) -> String {
    request.topic.split_once("/?$rid=").unwrap().1.to_owned()
}

async fn answer(device: &mut Device, request: &Publish, status: i64, body: &[u8]) {
    let topic = format!("$iothub/methods/res/{status}/?$rid={}", rid(request));
    device.client.publish(topic, QoS::AtLeastOnce, false, body).await.unwrap();
    while !matches!(device.incoming().await.unwrap(), rumqttc::Packet::PubAck(_)) {}
}

#[tokio::test]
async fn status_and_body_pass_as_the_device_sent_them() {
    let hub = hub().await;
    let service = Service::of(&hub);
    let mut device = Device::ready(&hub).await;
    for (payload, delivered, status, body, told) in [
        (
            r#","payload":{ "a" : [ 1, 2 ] }"#,
            r#"{"a":[1,2]}"#,
            200,
            "{}",
            r#"{"status":200,"payload":{}}"#,
        ),
        (r#","payload":null"#, "null", 500, "null", r#"{"status":500,"payload":null}"#),
        ("", "null", 404, r#"{"known":["a"]}"#, r#"{"status":404,"payload":{"known":["a"]}}"#),
        (r#","payload":"text""#, r#""text""#, -1, "\"ok\"", r#"{"status":-1,"payload":"ok"}"#),
        (
            r#","payload":7,"timeoutInSeconds":99,"x":1"#,
            "7",
            200,
            "1",
            r#"{"status":200,"payload":1}"#,
        ),
        // The hub pastes: an empty body is the caller's trouble.
        ("", "null", 200, "", r#"{"status":200,"payload":}"#),
    ] {
        let body_of_call = format!(r#"{{"methodName":"doIt"{payload}}}"#);
        let (called, ()) = tokio::join!(service.post(CALL, &body_of_call), async {
            let request = device.message().await;
            assert!(request.topic.starts_with("$iothub/methods/POST/doIt/?$rid="));
            assert_eq!(request.payload, delivered);
            assert_eq!(request.qos, QoS::AtMostOnce);
            answer(&mut device, &request, status, body.as_bytes()).await;
        });
        assert_eq!((called.status, called.text.as_str()), (200, told));
    }
    // The library says it plainly.
    let (called, ()) = tokio::join!(hub.invoke(DEVICE, "doIt", json!({}), LIMIT), async {
        let request = device.message().await;
        answer(&mut device, &request, 404, b"").await;
    });
    assert_eq!(called, Err(HubError::InvalidAnswer { status: 404, body: String::new() }));
}

#[tokio::test]
async fn nobody_there_is_404103_whether_offline_or_not_subscribed() {
    let hub = hub().await;
    let service = Service::of(&hub);
    let body = r#"{"methodName":"doIt"}"#;
    let offline = service.post(CALL, body).await;
    let device = Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
    let not_subscribed = service.post(CALL, body).await;
    drop(device);
    for answer in [offline, not_subscribed] {
        assert_eq!((answer.status, answer.header("iothub-errorcode")), (404, "DeviceNotOnline"));
        assert_eq!(answer.json()["ExceptionMessage"], "");
        let text = answer.json()["Message"].as_str().unwrap().to_owned();
        let inner: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(inner["errorCode"], 404_103);
        assert_eq!(inner["message"], "Timed out waiting for device to connect.");
        assert_eq!(inner["info"], json!({ "timeout": "00:00:00" }));
    }
}

#[tokio::test]
async fn the_connect_time_limit_waits_for_connection_and_subscription() {
    let hub = hub().await;
    let service = Service::of(&hub);
    let body = r#"{"methodName":"doIt","connectTimeoutInSeconds":20}"#;
    let (called, ()) = tokio::join!(service.post(CALL, body), async {
        let mut device = Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
        device.client.subscribe(METHODS, QoS::AtMostOnce).await.unwrap();
        let request = device.message().await;
        answer(&mut device, &request, 200, b"{}").await;
    });
    assert_eq!(called.text, r#"{"status":200,"payload":{}}"#);

    let body = r#"{"methodName":"doIt","connectTimeoutInSeconds":1}"#;
    hub.add_device("pi-2").unwrap();
    let answer = service.post("/twins/pi-2/methods", body).await;
    assert_eq!((answer.status, answer.error_code()), (404, 404_103));
    assert!(answer.text.contains(r#"\"timeout\":\"00:00:01\""#), "{}", answer.text);
}

#[tokio::test]
async fn no_answer_in_time_is_504101_and_a_late_one_is_dropped() {
    let hub = hub().await;
    let service = Service::of(&hub);
    let mut device = Device::ready(&hub).await;
    let body = r#"{"methodName":"doIt","responseTimeoutInSeconds":5}"#;
    let called = service.post(CALL, body).await;
    assert_eq!((called.status, called.header("iothub-errorcode")), (504, "GatewayTimeout"));
    assert_eq!(called.error_code(), 504_101);

    let mut events = hub.events();
    let request = device.message().await;
    answer(&mut device, &request, 200, b"{}").await;
    let late =
        |event: &hubsim::Event| matches!(event.kind, EventKind::MethodAnswered { late: true, .. });
    events.wait_for(late, LIMIT).await.unwrap();
    // The connection is none the worse.
    device.twin().await;
}

#[tokio::test]
async fn an_answer_counts_only_from_the_device_that_was_asked() {
    let hub = hub().await;
    hub.add_device("pi-2").unwrap();
    let mut device = Device::ready(&hub).await;
    let mut stranger = Device::connect(connect_options(&hub, "pi-2")).await.unwrap();
    let (called, ()) = tokio::join!(hub.invoke(DEVICE, "doIt", json!(1), LIMIT), async {
        let request = device.message().await;
        answer(&mut stranger, &request, 500, b"\"stolen\"").await;
        answer(&mut device, &request, 200, b"\"mine\"").await;
    });
    assert_eq!(called, Ok((200, json!("mine"))));
}

#[tokio::test]
async fn an_answer_after_a_reconnect_counts_unless_calls_end_with_their_connection() {
    for calls_end_with_connection in [false, true] {
        let hub = hub_with(Options { calls_end_with_connection, ..Options::default() }).await;
        let mut first = Device::ready(&hub).await;
        let limit = if calls_end_with_connection { Duration::from_secs(2) } else { LIMIT };
        let (called, _device) = tokio::join!(hub.invoke(DEVICE, "doIt", json!(1), limit), async {
            let request = first.message().await;
            let mut second = Device::ready(&hub).await;
            answer(&mut second, &request, 200, b"{}").await;
            second
        });
        match called {
            Ok(answer) => {
                assert_eq!((answer, calls_end_with_connection), ((200, json!({})), false))
            }
            Err(error) => {
                assert_eq!(error, HubError::NoAnswer { waited: limit });
                assert!(calls_end_with_connection);
            }
        }
    }
}

#[tokio::test]
async fn bad_calls_are_refused_before_anything_is_sent() {
    let hub = hub().await;
    hub.add_device("pi-1/agent").unwrap();
    let service = Service::of(&hub);
    let mut device = Device::ready(&hub).await;
    let big = format!(r#"{{"methodName":"m","payload":"{}"}}"#, "x".repeat(128 * 1024));
    for (path, body, status, code) in [
        ("/twins/nobody/methods", r#"{"methodName":"m"}"#, 404, 404_001),
        ("/twins/pi-1/modules/nobody/methods", r#"{"methodName":"m"}"#, 404, 404_010),
        ("/twins/pi-1/modules/agent/methods", r#"{"methodName":"m"}"#, 404, 404_103),
        (CALL, "", 400, 400_004),
        (CALL, "{", 400, 400_004),
        (CALL, "{}", 400, 400_004),
        (CALL, r#"{"methodName":""}"#, 400, 400_004),
        (CALL, r#"{"methodName":"a b"}"#, 400, 400_004),
        (CALL, r#"{"methodName":"a/b"}"#, 400, 400_004),
        (CALL, r#"{"methodName":"ä"}"#, 400, 400_004),
        (CALL, r#"{"methodName":"m","responseTimeoutInSeconds":4}"#, 400, 400_004),
        (CALL, r#"{"methodName":"m","responseTimeoutInSeconds":301}"#, 400, 400_004),
        (CALL, r#"{"methodName":"m","connectTimeoutInSeconds":301}"#, 400, 400_004),
        (CALL, r#"{"methodName":"m","connectTimeoutInSeconds":-1}"#, 400, 400_004),
        (CALL, big.as_str(), 413, 413_001),
    ] {
        let answer = service.post(path, body).await;
        let start: String = body.chars().take(80).collect();
        assert_eq!((answer.status, answer.error_code()), (status, code), "{path} {start}");
    }
    // Nothing of it reached the device.
    device.twin().await;
}

#[tokio::test]
async fn modules_have_methods_of_their_own() {
    let hub = hub().await;
    hub.add_device("pi-1/agent").unwrap();
    let service = Service::of(&hub);
    let mut module = Device::connect(connect_options(&hub, "pi-1/agent")).await.unwrap();
    module.client.subscribe(METHODS, QoS::AtMostOnce).await.unwrap();
    let body = r#"{"methodName":"m","connectTimeoutInSeconds":20}"#;
    let (called, ()) =
        tokio::join!(service.post("/twins/pi-1/modules/agent/methods", body), async {
            let request = module.message().await;
            answer(&mut module, &request, 200, b"1").await;
        });
    assert_eq!(called.text, r#"{"status":200,"payload":1}"#);
}

#[tokio::test]
async fn callers_need_a_good_service_token() {
    let hub = hub().await;
    let mut service = Service::of(&hub);
    let of = |policy: &str, expiry: i64| {
        let text = hub.policy_connection_string(policy).unwrap();
        let key = support::part(&text, "SharedAccessKey");
        hubsim::sas::token(hub.hub_name(), &key, expiry, Some(policy)).unwrap()
    };
    let milliseconds = of("service", (now() + 600) * 1000);
    for (token, status) in [
        (of("service", now() + 600), 200),
        (milliseconds, 200),
        (of("service", now() - 200), 200),
        (of("service", now() - 400), 401),
        (of("registryRead", now() + 600), 401),
        (of("device", now() + 600), 401),
        (device_token(&hub, DEVICE, now() + 600), 401),
        (of("service", now() + 600).replace("se=", "se=1"), 401),
        (of("service", now() + 600).replace("skn=service", "skn=iothubowner"), 401),
        ("Bearer x".to_owned(), 401),
        (String::new(), 401),
    ] {
        service.token = token;
        let answer = service.get("/twins/pi-1").await;
        assert_eq!(answer.status, status, "{}", service.token);
        if status == 401 {
            assert_eq!(answer.header("iothub-errorcode"), "IotHubUnauthorizedAccess");
            let message = answer.json()["Message"].as_str().unwrap().to_owned();
            assert!(message.starts_with("ErrorCode:IotHubUnauthorizedAccess;"), "{message}");
        }
    }
    service.token = of("registryRead", now() + 600);
    assert_eq!(service.get("/devices/pi-1").await.status, 200);
    assert_eq!(service.put("/devices/pi-9", "{}").await.status, 401);
    service.token = of("registryReadWrite", now() + 600);
    assert_eq!(service.put("/devices/pi-9", "{}").await.status, 200);
}
