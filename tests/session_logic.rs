//! The hub session against a scripted connection, in virtual time: what it sends, when it comes
//! back, and what it does when the hub misbehaves. `tests/session.rs` has the real wire.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::as_conversions,
    missing_docs,
    reason = "tests"
)]

#[path = "support/hub_script.rs"]
mod hub_script;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use hub_script::{BOOT_UNIX_MS, HOUR, MINUTE, Plan, Rig, Seen, TIMING, object, ok, twin};
use serde_json::{Map, Value, json};
use tokio::time::Instant;
use twinboot::hub::Desired;
use twinboot::hub::session::Timing;
use twinboot::hub::topic::METHODS;
use twinboot::hub::twin::merge;
use twinboot::request::{Answer, Command};

/// Longest first delay after a good connection.
const RETURN_SPREAD: Duration = Duration::from_secs(20);

fn desired(document: Value, version: u64, patch: Option<Value>) -> Desired {
    Desired { document: object(document), version, patch: patch.map(object) }
}

#[tokio::test(start_paused = true)]
async fn reads_the_twin_after_the_subscriptions_and_reports_what_differs() {
    let mut rig = Rig::new();
    rig.report(1, json!({"ours": {"a": 1, "b": 2}, "gone": null}));
    rig.connect_and_subscribe().await;
    let id = rig.read_request().await;
    assert!(!rig.status.borrow().online, "not before the twin was read");
    let reported = json!({"ours": {"a": 1, "old": 3}, "gone": 4, "theirs": 5});
    rig.answer(200, &id, &twin(json!({"x": 7, "$version": 9}), reported));

    let (id, patch) = rig.patch_request().await;
    assert_eq!(patch, json!({"ours": {"b": 2, "old": null}, "gone": null}));
    assert_eq!(rig.desired().await, desired(json!({"x": 7}), 9, None));
    assert_eq!(rig.status.borrow().acknowledged, 0);
    rig.answer(204, &id, &Value::Null);
    rig.acknowledged(1).await;
    assert_eq!(rig.status.borrow().text, "connected to contoso.azure-devices.net as pump-01");
    rig.assert_silence(10 * MINUTE).await;
}

#[tokio::test(start_paused = true)]
async fn a_report_that_the_hub_holds_already_is_acknowledged_without_a_patch() {
    let mut rig = Rig::new();
    rig.report(5, json!({"ours": {"a": 1}}));
    rig.online(json!({}), json!({"ours": {"a": 1}})).await;
    rig.acknowledged(5).await;
    rig.assert_silence(MINUTE).await;
}

#[tokio::test(start_paused = true)]
async fn desired_patches_count_by_their_version() {
    let mut rig = Rig::new();
    rig.connect_and_subscribe().await;
    let id = rig.read_request().await;
    // Before the answer: one that the twin holds already, and two newer ones in the wrong order.
    rig.notify(4, &json!({"a": "old"}));
    rig.notify(6, &json!({"c": 3}));
    rig.notify(5, &json!({"a": null, "b": 2}));
    rig.answer(200, &id, &twin(json!({"a": 1, "$version": 4}), json!({})));
    let patch = json!({"a": null, "b": 2, "c": 3});
    assert_eq!(rig.desired().await, desired(json!({"b": 2, "c": 3}), 6, Some(patch)));

    // Twice the same, then the next.
    rig.notify(6, &json!({"c": 3}));
    rig.notify(7, &json!({"c": 3}));
    let again = desired(json!({"b": 2, "c": 3}), 7, Some(json!({"c": 3})));
    assert_eq!(rig.desired().await, again);

    // One is missing: the twin is read, and only then is something handed on.
    rig.notify(9, &json!({"d": 4}));
    let id = rig.read_request().await;
    rig.answer(200, &id, &twin(json!({"b": 2, "e": 5, "d": 4, "$version": 9}), json!({})));
    assert_eq!(rig.desired().await, desired(json!({"b": 2, "e": 5, "d": 4}), 9, None));
    rig.assert_silence(MINUTE).await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_busy_gets_the_newest_document_and_all_patches() {
    let mut rig = Rig::new();
    rig.online(json!({"a": 1}), json!({})).await;
    assert_eq!(rig.desired().await.version, 1);
    for (version, patch) in
        [(2, json!({"a": 2})), (3, json!({"b": {"x": 1}})), (4, json!({"b": {"y": 2}, "a": null}))]
    {
        rig.notify(version, &patch);
    }
    // A round trip, so that all three have arrived before the agent looks.
    rig.call("nothing", "r1", &Value::Null);
    rig.method_answer().await;
    let patch = json!({"a": null, "b": {"x": 1, "y": 2}});
    assert_eq!(rig.desired().await, desired(json!({"b": {"x": 1, "y": 2}}), 4, Some(patch)));
}

#[tokio::test(start_paused = true)]
async fn each_call_is_answered_on_its_own() {
    let mut rig = Rig::new();
    rig.online(json!({}), json!({})).await;
    rig.call("firmwareUpdate", "slow", &json!({"fwPackageUri": "https://h/fw"}));
    let slow = rig.request().await;
    assert!(matches!(slow.command, Command::Install(..)));
    rig.call("getFirmwareStatus", "quick", &Value::Null);
    rig.request().await.reply.send(ok()).unwrap();
    assert_eq!(rig.method_answer().await, (200, "quick".into(), json!({"done": true})));
    rig.assert_silence(MINUTE).await;
    slow.reply.send(Answer::refused(409, "busy", "another update runs")).unwrap();
    let (status, id, body) = rig.method_answer().await;
    assert_eq!((status, id.as_str(), &body["error"]), (409, "slow", &json!("busy")));
}

#[tokio::test(start_paused = true)]
async fn answers_by_itself_what_the_agent_need_not_see() {
    let mut rig = Rig::new();
    rig.online(json!({}), json!({})).await;
    rig.call("formatDisk", "1", &Value::Null);
    let (status, _, body) = rig.method_answer().await;
    assert_eq!(status, 404);
    assert!(body["methods"].as_array().unwrap().contains(&json!("firmwareUpdate")));
    rig.call("firmwareUpdate", "2", &json!({"fwPackageUri": "http://h/fw"}));
    let (status, _, body) = rig.method_answer().await;
    assert_eq!((status, &body["key"]), (400, &json!("fwPackageUri")));

    // The agent is going down.
    rig.call("reboot", "3", &Value::Null);
    drop(rig.request().await.reply);
    assert_eq!(rig.method_answer().await.0, 500);

    // The agent does not listen: its channel holds four.
    for id in 10..14 {
        rig.call("reboot", &id.to_string(), &Value::Null);
    }
    rig.call("reboot", "14", &Value::Null);
    let (status, id, body) = rig.method_answer().await;
    assert_eq!((status, id.as_str(), &body["error"]), (503, "14", &json!("busy")));
}

#[tokio::test(start_paused = true)]
async fn a_call_that_comes_twice_while_it_waits_is_one_call() {
    let mut rig = Rig::new();
    rig.online(json!({}), json!({})).await;
    for _ in 0..2 {
        rig.call("reboot", "same", &Value::Null);
    }
    rig.request().await.reply.send(ok()).unwrap();
    assert_eq!(rig.method_answer().await.1, "same");
    rig.assert_silence(MINUTE).await;
    assert!(rig.requests.try_recv().is_err());
    // Request ids may come again later.
    rig.call("reboot", "same", &Value::Null);
    rig.request().await.reply.send(ok()).unwrap();
    assert_eq!(rig.method_answer().await.1, "same");
}

#[tokio::test(start_paused = true)]
async fn a_patch_without_an_answer_is_settled_by_reading() {
    let mut rig = Rig::new();
    rig.online(json!({}), json!({})).await;
    rig.report(1, json!({"ours": {"phase": "one", "extra": true}}));
    let (lost, _) = rig.patch_request().await;
    // A newer report waits: one patch at a time.
    rig.report(2, json!({"ours": {"phase": "two"}}));
    let before = Instant::now();
    let id = rig.read_request().await;
    assert_eq!(before.elapsed(), TIMING.reply_limit);
    // The late answer settles nothing any more.
    rig.answer(204, &lost, &Value::Null);
    // The first patch had been applied; what it brought and nobody wants any more must go.
    rig.answer(200, &id, &twin(json!({}), json!({"ours": {"phase": "one", "extra": true}})));
    let (id, patch) = rig.patch_request().await;
    assert_eq!(patch, json!({"ours": {"phase": "two", "extra": null}}));
    assert_eq!(rig.status.borrow().acknowledged, 0);
    rig.answer(204, &id, &Value::Null);
    rig.acknowledged(2).await;
    assert_eq!(rig.desired().await.version, 1);
    assert!(rig.desired.try_recv().is_err(), "the desired section did not change");
}

#[tokio::test(start_paused = true)]
async fn a_throttled_report_comes_back_as_the_newest() {
    let mut rig = Rig::new();
    rig.online(json!({}), json!({})).await;
    let began = Instant::now();
    let mut sent = 0;
    rig.report(1, json!({"ours": {"percent": 0}}));
    for generation in 2..8 {
        let (id, _) = rig.patch_request().await;
        sent += 1;
        rig.answer(429, &id, &json!({"errorCode": 429_001, "message": "Throttled"}));
        let status = rig.status_with("throttles").await;
        assert_eq!(status.acknowledged, 0, "refused is not acknowledged");
        // Ten reports while the session holds back: they are one in the end.
        for step in 0..10 {
            rig.report(
                generation * 10 + step,
                json!({"ours": {"percent": generation * 10 + step}}),
            );
        }
    }
    let (id, patch) = rig.patch_request().await;
    assert_eq!(patch, json!({"ours": {"percent": 79}}));
    // Six delays of up to 1, 2, 4 ... 32 s: together less than one second once in 20 million runs.
    assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
    rig.answer(204, &id, &Value::Null);
    rig.acknowledged(79).await;
    assert_eq!(sent, 6);
    assert!(!rig.status.borrow().text.contains("throttles"));
    rig.assert_silence(10 * MINUTE).await;
}

#[tokio::test(start_paused = true)]
async fn after_trouble_inside_the_hub_the_twin_is_read_again() {
    let mut rig = Rig::new();
    rig.online(json!({}), json!({})).await;
    rig.report(1, json!({"ours": 1}));
    let (id, _) = rig.patch_request().await;
    rig.answer(500, &id, &Value::Null);
    let id = rig.read_request().await;
    rig.answer(503, &id, &Value::Null);
    let id = rig.read_request().await;
    // It had been applied after all.
    rig.answer(200, &id, &twin(json!({}), json!({"ours": 1})));
    rig.acknowledged(1).await;
    rig.assert_silence(MINUTE).await;
}

#[tokio::test(start_paused = true)]
async fn a_refused_report_is_told_and_not_repeated() {
    let mut rig = Rig::new();
    rig.online(json!({}), json!({})).await;
    rig.report(1, json!({"ours": "bad"}));
    let (id, _) = rig.patch_request().await;
    rig.answer(400, &id, &json!({"errorCode": 400_004, "message": "too deep"}));
    let status = rig.status_with("the hub refuses the report (400: too deep)").await;
    assert!(status.online, "methods still work");
    rig.assert_silence(HOUR / 2).await;
    // The same content in a newer report stays where it is; other content is tried.
    rig.report(2, json!({"ours": "bad"}));
    rig.assert_silence(MINUTE).await;
    rig.report(3, json!({"ours": "good"}));
    let (id, patch) = rig.patch_request().await;
    assert_eq!(patch, json!({"ours": "good"}));
    rig.answer(204, &id, &Value::Null);
    rig.acknowledged(3).await;
    assert!(!rig.status.borrow().text.contains("refuses"));
}

/// Answers the next patches: 400 as long as the twin would hold more than `room` bytes. Returns
/// what it holds after the first that fits.
async fn fill(rig: &mut Rig, mut held: Map<String, Value>, room: usize) -> (usize, Value) {
    for refused in 0.. {
        let (id, patch) = rig.patch_request().await;
        let mut after = held.clone();
        merge(&mut after, &object(patch));
        if Value::Object(after.clone()).to_string().len() <= room {
            held = after;
            rig.answer(204, &id, &Value::Null);
            return (refused, Value::Object(held));
        }
        rig.answer(400, &id, &json!({"errorCode": 400_009, "message": "the twin is too large"}));
    }
    unreachable!()
}

#[tokio::test(start_paused = true)]
async fn a_report_that_has_no_room_goes_without_the_less_important() {
    let report = |phase: &str| {
        json!({
            "iothubDM": {"firmwareUpdate": {"status": "waiting"}},
            "firmware": {"currentFwVersion": "1"},
            "firmwareStatus": "standBy", "logTime": null,
            "twinboot": {
                "bootedSlot": "A", "update": {"phase": phase}, "lastUpdate": {"result": "failed"},
                "confirmed": true, "slots": {"A": {"state": "good", "digest": "sha256:00"}},
                "notices": ["one", "two"],
            },
        })
    };
    let theirs = json!({"theirs": "x".repeat(500)});
    let room = |ours: Value| {
        let mut all = object(theirs.clone());
        all.extend(object(ours));
        Value::Object(all).to_string().len()
    };
    let mut rig = Rig::with(Timing { token_lifetime: 24 * HOUR, ..TIMING });
    rig.online(json!({}), theirs.clone()).await;
    rig.report(1, report("idle"));
    let slots = json!({"A": {"state": "good"}});
    let own = json!({"bootedSlot": "A", "update": {"phase": "idle"},
                     "lastUpdate": {"result": "failed"}, "confirmed": true, "slots": slots});
    let fits = json!({"twinboot": own, "iothubDM": {"firmwareUpdate": {"status": "waiting"}}});
    let began = Instant::now();
    let (refused, held) = fill(&mut rig, object(theirs.clone()), room(fits.clone())).await;
    assert_eq!(refused, 4, "notices, digests, firmwareStatus and firmware had to go");
    assert_eq!(began.elapsed(), Duration::ZERO, "no time is lost on the way");
    assert_eq!((&held["twinboot"], &held["iothubDM"]), (&fits["twinboot"], &fits["iothubDM"]));
    rig.acknowledged(1).await;
    let status = rig.status_with("it goes without: the failed boot's journal, notices").await;
    assert!(status.text.contains("(400: the twin is too large)"), "{}", status.text);

    // From here on small at once, and smaller still if it must be: what is told no more is deleted.
    rig.report(2, report("downloading"));
    let (refused, held) = fill(&mut rig, object(held), room(json!({})) + 130).await;
    assert_eq!(refused, 2);
    let own = json!({"bootedSlot": "A", "update": {"phase": "downloading"},
                     "lastUpdate": {"result": "failed"}});
    assert_eq!(held, json!({"theirs": theirs["theirs"], "twinboot": own}));
    rig.acknowledged(2).await;
    assert_eq!(rig.status.borrow().answered, 2);

    // After an hour, and in every new connection, the whole of it is tried again.
    let (id, patch) = rig.patch_request().await;
    assert_eq!(began.elapsed(), HOUR);
    assert_eq!(patch["firmware"], json!({"currentFwVersion": "1"}));
    rig.answer(204, &id, &Value::Null);
    rig.status.wait_for(|status| !status.text.contains("goes without")).await.unwrap();
    rig.assert_silence(2 * HOUR).await;
}

#[tokio::test(start_paused = true)]
async fn a_refused_report_has_been_answered() {
    let mut rig = Rig::new();
    rig.online(json!({}), json!({})).await;
    rig.report(1, json!({"ours": "bad"}));
    for status in [429, 400] {
        let (id, _) = rig.patch_request().await;
        assert_eq!(rig.status.borrow().answered, u64::from(status == 400));
        rig.answer(status, &id, &Value::Null);
        rig.status_with(&format!("({status})")).await;
        let shown = rig.status.borrow().clone();
        assert_eq!((shown.online, shown.acknowledged, shown.answered), (true, 0, 1));
    }
    // A newer report with the same content is answered by the same refusal.
    rig.report(7, json!({"ours": "bad"}));
    rig.status.wait_for(|status| status.answered == 7).await.unwrap();
    rig.cut();
    rig.status_with("offline").await;
    assert_eq!(rig.status.borrow().answered, 0, "a new connection has to show it anew");
}

#[tokio::test(start_paused = true)]
async fn refused_reports_that_keep_changing_make_no_storm() {
    let mut rig = Rig::new();
    rig.online(json!({}), json!({})).await;
    let began = Instant::now();
    let mut sent = 0;
    for second in 1..=600 {
        rig.report(second, json!({"bad": second}));
        while let Ok(seen) =
            tokio::time::timeout_at(began + Duration::from_secs(second), rig.next()).await
        {
            let Seen::Publish { topic, .. } = seen else { panic!("{seen:?}") };
            let (_, id) = topic.split_once("$rid=").unwrap();
            rig.answer(400, id, &Value::Null);
            sent += 1;
        }
    }
    assert!(sent < 60, "{sent} patches in ten minutes");
}

#[tokio::test(start_paused = true)]
async fn renews_the_token_in_a_quiet_moment() {
    let mut rig = Rig::new();
    let began = Instant::now();
    let first = rig.online(json!({}), json!({})).await;
    assert_eq!(rig.next().await, Seen::Unsubscribe(METHODS.to_owned()));
    assert_eq!(began.elapsed(), HOUR.mul_f64(0.8));
    assert_eq!(rig.next().await, Seen::Disconnect);
    let second = rig.online(json!({}), json!({})).await;
    assert_eq!(began.elapsed(), HOUR.mul_f64(0.8), "at once");
    let expiry = |token: &str| token.split_once("&se=").unwrap().1.parse::<i64>().unwrap();
    assert_eq!(expiry(&first), BOOT_UNIX_MS / 1000 + 3600);
    assert_eq!(expiry(&second), BOOT_UNIX_MS / 1000 + 2880 + 3600);
}

#[tokio::test(start_paused = true)]
async fn renewal_waits_for_calls_and_reports() {
    let mut rig = Rig::new();
    rig.online(json!({}), json!({})).await;
    rig.call("firmwareUpdate", "r", &json!("https://h/fw"));
    let request = rig.request().await;
    tokio::time::sleep(HOUR.mul_f64(0.81)).await;
    rig.report(1, json!({"ours": 1}));
    let (id, _) = rig.patch_request().await;
    request.reply.send(ok()).unwrap();
    assert_eq!(rig.method_answer().await.1, "r");
    rig.assert_silence(Duration::from_secs(5)).await;
    rig.answer(204, &id, &Value::Null);
    assert_eq!(rig.next().await, Seen::Unsubscribe(METHODS.to_owned()));
    assert_eq!(rig.next().await, Seen::Disconnect);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_slips_in_while_the_subscription_ends_is_answered_before_goodbye() {
    let mut rig = Rig::new();
    rig.online(json!({}), json!({})).await;
    rig.call_before_unsuback("reboot", "late");
    assert_eq!(rig.next().await, Seen::Unsubscribe(METHODS.to_owned()));
    rig.request().await.reply.send(ok()).unwrap();
    assert_eq!(rig.method_answer().await.1, "late");
    assert_eq!(rig.next().await, Seen::Disconnect);
}

#[tokio::test(start_paused = true)]
async fn renewal_does_not_wait_for_ever_and_the_answer_follows() {
    let mut rig = Rig::new();
    let began = Instant::now();
    rig.online(json!({}), json!({})).await;
    rig.call("firmwareUpdate", "r", &json!("https://h/fw"));
    let request = rig.request().await;
    assert_eq!(rig.next().await, Seen::Unsubscribe(METHODS.to_owned()));
    assert_eq!(began.elapsed(), HOUR.mul_f64(0.95));
    assert_eq!(rig.next().await, Seen::Disconnect);
    rig.online(json!({}), json!({})).await;
    request.reply.send(ok()).unwrap();
    assert_eq!(rig.method_answer().await, (200, "r".into(), json!({"done": true})));
}

#[tokio::test(start_paused = true)]
async fn comes_back_after_a_loss_with_a_new_token_and_settles_the_report() {
    let mut rig = Rig::new();
    rig.report(1, json!({"ours": 1}));
    let first = rig.online(json!({}), json!({})).await;
    let _in_flight = rig.patch_request().await;
    tokio::time::sleep(2 * Duration::from_secs(1)).await;
    rig.cut();
    let status = rig.status_with("offline: the connection to the hub was lost").await;
    assert_eq!((status.online, status.acknowledged), (false, 0));
    let second = rig.online(json!({}), json!({})).await;
    assert_ne!(first, second);
    let (id, patch) = rig.patch_request().await;
    assert_eq!(patch, json!({"ours": 1}));
    rig.answer(204, &id, &Value::Null);
    rig.acknowledged(1).await;
}

#[tokio::test(start_paused = true)]
async fn a_hub_that_stops_answering_is_left() {
    let mut rig = Rig::new();
    rig.connect_and_subscribe().await;
    for _ in 0..2 {
        rig.read_request().await;
    }
    assert_eq!(rig.next().await, Seen::Disconnect);
    rig.status_with("the hub does not answer").await;
    rig.online(json!({}), json!({})).await;
}

/// CONNECTs within `time`, each accepted or not by plan and cut at once.
async fn connects_within(rig: &mut Rig, time: Duration) -> usize {
    let until = Instant::now() + time;
    let mut connects = 0;
    while let Ok(seen) = tokio::time::timeout_at(until, rig.next()).await {
        connects += usize::from(matches!(seen, Seen::Connect { .. }));
        rig.cut();
    }
    connects
}

#[tokio::test(start_paused = true)]
async fn a_hub_that_is_away_is_tried_with_growing_delays() {
    let mut rig = Rig::new();
    rig.always(|| Plan::Refuse(3));
    let connects = connects_within(&mut rig, 10 * HOUR).await;
    // On average one every 150 s once the ceiling is reached.
    assert!((150..400).contains(&connects), "{connects} in ten hours");
    assert!(rig.status_with("unavailable").await.out_of_reach);
}

#[tokio::test(start_paused = true)]
async fn a_refused_credential_makes_no_storm_and_is_told() {
    for code in [1, 2, 4, 5] {
        let mut rig = Rig::new();
        rig.plan((0..1000).map(|_| Plan::Refuse(code)));
        let connects = connects_within(&mut rig, 10 * HOUR).await;
        assert!((55..=125).contains(&connects), "{connects} in ten hours");
        let status = rig.status_with(&format!("MQTT code {code}")).await;
        assert!(!status.out_of_reach, "{}", status.text);
        let file = rig.credential.path().display().to_string();
        for part in ["pump-01", "contoso.azure-devices.net", &file, "the clock is right (2030-"] {
            assert!(status.text.contains(part), "{part} is not in {}", status.text);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_first_refusal_is_tried_again_soon_enough_for_a_trial() {
    let mut rig = Rig::new();
    rig.plan((0..5).map(|_| Plan::Refuse(5)));
    rig.connect().await;
    for part in [8, 4, 2, 1, 1] {
        let refused = Instant::now();
        rig.connect().await;
        let longest = TIMING.refused_retry / part;
        assert!((longest / 2..=longest).contains(&refused.elapsed()), "{:?}", refused.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_hub_that_closes_twice_without_a_word_refuses() {
    let mut rig = Rig::new();
    rig.always(|| Plan::Close);
    let began = Instant::now();
    rig.connect().await;
    rig.connect().await;
    assert!(began.elapsed() <= 2 * TIMING.retry_min, "the first may be an accident");
    rig.connect().await;
    assert!(began.elapsed() >= TIMING.refused_retry / 16);
    rig.status_with("closed the connection without an answer: check that pump-01 exists").await;
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_ends_the_wait_after_a_refusal() {
    let mut rig = Rig::new();
    let booted = Instant::now();
    rig.plan((0..4).map(|_| Plan::Refuse(5)));
    for _ in 0..4 {
        rig.connect().await;
    }
    rig.assert_silence(MINUTE).await;
    rig.clock.set(Some(BOOT_UNIX_MS + 86_400_000));
    let set = Instant::now();
    let token = rig.online(json!({}), json!({})).await;
    assert!(set.elapsed() <= Duration::from_secs(2));
    let since_boot_s = i64::try_from(booted.elapsed().as_secs()).unwrap();
    let expiry_s = BOOT_UNIX_MS / 1000 + 86_400 + since_boot_s + 3600;
    let (_, expiry) = token.split_once("&se=").unwrap();
    assert!((expiry_s - 3..=expiry_s).contains(&expiry.parse().unwrap()), "{expiry}");
}

#[tokio::test(start_paused = true)]
async fn waits_for_the_clock() {
    let mut rig = Rig::new();
    rig.clock.set(None);
    assert!(rig.status_with("waiting for the clock to be set").await.out_of_reach);
    rig.assert_silence(HOUR).await;
    rig.clock.set(Some(BOOT_UNIX_MS));
    let set = Instant::now();
    rig.online(json!({}), json!({})).await;
    assert!(set.elapsed() <= Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_credential_that_appears_is_used() {
    let mut rig = Rig::new();
    let text = std::fs::read_to_string(rig.credential.path()).unwrap();
    std::fs::write(rig.credential.path(), "HostName=h;DeviceId=d;SharedAccessKey=*secret*")
        .unwrap();
    let status = rig.status_with("SharedAccessKey: must be base64").await;
    assert!(!status.text.contains("secret"));
    assert!(!status.out_of_reach, "{}", status.text);
    rig.assert_silence(10 * MINUTE).await;
    std::fs::write(rig.credential.path(), text).unwrap();
    let fixed = Instant::now();
    rig.online(json!({}), json!({})).await;
    assert!(fixed.elapsed() <= TIMING.retry_max);
}

#[tokio::test(start_paused = true)]
async fn a_ready_made_token_that_is_over_is_told() {
    let mut rig = Rig::new();
    let token = "HostName=h;DeviceId=d;SharedAccessSignature=SharedAccessSignature sr=h&sig=x&se=9";
    std::fs::write(rig.credential.path(), token).unwrap();
    rig.status_with("expired at 1970-01-01T00:00:09.000Z, put a new one").await;
    rig.assert_silence(HOUR).await;
}

#[tokio::test(start_paused = true)]
async fn two_programs_with_one_identity_are_suspected() {
    let mut rig = Rig::new();
    for loss in 1..=3 {
        rig.online(json!({}), json!({})).await;
        assert!(!rig.status.borrow().text.contains("same identity"));
        rig.cut();
        rig.status_with("offline").await;
        if loss == 3 {
            let status = rig.status_with("another device or program").await;
            assert!(status.text.contains("3 times in a row"), "{}", status.text);
            assert!(status.text.contains("pump-01"), "{}", status.text);
        }
    }
    // The fight does not become a storm.
    let connects = connects_within(&mut rig, HOUR).await;
    assert!(connects < 60, "{connects} in an hour");
}

#[tokio::test(start_paused = true)]
async fn a_stable_connection_forgives_what_was_before() {
    let mut rig = Rig::new();
    rig.plan((0..8).map(|_| Plan::Refuse(3)));
    for _ in 0..8 {
        rig.connect().await;
    }
    rig.online(json!({}), json!({})).await;
    // Nothing is left of the long delays, also where the connection then breaks at once.
    for stable in [true, false] {
        tokio::time::sleep(if stable { 2 * MINUTE } else { Duration::ZERO }).await;
        rig.cut();
        let cut = Instant::now();
        rig.connect_and_subscribe().await;
        rig.read_request().await;
        let longest = if stable { RETURN_SPREAD } else { TIMING.retry_min };
        assert!(cut.elapsed() <= longest, "{:?}", cut.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_fleet_that_loses_a_hub_does_not_come_back_in_one_second() {
    let mut rig = Rig::new();
    let mut delays = Vec::new();
    for _ in 0..100 {
        rig.online(json!({}), json!({})).await;
        tokio::time::sleep(2 * MINUTE).await;
        rig.cut();
        let cut = Instant::now();
        rig.connect_and_subscribe().await;
        rig.read_request().await;
        delays.push(cut.elapsed());
        rig.cut();
    }
    assert!(delays.iter().all(|delay| *delay <= RETURN_SPREAD), "{delays:?}");
    let within = |second: u64| delays.iter().filter(|delay| delay.as_secs() == second).count();
    assert!((0..20).all(|second| within(second) < 25), "{delays:?}");
}

/// CONNECTs until the trial is over, each refused.
async fn connects_in_a_trial(rig: &mut Rig, limit: Duration) -> (usize, Duration) {
    let ends = Instant::now() + limit;
    rig.trial(limit);
    let (mut connects, mut last) = (0, Instant::now());
    while tokio::time::timeout_at(ends, rig.connect()).await.is_ok() {
        (connects, last) = (connects + 1, Instant::now());
    }
    (connects, ends - last)
}

#[tokio::test(start_paused = true)]
async fn a_trial_is_not_lost_between_two_tries() {
    let refusals: [fn() -> Plan; 3] = [|| Plan::Refuse(5), || Plan::Close, || Plan::Refuse(3)];
    for plan in refusals {
        let name = format!("{:?}", plan());
        // The device waits already when the trial begins.
        let mut rig = Rig::new();
        rig.always(plan);
        for _ in 0..2 {
            rig.connect().await;
        }
        let (connects, before_the_end) = connects_in_a_trial(&mut rig, 10 * MINUTE).await;
        assert!((5..40).contains(&connects), "{name}: {connects} in ten minutes");
        assert!(before_the_end <= Duration::from_secs(15), "{name}: {before_the_end:?}");
        // Afterwards it is slow again.
        rig.always(|| Plan::Refuse(5));
        let connects = connects_within(&mut rig, HOUR).await;
        assert!(connects <= 16, "{name}: {connects} in an hour");
    }
}

#[tokio::test(start_paused = true)]
async fn a_credential_of_systemd_changes_with_a_restart_and_people_are_told() {
    let folder = tempfile::TempDir::new().unwrap();
    let key = "HostName=contoso.azure-devices.net;DeviceId=pump-01;SharedAccessKey=a2V5";
    let file = folder.path().join("hub-credential");
    std::fs::write(&file, key).unwrap();
    let mut rig = Rig::with_credentials_of_systemd(folder.path());
    rig.plan([Plan::Refuse(5)]);
    let status = rig.status_with("the systemd credential hub-credential holds").await;
    assert!(status.text.contains("run systemctl restart twinbootd"), "{}", status.text);
    // Where systemd keeps its copy is of no use to anybody.
    assert!(!status.text.contains(&folder.path().display().to_string()), "{}", status.text);

    std::fs::write(&file, "HostName=h;DeviceId=d;SharedAccessKey=*").unwrap();
    let mut rig = Rig::with_credentials_of_systemd(folder.path());
    let status = rig.status_with("SharedAccessKey: must be base64").await;
    assert!(status.text.contains("run systemctl restart twinbootd"), "{}", status.text);
}

/// Everything of the level `info` and above, as the journal would have it.
#[derive(Clone, Default)]
struct Journal(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Journal {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn who_only_looks_does_not_fill_the_journal() {
    let journal = Journal::default();
    let writer = journal.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let mut rig = Rig::new();
    rig.online(json!({}), json!({})).await;
    for method in ["getFirmwareStatus", "getFirmwareStatus", "reboot"] {
        rig.call(method, "r", &Value::Null);
        rig.request().await.reply.send(ok()).unwrap();
        rig.method_answer().await;
    }
    let journal = String::from_utf8(journal.0.lock().unwrap().clone()).unwrap();
    assert!(journal.contains("method answered") && journal.contains("reboot"), "{journal}");
    assert!(!journal.contains("getFirmwareStatus"), "{journal}");
}

#[tokio::test(start_paused = true)]
async fn says_goodbye_and_leaves_no_caller_waiting() {
    let mut rig = Rig::new();
    rig.online(json!({}), json!({})).await;
    rig.call("firmwareUpdate", "r", &json!("https://h/fw"));
    let _request = rig.request().await;
    rig.cancel.cancel();
    let (status, id, body) = rig.method_answer().await;
    assert_eq!((status, id.as_str(), &body["error"]), (500, "r", &json!("stopping")));
    assert_eq!(rig.next().await, Seen::Disconnect);
    let before = Instant::now();
    (&mut rig.task).await.unwrap();
    assert!(before.elapsed() <= Duration::from_secs(2));
    assert_eq!(rig.status.borrow().text, "the hub session has ended");
}

#[tokio::test(start_paused = true)]
async fn an_answer_given_at_the_last_moment_still_goes_out() {
    let mut rig = Rig::new();
    rig.online(json!({}), json!({})).await;
    rig.call("reboot", "r", &Value::Null);
    let request = rig.request().await;
    rig.cancel.cancel();
    request.reply.send(ok()).unwrap();
    assert_eq!(rig.method_answer().await, (200, "r".into(), json!({"done": true})));
}

#[tokio::test(start_paused = true)]
async fn can_be_stopped_in_every_kind_of_wait() {
    for plan in [Plan::Refuse(5), Plan::Refuse(3), Plan::Accept] {
        let mut rig = Rig::new();
        rig.plan([plan]);
        rig.connect().await;
        tokio::time::sleep(Duration::from_millis(1)).await;
        rig.cancel.cancel();
        (&mut rig.task).await.unwrap();
    }
    let mut rig = Rig::new();
    rig.clock.set(None);
    rig.status_with("waiting").await;
    rig.cancel.cancel();
    (&mut rig.task).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn ends_with_the_agent() {
    let mut rig = Rig::new();
    rig.online(json!({}), json!({})).await;
    drop(rig.report);
    rig.task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn nonsense_from_the_hub_does_no_harm() {
    let mut rig = Rig::new();
    rig.report(1, json!({"ours": 1}));
    rig.connect_and_subscribe().await;
    let id = rig.read_request().await;
    rig.send("$iothub/nonsense", &json!(1));
    rig.send("$iothub/twin/res/204/?$rid=99999", &json!({"x": 1}));
    rig.send("$iothub/methods/POST/reboot/", &Value::Null);
    rig.answer(200, &id, &json!({"desired": 7}));
    rig.status_with("does not hand out the twin").await;
    let id = rig.read_request().await;
    rig.answer(200, &id, &twin(json!({}), json!({})));
    let (id, _) = rig.patch_request().await;
    rig.answer(204, &id, &Value::Null);
    rig.acknowledged(1).await;
    // A patch that is none: the twin is read.
    rig.send("$iothub/twin/PATCH/properties/desired/?$version=2", &json!([1]));
    let id = rig.read_request().await;
    rig.answer(200, &id, &twin(json!({"a": 1, "$version": 2}), json!({"ours": 1})));
    assert_eq!(rig.desired().await.version, 1);
    assert_eq!(rig.desired().await.version, 2);
}

#[tokio::test(start_paused = true)]
async fn short_token_lives_are_kept_too() {
    let timing = Timing { token_lifetime: Duration::from_secs(10), ..TIMING };
    let mut rig = Rig::with(timing);
    let began = Instant::now();
    for _ in 0..5 {
        rig.online(json!({}), json!({})).await;
        rig.desired().await;
        assert_eq!(rig.next().await, Seen::Unsubscribe(METHODS.to_owned()));
        assert_eq!(rig.next().await, Seen::Disconnect);
    }
    assert_eq!(began.elapsed(), Duration::from_secs(40));
}
