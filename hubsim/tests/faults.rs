//! Every fault handle, through the library and through the admin endpoint.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::time::Duration;

use hubsim::{EventKind, Hub, HubError, Options, Reason};
use rumqttc::{ConnectReturnCode as Code, Packet, QoS};
use serde_json::{Value, json};
use support::{
    DEVICE, Device, LIMIT, METHODS, connect_options, disconnected, hub, hub_with, refusal,
};

const REPORTED: &str = "$iothub/twin/PATCH/properties/reported/";

async fn admin(hub: &Hub, method: &str, path: &str, body: &str) -> (u16, String) {
    let url = format!("http://{}{path}", hub.admin_addr().unwrap());
    let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
    let request = reqwest::Client::new().request(method, url).body(body.to_owned());
    let response = request.header("content-type", "application/json").send().await.unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

async fn hub_with_admin() -> Hub {
    hub_with(Options { admin: Some("127.0.0.1:0".parse().unwrap()), ..Options::default() }).await
}

#[tokio::test]
async fn connections_are_dropped_at_the_packet_asked_for() {
    let hub = hub().await;
    let mut events = hub.events();

    let mut device = Device::reporter(&hub).await;
    hub.faults(DEVICE).drop_now().unwrap();
    device.closed().await;
    assert_eq!(disconnected(&mut events).await, Reason::Fault);

    // The second packet is handled, but its answer never comes.
    let mut device = Device::reporter(&hub).await;
    hub.faults(DEVICE).drop_after_packets(2).unwrap();
    assert_eq!(device.report(r#"{"a":1}"#).await.0, 204);
    device.publish(&format!("{REPORTED}?$rid=9"), r#"{"b":1}"#).await;
    let next = device.incoming().await;
    assert!(next.is_err(), "{next:?}");
    assert_eq!(disconnected(&mut events).await, Reason::Fault);
    assert_eq!(hub.twin(DEVICE).unwrap()["properties"]["reported"]["b"], 1);

    // This one is not even handled.
    let mut device = Device::reporter(&hub).await;
    hub.faults(DEVICE).drop_before_packet(1).unwrap();
    device.publish(&format!("{REPORTED}?$rid=9"), r#"{"c":1}"#).await;
    let next = device.incoming().await;
    assert!(next.is_err(), "{next:?}");
    assert_eq!(disconnected(&mut events).await, Reason::Fault);
    assert_eq!(hub.twin(DEVICE).unwrap()["properties"]["reported"]["c"], Value::Null);

    // Each fault works once.
    assert_eq!(Device::reporter(&hub).await.report("{}").await.0, 204);
}

#[tokio::test]
async fn responses_are_delayed_and_lost() {
    let hub = hub().await;
    let mut device = Device::reporter(&hub).await;
    hub.faults(DEVICE).delay_next_response(Duration::from_millis(300)).unwrap();
    device.publish("$iothub/twin/GET/?$rid=slow", "").await;
    device.publish("$iothub/twin/GET/?$rid=quick", "").await;
    for rid in ["quick", "slow"] {
        assert_eq!(device.message().await.topic, format!("$iothub/twin/res/200/?$rid={rid}"));
    }

    hub.faults(DEVICE).lose_next_response().unwrap();
    device.publish(&format!("{REPORTED}?$rid=lost"), r#"{"a":1}"#).await;
    assert_eq!(device.twin().await["reported"], json!({ "a": 1, "$version": 2 }));

    hub.faults(DEVICE).lose_next_puback().unwrap();
    let events = "devices/pi-1/messages/events/";
    device.publish_at(events, "unacknowledged", QoS::AtLeastOnce).await;
    device.publish_at(events, "acknowledged", QoS::AtLeastOnce).await;
    match device.incoming().await.unwrap() {
        // 1 was the SUBSCRIBE, 2 the message before.
        Packet::PubAck(ack) => assert_eq!(ack.pkid, 3),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn twin_requests_fail_as_often_as_asked() {
    let hub = hub().await;
    let mut device = Device::reporter(&hub).await;
    for (status, code) in [(429, 429_001), (500, 500_001)] {
        hub.faults(DEVICE).fail_twin(status, 2).unwrap();
        let (topic, body) = device.request("$iothub/twin/GET/", "").await;
        assert!(topic.starts_with(&format!("$iothub/twin/res/{status}/?$rid=")), "{topic}");
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["errorCode"], code);
        assert_eq!(device.report(r#"{"a":1}"#).await.0, status);
        assert_eq!(device.twin().await["reported"], json!({ "$version": 1 }), "not applied");
    }
}

#[tokio::test]
async fn the_token_expires_now() {
    let hub = hub().await;
    let mut device = Device::reporter(&hub).await;
    let mut events = hub.events();
    hub.faults(DEVICE).expire_token_now().unwrap();
    device.closed().await;
    assert_eq!(disconnected(&mut events).await, Reason::TokenExpired);
    Device::reporter(&hub).await;
}

#[tokio::test]
async fn a_method_is_delivered_twice() {
    for push_qos in [0, 1] {
        let hub = hub_with(Options { push_qos, ..Options::default() }).await;
        let mut device = Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
        device.subscribe(METHODS, QoS::AtLeastOnce).await;
        hub.faults(DEVICE).deliver_next_method_twice().unwrap();
        let (called, ()) = tokio::join!(hub.invoke(DEVICE, "doIt", json!(1), LIMIT), async {
            let (first, second) = (device.message().await, device.message().await);
            assert_eq!((&first.topic, &first.payload), (&second.topic, &second.payload));
            assert_eq!((first.dup, second.dup), (false, push_qos == 1));
            assert_eq!(first.pkid, second.pkid);
            let rid = first.topic.split_once("$rid=").unwrap().1;
            for body in ["1", "2"] {
                device.publish(&format!("$iothub/methods/res/200/?$rid={rid}"), body).await;
            }
            // The second answer is too late, and harmless.
            let late = |event: &hubsim::Event| {
                matches!(event.kind, EventKind::MethodAnswered { late: true, .. })
            };
            let mut events = hub.events_from_start();
            let wait = events.wait_for(late, LIMIT);
            tokio::select! { _ = device.closed() => panic!("closed"), found = wait => { found.unwrap(); } }
        });
        assert_eq!(called, Ok((200, json!(1))));
    }
}

#[tokio::test]
async fn any_bytes_can_be_a_method() {
    let hub = hub().await;
    let mut device = Device::ready(&hub).await;
    let bad: &[u8] = b"{ fwPackageUri : 'https://h/f' }\x00\xff";
    let limit = Duration::from_millis(500);
    let faults = hub.faults(DEVICE);
    let (called, request) =
        tokio::join!(faults.send_raw_method("firmwareUpdate", bad, limit), device.message());
    assert_eq!(request.payload, bad);
    assert_eq!(called, Err(HubError::NoAnswer { waited: limit }));
}

#[tokio::test]
async fn parameters_can_stand_in_another_order_or_form() {
    let hub = hub().await;
    let mut device = Device::reporter(&hub).await;
    hub.faults(DEVICE).swap_parameter_order(true).unwrap();
    let (_, topic, _) = device.report("{}").await;
    assert_eq!(topic, "$iothub/twin/res/204/?$version=2&$rid=1");
    hub.faults(DEVICE).swap_parameter_order(false).unwrap();
    hub.faults(DEVICE).encode_dollar(true).unwrap();
    let (_, topic, _) = device.report("{}").await;
    assert_eq!(topic, "$iothub/twin/res/204/?%24rid=2&%24version=3");
}

#[tokio::test]
async fn connections_are_refused_as_asked() {
    let hub = hub().await;
    for (code, shown) in [
        (1, Code::RefusedProtocolVersion),
        (2, Code::BadClientId),
        (3, Code::ServiceUnavailable),
        (4, Code::BadUserNamePassword),
        (5, Code::NotAuthorized),
    ] {
        hub.faults(DEVICE).refuse_connections(Some(code)).unwrap();
        assert_eq!(refusal(connect_options(&hub, DEVICE)).await, shown);
    }
    hub.faults(DEVICE).refuse_connections(None).unwrap();
    hub.faults(DEVICE).close_instead_of_connack(true).unwrap();
    let closed = Device::connect(connect_options(&hub, DEVICE)).await;
    assert!(!matches!(closed, Ok(_) | Err(rumqttc::ConnectionError::ConnectionRefused(_))));
    hub.faults(DEVICE).close_instead_of_connack(false).unwrap();
    Device::reporter(&hub).await;
}

#[tokio::test]
async fn a_stalled_hub_answers_when_it_goes_on() {
    let hub = hub().await;
    let mut device = Device::reporter(&hub).await;
    hub.faults(DEVICE).stall(true).unwrap();
    device.publish("$iothub/twin/GET/?$rid=1", "").await;
    let silence = tokio::time::timeout(Duration::from_millis(500), device.message()).await;
    assert!(silence.is_err(), "{silence:?}");
    hub.faults(DEVICE).stall(false).unwrap();
    assert_eq!(device.message().await.topic, "$iothub/twin/res/200/?$rid=1");
}

#[tokio::test]
async fn the_admin_endpoint_has_the_same_handles() {
    let hub = hub_with_admin().await;
    let mut device = Device::reporter(&hub).await;
    let faults = "/devices/pi-1/faults";
    let put = async |body: &str| admin(&hub, "POST", faults, body).await;

    assert_eq!(put(r#"{"fault":"failTwin","status":429,"times":1}"#).await.0, 204);
    assert_eq!(device.report("{}").await.0, 429);
    for fault in [
        r#"{"fault":"dropAfterPackets","packets":1000}"#,
        r#"{"fault":"dropBeforePacket","packets":1000}"#,
        r#"{"fault":"delayNextResponse","millis":1}"#,
        r#"{"fault":"loseNextPuback"}"#,
        r#"{"fault":"deliverNextMethodTwice"}"#,
        r#"{"fault":"swapParameterOrder","on":false}"#,
        r#"{"fault":"encodeDollar","on":false}"#,
        r#"{"fault":"refuseConnections","code":null}"#,
        r#"{"fault":"closeInsteadOfConnack","on":false}"#,
        r#"{"fault":"stall","on":false}"#,
    ] {
        assert_eq!(put(fault).await.0, 204, "{fault}");
    }
    for bad in [
        "",
        "{}",
        r#"{"fault":"magic"}"#,
        r#"{"fault":"stall"}"#,
        r#"{"fault":"stall","on":true,"for":1}"#,
    ] {
        assert_eq!(put(bad).await.0, 400, "{bad}");
    }
    let unknown = admin(&hub, "POST", "/devices/nobody/faults", r#"{"fault":"dropNow"}"#).await;
    assert_eq!(unknown.0, 404);

    assert_eq!(device.report(r#"{"a":1}"#).await.0, 204);
    let (_, history) = admin(&hub, "GET", "/devices/pi-1/reported-history", "").await;
    let history: Value = serde_json::from_str(&history).unwrap();
    assert_eq!(history[0]["reported"], json!({ "a": 1, "$version": 2 }));

    assert_eq!(put(r#"{"fault":"dropNow"}"#).await.0, 204);
    device.closed().await;
    let (_, events) = admin(&hub, "GET", "/events?from=1", "").await;
    let events: Value = serde_json::from_str(&events).unwrap();
    assert_eq!(events[0]["number"], 1);
    let last = events.as_array().unwrap().last().unwrap();
    assert_eq!((&last["event"], &last["reason"]), (&json!("disconnected"), &json!("fault")));
    assert_eq!(last["identity"], DEVICE);

    let mut device = Device::ready(&hub).await;
    let path = "/devices/pi-1/methods/doIt";
    let ((status, answer), ()) = tokio::join!(admin(&hub, "POST", path, "{ a: 1 }"), async {
        let request = device.message().await;
        assert_eq!(request.payload, "{ a: 1 }");
        assert_eq!(device.message().await.topic, request.topic, "twice, as armed above");
        let rid = request.topic.split_once("$rid=").unwrap().1;
        device.publish(&format!("$iothub/methods/res/400/?$rid={rid}"), "{}").await;
        device.twin().await;
    });
    assert_eq!(status, 200);
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer, json!({ "status": 400, "payloadText": "{}" }));

    assert_eq!(admin(&hub, "PUT", "/clock", r#"{"offsetSeconds":5000}"#).await.0, 204);
    device.closed().await;
    let (_, view) = admin(&hub, "GET", "/view", "").await;
    let view: Value = serde_json::from_str(&view).unwrap();
    assert_eq!(view[0]["connectionState"], "Disconnected");
}

#[tokio::test]
async fn the_admin_endpoint_stays_on_loopback() {
    let admin = Some("0.0.0.0:0".parse().unwrap());
    let started = Hub::start(Options { admin, ..Options::default() }).await;
    assert!(matches!(started, Err(hubsim::StartError::AdminNotLoopback(_))));
}
