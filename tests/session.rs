//! The hub session on the real wire: Paho, TLS and hubsim, with every fault that hubsim can put
//! in. `tests/session_logic.rs` has what needs virtual time.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::print_stdout,
    missing_docs,
    reason = "tests"
)]

#[path = "support/hub_device.rs"]
mod hub_device;
#[path = "support/proxy.rs"]
mod proxy;

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hub_device::{DEVICE, LIMIT, Setup, TIMING, is_end, reported, write_certificate, write_secret};
use hubsim::{Event, EventKind, Hub, HubError, Options, Reason, Transport};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use twinboot::config;
use twinboot::hub::credential::Source;
use twinboot::hub::paho::Paho;
use twinboot::hub::session::Timing;
use twinboot::hub::transport::{ConnectError, Transport as _};
use twinboot::request::Command;
use twinboot::update::WallTime;

async fn hub() -> Hub {
    Hub::start(Options { sas_grace: Duration::ZERO, ..Options::default() }).await.unwrap()
}

/// Twin and methods work both ways.
async fn assert_works(hub: &Hub, id: &str, device: &mut hub_device::Device) {
    device.online().await;
    let mark = fastrand::u32(..);
    let generation = device.report(json!({"ours": {"mark": mark, "old": null}}));
    device.acknowledged(generation).await;
    assert_eq!(reported(hub, id)["ours"], json!({ "mark": mark }));
    hub.patch_desired(id, json!({ "mark": mark })).unwrap();
    while device.desired().await.document.get("mark") != Some(&json!(mark)) {}
    let answer = hub.invoke(id, "getFirmwareStatus", Value::Null, LIMIT).await.unwrap();
    assert_eq!(answer, (200, json!({"accepted": true})));
}

#[tokio::test]
async fn works_with_every_transport_and_credential() {
    let hub = hub().await;
    for (id, setup, transport) in [
        ("a", Setup::new(&hub, "a"), Transport::Mqtt),
        ("b", Setup::new(&hub, "b").websocket(&hub), Transport::WebSocket),
        ("c", Setup::certificate(&hub, "c"), Transport::Mqtt),
        ("d", Setup::certificate(&hub, "d").websocket(&hub), Transport::WebSocket),
    ] {
        let mut events = hub.events();
        let mut device = setup.start();
        assert_works(&hub, id, &mut device).await;
        let connected = |event: &Event| {
            matches!(
                &event.kind,
                EventKind::Connected { clean: false, keep_alive_s: 120, transport: used, .. }
                    if *used == transport
            )
        };
        events.wait_for(connected, LIMIT).await.unwrap();
        device.stop().await;
        let end = events.wait_for(is_end, LIMIT).await.unwrap();
        assert_eq!(end.kind, EventKind::Disconnected { reason: Reason::ClientDisconnected });
    }
}

#[tokio::test]
async fn trusts_the_certificates_in_a_folder() {
    let hub = hub().await;
    let pem = std::fs::read(hub.ca_path()).unwrap();
    let hash = openssl::x509::X509::from_pem(&pem).unwrap().subject_name_hash();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(format!("{hash:08x}.0")), &pem).unwrap();
    let mut setup = Setup::new(&hub, DEVICE);
    setup.hub.ca_file = folder.path().to_owned();
    let mut device = setup.start();
    assert_works(&hub, DEVICE, &mut device).await;
}

#[tokio::test]
async fn works_as_a_module_and_through_a_gateway() {
    let hub = hub().await;
    hub.add_device(DEVICE).unwrap();
    let id = "pump-01/updater";
    let mut device = Setup::new(&hub, id).start();
    assert_works(&hub, id, &mut device).await;

    let string = hub.add_device("behind").unwrap() + ";GatewayHostName=localhost";
    let mut device = Setup::with_credential(&hub, &string).start();
    assert_works(&hub, "behind", &mut device).await;
}

#[tokio::test]
async fn works_for_ids_with_every_permitted_character() {
    let hub = hub().await;
    let id = "A-z0:.+%_#*?!(),=@;$'";
    // A connection string cannot carry a semicolon; everything else must survive.
    let id = id.replace(';', "");
    let mut device = Setup::new(&hub, &id).start();
    assert_works(&hub, &id, &mut device).await;
}

#[tokio::test]
async fn takes_the_payloads_of_all_callers() {
    let hub = hub().await;
    let mut device = Setup::new(&hub, DEVICE).start();
    device.online().await;
    for payload in [
        r#"{"fwPackageUri":"https://secureurl/"}"#,
        r#""{\"fwPackageUri\":\"https://secureurl/\"}""#,
        r#""https://secureurl/""#,
        "{ fwPackageUri : 'https://secureurl/' }",
    ] {
        let (status, _) =
            hub.invoke_raw(DEVICE, "firmwareUpdate", payload.into(), LIMIT).await.unwrap();
        assert_eq!(status, 200, "{payload}");
        let command = device.seen.lock().unwrap().pop();
        let Some(Command::Install(job, _)) = command else { panic!("{command:?}") };
        assert_eq!(job.url.to_string(), "https://secureurl/");
    }
    let (status, body) =
        hub.invoke(DEVICE, "firmwareUpdate", json!({"fwPackageUri": 1}), LIMIT).await.unwrap();
    assert_eq!(
        (status, &body["key"], &body["rule"]),
        (400, &json!("fwPackageUri"), &json!("must be a string"))
    );
    let (status, body) = hub.invoke(DEVICE, "selfDestruct", Value::Null, LIMIT).await.unwrap();
    assert_eq!(status, 404);
    assert_eq!(body["methods"].as_array().unwrap().len(), 6);
}

#[tokio::test]
async fn a_report_that_would_break_the_hubs_rules_is_made_to_fit() {
    let hub = hub().await;
    let mut device = Setup::new(&hub, DEVICE).start();
    let generation = device.report(json!({"ours": {
        "text": "ä".repeat(4000),
        "list": [1, null, {"a": null, "b": "x"}],
        "a.b": 1,
        "big": u64::MAX,
    }}));
    device.acknowledged(generation).await;
    assert_eq!(reported(&hub, DEVICE)["ours"]["list"], json!([1, {"b": "x"}]));
    let generation = device
        .report((0..60).map(|n| (format!("k{n}"), json!("y".repeat(2000)))).collect::<Value>());
    device.acknowledged(generation).await;
}

/// CONNECT counts as none, then come SUBSCRIBE, the read of the twin, four patches and an answer.
const PACKETS: u64 = 7;

#[tokio::test]
async fn survives_a_cut_at_every_packet() {
    let hub = hub().await;
    for packets in 1..=PACKETS {
        for after in [false, true] {
            let id = format!("cut-{packets}-{after}");
            // A cut is noticed by the cut alone, never by waiting for what does not come.
            let timing = Timing { reply_limit: 10 * LIMIT, ..TIMING };
            let setup = Setup { timing, ..Setup::new(&hub, &id) };
            let faults = hub.faults(&id);
            if after {
                faults.drop_after_packets(packets).unwrap();
            } else {
                faults.drop_before_packet(packets).unwrap();
            }
            let mut events = hub.events();
            let mut device = setup.start();
            for step in 0..4 {
                let generation =
                    device.report(json!({"ours": {"step": step, (format!("k{step}")): 1}}));
                device.acknowledged(generation).await;
            }
            // An answer that is cut off never comes: its caller calls again, as operators do.
            let limit = Duration::from_secs(1);
            while hub.invoke(&id, "getFirmwareStatus", Value::Null, limit).await.is_err() {
                device.online().await;
            }
            let cut =
                |event: &Event| event.kind == EventKind::Disconnected { reason: Reason::Fault };
            events.wait_for(cut, LIMIT).await.unwrap();
            assert_works(&hub, &id, &mut device).await;
            let ours = &reported(&hub, &id)["ours"];
            assert_eq!(ours.as_object().unwrap().len(), 1, "{id}: {ours}");
            device.stop().await;
        }
    }
}

#[tokio::test]
async fn survives_every_fault_of_the_hub() {
    let hub = hub().await;
    let mut device = Setup::new(&hub, DEVICE).start();
    let faults = hub.faults(DEVICE);
    for (name, put_in) in [
        ("drop", Box::new(|| faults.drop_now()) as Box<dyn Fn() -> Result<(), HubError> + '_>),
        ("lose the response", Box::new(|| faults.lose_next_response())),
        ("delay the response", Box::new(|| faults.delay_next_response(Duration::from_secs(3)))),
        ("429", Box::new(|| faults.fail_twin(429, 3))),
        ("500", Box::new(|| faults.fail_twin(500, 3))),
        ("expire the token", Box::new(|| faults.expire_token_now())),
        ("swap parameters", Box::new(|| faults.swap_parameter_order(true))),
        ("encode the dollar", Box::new(|| faults.encode_dollar(true))),
    ] {
        println!("{name}");
        device.online().await;
        put_in().unwrap();
        // The first may go down with the fault.
        device.report(json!({"ours": {"fault": name, "first": true}}));
        let generation = device.report(json!({"ours": {"fault": name}}));
        device.acknowledged(generation).await;
        // A cut is noticed a moment after it; what was acknowledged before it still stands.
        tokio::time::timeout(LIMIT, async {
            while reported(&hub, DEVICE)["ours"] != json!({ "fault": name })
                || !hub.connected(DEVICE)
                || !device.status.borrow().online
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .unwrap_or_else(|_| panic!("{name}: {}", reported(&hub, DEVICE)));
        assert_works(&hub, DEVICE, &mut device).await;
    }
}

#[tokio::test]
async fn a_call_that_the_hub_delivers_twice_does_no_harm() {
    let hub = hub().await;
    let mut device = Setup::new(&hub, DEVICE).start();
    device.online().await;
    for _ in 0..20 {
        hub.faults(DEVICE).deliver_next_method_twice().unwrap();
        let answer = hub.invoke(DEVICE, "reboot", Value::Null, LIMIT).await.unwrap();
        assert_eq!(answer, (200, json!({"accepted": true})));
    }
    assert_works(&hub, DEVICE, &mut device).await;
}

#[tokio::test]
async fn a_hub_that_hears_but_does_not_answer_is_left_and_found_again() {
    let hub = hub().await;
    let mut device = Setup::new(&hub, DEVICE).start();
    device.online().await;
    hub.faults(DEVICE).stall(true).unwrap();
    let generation = device.report(json!({"ours": 1}));
    device.status_with("offline").await;
    hub.faults(DEVICE).stall(false).unwrap();
    device.acknowledged(generation).await;
    assert_works(&hub, DEVICE, &mut device).await;
}

#[tokio::test]
async fn comes_back_when_the_hub_comes_back() {
    let hub = hub().await;
    let mut device = Setup::new(&hub, DEVICE).start();
    device.online().await;
    let away = hub.stop().await;
    device.status_with("no TCP connection to localhost").await;
    let generation = device.report(json!({"ours": "while away"}));
    let hub = away.start().await.unwrap();
    device.acknowledged(generation).await;
    assert_works(&hub, DEVICE, &mut device).await;
}

#[tokio::test]
async fn tells_people_why_there_is_no_session() {
    let hub = hub().await;
    let elsewhere = SocketAddr::from(([127, 0, 0, 2], 0));
    let stranger = Hub::start(Options { mqtt: elsewhere, ..Options::default() }).await.unwrap();

    let mut setup = Setup::new(&hub, DEVICE);
    // Not the stranger's authority: hubs of one process share the key of theirs.
    setup.hub.ca_file = setup.path("other-ca.pem");
    write_certificate("other", &setup.hub.ca_file, &setup.path("other-ca.key"));
    setup.start().status_with("is not trusted").await;

    let mut setup = Setup::new(&stranger, DEVICE);
    setup.hub.host = Some("127.0.0.2".to_owned());
    setup.start().status_with("is not for 127.0.0.2").await;

    let mut setup = Setup::new(&hub, DEVICE);
    setup.hub.host = Some("hub.invalid".to_owned());
    setup.start().status_with("the name hub.invalid has no address").await;

    let string = stranger.add_device(DEVICE).unwrap();
    let mut setup = Setup::with_credential(&hub, &string);
    setup.hub.host = Some("localhost".to_owned());
    let credential = setup.hub.credential_file.clone();
    let mut device = setup.start();
    let status = device.status_with("MQTT code 5 (not authorized)").await;
    assert!(
        !status.text.contains(string.split_once("SharedAccessKey=").unwrap().1),
        "{}",
        status.text
    );
    // The right key is used as soon as it is there.
    write_secret(&credential, &hub.device_connection_string(DEVICE).unwrap());
    assert_works(&hub, DEVICE, &mut device).await;
    device.stop().await;

    hub.faults(DEVICE).close_instead_of_connack(true).unwrap();
    let mut device = Setup::new(&hub, DEVICE).start();
    device.status_with("closed the connection without an answer").await;
    hub.faults(DEVICE).close_instead_of_connack(false).unwrap();
    hub.faults(DEVICE).refuse_connections(Some(3)).unwrap();
    device.status_with("MQTT code 3 (unavailable)").await;
    hub.faults(DEVICE).refuse_connections(None).unwrap();
    assert_works(&hub, DEVICE, &mut device).await;
}

/// A hub in trouble is not asked twice by every device at every try.
#[tokio::test]
async fn one_diagnosis_does_for_many_failures() {
    let hub = hub().await;
    let broken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut setup = Setup::new(&hub, DEVICE);
    setup.hub.host = Some("127.0.0.1".to_owned());
    setup.hub.port = NonZeroU16::new(broken.local_addr().unwrap().port());
    let accepted = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&accepted);
    tokio::spawn(async move {
        while broken.accept().await.is_ok() {
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    let credential = Source::new(&setup.hub, None).load().unwrap();
    let now = WallTime::from_unix_ms(1_900_000_000_000);
    let login = credential.login(now, Duration::from_secs(60)).unwrap();
    let mut paho = Paho::new(&setup.hub);
    for attempt in 1..=5 {
        let error = paho.connect(&login).await.unwrap_err();
        assert!(matches!(error, ConnectError::Unreachable(_)), "{attempt}: {error:?}");
    }
    assert_eq!(accepted.load(Ordering::SeqCst), 5 + 1);
}

#[tokio::test]
async fn a_fight_over_the_identity_is_told() {
    let hub = hub().await;
    let mut first = Setup::new(&hub, DEVICE).start();
    first.online().await;
    let mut events = hub.events();
    let _second = Setup::new(&hub, DEVICE).start();
    let thrown_out =
        |event: &Event| event.kind == EventKind::Disconnected { reason: Reason::TakenOver };
    events.wait_for(thrown_out, LIMIT).await.unwrap();
    first.status_with("another device or program").await;
}

#[tokio::test]
async fn tokens_are_renewed_without_a_lost_call_or_report() {
    let hub = hub().await;
    tokio::join!(
        renewals(&hub, "tcp", Setup::new(&hub, "tcp")),
        renewals(&hub, "ws", Setup::new(&hub, "ws").websocket(&hub)),
    );
}

/// Calls and reports without a pause until the token was renewed twice.
async fn renewals(hub: &Hub, id: &str, setup: Setup) {
    let timing = Timing { token_lifetime: Duration::from_secs(4), ..TIMING };
    let mut device = Setup { timing, ..setup }.start();
    device.online().await;
    let mut events = hub.events();
    let (mut answered, mut renewed, mut step) = (0, 0, 0_u64);
    let mut reported = Value::Null;
    while renewed < 2 {
        step += 1;
        device.report(json!({"ours": {"step": step}}));
        match hub.invoke(id, "getFirmwareStatus", Value::Null, LIMIT).await {
            Ok((200, _)) => answered += 1,
            // The hub tells the caller at once that the device is between two connections.
            Err(HubError::NotOnline { .. }) => tokio::time::sleep(Duration::from_millis(5)).await,
            other => panic!("a call was lost: {other:?}"),
        }
        while let Some(event) = events.try_next() {
            if event.identity.is_none_or(|identity| identity.to_string() != id) {
                continue;
            }
            match event.kind {
                EventKind::Connected { .. } => renewed += 1,
                EventKind::Disconnected { reason } => {
                    assert_eq!(reason, Reason::ClientDisconnected, "{id}");
                }
                EventKind::Reported { patch, status: 204, .. } => reported = patch,
                EventKind::Warning { message } => panic!("{id}: {message}"),
                _ => {}
            }
        }
    }
    assert!(answered > 10 && reported["ours"]["step"].as_u64() > Some(10), "{answered} {reported}");
    let generation = device.report(json!({"ours": {"step": "last"}}));
    device.acknowledged(generation).await;
    assert_eq!(self::reported(hub, id)["ours"], json!({"step": "last"}));
    device.stop().await;
}

#[tokio::test]
async fn goes_through_an_http_proxy() {
    let hub = hub().await;
    let (proxy, mut tunnels) = proxy::start().await;
    for (id, websocket) in [("tcp", false), ("ws", true)] {
        let mut setup = Setup::new(&hub, id);
        if websocket {
            setup = setup.websocket(&hub);
        }
        let text = format!("[hub]\nproxy = \"{proxy}\"");
        setup.hub.proxy = config::Config::parse(&text).unwrap().hub.proxy;
        let port = setup.hub.port.unwrap();
        let mut device = setup.start();
        assert_works(&hub, id, &mut device).await;
        assert_eq!(tunnels.try_recv().as_deref(), Ok(format!("localhost:{port}").as_str()));
    }
}

#[tokio::test]
async fn tokens_pass_the_checker_of_the_hub() {
    let hub = hub().await;
    hub.add_device(DEVICE).unwrap();
    for id in [DEVICE, "pump-01/updater", "a%2Fb", "x+y=z", "A-z0:.+%_#*?!(),=@$'"] {
        let setup = Setup::new(&hub, id);
        let credential = Source::new(&setup.hub, None).load().unwrap();
        let key = hub.device_connection_string(id).unwrap();
        let key = key.split_once(";SharedAccessKey=").unwrap().1;
        let now = WallTime::from_unix_ms(1_900_000_000_000);
        let login = credential.login(now, Duration::from_secs(60)).unwrap();
        let token = login.password.unwrap();
        let token = hubsim::sas::Token::parse(token.expose_secret()).unwrap();
        let resource = match id.split_once('/') {
            Some((device, module)) => format!("devices/{device}/modules/{module}"),
            None => format!("devices/{id}"),
        };
        assert!(token.signed_by(key), "{id}");
        assert!(!token.signed_by("bm90IHRoZSBrZXk="), "{id}");
        assert!(token.covers(&format!("{}/{resource}", hub.hub_name())), "{id}");
        assert!(!token.covers(&format!("{}/devices/other", hub.hub_name())), "{id}");
        assert_eq!((token.expiry(), token.policy()), (1_900_000_060, None));
    }
}

/// Prints the figures and asserts none: machines differ.
#[tokio::test]
async fn how_long_a_method_takes() {
    let hub = hub().await;
    for (id, setup) in
        [("tcp", Setup::new(&hub, "tcp")), ("ws", Setup::new(&hub, "ws").websocket(&hub))]
    {
        let mut device = setup.start();
        device.online().await;
        let mut times = Vec::new();
        for _ in 0..200 {
            let began = Instant::now();
            hub.invoke(id, "getFirmwareStatus", Value::Null, LIMIT).await.unwrap();
            times.push(began.elapsed());
        }
        times.sort();
        println!("{id}: p50 {:?}, p99 {:?}, worst {:?}", times[100], times[198], times[199]);
        device.stop().await;
    }
}
