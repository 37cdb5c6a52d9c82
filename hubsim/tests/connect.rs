//! Who may connect, and what he is told if not.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use hubsim::{EventKind, Hub, Options, Reason};
use rumqttc::{ConnectReturnCode as Code, QoS};
use std::time::Duration;
use support::{
    DEVICE, Device, LIMIT, METHODS, Service, anonymous_options, connect_options, device_key,
    device_token, disconnected, hub, hub_with, now, part, refusal, user_name,
};

fn token(hub: &Hub, resource: &str, key: &str, expiry: i64, policy: Option<&str>) -> String {
    hubsim::sas::token(&format!("{}{resource}", hub.hub_name()), key, expiry, policy).unwrap()
}

fn policy_key(hub: &Hub, policy: &str) -> String {
    part(&hub.policy_connection_string(policy).unwrap(), "SharedAccessKey")
}

async fn accepted(hub: &Hub, id: &str, user: &str, password: &str) {
    let mut options = anonymous_options(hub, id);
    options.set_credentials(user, password);
    if let Err(error) = Device::connect(options).await {
        panic!("{user}: {error}");
    }
}

async fn refused(hub: &Hub, id: &str, user: &str, password: &str) -> Code {
    let mut options = anonymous_options(hub, id);
    options.set_credentials(user, password);
    refusal(options).await
}

#[tokio::test]
async fn user_names_of_all_clients_are_understood() {
    let hub =
        hub_with(Options { extra_names: vec!["gw.local".into()], ..Options::default() }).await;
    hub.add_device("pi-1/agent").unwrap();
    let password = device_token(&hub, DEVICE, now() + 600);
    let name = hub.hub_name().to_owned();
    for user in [
        format!("{name}/pi-1/?api-version=2021-04-12"),
        format!("{name}/pi-1/?api-version=2020-09-30&DeviceClientType=py-azure%2F1%20%28Linux%29"),
        format!("{name}/pi-1/api-version=2016-11-14&DeviceClientType=c"),
        format!("{name}/pi-1/?DeviceClientType=x&api-version=2021-04-12&model-id=dtmi%3Aa%3Bb%3B1"),
        format!("{name}/pi-1"),
        format!("{}/pi-1/?api-version=2021-04-12", name.to_uppercase()),
        "localhost/pi-1/?api-version=2021-04-12".to_owned(),
        "gw.local/pi-1/?api-version=2021-04-12".to_owned(),
    ] {
        accepted(&hub, DEVICE, &user, &password).await;
    }
    assert_eq!(hub.twin(DEVICE).unwrap()["modelId"], "dtmi:a;b;1");
    let module = device_token(&hub, "pi-1/agent", now() + 600);
    accepted(&hub, "pi-1/agent", &user_name(&hub, "pi-1/agent"), &module).await;

    let mut warnings = hub.events_from_start();
    let warned = |event: &hubsim::Event| matches!(event.kind, EventKind::Warning { .. });
    let warning = warnings.wait_for(warned, LIMIT).await.unwrap();
    assert!(warning.to_string().contains("no api-version"), "{warning}");
}

#[tokio::test]
async fn refusals_have_the_hubs_codes() {
    let hub = hub().await;
    hub.add_device("pi-2").unwrap();
    hub.add_device("off").unwrap();
    hub.set_enabled("off", false).unwrap();
    let user = user_name(&hub, DEVICE);
    let good = device_token(&hub, DEVICE, now() + 600);

    for user in
        ["", "pi-1", "a/b/c/d/?api-version=1", "/pi-1/?api-version=1", "h/pi 1/?api-version=1"]
    {
        assert_eq!(refused(&hub, DEVICE, user, &good).await, Code::BadUserNamePassword, "{user:?}");
    }
    let other_hub = "other.azure-devices.net/pi-1/?api-version=2021-04-12";
    let key = device_key(&hub, DEVICE);
    let wrong_key = device_key(&hub, "pi-2");
    let for_device = "/devices/pi-1";
    for (what, id, user, password) in [
        ("id mismatch", "pi-2", user.as_str(), good.clone()),
        ("case of the id", "PI-1", user.as_str(), good.clone()),
        ("another hub", DEVICE, other_hub, good.clone()),
        ("no password", DEVICE, &user, String::new()),
        ("no token", DEVICE, &user, "secret".to_owned()),
        ("wrong key", DEVICE, &user, token(&hub, for_device, &wrong_key, now() + 600, None)),
        ("another device", DEVICE, &user, token(&hub, "/devices/pi-2", &key, now() + 600, None)),
        ("expired", DEVICE, &user, device_token(&hub, DEVICE, now() - 301)),
        (
            "a policy without the right",
            DEVICE,
            &user,
            token(&hub, "", &policy_key(&hub, "service"), now() + 600, Some("service")),
        ),
        ("unknown policy", DEVICE, &user, token(&hub, "", &key, now() + 600, Some("nobody"))),
    ] {
        assert_eq!(refused(&hub, id, user, &password).await, Code::NotAuthorized, "{what}");
    }
    for id in ["off", "unknown"] {
        let password = if id == "off" { device_token(&hub, id, now() + 600) } else { good.clone() };
        assert_eq!(refused(&hub, id, &user_name(&hub, id), &password).await, Code::NotAuthorized);
    }
    // Nobody got in, and the one refused is named.
    let mut events = hub.events_from_start();
    while let Some(event) = events.try_next() {
        assert!(!matches!(event.kind, EventKind::Connected { .. }), "{event}");
        assert!(!event.to_string().contains("sig="), "a token in the log: {event}");
    }
}

#[tokio::test]
async fn keys_and_policies_that_may_connect_a_device() {
    let hub = hub().await;
    let service = Service::of(&hub);
    let entry = service.get("/devices/pi-1").await.json();
    let secondary = entry["authentication"]["symmetricKey"]["secondaryKey"].as_str().unwrap();
    let owner = policy_key(&hub, "iothubowner");
    let device = policy_key(&hub, "device");
    let key = device_key(&hub, DEVICE);
    let user = user_name(&hub, DEVICE);
    for password in [
        token(&hub, "/devices/pi-1", secondary, now() + 600, None),
        token(&hub, "", &key, now() + 600, None),
        token(&hub, "/devices", &device, now() + 600, Some("device")),
        token(&hub, "", &owner, now() + 600, Some("iothubowner")),
        // Within the allowance for skewed clocks.
        token(&hub, "/devices/pi-1", &key, now() - 240, None),
    ] {
        accepted(&hub, DEVICE, &user, &password).await;
    }
}

#[tokio::test]
async fn a_lower_case_escape_in_the_resource_is_signed_as_written() {
    let hub = hub().await;
    let password = device_token(&hub, DEVICE, now() + 600);
    // The same scope, but not the text that was signed.
    let lower = password.replacen("%2Fdevices%2F", "%2fdevices%2f", 1);
    assert_ne!(password, lower);
    assert_eq!(refused(&hub, DEVICE, &user_name(&hub, DEVICE), &lower).await, Code::NotAuthorized);
}

#[tokio::test]
async fn a_second_connection_throws_out_the_first() {
    let hub = hub().await;
    hub.add_device("pi-1/agent").unwrap();
    let mut module = Device::connect(connect_options(&hub, "pi-1/agent")).await.unwrap();
    let mut first = Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
    let mut events = hub.events();
    let mut second = Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
    first.closed().await;
    assert_eq!(disconnected(&mut events).await, Reason::TakenOver);
    assert!(hub.connected(DEVICE));
    // The module is an identity of its own, and the second connection lives.
    assert_eq!(module.subscribe(METHODS, QoS::AtMostOnce).await, Some(0));
    assert_eq!(second.subscribe(METHODS, QoS::AtMostOnce).await, Some(0));
}

#[tokio::test]
async fn a_disabled_or_deleted_device_is_cut() {
    let hub = hub().await;
    let service = Service::of(&hub);
    let mut device = Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
    let mut events = hub.events();
    let disabled = r#"{"deviceId":"pi-1","status":"disabled","statusReason":"stolen"}"#;
    let answer = service.send("PUT", "/devices/pi-1", &[("If-Match", "*")], disabled).await;
    assert_eq!((answer.status, &answer.json()["statusReason"]), (200, &"stolen".into()));
    device.closed().await;
    assert_eq!(disconnected(&mut events).await, Reason::IdentityRemoved);
    assert_eq!(refusal(connect_options(&hub, DEVICE)).await, Code::NotAuthorized);

    hub.set_enabled(DEVICE, true).unwrap();
    let mut device = Device::connect(connect_options(&hub, DEVICE)).await.unwrap();
    let options = connect_options(&hub, DEVICE);
    let answer = service.send("DELETE", "/devices/pi-1", &[("If-Match", "\"*\"")], "").await;
    assert_eq!(answer.status, 204);
    device.closed().await;
    assert_eq!(disconnected(&mut events).await, Reason::IdentityRemoved);
    assert_eq!(refusal(options).await, Code::NotAuthorized);
}

#[tokio::test]
async fn a_connection_ends_with_its_token_and_the_grace() {
    let hub = hub_with(Options { sas_grace: Duration::from_secs(60), ..Options::default() }).await;
    let mut options = anonymous_options(&hub, DEVICE);
    options.set_credentials(user_name(&hub, DEVICE), device_token(&hub, DEVICE, now() + 1000));
    let mut device = Device::connect(options).await.unwrap();
    let mut events = hub.events();
    hub.set_clock_offset(1050);
    assert_eq!(device.subscribe(METHODS, QoS::AtMostOnce).await, Some(0), "within the grace");
    hub.set_clock_offset(1070);
    device.closed().await;
    assert_eq!(disconnected(&mut events).await, Reason::TokenExpired);
    // The old token does not let it in again, a new one does.
    let mut options = anonymous_options(&hub, DEVICE);
    options.set_credentials(user_name(&hub, DEVICE), device_token(&hub, DEVICE, now() + 1000));
    assert_eq!(refusal(options).await, Code::NotAuthorized);
    let mut options = anonymous_options(&hub, DEVICE);
    options.set_credentials(user_name(&hub, DEVICE), device_token(&hub, DEVICE, now() + 2000));
    Device::connect(options).await.unwrap();
}
