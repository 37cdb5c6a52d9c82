//! The way to the hub breaks, and the update goes on.

use hubsim::{EventKind, Hub, Reason};
use serde_json::{Value, json};

use crate::world::images::Fault;
use crate::world::machine::LIMIT;
use crate::world::{DEVICE, World, phase, side_by_side};

/// What every run must leave, whatever happened on the way.
#[track_caller]
fn assert_told_well(world: &World, twin: &Value, version: &str) {
    assert_eq!(twin["iothubDM"]["firmwareUpdate"]["status"], "applyComplete");
    assert_eq!(twin["firmwareStatus"], "completed");
    assert_eq!(twin["firmware"]["fwUpdateStatus"], "current");
    assert_eq!(twin["firmware"]["currentFwVersion"], version);
    assert_eq!(twin["twinboot"]["lastUpdate"]["result"], "succeeded");
    world.assert_bootable();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_is_gone_during_the_whole_update_hears_of_it_later() {
    let mut world = World::new().await;
    world.machine.set("health.hub", false);
    world.start().await;
    let stopped = world.stop_hub().await;
    let output = world.twinboot(&["install", &world.url("2.0.0.img.zst"), "--detach", "--json"]);
    assert!(output.status.success(), "{output:?}");
    let started: Value = serde_json::from_slice(&output.stdout).unwrap();
    world.machine.restart_order(LIMIT).await.unwrap();
    world.machine.restart().await.unwrap();
    let confirmed = |world: &World| world.machine.variables().unwrap().0 == "B";
    world.eventually("it is confirmed without the hub", confirmed).await;
    world.start_hub(stopped).await;
    let twin = world.over(started["id"].as_str().unwrap()).await;
    assert_told_well(&world, &twin, "2.0.0");
    assert_eq!(twin["twinboot"]["lastUpdate"]["origin"], "local");
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trial_waits_for_the_hub() {
    let mut world = World::started().await;
    let id = world.half_an_update("2.0.0.img").await;
    let stopped = world.stop_hub().await;
    world.images.release();
    world.machine.restart_order(LIMIT).await.unwrap();
    assert_eq!(world.machine.restart().await.unwrap().slot, 'B');
    world.saved_state("trial").await;
    let tried = |world: &World| {
        let output = world.twinboot(&["status"]);
        String::from_utf8(output.stdout).unwrap().contains("offline")
    };
    world.eventually("it has looked for the hub", tried).await;
    assert_eq!(world.machine.variables().unwrap().0, "A", "not confirmed without the hub");
    world.start_hub(stopped).await;
    let twin = world.over(&id).await;
    assert_told_well(&world, &twin, "2.0.0");
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trial_without_a_hub_is_lost_and_told_when_the_hub_is_back() {
    let mut world = World::new().await;
    world.machine.set("update.trial_limit_s", 5);
    world.start().await;
    let id = world.half_an_update("2.0.0.img").await;
    let stopped = world.stop_hub().await;
    world.images.release();
    for slot in ['B', 'A'] {
        world.machine.restart_order(LIMIT).await.unwrap();
        assert_eq!(world.machine.restart().await.unwrap().slot, slot);
    }
    world.start_hub(stopped).await;
    let twin = world.over(&id).await;
    let last = &twin["twinboot"]["lastUpdate"];
    assert_eq!((&last["result"], &last["code"]), (&json!("rolledBack"), &json!("unhealthy")));
    assert!(last["reason"].as_str().unwrap().contains("hub"), "{last}");
    assert_eq!(twin["firmware"]["fwUpdateStatus"], "rolledback");
    world.assert_bootable();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_expires_in_mid_download_costs_no_byte_and_no_report() {
    let mut world = World::started().await;
    let id = world.half_an_update("2.0.0.img").await;
    let mut events = world.events();
    world.hub().faults(DEVICE).expire_token_now().unwrap();
    let lost =
        |kind: &EventKind| matches!(kind, EventKind::Disconnected { reason: Reason::TokenExpired });
    world.event(&mut events, lost).await;
    world.online().await;
    world.images.release();
    let twin = world.over(&id).await;
    assert_told_well(&world, &twin, "2.0.0");
    assert_eq!(world.images.seen("/2.0.0.img").len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_hub_hears_the_truth_in_the_end() {
    side_by_side([429, 500].map(|status| async move {
        let mut world = World::started().await;
        // Slow enough for reports of mere progress.
        world.fault("2.0.0.img", [Fault::Slow(60_000)]);
        let id = world.update("2.0.0.img").await;
        world.until("it downloads", |twin| phase(twin) == "downloading").await;
        let mut events = world.events();
        world.hub().faults(DEVICE).fail_twin(status, 3).unwrap();
        let refused = |kind: &EventKind| matches!(kind, EventKind::Reported { status: found, .. } if *found == status);
        world.event(&mut events, refused).await;
        let twin = world.over(&id).await;
        assert_told_well(&world, &twin, "2.0.0");
        assert_eq!(world.images.seen("/2.0.0.img").len(), 1);
    }))
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_acknowledgement_is_made_good() {
    let mut world = World::started().await;
    world.hub().faults(DEVICE).lose_next_response().unwrap();
    let id = world.update("2.0.0.img").await;
    let twin = world.over(&id).await;
    assert_told_well(&world, &twin, "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_credential_is_told_and_not_a_storm() {
    let mut world = World::new().await;
    world.hub().set_enabled(DEVICE, false).unwrap();
    let mut events = world.events();
    world.machine.boot().unwrap();
    for _ in 0..2 {
        world.event(&mut events, |kind| matches!(kind, EventKind::AuthFailed { .. })).await;
    }
    let told = |world: &World| {
        let output = world.twinboot(&["status"]);
        String::from_utf8(output.stdout).unwrap().contains("the hub refused")
    };
    world.eventually("the status says why", told).await;
    world.hub().set_enabled(DEVICE, true).unwrap();
    world.up().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topics_in_another_order_are_understood() {
    let mut world = World::new().await;
    world.hub().faults(DEVICE).swap_parameter_order(true).unwrap();
    world.start().await;
    let id = world.update("2.0.0.img").await;
    let twin = world.over(&id).await;
    assert_told_well(&world, &twin, "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_goes_over_a_websocket_too() {
    let mut world = World::new().await;
    let port = i64::from(world.hub().https_addr().port());
    world.machine.set("hub.transport", "websocket");
    world.machine.set("hub.port", port);
    world.start().await;
    let id = world.update("2.0.0.img").await;
    let twin = world.over(&id).await;
    assert_told_well(&world, &twin, "2.0.0");
    world.assert_runs('B', "2.0.0");
}

/// Reports `value` under `other`, as another program of the device may do.
pub async fn fill_twin(hub: &Hub, value: Value) {
    let resource = format!("{}/devices/{DEVICE}", hub.hub_name());
    let connection = hub.device_connection_string(DEVICE).unwrap();
    let key = connection.split_once("SharedAccessKey=").unwrap().1;
    let expiry = time::OffsetDateTime::now_utc().unix_timestamp() + 600;
    let token = hubsim::sas::token(&resource, key, expiry, None).unwrap();
    let address = format!("ssl://localhost:{}", hub.mqtt_addr().port());
    let client = paho_mqtt::CreateOptionsBuilder::new().server_uri(address).client_id(DEVICE);
    let client = paho_mqtt::AsyncClient::new(client.finalize()).unwrap();
    let tls = paho_mqtt::SslOptionsBuilder::new().trust_store(hub.ca_path()).unwrap().finalize();
    let options = paho_mqtt::ConnectOptionsBuilder::new()
        .user_name(format!("{}/{DEVICE}/?api-version=2021-04-12", hub.hub_name()))
        .password(token)
        .ssl_options(tls)
        .finalize();
    client.connect(options).await.unwrap();
    let mut events = hub.events();
    let topic = "$iothub/twin/PATCH/properties/reported/?$rid=1";
    let message = paho_mqtt::Message::new(topic, json!({ "other": value }).to_string(), 0);
    client.publish(message).await.unwrap();
    let told = |kind: &EventKind| matches!(kind, EventKind::Reported { status: 204, .. });
    events.wait_for(|event| told(&event.kind), LIMIT).await.unwrap();
    client.disconnect(None).await.unwrap();
}

/// So many texts of so many bytes.
pub fn ballast(count: usize, bytes: usize) -> Value {
    Value::Object((0..count).map(|at| (format!("t{at}"), json!("x".repeat(bytes)))).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_twin_that_is_nearly_full_still_tells_everything() {
    let mut world = World::new().await;
    // Ours never takes more than a quarter of the 32 KiB.
    fill_twin(world.hub(), ballast(23, 1000)).await;
    world.start().await;
    // The longest that may be asked for, failing with the longest words.
    let name = format!("{}.img", "n".repeat(1900));
    let payload = json!({
        "fwPackageUri": world.url(&name),
        "fwVersion": "v".repeat(128),
        "fwPackageCheckValue": "ab".repeat(32),
    });
    let (status, answer) = world.call("firmwareUpdate", payload).await.unwrap();
    assert_eq!(status, 200, "{answer}");
    let twin = world.over(answer["id"].as_str().unwrap()).await;
    assert_eq!(twin["iothubDM"]["firmwareUpdate"]["status"], "downloadfailed");
    assert_eq!(twin["other"], ballast(23, 1000), "what is not ours is left alone");
    assert!(serde_json::to_string(&twin).unwrap().len() > 23_000);
    let id = world.update("2.0.0.img").await;
    world.over(&id).await;
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_twin_does_not_stop_the_device() {
    // Room for the least report, and for none at all.
    for (bytes, is_told) in [(1000, true), (1020, false)] {
        let mut world = World::new().await;
        world.machine.set("health.hub", true);
        fill_twin(world.hub(), ballast(32, bytes)).await;
        let mut events = world.events();
        world.machine.boot().unwrap();
        world.online().await;
        // Methods work, and the update too: the health of the image is what is judged.
        let id = world.update("2.0.0.img").await;
        world.machine.restart_order(LIMIT).await.unwrap();
        world.machine.restart().await.unwrap();
        let ended = async {
            loop {
                if let Ok((200, body)) = world.call("getFirmwareStatus", Value::Null).await
                    && body["lastUpdate"]["id"] == id
                {
                    return body;
                }
                tokio::time::sleep(crate::world::machine::LOOK).await;
            }
        };
        let body = tokio::time::timeout(LIMIT, ended).await.unwrap();
        assert_eq!(body["lastUpdate"]["result"], "succeeded");
        if is_told {
            let twin = world.over(&id).await;
            assert_eq!(twin["twinboot"]["bootedSlot"], "B");
            assert_eq!(twin["twinboot"]["lastUpdate"]["result"], "succeeded");
            assert_eq!(twin["other"], ballast(32, bytes), "what is not ours is left alone");
        }
        let refused =
            |kind: &EventKind| matches!(kind, EventKind::Reported { status: 400..=499, .. });
        world.event(&mut events, refused).await;
        world.assert_runs('B', "2.0.0");
    }
}
