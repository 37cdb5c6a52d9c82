//! What the twin shows, per contract and in every state, and that what is saved can be read again.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::as_conversions,
    reason = "tests"
)]

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use twinboot::hub::reduction;
use twinboot::update::{
    BootId, Checkpoint, Content, Contracts, Device, Digest, FailedBoot, Failure, FailureKind,
    HashState, Job, LastWords, MAX_IMAGE_URL_BYTES, MAX_VERSION_BYTES, Origin, Outage, Outcome,
    OutcomeKind, Passage, Progress, Run, RunId, SCHEMA, Saved, Slot, Slots, Source, State, Success,
    Times, Unread, WallTime, Written, report,
};

// Values -------------------------------------------------------------------------------------

const ALL: Contracts = Contracts { iothub_dm: true, firmware_status: true, firmware: true };

/// 10:00 and so many seconds.
fn at(seconds: i64) -> WallTime {
    WallTime::from_unix_ms(1_504_778_400_000 + seconds * 1000)
}

fn iso(seconds: i64) -> String {
    format!("2017-09-07T10:00:{seconds:02}.000Z")
}

fn python(seconds: i64) -> String {
    format!("2017-09-07 10:00:{seconds:02}.000000")
}

fn device() -> Device {
    Device {
        agent_version: "0.1.0",
        running: Slot::A,
        running_version: Some("1.0".parse().unwrap()),
        started: Some(at(0)),
        contracts: ALL,
        notices: vec![],
    }
}

/// The same device after the restart into the new slot.
fn updated_device() -> Device {
    Device { running: Slot::B, running_version: Some("2.0".parse().unwrap()), ..device() }
}

/// Asked for at 10:00:01, and as far as `phases` says.
fn run(phases: usize) -> Run {
    let time = |phase: usize| (phases >= phase).then(|| at(phase as i64));
    Run {
        id: RunId("r1".into()),
        source: Source::Image(Job {
            url: "https://user:secret@h/fw.img?sig=secret".parse().unwrap(),
            version: Some("2.0".parse().unwrap()),
            digest: None,
            size_bytes: None,
        }),
        origin: Origin::Method,
        from: Slot::A,
        times: Times {
            requested: time(1),
            downloading: time(2),
            downloaded: time(3),
            applying: time(4),
            rebooted: time(5),
        },
        starts: 1,
        passage: Passage::default(),
    }
}

fn saved(state: State) -> Saved {
    let mut saved = Saved::new();
    saved.state = state;
    saved.home = Some(Slot::A);
    saved.slots.a = Content::Good { version: Some("1.0".parse().unwrap()), digest: None };
    saved
}

fn ended(kind: OutcomeKind, phases: usize) -> Saved {
    let mut saved = saved(State::Idle);
    saved.last = Some(Outcome::new(Some(run(phases)), kind, Some(at(9))));
    saved
}

fn cause(kind: FailureKind) -> Failure {
    Failure::new(kind, "because of this")
}

fn success() -> Saved {
    let mut saved = ended(OutcomeKind::Succeeded, 5);
    saved.home = Some(Slot::B);
    saved.last_success = Some(Success { version: Some("2.0".parse().unwrap()), at: Some(at(9)) });
    saved
}

fn written() -> Written {
    Written { image_bytes: 200, image_digest: Digest::new([0xab; 32]), fetched_bytes: 100 }
}

fn fetching(began: bool) -> State {
    let run = run(if began { 2 } else { 1 });
    State::Fetching { run, checkpoint: None, attempt: 1, began }
}

fn verifying() -> State {
    State::Verifying { run: run(3), written: written(), attempt: 1 }
}

fn switching(armed: bool) -> State {
    let (run, ordered_in) = (run(4), BootId("b1".into()));
    State::Switching { run, ordered_in, attempt: 1, armed, left: false }
}

fn trial() -> State {
    State::Trial {
        run: run(5),
        starts: 1,
        boot: BootId("b2".into()),
        began_s: 9,
        healthy: false,
        stopped: false,
        outage: None,
    }
}

fn rolling_back() -> State {
    State::RollingBack {
        run: run(5),
        reason: cause(FailureKind::Unhealthy),
        ordered_in: BootId("b2".into()),
        attempt: 1,
    }
}

fn show(saved: &Saved, device: &Device) -> Map<String, Value> {
    report(saved, &Progress::default(), device)
}

/// Every state and outcome, and whether it is met in the new slot.
fn all_states() -> Vec<(&'static str, Saved, bool)> {
    let failed = |kind, phases| ended(OutcomeKind::Failed(cause(kind)), phases);
    let back = |kind, phases| ended(OutcomeKind::RolledBack(cause(kind)), phases);
    let mut up_to_date = saved(State::Idle);
    up_to_date.last = Some(Outcome::new(None, OutcomeKind::UpToDate, Some(at(9))));
    vec![
        ("new", saved(State::Idle), false),
        ("waiting", saved(fetching(false)), false),
        ("downloading", saved(fetching(true)), false),
        ("verifying", saved(verifying()), false),
        ("switching", saved(switching(false)), false),
        ("restarting", saved(switching(true)), false),
        ("on trial", saved(trial()), true),
        ("going back", saved(rolling_back()), true),
        ("succeeded", success(), true),
        ("up to date", up_to_date, false),
        ("not fetched", failed(FailureKind::Network, 2), false),
        ("cancelled", failed(FailureKind::Cancelled, 2), false),
        ("read back wrong", failed(FailureKind::ReadBack, 3), false),
        ("not switched", failed(FailureKind::Bootloader, 4), false),
        ("stuck", failed(FailureKind::Stuck, 5), true),
        ("rolled back", back(FailureKind::Unhealthy, 5), false),
    ]
}

fn shown(saved: &Saved, new_slot: bool) -> Map<String, Value> {
    show(saved, &if new_slot { updated_device() } else { device() })
}

// Contract by contract -------------------------------------------------------------------------

#[test]
fn contract_a_and_d_show_every_state() {
    let uri = "https://h/fw.img";
    let error = |code: &str| json!({ "code": code, "message": "because of this" });
    let expected = [
        ("new", json!({ "status": "waiting" })),
        (
            "waiting",
            json!({ "status": "waiting", "fwPackageUri": uri, "startedWaitingTime": iso(1) }),
        ),
        (
            "downloading",
            json!({ "status": "downloading", "fwPackageUri": uri, "startedWaitingTime": iso(1) }),
        ),
        (
            "verifying",
            json!({
                "status": "downloadComplete", "fwPackageUri": uri,
                "startedWaitingTime": iso(1), "downloadCompleteTime": iso(3),
            }),
        ),
        ("switching", applying(uri)),
        ("restarting", applying(uri)),
        ("on trial", applying(uri)),
        ("going back", applying(uri)),
        (
            "succeeded",
            json!({
                "status": "applyComplete", "fwPackageUri": uri, "startedWaitingTime": iso(1),
                "downloadCompleteTime": iso(3), "startedApplyingImage": iso(4),
                "lastFirmwareUpdate": iso(9),
            }),
        ),
        ("up to date", json!({ "status": "waiting" })),
        (
            "not fetched",
            json!({
                "status": "downloadfailed", "fwPackageUri": uri, "startedWaitingTime": iso(1),
                "error": error("network"),
            }),
        ),
        (
            "cancelled",
            json!({
                "status": "downloadfailed", "fwPackageUri": uri, "startedWaitingTime": iso(1),
                "error": error("cancelled"),
            }),
        ),
        (
            "read back wrong",
            json!({
                "status": "applyFailed", "fwPackageUri": uri, "startedWaitingTime": iso(1),
                "downloadCompleteTime": iso(3), "error": error("readBack"),
            }),
        ),
        ("not switched", apply_failed(uri, error("bootloader"))),
        ("stuck", apply_failed(uri, error("stuck"))),
        ("rolled back", apply_failed(uri, error("unhealthy"))),
    ];
    for ((name, saved, new_slot), (of, firmware_update)) in all_states().iter().zip(expected) {
        assert_eq!(*name, of);
        let version = if *new_slot { "2.0" } else { "1.0" };
        assert_eq!(
            shown(saved, *new_slot)["iothubDM"],
            json!({ "firmwareVersion": version, "firmwareUpdate": firmware_update }),
            "{name}"
        );
    }
}

fn applying(uri: &str) -> Value {
    json!({
        "status": "applying", "fwPackageUri": uri, "startedWaitingTime": iso(1),
        "downloadCompleteTime": iso(3), "startedApplyingImage": iso(4),
    })
}

fn apply_failed(uri: &str, error: Value) -> Value {
    let mut fields = applying(uri);
    fields["status"] = json!("applyFailed");
    fields["error"] = error;
    fields
}

#[test]
fn contract_a_tells_of_an_operators_reboot() {
    let mut saved = saved(State::Idle);
    saved.last_reboot = Some(at(3));
    let dm = &show(&saved, &device())["iothubDM"];
    assert_eq!(dm["reboot"], json!({ "lastReboot": iso(3) }));
}

#[test]
fn contract_b_shows_every_state() {
    // Status, downloadComplete, startedApplyingImage, lastFirmwareUpdate; null deletes.
    let time = |seconds| if seconds == 0 { Value::Null } else { json!(python(seconds)) };
    let expected = [
        ("new", "standBy", 0, 0, 0),
        ("waiting", "downloading", 0, 0, 0),
        ("downloading", "downloading", 0, 0, 0),
        ("verifying", "applying", 3, 0, 0),
        ("switching", "applying", 3, 4, 0),
        ("restarting", "applying", 3, 4, 0),
        ("on trial", "applying", 3, 4, 0),
        ("going back", "applying", 3, 4, 0),
        ("succeeded", "completed", 3, 4, 9),
        ("up to date", "standBy", 0, 0, 0),
        ("not fetched", "standBy", 0, 0, 0),
        ("cancelled", "standBy", 0, 0, 0),
        ("read back wrong", "standBy", 3, 0, 0),
        ("not switched", "standBy", 3, 4, 0),
        ("stuck", "standBy", 3, 4, 0),
        ("rolled back", "standBy", 3, 4, 0),
    ];
    for ((name, saved, new_slot), (of, status, downloaded, started, last)) in
        all_states().iter().zip(expected)
    {
        assert_eq!(*name, of);
        let all = shown(saved, *new_slot);
        let own: Map<String, Value> = all
            .into_iter()
            .filter(|(key, _)| !["iothubDM", "firmware", "twinboot"].contains(&key.as_str()))
            .collect();
        assert_eq!(
            Value::Object(own),
            json!({
                "firmwareStatus": status, "logTime": python(0),
                "downloadComplete": time(downloaded), "startedApplyingImage": time(started),
                "lastFirmwareUpdate": time(last),
            }),
            "{name}"
        );
    }
}

#[test]
fn contract_c_shows_every_state() {
    // Running and pending version, status, substatus, start and end.
    let expected = [
        ("new", "1.0", "", "current", "", "", ""),
        ("waiting", "1.0", "2.0", "downloading", "Start downloading", "1", ""),
        ("downloading", "1.0", "2.0", "downloading", "Start downloading", "1", ""),
        ("verifying", "1.0", "2.0", "verifying", "Start verifying download", "1", ""),
        ("switching", "1.0", "2.0", "applying", "Start applying image", "1", ""),
        ("restarting", "1.0", "2.0", "rebooting", "Start reboot", "1", ""),
        ("on trial", "2.0", "2.0", "rebooting", "Finished reboot", "1", ""),
        ("going back", "2.0", "2.0", "error", "because of this", "1", ""),
        ("succeeded", "2.0", "", "current", "", "1", "9"),
        ("up to date", "1.0", "", "current", "Firmware already up to date", "", "9"),
        ("not fetched", "1.0", "", "error", "because of this", "1", "9"),
        ("cancelled", "1.0", "", "error", "because of this", "1", "9"),
        ("read back wrong", "1.0", "", "error", "because of this", "1", "9"),
        ("not switched", "1.0", "", "error", "because of this", "1", "9"),
        ("stuck", "2.0", "", "error", "because of this", "1", "9"),
        ("rolled back", "1.0", "", "rolledback", "Rolled back to: 1.0 (because of this)", "1", "9"),
    ];
    let time = |text: &str| text.parse().map(iso).unwrap_or_default();
    for ((name, saved, new_slot), (of, current, pending, status, substatus, start, end)) in
        all_states().iter().zip(expected)
    {
        assert_eq!(*name, of);
        assert_eq!(
            shown(saved, *new_slot)["firmware"],
            json!({
                "currentFwVersion": current, "pendingFwVersion": pending,
                "fwUpdateStatus": status, "fwUpdateSubstatus": substatus,
                "lastFwUpdateStartTime": time(start), "lastFwUpdateEndTime": time(end),
            }),
            "{name}"
        );
    }
}

#[test]
fn our_own_section_shows_every_state() {
    let run = |phases: usize| {
        let _ = phases;
        json!({
            "id": "r1", "origin": "method", "uri": "https://h/fw.img", "version": "2.0",
            "slot": "B", "requestedTime": iso(1),
        })
    };
    let with = |mut fields: Value, more: Value| {
        fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        fields
    };
    let under_way = |more: Value| (with(run(1), more), Value::Null);
    let over = |more: Value| {
        (json!({ "phase": "idle" }), with(with(run(1), json!({ "endedTime": iso(9) })), more))
    };
    let because = |result: &str, code: &str| json!({ "result": result, "code": code, "reason": "because of this" });
    let expected = [
        ("new", (json!({ "phase": "idle" }), Value::Null)),
        (
            "waiting",
            under_way(json!({
                "phase": "waiting", "attempt": 1, "bytesDownloaded": 0, "bytesWritten": 0,
            })),
        ),
        (
            "downloading",
            under_way(json!({
                "phase": "downloading", "attempt": 1, "bytesDownloaded": 0, "bytesWritten": 0,
            })),
        ),
        (
            "verifying",
            under_way(json!({
                "phase": "verifying", "attempt": 1, "percent": 0, "bytesDownloaded": 100,
                "bytesWritten": 200,
            })),
        ),
        ("switching", under_way(json!({ "phase": "applying", "attempt": 1 }))),
        ("restarting", under_way(json!({ "phase": "rebooting", "attempt": 1 }))),
        ("on trial", under_way(json!({ "phase": "trial", "attempt": 1 }))),
        (
            "going back",
            under_way(json!({
                "phase": "rollingBack", "attempt": 1, "reason": "because of this",
            })),
        ),
        ("succeeded", over(json!({ "result": "succeeded" }))),
        (
            "up to date",
            (json!({ "phase": "idle" }), json!({ "result": "upToDate", "endedTime": iso(9) })),
        ),
        ("not fetched", over(because("failed", "network"))),
        ("cancelled", over(because("cancelled", "cancelled"))),
        ("read back wrong", over(because("failed", "readBack"))),
        ("not switched", over(because("failed", "bootloader"))),
        ("stuck", over(because("failed", "stuck"))),
        ("rolled back", over(because("rolledBack", "unhealthy"))),
    ];
    for ((name, saved, new_slot), (of, (update, last_update))) in all_states().iter().zip(expected)
    {
        assert_eq!(*name, of);
        let section = &shown(saved, *new_slot)["twinboot"];
        assert_eq!(section["update"], update, "{name}");
        assert_eq!(section["lastUpdate"], last_update, "{name}");
        let confirmed = saved.home == Some(if *new_slot { Slot::B } else { Slot::A });
        assert_eq!(section["confirmed"], json!(confirmed), "{name}");
    }
}

#[test]
fn our_own_section_tells_what_the_device_is() {
    let mut saved = saved(State::Idle);
    saved.slots.b = Content::Bad {
        version: Some("2.0".parse().unwrap()),
        digest: Some(Digest::new([0xab; 32])),
    };
    let device = Device { notices: vec!["look here".into()], ..device() };
    assert_eq!(
        show(&saved, &device)["twinboot"],
        json!({
            "agentVersion": "0.1.0",
            "bootedSlot": "A",
            "runningVersion": "1.0",
            "confirmed": true,
            "slots": {
                "A": { "state": "good", "version": "1.0" },
                "B": {
                    "state": "bad", "version": "2.0",
                    "digest": format!("sha256:{}", "ab".repeat(32)),
                },
            },
            "update": { "phase": "idle" },
            "notices": ["look here"],
        })
    );
}

#[test]
fn our_own_section_tells_how_far_it_is() {
    let progress = |fetched_bytes, total_bytes| Progress {
        fetched_bytes,
        total_bytes,
        written_bytes: 7,
        read_back_bytes: 50,
        installed_percent: None,
    };
    for (state, progress, percent) in [
        (fetching(true), progress(1, Some(3)), json!(33)),
        (fetching(true), progress(3, Some(3)), json!(100)),
        (fetching(true), progress(9, Some(3)), json!(100)),
        (fetching(true), progress(9, None), Value::Null),
        (fetching(true), progress(0, Some(0)), json!(100)),
        (fetching(true), progress(u64::MAX, Some(u64::MAX)), json!(1)),
        (verifying(), progress(9, None), json!(25)),
        (switching(false), progress(9, Some(9)), Value::Null),
    ] {
        let report = report(&saved(state.clone()), &progress, &device());
        assert_eq!(report["twinboot"]["update"]["percent"], percent, "{state:?}");
    }
}

#[test]
fn each_contract_can_be_switched_off() {
    let keys = |contracts| {
        let device = Device { contracts, ..device() };
        show(&success(), &device).keys().cloned().collect::<Vec<_>>()
    };
    let none = Contracts { iothub_dm: false, firmware_status: false, firmware: false };
    assert_eq!(keys(none), ["twinboot"]);
    assert_eq!(keys(Contracts { iothub_dm: true, ..none }), ["iothubDM", "twinboot"]);
    assert_eq!(keys(Contracts { firmware: true, ..none }), ["firmware", "twinboot"]);
    let b = ["downloadComplete", "firmwareStatus", "lastFirmwareUpdate", "logTime"];
    assert_eq!(
        keys(Contracts { firmware_status: true, ..none }),
        [&b[..], &["startedApplyingImage", "twinboot"]].concat()
    );
}

// Over time -----------------------------------------------------------------------------------

#[test]
fn a_new_run_shows_nothing_of_the_one_before() {
    let mut after_failure = ended(OutcomeKind::Failed(cause(FailureKind::ReadBack)), 5);
    after_failure.last_success =
        Some(Success { version: Some("1.0".parse().unwrap()), at: Some(at(8)) });
    let before = show(&after_failure, &device());
    assert!(before["iothubDM"]["firmwareUpdate"].get("error").is_some());

    after_failure.state = fetching(false);
    let report = show(&after_failure, &device());
    assert_eq!(
        report["iothubDM"]["firmwareUpdate"],
        json!({
            "status": "waiting", "fwPackageUri": "https://h/fw.img",
            "startedWaitingTime": iso(1),
        })
    );
    for key in ["downloadComplete", "startedApplyingImage", "lastFirmwareUpdate"] {
        assert_eq!(report[key], Value::Null, "{key} must be deleted");
    }
    assert_eq!(report["firmware"]["lastFwUpdateEndTime"], "");
    assert_eq!(report["twinboot"]["update"].get("reason"), None);
}

#[test]
fn the_last_good_update_is_remembered_through_a_failed_one() {
    let mut saved = ended(OutcomeKind::RolledBack(cause(FailureKind::Unhealthy)), 5);
    saved.last_success = Some(Success { version: None, at: Some(at(7)) });
    let report = show(&saved, &device());
    assert_eq!(report["iothubDM"]["firmwareUpdate"]["status"], "applyFailed");
    assert_eq!(report["iothubDM"]["firmwareUpdate"]["lastFirmwareUpdate"], iso(7));
    assert_eq!(report["lastFirmwareUpdate"], python(7));
}

// Whatever was saved --------------------------------------------------------------------------

fn option<T: std::fmt::Debug>(
    strategy: impl Strategy<Value = T>,
) -> impl Strategy<Value = Option<T>> {
    proptest::option::weighted(0.8, strategy)
}

/// Texts as they may come out of tools and servers: long, or not ASCII.
fn any_text() -> BoxedStrategy<String> {
    prop_oneof![
        Just(String::new()),
        "[ -~]{1,40}",
        any::<String>(),
        (500_usize..6000).prop_map(|length| "ä\u{0}\"\n𐍈".chars().cycle().take(length).collect()),
    ]
    .boxed()
}

fn any_time() -> BoxedStrategy<WallTime> {
    prop_oneof![
        (0_i64..4_000_000_000_000).prop_map(WallTime::from_unix_ms),
        any::<i64>().prop_map(WallTime::from_unix_ms),
    ]
    .boxed()
}

fn any_version() -> BoxedStrategy<twinboot::update::Version> {
    prop_oneof![Just("1".to_owned()), Just("v".repeat(MAX_VERSION_BYTES)), "[!-~]{1,128}"]
        .prop_map(|text| text.parse().unwrap())
        .boxed()
}

fn any_digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest::new)
}

/// Every URL that the parser lets through, with a secret in each place that can hold one.
fn any_url() -> BoxedStrategy<twinboot::update::ImageUrl> {
    prop_oneof![
        "[a-z%20é /]{0,200}",
        (0_usize..MAX_IMAGE_URL_BYTES).prop_map(|length| "é".repeat(length)),
        (0_usize..MAX_IMAGE_URL_BYTES).prop_map(|length| "a".repeat(length)),
    ]
    .prop_filter_map("refused", |path| {
        format!("https://SECRET:SECRET@h/{path}?sig=SECRET").parse().ok()
    })
    .boxed()
}

fn any_slot() -> impl Strategy<Value = Slot> {
    prop_oneof![Just(Slot::A), Just(Slot::B)]
}

fn any_boot() -> impl Strategy<Value = BootId> {
    "[0-9a-f-]{0,36}".prop_map(BootId)
}

fn any_run() -> BoxedStrategy<Run> {
    let source = prop_oneof![
        3 => (any_url(), option(any_version()), option(any_digest()), option(any::<u64>()))
            .prop_map(|(url, version, digest, size_bytes)| {
                Source::Image(Job { url, version, digest, size_bytes })
            }),
        1 => option(any_version()).prop_map(|version| Source::OtherSlot { version }),
    ];
    let origin = prop_oneof![
        Just(Origin::Method),
        Just(Origin::Local),
        any_digest().prop_map(Origin::Desired),
    ];
    let times = proptest::collection::vec(option(any_time()), 5).prop_map(|times| Times {
        requested: times[0],
        downloading: times[1],
        downloaded: times[2],
        applying: times[3],
        rebooted: times[4],
    });
    ("[0-9a-f]{16}", source, origin, any_slot(), times, any::<u16>(), any_passage())
        .prop_map(|(id, source, origin, from, times, starts, passage)| Run {
            id: RunId(id),
            source,
            origin,
            from,
            times,
            starts,
            passage,
        })
        .boxed()
}

fn any_failure() -> BoxedStrategy<Failure> {
    use FailureKind as K;
    let kinds = [
        K::InvalidRequest,
        K::InsecureUrl,
        K::DigestMissing,
        K::NotFound,
        K::AccessDenied,
        K::Network,
        K::BadServer,
        K::ImageChanged,
        K::TooLarge,
        K::DigestMismatch,
        K::CorruptImage,
        K::SlotIo,
        K::ReadBack,
        K::Installer,
        K::Bootloader,
        K::RestartFailed,
        K::FellBack,
        K::Unhealthy,
        K::Stuck,
        K::TooManyStarts,
        K::Cancelled,
        K::Withdrawn,
        K::RolledBackByOperator,
        K::LeftConfirmedSlot,
        K::Unknown,
    ];
    (proptest::sample::select(kinds.to_vec()), any_text())
        .prop_map(|(kind, detail)| Failure::new(kind, detail))
        .boxed()
}

fn any_content() -> BoxedStrategy<Content> {
    (0..5, option(any_version()), option(any_digest()))
        .prop_map(|(which, version, digest)| match which {
            0 => Content::Unknown,
            1 => Content::Incomplete,
            2 => Content::Written { version, digest },
            3 => Content::Good { version, digest },
            _ => Content::Bad { version, digest },
        })
        .boxed()
}

fn any_checkpoint() -> BoxedStrategy<Checkpoint> {
    (any::<u64>(), any::<u64>(), any_text(), any_text(), option(any_text()), option(any::<u64>()))
        .prop_map(|(fetched_bytes, written_bytes, one, two, etag, total_bytes)| Checkpoint {
            fetched_bytes,
            written_bytes,
            fetched_hash: HashState(one),
            image_hash: HashState(two),
            etag,
            total_bytes,
        })
        .boxed()
}

fn any_outage() -> BoxedStrategy<Outage> {
    (any_text(), any::<u64>(), any::<bool>())
        .prop_map(|(what, seen_s, lasts)| Outage { what, seen_s, lasts })
        .boxed()
}

fn any_passage() -> BoxedStrategy<Passage> {
    (option(any::<bool>()), any::<[u8; 3]>(), any::<bool>())
        .prop_map(|(hub_before, [armed_again, clean_stops, operator_stops], left)| Passage {
            hub_before,
            armed_again,
            clean_stops,
            operator_stops,
            left,
        })
        .boxed()
}

fn any_state() -> BoxedStrategy<State> {
    let written = (any::<u64>(), any_digest(), any::<u64>()).prop_map(
        |(image_bytes, image_digest, fetched_bytes)| Written {
            image_bytes,
            image_digest,
            fetched_bytes,
        },
    );
    prop_oneof![
        Just(State::Idle),
        (any_run(), option(any_checkpoint()), any::<u8>(), any::<bool>()).prop_map(
            |(run, checkpoint, attempt, began)| State::Fetching { run, checkpoint, attempt, began }
        ),
        (any_run(), written, any::<u8>()).prop_map(|(run, written, attempt)| State::Verifying {
            run,
            written,
            attempt
        }),
        (any_run(), any_boot(), any::<u8>(), any::<bool>(), any::<bool>()).prop_map(
            |(run, ordered_in, attempt, armed, left)| State::Switching {
                run,
                ordered_in,
                attempt,
                armed,
                left
            }
        ),
        (
            any_run(),
            any::<u8>(),
            any_boot(),
            any::<u64>(),
            any::<[bool; 2]>(),
            option(any_outage())
        )
            .prop_map(|(run, starts, boot, began_s, [healthy, stopped], outage)| {
                State::Trial { run, starts, boot, began_s, healthy, stopped, outage }
            }),
        (any_run(), any_failure(), any_boot(), any::<u8>()).prop_map(
            |(run, reason, ordered_in, attempt)| State::RollingBack {
                run,
                reason,
                ordered_in,
                attempt
            }
        ),
    ]
    .boxed()
}

fn any_saved() -> BoxedStrategy<Saved> {
    let kind = prop_oneof![
        Just(OutcomeKind::Succeeded),
        Just(OutcomeKind::UpToDate),
        any_failure().prop_map(OutcomeKind::Failed),
        any_failure().prop_map(OutcomeKind::RolledBack),
    ];
    let boots = || proptest::collection::vec(any_boot(), 0..3);
    let lines = proptest::collection::vec("\\PC{0,50}", 0..20);
    let journal = prop_oneof![
        any_boot().prop_map(|boot| LastWords::Wanted(FailedBoot::Known(boot))),
        (any_boot(), boots()).prop_map(|(after, others)| {
            LastWords::Wanted(FailedBoot::Unknown { after, others })
        }),
        lines.prop_map(LastWords::Lines),
        any_text().prop_map(LastWords::Missing),
    ];
    let again = (any_boot(), any::<u8>())
        .prop_map(|(boot, failures)| Unread { of: FailedBoot::Known(boot), failures });
    let outcome = (option(any_run()), kind, option(any_time()), option(journal), option(again))
        .prop_map(|(run, kind, at, journal, journal_again)| Outcome {
            run,
            kind,
            at,
            journal,
            journal_again,
        });
    let success = (option(any_version()), option(any_time()))
        .prop_map(|(version, at)| Success { version, at });
    let slots = (any_content(), any_content()).prop_map(|(a, b)| Slots { a, b });
    (
        any_state(),
        option(outcome),
        option(success),
        option(any_slot()),
        slots,
        option(any_digest()),
        (option(any_time()), option(any_time())),
    )
        .prop_map(|(state, last, last_success, home, slots, settled, times)| Saved {
            schema: SCHEMA,
            state,
            last,
            last_success,
            home,
            slots,
            settled,
            last_reboot: times.0,
            newest_time: times.1,
        })
        .boxed()
}

/// The rules a twin has for a document (limits of IoT Hub; its size is that of the JSON text,
/// which is the stricter of the two ways it is counted).
fn check_twin_rules(value: &Value, depth: usize, path: &str) {
    match value {
        Value::Object(members) => {
            assert!(depth <= 10, "{path} is too deep");
            for (key, member) in members {
                assert!((1..=1024).contains(&key.len()), "key in {path}");
                let bad = |c: char| c.is_control() || c.is_whitespace() || ".$#".contains(c);
                assert!(!key.contains(bad), "key {key} in {path}");
                check_twin_rules(member, depth + 1, &format!("{path}.{key}"));
            }
        }
        Value::Array(items) => {
            assert!(depth <= 10, "{path} is too deep");
            for item in items {
                assert!(!item.is_null(), "null in the array {path}");
                check_twin_rules(item, depth + 1, path);
            }
        }
        Value::String(text) => assert!(text.len() <= 4096, "{path}: {} bytes", text.len()),
        Value::Number(number) => {
            let number = number.as_i64().unwrap_or_else(|| panic!("{path} = {number}"));
            assert!((-(1_i64 << 52)..(1 << 52)).contains(&number), "{path} = {number}");
        }
        Value::Bool(_) | Value::Null => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_hub_takes_every_report_and_no_secret_is_in_it(
        saved in any_saved(),
        numbers in any::<[u64; 3]>(),
        total_bytes in option(any::<u64>()),
        running in any_slot(),
        notices in proptest::collection::vec(any_text(), 0..30),
        started in option(any_time()),
        running_version in option(any_version()),
    ) {
        let device =
            Device { running, notices, started, running_version, ..device() };
        let progress = Progress {
            fetched_bytes: numbers[0],
            total_bytes,
            written_bytes: numbers[1],
            read_back_bytes: numbers[2],
            installed_percent: None,
        };
        let document = Value::Object(report(&saved, &progress, &device));
        check_twin_rules(&document, 0, "reported");
        let text = document.to_string();
        prop_assert!(text.len() <= 32 * 1024, "{} bytes", text.len());
        prop_assert!(!text.contains("SECRET"), "{}", text);

        // An old success is never shown as the end of a run that goes on.
        if saved.state != State::Idle {
            let update = &document["iothubDM"]["firmwareUpdate"];
            prop_assert_eq!(update.get("lastFirmwareUpdate"), None);
            prop_assert_eq!(update.get("error"), None);
            prop_assert_ne!(&update["status"], "applyComplete");
            prop_assert_eq!(&document["lastFirmwareUpdate"], &Value::Null);
            prop_assert_ne!(&document["firmwareStatus"], "completed");
            prop_assert_ne!(&document["firmware"]["fwUpdateStatus"], "current");
        }
        // And none is shown that nobody confirmed.
        if saved.last_success.is_none() {
            prop_assert!(!text.contains("\"lastFirmwareUpdate\":\""));
        }
    }

    #[test]
    fn what_is_saved_reads_back_as_it_was(saved in any_saved()) {
        let text = serde_json::to_string(&saved).unwrap();
        prop_assert_eq!(serde_json::from_str::<Saved>(&text).unwrap(), saved);
    }

    /// After a rollback an older agent reads what a newer one saved on trial.
    #[test]
    fn members_of_a_newer_agent_are_passed_over_and_the_known_ones_kept(
        saved in any_saved(),
        number in any::<i32>(),
    ) {
        let mut value = serde_json::to_value(&saved).unwrap();
        let mut paths = Vec::new();
        objects(&value, String::new(), &mut paths);
        // The objects that only name which variant it is have one member, always.
        paths.retain(|path| !names_a_variant(&value, path));
        for path in &paths {
            let object = value.pointer_mut(path).unwrap().as_object_mut().unwrap();
            object.insert("fromTheFuture".into(), json!({ "number": number }));
        }
        prop_assert_eq!(serde_json::from_value::<Saved>(value).unwrap(), saved);
    }
}

fn names_a_variant(value: &Value, path: &str) -> bool {
    let names = [
        "fetching",
        "verifying",
        "switching",
        "trial",
        "rollingBack",
        "image",
        "otherSlot",
        "desired",
        "written",
        "good",
        "bad",
        "failed",
        "rolledBack",
        "wanted",
        "lines",
        "missing",
        "known",
        "unknown",
    ];
    let Some(Value::Object(object)) = value.pointer(path) else { return false };
    object.len() == 1 && object.keys().all(|key| names.contains(&key.as_str()))
}

#[test]
fn a_failure_of_a_kind_that_only_a_newer_agent_knows_keeps_its_explanation() {
    let text = r#"{ "kind": "eatenByBear", "detail": "a bear came" }"#;
    let failure: Failure = serde_json::from_str(text).unwrap();
    assert_eq!(failure, Failure::new(FailureKind::Unknown, "a bear came"));
    assert_eq!(failure.kind.name(), "unknown");
}

#[test]
fn what_would_change_the_meaning_is_not_passed_over() {
    let whole = serde_json::to_value(Saved::new()).unwrap();
    for (member, foreign) in [
        ("state", json!("hibernating")),
        ("slots", json!({ "a": "melted", "b": "unknown" })),
        ("home", json!("C")),
        ("schema", json!("one")),
    ] {
        let mut value = whole.clone();
        value[member] = foreign;
        assert!(serde_json::from_value::<Saved>(value).is_err(), "{member}");
    }
    let mut value = whole;
    value.as_object_mut().unwrap().remove("slots");
    assert!(serde_json::from_value::<Saved>(value).is_err(), "without slots");
}

/// An update brings a newer agent, which finds what the older one saved.
#[test]
fn what_an_older_agent_saved_in_a_switch_or_a_trial_is_understood() {
    let run = json!({
        "id": "r1", "source": { "otherSlot": { "version": null } }, "origin": "method", "from": "A",
        "times": {}, "starts": 1,
    });
    let switching = json!({ "switching": {
        "run": run, "ordered_in": "b1", "attempt": 1, "armed": true,
    } });
    let trial = json!({ "trial": {
        "run": run, "starts": 2, "boot": "b2", "began_s": 9, "healthy": false,
    } });
    let run = || Run {
        id: RunId("r1".into()),
        source: Source::OtherSlot { version: None },
        origin: Origin::Method,
        from: Slot::A,
        times: Times::default(),
        starts: 1,
        passage: Passage::default(),
    };
    let ordered_in = BootId("b1".into());
    let state = State::Switching { run: run(), ordered_in, attempt: 1, armed: true, left: false };
    assert_eq!(serde_json::from_value::<State>(switching).unwrap(), state);
    let state = State::Trial {
        run: run(),
        starts: 2,
        boot: BootId("b2".into()),
        began_s: 9,
        healthy: false,
        stopped: false,
        outage: None,
    };
    assert_eq!(serde_json::from_value::<State>(trial).unwrap(), state);
}

#[test]
fn our_own_section_tells_what_keeps_an_update_and_what_it_met() {
    let update = |state: State| show(&saved(state), &device())["twinboot"]["update"].clone();
    let waiting = |lasts, has_passed| {
        let mut state = trial();
        if let State::Trial { outage, healthy, .. } = &mut state {
            *outage = Some(Outage { what: "eth0 has no carrier".into(), seen_s: 9, lasts });
            *healthy = has_passed;
        }
        update(state)
    };
    assert_eq!(waiting(true, false)["waitsFor"], "eth0 has no carrier");
    assert_eq!(waiting(false, false)["waitsFor"], Value::Null, "it is over");
    assert_eq!(waiting(true, true)["waitsFor"], Value::Null, "it waits for nothing more");

    let mut again = switching(true);
    if let State::Switching { run, attempt, .. } = &mut again {
        (run.passage.armed_again, *attempt) = (1, 2);
    }
    let told = "armed again, 2 of 3: the machine restarted without trying slot B";
    let shown = update(again);
    assert_eq!((&shown["reason"], &shown["armedAgain"]), (&json!(told), &json!(1)));
    let shown = update(switching(true));
    assert_eq!((&shown["reason"], &shown["armedAgain"]), (&Value::Null, &Value::Null));

    let mut over = success();
    let run = over.last.as_mut().and_then(|last| last.run.as_mut()).unwrap();
    run.passage.armed_again = 2;
    let shown = show(&over, &updated_device());
    assert_eq!(shown["twinboot"]["lastUpdate"]["armedAgain"], 2);
}

fn objects(value: &Value, path: String, found: &mut Vec<String>) {
    if let Value::Object(members) = value {
        for (key, member) in members {
            objects(member, format!("{path}/{key}"), found);
        }
        found.push(path);
    }
}

#[test]
fn a_rollback_tells_the_failed_boots_last_words_or_why_there_are_none() {
    let told = |journal| {
        let mut saved = ended(OutcomeKind::RolledBack(cause(FailureKind::FellBack)), 4);
        saved.last.as_mut().unwrap().journal = journal;
        show(&saved, &device())["twinboot"]["lastUpdate"].clone()
    };
    let (lines, none) = (vec!["0.9s a: b".to_owned(), "31.4s err app: no".to_owned()], Value::Null);
    let without = "the failed boot left nothing in the journal: the new system did not get that \
                   far, or keeps its journal elsewhere";
    for (journal, shown, note) in [
        (None, none.clone(), none.clone()),
        // Not read yet, but the rollback is told at once.
        (
            Some(LastWords::Wanted(FailedBoot::Known(BootId("b".into())))),
            none.clone(),
            none.clone(),
        ),
        (Some(LastWords::read(Ok(lines.clone()))), json!(lines), none.clone()),
        (Some(LastWords::read(Ok(vec![]))), none.clone(), json!(without)),
        (
            Some(LastWords::read(Err("no journalctl".into()))),
            none,
            json!("the journal could not be read: no journalctl"),
        ),
    ] {
        let last = told(journal);
        assert_eq!(last["result"], "rolledBack");
        assert_eq!((&last["journal"], &last["journalNote"]), (&shown, &note));
    }
}

#[test]
fn an_outcome_that_an_agent_saved_before_there_were_journals_loads() {
    let saved = ended(OutcomeKind::RolledBack(cause(FailureKind::FellBack)), 4);
    let mut value = serde_json::to_value(&saved).unwrap();
    for name in ["journal", "journal_again"] {
        let member = value["last"].as_object_mut().unwrap().remove(name);
        assert_eq!(member, Some(Value::Null), "{name}");
    }
    assert_eq!(serde_json::from_value::<Saved>(value).unwrap(), saved);
}

/// The names that a reduction leaves out are those of the report.
#[test]
fn every_step_of_a_reduction_leaves_something_out_and_the_update_stays() {
    let mut saved = success();
    saved.slots.b = Content::Good { version: None, digest: Some(Digest::new([7; 32])) };
    let device = Device { notices: vec!["look here".to_owned()], ..updated_device() };
    let lines = vec!["31.4s err app: no".to_owned()];
    saved.last.as_mut().unwrap().journal = Some(LastWords::Lines(lines));
    let mut whole = show(&saved, &device);
    assert_eq!(reduction::reduced(&whole, 0), whole);
    let first = reduction::reduced(&whole, 1);
    let journal = whole["twinboot"]["lastUpdate"].as_object_mut().unwrap().remove("journal");
    assert!(journal.is_some(), "the whole report has it");
    assert_eq!(first, whole, "what is long and can be read on the device goes first");
    for steps in 2..=reduction::ALL {
        let (before, after) =
            (reduction::reduced(&whole, steps - 1), reduction::reduced(&whole, steps));
        assert_ne!(before, after, "{}", reduction::left_out(steps));
    }
    let least = reduction::reduced(&whole, reduction::ALL);
    for (key, value) in &least {
        assert!(whole.contains_key(key) && (key == "twinboot" || value.is_null()), "{key}");
    }
    let own = least["twinboot"].as_object().unwrap();
    let keys: Vec<&str> = own.keys().map(String::as_str).collect();
    assert_eq!(keys, ["bootedSlot", "lastUpdate", "update"]);
    for key in keys {
        assert_eq!(own[key], whole["twinboot"][key]);
    }
}
