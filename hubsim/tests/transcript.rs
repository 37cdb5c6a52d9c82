//! The main flow as a device and a back end see it, packet by packet.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use rumqttc::QoS;
use serde_json::json;
use support::{DESIRED, DEVICE, Device, METHODS, Service, TWIN_RESPONSES, connect_options, hub};

#[tokio::test]
async fn worked_transcript_of_the_protocol_notes() {
    let hub = hub().await;
    let service = Service::of(&hub);
    let mut device = Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
    assert!(!device.session_present);
    for filter in [TWIN_RESPONSES, DESIRED, METHODS] {
        assert_eq!(device.subscribe(filter, QoS::AtMostOnce).await, Some(0));
    }

    let (topic, body) = device.request("$iothub/twin/GET/", "").await;
    assert_eq!(topic, "$iothub/twin/res/200/?$rid=1");
    assert_eq!(body, r#"{"desired":{"$version":1},"reported":{"$version":1}}"#);

    let (_, topic, body) = device.report(r#"{"firmwareVersion":"1.0.0"}"#).await;
    assert_eq!(topic, "$iothub/twin/res/204/?$rid=2&$version=2");
    assert_eq!(body, "");

    let call = r#"{"methodName":"firmwareUpdate","payload":{ "fwPackageUri": "https://h/f" }}"#;
    let answer = async {
        let request = device.message().await;
        let rid = request.topic.strip_prefix("$iothub/methods/POST/firmwareUpdate/?$rid=").unwrap();
        assert_eq!(request.payload, r#"{"fwPackageUri":"https://h/f"}"#);
        let topic = format!("$iothub/methods/res/200/?$rid={rid}");
        device.publish(&topic, r#"{"accepted":true}"#).await;
        let report = r#"{"iothubDM":{"firmwareUpdate":{"status":"downloading"}}}"#;
        let (_, topic, _) = device.report(report).await;
        assert_eq!(topic, "$iothub/twin/res/204/?$rid=3&$version=3");
        device
    };
    let (called, mut device) = tokio::join!(service.post("/twins/pi-1/methods", call), answer);
    assert_eq!(called.status, 200);
    assert_eq!(called.text, r#"{"status":200,"payload":{"accepted":true}}"#);

    let written = service.patch("/twins/pi-1", r#"{"properties":{"desired":{"x":1}}}"#).await;
    assert_eq!(written.status, 200);
    assert_eq!(written.json()["connectionState"], "Connected");
    let told = device.message().await;
    assert_eq!(told.topic, "$iothub/twin/PATCH/properties/desired/?$version=2");
    assert_eq!(told.payload, r#"{"$version":2,"x":1}"#);

    let (status, topic, body) = device.report(r#"{"$version":3,"y":1}"#).await;
    assert_eq!((status, topic.as_str()), (400, "$iothub/twin/res/400/?$rid=4"));
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["errorCode"], 400_004);
    assert_eq!(
        hub.twin(DEVICE).unwrap()["properties"]["reported"]["iothubDM"],
        json!({ "firmwareUpdate": { "status": "downloading" } })
    );

    device.publish_at("devices/pi-1/messages/events/", "hello", QoS::ExactlyOnce).await;
    device.closed().await;
}
