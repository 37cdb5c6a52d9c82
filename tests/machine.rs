//! Every transition of an update, and what no sequence of events may bring about.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::as_conversions,
    reason = "tests"
)]

use proptest::prelude::*;
use twinboot::update::{
    BootId, Checkpoint, Content, Digest, Event, Facts, FailedBoot, Failure, FailureKind, HashState,
    Job, LastWords, Limits, Order, Origin, Outage, Outcome, OutcomeKind, Passage, Run, RunId,
    Saved, Slot, Source, State, Success, Times, Verdict, Version, WallTime, Wanted, Written, step,
};

// Values -------------------------------------------------------------------------------------

const LIMITS: Limits =
    Limits { attempts: 3, trial_starts: 3, trial_s: 600, trial_outage_s: 86_400 };

fn now() -> WallTime {
    WallTime::from_unix_ms(1_800_000_000_000)
}

fn version(text: &str) -> Version {
    text.parse().unwrap()
}

fn job(version_text: &str) -> Job {
    Job {
        url: format!("https://h/{version_text}.img").parse().unwrap(),
        version: Some(version(version_text)),
        digest: Some(Digest::new([1; 32])),
        size_bytes: None,
    }
}

fn written() -> Written {
    Written { image_bytes: 10, image_digest: Digest::new([2; 32]), fetched_bytes: 5 }
}

fn checkpoint() -> Checkpoint {
    Checkpoint {
        fetched_bytes: 2,
        written_bytes: 4,
        fetched_hash: HashState("aa".into()),
        image_hash: HashState("bb".into()),
        etag: Some("\"e\"".into()),
        total_bytes: Some(5),
    }
}

fn cause(kind: FailureKind) -> Failure {
    Failure::new(kind, "because")
}

fn id(text: &str) -> RunId {
    RunId(text.into())
}

/// An update to version 2 from slot A into slot B.
fn run() -> Run {
    Run {
        id: id("run"),
        source: Source::Image(job("2")),
        origin: Origin::Method,
        from: Slot::A,
        times: Times::default(),
        starts: 1,
        passage: Passage { hub_before: Some(true), ..Passage::default() },
    }
}

fn desired_run() -> Run {
    Run { origin: Origin::Desired(Digest::new([7; 32])), ..run() }
}

fn wanted(version_text: &str, fingerprint: u8) -> Wanted {
    Wanted { fingerprint: Digest::new([fingerprint; 32]), job: Ok(job(version_text)) }
}

fn good(version_text: &str) -> Content {
    Content::Good { version: Some(version(version_text)), digest: None }
}

fn tried(whole: fn(Option<Version>, Option<Digest>) -> Content) -> Content {
    whole(Some(version("2")), Some(Digest::new([2; 32])))
}

fn is_written(version: Option<Version>, digest: Option<Digest>) -> Content {
    Content::Written { version, digest }
}

fn is_bad(version: Option<Version>, digest: Option<Digest>) -> Content {
    Content::Bad { version, digest }
}

/// Slot A runs version 1, is good and boots by default. It is the first boot.
fn in_a() -> Facts {
    Facts {
        running: Slot::A,
        next: Some(Slot::A),
        tried: None,
        by_argument: false,
        boot: BootId("boot 1".into()),
        hub_online: true,
        running_version: Some(version("1")),
        since_boot_s: 1000,
        now: Some(now()),
        limits: LIMITS,
    }
}

/// Slot B runs version 2 for this boot only. It is the second boot.
fn in_b() -> Facts {
    Facts {
        running: Slot::B,
        boot: BootId("boot 2".into()),
        running_version: Some(version("2")),
        since_boot_s: 20,
        ..in_a()
    }
}

fn outage(lasts: bool) -> Outage {
    Outage { what: "eth0 has no carrier".into(), seen_s: 20, lasts }
}

fn home_is_a() -> Saved {
    let mut saved = Saved::new();
    saved.home = Some(Slot::A);
    saved.slots.a = good("1");
    saved
}

/// The states of the tables, each with the device it is met on.
fn scene(name: &str) -> (Saved, Facts) {
    let mut saved = home_is_a();
    let first = BootId("boot 1".into());
    let second = BootId("boot 2".into());
    let with = |mut saved: Saved, state: State, b: Content| {
        saved.state = state;
        saved.slots.b = b;
        saved
    };
    let fetching =
        |run| State::Fetching { run, checkpoint: Some(checkpoint()), attempt: 2, began: true };
    let switching = |armed, left| {
        let (run, ordered_in) = (run(), first.clone());
        State::Switching { run, ordered_in, attempt: 1, armed, left }
    };
    let trial = |healthy, stopped, outage| State::Trial {
        run: run(),
        starts: 1,
        boot: second.clone(),
        began_s: 15,
        healthy,
        stopped,
        outage,
    };
    let failed = |kind| Outcome::new(Some(run()), OutcomeKind::Failed(cause(kind)), Some(now()));
    match name {
        "idle" => (with(saved, State::Idle, Content::Unknown), in_a()),
        "idle, the other slot good" => (with(saved, State::Idle, good("0")), in_a()),
        "idle, nothing known" => (Saved::new(), Facts { next: Some(Slot::B), ..in_a() }),
        "idle, given up" => {
            saved.last = Some(failed(FailureKind::Stuck));
            (with(saved, State::Idle, tried(is_bad)), in_b())
        }
        "fetching" => (with(saved, fetching(run()), Content::Incomplete), in_a()),
        "fetching the desired" => {
            (with(saved, fetching(desired_run()), Content::Incomplete), in_a())
        }
        "verifying" => (
            with(
                saved,
                State::Verifying { run: run(), written: written(), attempt: 2 },
                Content::Incomplete,
            ),
            in_a(),
        ),
        "switching" => (with(saved, switching(false, false), tried(is_written)), in_a()),
        "restarting" => (with(saved, switching(true, false), tried(is_written)), in_a()),
        "left" => (with(saved, switching(true, true), tried(is_written)), in_a()),
        "on trial" => (with(saved, trial(false, false, None), tried(is_written)), in_b()),
        "waiting" => {
            let outage = Some(outage(true));
            (with(saved, trial(false, false, outage), tried(is_written)), in_b())
        }
        "stopped" => (with(saved, trial(false, true, None), tried(is_written)), in_b()),
        "stopped, restarting" | "stopped, off" => {
            let saved = with(saved, trial(false, false, None), tried(is_written));
            let restarts = name == "stopped, restarting";
            (step(saved, Event::MachineStops { restarts }, &in_b()).0, in_b())
        }
        "confirming" => (with(saved, trial(true, false, None), tried(is_written)), in_b()),
        "going back" => (
            with(
                saved,
                State::RollingBack {
                    run: run(),
                    reason: cause(FailureKind::Unhealthy),
                    ordered_in: second,
                    attempt: 1,
                },
                tried(is_written),
            ),
            in_b(),
        ),
        other => panic!("no scene {other}"),
    }
}

const SCENES: [&str; 15] = [
    "idle",
    "idle, the other slot good",
    "idle, nothing known",
    "idle, given up",
    "fetching",
    "fetching the desired",
    "verifying",
    "switching",
    "restarting",
    "left",
    "on trial",
    "waiting",
    "stopped",
    "confirming",
    "going back",
];

fn event(name: &str) -> Event {
    let desired = |wanted, rewritten| Event::Desired { id: id("new"), wanted, rewritten };
    match name {
        "the same install" => {
            Event::Requested { id: id("new"), job: job("2"), origin: Origin::Method }
        }
        "an install" => Event::Requested { id: id("new"), job: job("3"), origin: Origin::Local },
        "desired: nothing" => desired(None, false),
        "desired: the same" => desired(Some(wanted("2", 7)), false),
        "desired: another" => desired(Some(wanted("3", 8)), false),
        "desired: what runs in A" => desired(Some(wanted("1", 9)), false),
        "desired: nonsense" => desired(
            Some(Wanted {
                fingerprint: Digest::new([9; 32]),
                job: Err(cause(FailureKind::InvalidRequest)),
            }),
            false,
        ),
        "cancel" => Event::CancelRequested,
        "confirm" => Event::ConfirmRequested,
        "roll back" => Event::RollBackRequested { id: id("new"), origin: Origin::Local },
        "reboot" => Event::RestartRequested,
        "first bytes" => Event::FetchBegan,
        "checkpoint" => Event::Checkpointed(checkpoint()),
        "fetched" => Event::Fetched(Ok(written())),
        "not fetched" => Event::Fetched(Err(cause(FailureKind::Network))),
        "verified" => Event::Verified(Ok(())),
        "not verified" => Event::Verified(Err(cause(FailureKind::ReadBack))),
        "switched" => Event::Switched(Ok(())),
        "not switched" => Event::Switched(Err(cause(FailureKind::Bootloader))),
        "not restarted" => Event::RestartFailed(cause(FailureKind::RestartFailed)),
        "healthy" => Event::Healthy,
        "trial over" => Event::TrialExpired("hub not reached".into()),
        "confirmed" => Event::Confirmed,
        "not confirmed" => Event::ConfirmFailed(cause(FailureKind::Bootloader)),
        "no network" => Event::Outage(outage(true)),
        "network again" => Event::Outage(outage(false)),
        "machine restarts" => Event::MachineStops { restarts: true },
        "machine off" => Event::MachineStops { restarts: false },
        other => panic!("no event {other}"),
    }
}

const EVENTS: [&str; 28] = [
    "the same install",
    "an install",
    "desired: nothing",
    "desired: the same",
    "desired: another",
    "desired: what runs in A",
    "desired: nonsense",
    "cancel",
    "confirm",
    "roll back",
    "reboot",
    "first bytes",
    "checkpoint",
    "fetched",
    "not fetched",
    "verified",
    "not verified",
    "switched",
    "not switched",
    "not restarted",
    "healthy",
    "trial over",
    "confirmed",
    "not confirmed",
    "no network",
    "network again",
    "machine restarts",
    "machine off",
];

// States and orders, said aloud ---------------------------------------------------------------

fn say_outcome(saved: &Saved) -> String {
    match saved.last.as_ref().map(|last| &last.kind) {
        None => "idle".into(),
        Some(OutcomeKind::Succeeded) => "idle: succeeded".into(),
        Some(OutcomeKind::UpToDate) => "idle: up to date".into(),
        Some(OutcomeKind::Failed(cause)) => format!("idle: failed, {}", cause.kind.name()),
        Some(OutcomeKind::RolledBack(cause)) => format!("idle: rolled back, {}", cause.kind.name()),
    }
}

fn say(saved: &Saved) -> String {
    match &saved.state {
        State::Idle => say_outcome(saved),
        State::Fetching { attempt, checkpoint, .. } => {
            let behind = if checkpoint.is_some() { " behind a checkpoint" } else { "" };
            format!("fetching{behind}, start {attempt}")
        }
        State::Verifying { attempt, .. } => format!("verifying, start {attempt}"),
        State::Switching { attempt, armed: false, .. } => format!("switching, order {attempt}"),
        State::Switching { attempt, left: false, .. } => format!("restarting, order {attempt}"),
        State::Switching { attempt, .. } => format!("left, order {attempt}"),
        State::Trial { starts, healthy: false, stopped: true, .. } => {
            format!("stopped, start {starts}")
        }
        State::Trial { starts, healthy: false, outage: Some(outage), .. } if outage.lasts => {
            format!("waiting, start {starts}")
        }
        State::Trial { starts, healthy: false, .. } => format!("on trial, start {starts}"),
        State::Trial { starts, .. } => format!("confirming, start {starts}"),
        State::RollingBack { reason, attempt, .. } => {
            format!("going back, {}, order {attempt}", reason.kind.name())
        }
    }
}

fn say_orders(orders: &[Order]) -> String {
    let one = |order: &Order| match order {
        Order::Answer(verdict) => format!("answer {verdict:?}"),
        Order::Retire(slot) => format!("retire {slot}"),
        Order::Fetch(job, slot, checkpoint) => {
            let behind = if checkpoint.is_some() { " behind a checkpoint" } else { "" };
            format!("fetch {} into {slot}{behind}", job.version.as_ref().unwrap())
        }
        Order::Verify(_, slot) => format!("verify {slot}"),
        Order::StopWork => "stop work".into(),
        Order::TryNext(slot) => format!("try {slot}"),
        Order::CancelTry(slot) => format!("forget {slot}"),
        Order::Confirm => "confirm".into(),
        Order::Watch(None) => "watch".into(),
        Order::Watch(Some(time)) => format!("watch until {} s", time.ends_s()),
        Order::RestartToTry => "restart to try".into(),
        Order::Restart => "restart".into(),
        Order::CarryArgument => "carry the argument".into(),
        Order::ReadJournal(_) => "read the journal".into(),
    };
    orders
        .iter()
        .map(one)
        .collect::<Vec<_>>()
        .join("; ")
        .replace("RunId(\"run\")", "run")
        .replace("RunId(\"new\")", "new")
}

// Tables --------------------------------------------------------------------------------------

/// The lines of a table, without its comments: four columns each.
fn rows(table: &'static str) -> Vec<[&'static str; 4]> {
    table
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            cells.try_into().unwrap_or_else(|_| panic!("not four columns: {line}"))
        })
        .collect()
}

/// Where things stand, what happens, where they stand then, what is ordered. Every pair of
/// [`SCENES`] and [`EVENTS`] that is not here changes nothing and orders nothing.
const TRANSITIONS: &str = "\
# Nothing is under way.
idle                      | the same install        | fetching, start 1                         | answer Accepted(new); retire B; fetch 2 into B
idle                      | an install              | fetching, start 1                         | answer Accepted(new); retire B; fetch 3 into B
idle                      | desired: the same       | fetching, start 1                         | retire B; fetch 2 into B
idle                      | desired: another        | fetching, start 1                         | retire B; fetch 3 into B
idle                      | desired: what runs in A | idle: up to date                          |
idle                      | desired: nonsense       | idle: failed, invalidRequest              |
idle                      | cancel                  | idle                                      | answer Nothing
idle                      | confirm                 | idle                                      | answer Nothing
idle                      | roll back               | idle                                      | answer NoWayBack
idle                      | reboot                  | idle                                      | answer Restarting; restart
idle                      | confirmed               | idle                                      |
# The same, and there is a way back.
idle, the other slot good | the same install        | fetching, start 1                         | answer Accepted(new); retire B; fetch 2 into B
idle, the other slot good | an install              | fetching, start 1                         | answer Accepted(new); retire B; fetch 3 into B
idle, the other slot good | desired: the same       | fetching, start 1                         | retire B; fetch 2 into B
idle, the other slot good | desired: another        | fetching, start 1                         | retire B; fetch 3 into B
idle, the other slot good | desired: what runs in A | idle: up to date                          |
idle, the other slot good | desired: nonsense       | idle: failed, invalidRequest              |
idle, the other slot good | cancel                  | idle                                      | answer Nothing
idle, the other slot good | confirm                 | idle                                      | answer Nothing
idle, the other slot good | roll back               | switching, order 1                        | answer RollingBack; try B
idle, the other slot good | reboot                  | idle                                      | answer Restarting; restart
idle, the other slot good | confirmed               | idle                                      |
# It is not known which slot is good; slot A is watched.
idle, nothing known       | the same install        | idle                                      | answer Unconfirmed
idle, nothing known       | an install              | idle                                      | answer Unconfirmed
idle, nothing known       | desired: nonsense       | idle: failed, invalidRequest              |
idle, nothing known       | cancel                  | idle                                      | answer Nothing
idle, nothing known       | confirm                 | idle                                      | answer Confirming; confirm
idle, nothing known       | roll back               | idle                                      | answer Unconfirmed
idle, nothing known       | reboot                  | idle                                      | answer Restarting; restart
idle, nothing known       | healthy                 | idle                                      | confirm
idle, nothing known       | confirmed               | idle                                      |
# Slot B was given up and runs all the same.
idle, given up            | the same install        | idle: failed, stuck                       | answer Unconfirmed
idle, given up            | an install              | idle: failed, stuck                       | answer Unconfirmed
idle, given up            | desired: nonsense       | idle: failed, invalidRequest              |
idle, given up            | cancel                  | idle: failed, stuck                       | answer Nothing
idle, given up            | confirm                 | confirming, start 1                       | answer Confirming; confirm
idle, given up            | roll back               | going back, rolledBackByOperator, order 1 | answer RollingBack; forget B; restart
idle, given up            | reboot                  | idle: failed, stuck                       | answer Restarting; restart
# Bytes flow.
fetching                  | the same install        | fetching behind a checkpoint, start 2     | answer AlreadyRunning(run)
fetching                  | an install              | fetching behind a checkpoint, start 2     | answer Busy(run)
fetching                  | cancel                  | idle: failed, cancelled                   | stop work; answer Cancelled(run)
fetching                  | confirm                 | fetching behind a checkpoint, start 2     | answer Nothing
fetching                  | roll back               | fetching behind a checkpoint, start 2     | answer Busy(run)
fetching                  | reboot                  | fetching behind a checkpoint, start 2     | answer Restarting; restart
fetching                  | checkpoint              | fetching behind a checkpoint, start 1     |
fetching                  | fetched                 | verifying, start 1                        | verify B
fetching                  | not fetched             | idle: failed, network                     |
fetching                  | not restarted           | fetching behind a checkpoint, start 2     | retire B; fetch 2 into B behind a checkpoint
# They flow because the desired properties ask for it.
fetching the desired      | the same install        | fetching behind a checkpoint, start 2     | answer AlreadyRunning(run)
fetching the desired      | an install              | fetching behind a checkpoint, start 2     | answer Busy(run)
fetching the desired      | desired: nothing        | idle: failed, withdrawn                   | stop work
fetching the desired      | desired: another        | fetching, start 1                         | stop work; retire B; fetch 3 into B
fetching the desired      | desired: what runs in A | idle: up to date                          | stop work
fetching the desired      | desired: nonsense       | idle: failed, invalidRequest              | stop work
fetching the desired      | cancel                  | idle: failed, cancelled                   | stop work; answer Cancelled(run)
fetching the desired      | confirm                 | fetching behind a checkpoint, start 2     | answer Nothing
fetching the desired      | roll back               | fetching behind a checkpoint, start 2     | answer Busy(run)
fetching the desired      | reboot                  | fetching behind a checkpoint, start 2     | answer Restarting; restart
fetching the desired      | checkpoint              | fetching behind a checkpoint, start 1     |
fetching the desired      | fetched                 | verifying, start 1                        | verify B
fetching the desired      | not fetched             | idle: failed, network                     |
fetching the desired      | not restarted           | fetching behind a checkpoint, start 2     | retire B; fetch 2 into B behind a checkpoint
# The slot is read back.
verifying                 | the same install        | verifying, start 2                        | answer AlreadyRunning(run)
verifying                 | an install              | verifying, start 2                        | answer Busy(run)
verifying                 | cancel                  | idle: failed, cancelled                   | stop work; answer Cancelled(run)
verifying                 | confirm                 | verifying, start 2                        | answer Nothing
verifying                 | roll back               | verifying, start 2                        | answer Busy(run)
verifying                 | reboot                  | verifying, start 2                        | answer Restarting; restart
verifying                 | verified                | switching, order 1                        | try B
verifying                 | not verified            | idle: failed, readBack                    |
verifying                 | not restarted           | verifying, start 2                        | verify B
# The bootloader is being told.
switching                 | the same install        | switching, order 1                        | answer AlreadyRunning(run)
switching                 | an install              | switching, order 1                        | answer Busy(run)
switching                 | cancel                  | switching, order 1                        | answer TooLate(run)
switching                 | confirm                 | switching, order 1                        | answer Nothing
switching                 | roll back               | switching, order 1                        | answer Busy(run)
switching                 | reboot                  | switching, order 1                        | answer TooLate(run)
switching                 | switched                | restarting, order 1                       | restart to try
switching                 | not switched            | idle: failed, bootloader                  | forget B
switching                 | not restarted           | switching, order 2                        | try B
# The machine is to restart into slot B.
restarting                | the same install        | restarting, order 1                       | answer AlreadyRunning(run)
restarting                | an install              | restarting, order 1                       | answer Busy(run)
restarting                | cancel                  | restarting, order 1                       | answer TooLate(run)
restarting                | confirm                 | restarting, order 1                       | answer Nothing
restarting                | roll back               | restarting, order 1                       | answer Busy(run)
restarting                | reboot                  | restarting, order 1                       | answer TooLate(run)
restarting                | not switched            | idle: failed, bootloader                  | forget B
restarting                | not restarted           | switching, order 2                        | try B
restarting                | machine restarts        | left, order 1                             | carry the argument
restarting                | machine off             | restarting, order 1                       | carry the argument
# It went down cleanly after that.
left                      | the same install        | left, order 1                             | answer AlreadyRunning(run)
left                      | an install              | left, order 1                             | answer Busy(run)
left                      | cancel                  | left, order 1                             | answer TooLate(run)
left                      | confirm                 | left, order 1                             | answer Nothing
left                      | roll back               | left, order 1                             | answer Busy(run)
left                      | reboot                  | left, order 1                             | answer TooLate(run)
left                      | not switched            | idle: failed, bootloader                  | forget B
left                      | not restarted           | switching, order 2                        | try B
left                      | machine restarts        | left, order 1                             | carry the argument
left                      | machine off             | restarting, order 1                       | carry the argument
# Slot B runs and is checked.
on trial                  | the same install        | on trial, start 1                         | answer AlreadyRunning(run)
on trial                  | an install              | on trial, start 1                         | answer Busy(run)
on trial                  | cancel                  | on trial, start 1                         | answer TooLate(run)
on trial                  | confirm                 | confirming, start 1                       | answer Confirming; confirm
on trial                  | roll back               | going back, rolledBackByOperator, order 1 | answer RollingBack; forget B; restart
on trial                  | reboot                  | stopped, start 1                          | try B; answer Restarting; restart to try
on trial                  | healthy                 | confirming, start 1                       | confirm
on trial                  | trial over              | going back, unhealthy, order 1            | forget B; restart
on trial                  | no network              | waiting, start 1                          |
on trial                  | network again           | on trial, start 1                         |
on trial                  | machine restarts        | stopped, start 1                          | try B; carry the argument
on trial                  | machine off             | stopped, start 1                          | try B; carry the argument
# The network is missing through no fault of the image.
waiting                   | the same install        | waiting, start 1                          | answer AlreadyRunning(run)
waiting                   | an install              | waiting, start 1                          | answer Busy(run)
waiting                   | cancel                  | waiting, start 1                          | answer TooLate(run)
waiting                   | confirm                 | confirming, start 1                       | answer Confirming; confirm
waiting                   | roll back               | going back, rolledBackByOperator, order 1 | answer RollingBack; forget B; restart
waiting                   | reboot                  | stopped, start 1                          | try B; answer Restarting; restart to try
waiting                   | healthy                 | confirming, start 1                       | confirm
waiting                   | trial over              | going back, unhealthy, order 1            | forget B; restart
waiting                   | network again           | on trial, start 1                         |
waiting                   | machine restarts        | stopped, start 1                          | try B; carry the argument
waiting                   | machine off             | stopped, start 1                          | try B; carry the argument
# The machine is restarted cleanly and is to come back into slot B. What would tell the bootloader
# something else has to wait.
stopped                   | the same install        | stopped, start 1                          | answer AlreadyRunning(run)
stopped                   | an install              | stopped, start 1                          | answer Busy(run)
stopped                   | cancel                  | stopped, start 1                          | answer TooLate(run)
stopped                   | confirm                 | stopped, start 1                          | answer TooLate(run)
stopped                   | roll back               | going back, rolledBackByOperator, order 1 | answer RollingBack; forget B; restart
stopped                   | reboot                  | stopped, start 1                          | try B; answer Restarting; restart to try
stopped                   | not restarted           | on trial, start 1                         | forget B; watch until 615 s
stopped                   | not switched            | on trial, start 1                         | forget B; watch until 615 s
stopped                   | trial over              | going back, unhealthy, order 1            | forget B; restart
stopped                   | no network              | stopped, start 1                          |
stopped                   | network again           | stopped, start 1                          |
stopped                   | machine restarts        | stopped, start 1                          | try B; carry the argument
stopped                   | machine off             | stopped, start 1                          | try B; carry the argument
# It passed, and is being made the default.
confirming                | the same install        | confirming, start 1                       | answer AlreadyRunning(run)
confirming                | an install              | confirming, start 1                       | answer Busy(run)
confirming                | cancel                  | confirming, start 1                       | answer TooLate(run)
confirming                | confirm                 | confirming, start 1                       | answer Confirming; confirm
confirming                | roll back               | going back, rolledBackByOperator, order 1 | answer RollingBack; forget B; restart
confirming                | reboot                  | confirming, start 1                       | answer TooLate(run)
confirming                | confirmed               | idle: succeeded                           |
# The machine is to restart into slot A.
going back                | the same install        | going back, unhealthy, order 1            | answer AlreadyRunning(run)
going back                | an install              | going back, unhealthy, order 1            | answer Busy(run)
going back                | cancel                  | going back, unhealthy, order 1            | answer TooLate(run)
going back                | confirm                 | going back, unhealthy, order 1            | answer Nothing
going back                | roll back               | going back, unhealthy, order 1            | answer RollingBack
going back                | reboot                  | going back, unhealthy, order 1            | answer TooLate(run)
going back                | not restarted           | going back, unhealthy, order 2            | forget B; restart
";

#[test]
fn every_event_in_every_state_does_what_the_table_says_and_nothing_else() {
    let table = rows(TRANSITIONS);
    let mut wrong = Vec::new();
    for scene_name in SCENES {
        for event_name in EVENTS {
            let (before, facts) = scene(scene_name);
            let row = table.iter().find(|row| row[..2] == [scene_name, event_name]);
            let (after, orders) = step(before.clone(), event(event_name), &facts);
            let found = (say(&after), say_orders(&orders));
            let expected = match row {
                Some([_, _, then, orders]) => ((*then).to_owned(), (*orders).to_owned()),
                None => (say(&before), String::new()),
            };
            if found != expected || (row.is_none() && after != before) {
                wrong.push(format!("{scene_name} | {event_name} | {} | {}", found.0, found.1));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of the pairs are different:\n{}", wrong.len(), wrong.join("\n"));
    for row in table {
        assert!(SCENES.contains(&row[0]) && EVENTS.contains(&row[1]), "nobody looks at {row:?}");
    }
}

/// How the agent started, for the scenes: still in the same boot, or after a restart in a slot
/// with what the bootloader would start next.
fn start(scene_name: &str, how: &str) -> (Saved, Vec<Order>) {
    let (saved, facts) = scene(scene_name);
    let facts = match how {
        "again" => facts,
        "in A" => Facts { boot: BootId("boot 3".into()), ..in_a() },
        "in A, B is next" => Facts { boot: BootId("boot 3".into()), next: Some(Slot::B), ..in_a() },
        "in A, nothing is next" => Facts { boot: BootId("boot 3".into()), next: None, ..in_a() },
        "in B, A is next" => Facts { boot: BootId("boot 3".into()), ..in_b() },
        "in B, B is next" => Facts { boot: BootId("boot 3".into()), next: Some(Slot::B), ..in_b() },
        "in B, nothing is next" => Facts { boot: BootId("boot 3".into()), next: None, ..in_b() },
        "in A, B was tried" => Facts { boot: BootId("boot 3".into()), tried: Some(true), ..in_a() },
        "in A, B was not" => Facts { boot: BootId("boot 3".into()), tried: Some(false), ..in_a() },
        "in A, by argument" => Facts { boot: BootId("boot 3".into()), by_argument: true, ..in_a() },
        "in B, by argument" => Facts { boot: BootId("boot 3".into()), by_argument: true, ..in_b() },
        other => panic!("no start {other}"),
    };
    step(saved, Event::Started, &facts)
}

/// The agent starts: what was saved, how it started, what follows.
const STARTS: &str = "\
# The good slot runs. GRUB marks it as tried at every boot, U-Boot counts: it is refreshed.
idle                      | again                 | idle                                  | confirm
idle                      | in A                  | idle                                  | confirm
idle                      | in A, B is next       | idle                                  | confirm
idle                      | in A, nothing is next | idle                                  | confirm
idle, given up            | in A                  | idle: rolled back, stuck              | confirm
# The file was lost or never was. Only a slot that may be on trial has to prove itself.
idle, nothing known       | in A                  | idle                                  | confirm
idle, nothing known       | in A, nothing is next | idle                                  | confirm
idle, nothing known       | in A, B is next       | idle                                  | watch
idle, nothing known       | in B, A is next       | idle                                  | watch
idle, nothing known       | in B, B is next       | idle                                  | confirm
# Another slot than the good one runs, and nobody knows why.
idle                      | in B, A is next       | on trial, start 1                     | watch until 620 s
idle                      | in B, B is next       | idle: rolled back, leftConfirmedSlot  | confirm
idle                      | in B, nothing is next | idle: rolled back, leftConfirmedSlot  | confirm
idle, the other slot good | in B, A is next       | on trial, start 1                     | watch until 620 s
idle, the other slot good | in B, B is next       | idle: rolled back, leftConfirmedSlot  | confirm
idle, given up            | in B, A is next       | idle: failed, stuck                   |
idle, given up            | in B, nothing is next | idle: failed, stuck                   |
# A download goes on, behind what is proven.
fetching                  | again                 | fetching behind a checkpoint, start 3 | confirm; retire B; fetch 2 into B behind a checkpoint
fetching                  | in A                  | fetching behind a checkpoint, start 3 | confirm; retire B; fetch 2 into B behind a checkpoint
fetching                  | in B, A is next       | going back, fellBack, order 1         | forget B; restart
fetching                  | in B, B is next       | idle: failed, stuck                   |
fetching                  | in B, nothing is next | idle: failed, stuck                   |
verifying                 | again                 | verifying, start 3                    | confirm; verify B
verifying                 | in A, nothing is next | verifying, start 3                    | confirm; verify B
verifying                 | in B, A is next       | going back, fellBack, order 1         | forget B; restart
verifying                 | in B, B is next       | idle: failed, stuck                   |
# The switch was ordered. Unless the restart was too, the slot was never tried.
switching                 | again                 | switching, order 2                    | confirm; try B
switching                 | in A                  | switching, order 2                    | confirm; try B
switching                 | in B, A is next       | on trial, start 1                     | watch until 620 s
switching                 | in B, B is next       | on trial, start 1                     | watch until 620 s
switching                 | in B, nothing is next | on trial, start 1                     | watch until 620 s
restarting                | again                 | switching, order 2                    | confirm; try B
restarting                | in A                  | idle: rolled back, fellBack           | forget B; confirm; read the journal
restarting                | in B, A is next       | on trial, start 1                     | watch until 620 s
left                      | again                 | switching, order 2                    | confirm; try B
left                      | in A                  | idle: rolled back, fellBack           | forget B; confirm; read the journal
left                      | in A, nothing is next | idle: rolled back, fellBack           | forget B; confirm; read the journal
left                      | in B, A is next       | on trial, start 1                     | watch until 620 s
# It was not tried: the bootloader still means to, or the argument was lost with the power. One that
# went down with the argument was.
restarting                | in A, B is next       | switching, order 2                    | confirm; try B
left                      | in A, B is next       | switching, order 2                    | confirm; try B
switching                 | in A, by argument     | switching, order 2                    | confirm; try B
restarting                | in A, by argument     | switching, order 2                    | confirm; try B
left                      | in A, by argument     | idle: rolled back, fellBack           | forget B; confirm; read the journal
restarting                | in B, by argument     | on trial, start 1                     | watch until 620 s
left                      | in B, by argument     | on trial, start 1                     | watch until 620 s
# What the bootloader says of it outranks all that: the power may go before the order is saved.
switching                 | in A, B was tried     | idle: rolled back, fellBack           | forget B; confirm; read the journal
switching                 | in A, B was not       | switching, order 2                    | confirm; try B
restarting                | in A, B was not       | switching, order 2                    | confirm; try B
restarting                | in A, B was tried     | idle: rolled back, fellBack           | forget B; confirm; read the journal
stopped                   | in A, B was tried     | idle: rolled back, fellBack           | forget B; confirm; read the journal
stopped, restarting       | in A, B was not       | switching, order 2                    | confirm; try B
# The trial goes on in its own boot with its own deadline, in another with a new one.
on trial                  | again                 | on trial, start 2                     | watch until 615 s
on trial                  | in A                  | idle: rolled back, fellBack           | forget B; confirm; read the journal
on trial                  | in A, B is next       | idle: rolled back, fellBack           | forget B; confirm; read the journal
on trial                  | in B, A is next       | on trial, start 2                     | watch until 620 s
on trial                  | in B, B is next       | on trial, start 2                     | watch until 620 s
on trial                  | in A, by argument     | idle: rolled back, fellBack           | forget B; confirm; read the journal
on trial                  | in B, by argument     | on trial, start 2                     | watch until 620 s
# An outage buys time in its own boot only.
waiting                   | again                 | waiting, start 2                      | watch until 620 s
waiting                   | in B, A is next       | on trial, start 2                     | watch until 620 s
waiting                   | in A                  | idle: rolled back, fellBack           | forget B; confirm; read the journal
# After a clean stop the slot comes back, and that is no new start. The argument may be lost.
stopped                   | again                 | on trial, start 1                     | forget B; watch until 615 s
stopped                   | in B, A is next       | on trial, start 1                     | watch until 620 s
stopped                   | in B, by argument     | on trial, start 1                     | watch until 620 s
stopped                   | in A                  | idle: rolled back, fellBack           | forget B; confirm; read the journal
stopped                   | in A, B is next       | switching, order 2                    | confirm; try B
stopped                   | in A, by argument     | switching, order 2                    | confirm; try B
# One that was restarted carried it: the slot was tried and failed.
stopped, restarting       | in A, by argument     | idle: rolled back, fellBack           | forget B; confirm; read the journal
stopped, restarting       | in A, B is next       | switching, order 2                    | confirm; try B
stopped, restarting       | in B, by argument     | on trial, start 1                     | watch until 620 s
stopped, off              | in A, by argument     | switching, order 2                    | confirm; try B
stopped, off              | in A                  | idle: rolled back, fellBack           | forget B; confirm; read the journal
confirming                | again                 | confirming, start 1                   | confirm
confirming                | in A                  | idle: rolled back, fellBack           | forget B; confirm; read the journal
confirming                | in B, A is next       | confirming, start 1                   | confirm
confirming                | in B, B is next       | confirming, start 1                   | confirm
# The way back is ordered again in one boot; a boot that came up wrong ends it.
going back                | again                 | going back, unhealthy, order 2        | forget B; restart
going back                | in A                  | idle: rolled back, unhealthy          | forget B; confirm; read the journal
going back                | in A, nothing is next | idle: rolled back, unhealthy          | forget B; confirm; read the journal
going back                | in B, A is next       | idle: failed, stuck                   |
going back                | in B, B is next       | idle: failed, stuck                   |
";

#[test]
fn every_start_goes_on_where_the_bootloader_says_the_device_is() {
    let mut wrong = Vec::new();
    for [scene_name, how, then, ordered] in rows(STARTS) {
        let (after, orders) = start(scene_name, how);
        let found = (say(&after), say_orders(&orders));
        if found != (then.to_owned(), ordered.to_owned()) {
            wrong.push(format!("{scene_name} | {how} | {} | {}", found.0, found.1));
        }
    }
    assert!(wrong.is_empty(), "{} are different:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_slot_that_is_never_tried_is_armed_again_and_then_given_up() {
    // A restart that always loses the argument, or a bootloader that does as if.
    for facts in [
        Facts { by_argument: true, ..in_a() },
        Facts { next: Some(Slot::B), ..in_a() },
        Facts { tried: Some(false), ..in_a() },
    ] {
        let (mut saved, _) = scene("restarting");
        let mut told = vec![say(&saved)];
        let mut orders = Vec::new();
        for boot in 2..10 {
            let facts = Facts { boot: BootId(format!("boot {boot}")), ..facts.clone() };
            (saved, orders) = step(saved, Event::Started, &facts);
            if saved.state == State::Idle {
                break;
            }
            let why = saved.state.run().unwrap().why_armed_again(boot).unwrap();
            assert!(why.starts_with(&format!("armed again, {boot} of 3: ")), "{why}");
            (saved, _) = step(saved, event("switched"), &facts);
            told.push(say(&saved));
        }
        assert_eq!(told, ["restarting, order 1", "restarting, order 2", "restarting, order 3"]);
        assert_eq!(
            (say(&saved).as_str(), saved.slots.b.name()),
            ("idle: failed, fellBack", "written")
        );
        assert_eq!(say_orders(&orders), "forget B; confirm");
    }
}

#[test]
fn a_slot_that_failed_is_not_tried_a_second_time() {
    // The machine went down with the argument, and came up in the old slot.
    for by_argument in [false, true] {
        let (saved, facts) = scene("restarting");
        let (saved, _) = step(saved, event("machine restarts"), &facts);
        let facts = Facts { boot: BootId("boot 2".into()), by_argument, ..in_a() };
        let (saved, orders) = step(saved, Event::Started, &facts);
        assert_eq!(say(&saved), "idle: rolled back, fellBack");
        assert_eq!(saved.slots.b.name(), "bad");
        assert!(!orders.iter().any(|order| matches!(order, Order::TryNext(_))), "{orders:?}");
        let (saved, orders) = step(saved, Event::Started, &facts);
        assert_eq!(
            (say(&saved).as_str(), say_orders(&orders).as_str()),
            ("idle: rolled back, fellBack", "confirm; read the journal")
        );
    }
}

#[test]
fn clean_restarts_in_a_trial_are_no_starts_and_have_an_end() {
    let (mut saved, _) = scene("on trial");
    let mut number = 2;
    let mut boot = || {
        number += 1;
        Facts { boot: BootId(format!("boot {number}")), ..in_b() }
    };
    // An operator's restart comes as a stop of the machine, too.
    for _ in 0..10 {
        let (after, orders) = step(saved, event("reboot"), &in_b());
        assert_eq!(say_orders(&orders), "try B; answer Restarting; restart to try");
        let (after, _) = step(after, event("machine restarts"), &in_b());
        (saved, _) = step(after, Event::Started, &boot());
        assert_eq!(say(&saved), "on trial, start 1");
    }
    let (same, orders) = step(saved.clone(), event("reboot"), &in_b());
    assert_eq!((&same, say_orders(&orders).as_str()), (&saved, "answer TooLate(run)"));
    // Whoever else does it may be the image itself: three boots of it in all.
    for _ in 0..2 {
        let (after, orders) = step(saved, event("machine restarts"), &in_b());
        assert_eq!(say_orders(&orders), "try B; carry the argument");
        (saved, _) = step(after, Event::Started, &boot());
        assert_eq!(say(&saved), "on trial, start 1");
    }
    let (same, orders) = step(saved.clone(), event("machine restarts"), &in_b());
    assert_eq!((&same, &orders[..]), (&saved, &[][..]), "an image that restarts itself for ever");
    // The bootloader goes back then, as after every boot that nobody vouched for.
    let (saved, _) = step(saved, Event::Started, &Facts { by_argument: true, ..in_a() });
    assert_eq!(say(&saved), "idle: rolled back, fellBack");
    let told = format!("{:?}", saved.last.unwrap().kind);
    assert!(told.contains("after as many clean restarts as a trial may have"), "{told}");
}

#[test]
fn a_machine_that_is_switched_off_every_night_in_its_trial_comes_back_some_times() {
    // With tryboot each of them loses the argument.
    let (mut saved, _) = scene("on trial");
    let mut nights = 0;
    loop {
        nights += 1;
        let by_argument = |facts: Facts, part| Facts {
            by_argument: true,
            boot: BootId(format!("boot {nights} {part}")),
            ..facts
        };
        let (after, _) = step(saved, event("machine off"), &by_argument(in_b(), "evening"));
        let home = by_argument(in_a(), "morning");
        (saved, _) = step(after, Event::Started, &home);
        if saved.state == State::Idle {
            break;
        }
        (saved, _) = step(saved, event("switched"), &home);
        (saved, _) = step(saved, event("machine restarts"), &home);
        (saved, _) = step(saved, Event::Started, &by_argument(in_b(), "noon"));
        assert!(nights < 10, "never ends");
    }
    assert_eq!((say(&saved).as_str(), nights), ("idle: rolled back, fellBack", 3));
}

#[test]
fn a_trial_whose_time_is_over_is_left_whoever_restarts_the_machine() {
    // The trial guard for instance, which told the bootloader so.
    for (scene_name, over_s) in [("on trial", 615), ("waiting", 620)] {
        let (saved, facts) = scene(scene_name);
        let at = |since_boot_s| Facts { since_boot_s, ..facts.clone() };
        let (_, orders) = step(saved.clone(), event("machine restarts"), &at(over_s - 1));
        assert_eq!(say_orders(&orders), "try B; carry the argument");
        let (same, orders) = step(saved.clone(), event("machine restarts"), &at(over_s));
        assert_eq!((same, orders), (saved, vec![]));
    }
}

#[test]
fn what_was_waited_for_the_network_is_not_missing_when_it_is_confirmed() {
    let (saved, facts) = scene("waiting");
    let at = |since_boot_s| Facts { since_boot_s, ..facts.clone() };
    let seen_s = 40_000;
    let seen = Event::Outage(Outage { seen_s, ..outage(true) });
    let (saved, _) = step(saved, seen, &at(seen_s));
    let (saved, _) = step(saved, Event::Healthy, &at(40_300));
    let (same, _) = step(saved.clone(), event("not confirmed"), &at(40_899));
    assert_eq!(same, saved, "it is tried again");
    let (saved, _) = step(saved, event("not confirmed"), &at(40_900));
    assert_eq!(say(&saved), "going back, bootloader, order 1");
}

#[test]
fn what_the_old_slot_knew_of_the_hub_goes_along() {
    for (hub_online, ways) in [(true, false), (false, true)] {
        let facts = Facts { hub_online, ..in_a() };
        for (scene_name, last) in
            [("verifying", "verified"), ("idle, the other slot good", "roll back")]
        {
            let (saved, orders) = step(scene(scene_name).0, event(last), &facts);
            assert!(orders.contains(&Order::TryNext(Slot::B)), "{orders:?}");
            // Nobody knows after a start: what was known stays.
            let later = Facts { hub_online: !hub_online, ..facts.clone() };
            let (saved, _) = step(saved, Event::Started, &later);
            assert_eq!(saved.state.run().unwrap().passage.hub_before, Some(hub_online));
            let (_, orders) = step(saved, Event::Started, &Facts { hub_online: false, ..in_b() });
            let [Order::Watch(Some(time))] = orders[..] else { panic!("{orders:?}") };
            assert_eq!(time.hub_was_missing, ways);
        }
    }
}

#[test]
fn a_hub_that_the_old_slot_finds_before_it_leaves_is_no_excuse_any_more() {
    for (armed_again, last) in
        [(false, "switched"), (false, "machine restarts"), (true, "switched")]
    {
        let offline = Facts { hub_online: false, ..in_a() };
        let (mut saved, _) = step(scene("verifying").0, event("verified"), &offline);
        if armed_again {
            let next = Facts { boot: boot("boot 2"), ..offline.clone() };
            (saved, _) = step(saved, Event::Started, &next);
            assert_eq!(say(&saved), "switching, order 2");
        }
        if last != "switched" {
            (saved, _) = step(saved, event("switched"), &offline);
        }
        assert_eq!(saved.state.run().unwrap().passage.hub_before, Some(false));
        let (saved, _) = step(saved, event(last), &in_a());
        assert_eq!(saved.state.run().unwrap().passage.hub_before, Some(true), "{last}");
    }
}

/// Slot A is good, nothing is under way, and slot B with this content runs.
fn away(content: Content, last: Option<FailureKind>, next: Option<Slot>) -> (Saved, Vec<Order>) {
    let mut saved = home_is_a();
    saved.slots.b = content;
    saved.last = last.map(|kind| {
        Outcome::new(Some(desired_run()), OutcomeKind::Failed(cause(kind)), Some(now()))
    });
    step(saved, Event::Started, &Facts { next, ..in_b() })
}

#[test]
fn a_slot_that_never_passed_its_checks_is_a_trial_whatever_was_saved() {
    // The try could not be taken back, and the machine was restarted long after.
    for next in [Some(Slot::A), Some(Slot::B), None] {
        let (saved, orders) = away(tried(is_written), Some(FailureKind::RestartFailed), next);
        let State::Trial { run, starts: 1, healthy: false, .. } = &saved.state else {
            panic!("{:?}", saved.state);
        };
        assert_eq!(run.id, id("run"), "the run that led here goes on");
        assert_eq!(say_orders(&orders), "watch until 620 s");
        assert_eq!(saved.home, Some(Slot::A));
    }
    // Nobody remembers a run: one is made up, and can end either way.
    let (saved, _) = away(Content::Unknown, None, Some(Slot::A));
    let run = saved.state.run().unwrap().clone();
    assert_eq!((run.from, run.source), (Slot::A, Source::OtherSlot { version: None }));
    let (saved, _) = step(saved, Event::Healthy, &in_b());
    let (saved, _) = step(saved, Event::Confirmed, &in_b());
    assert_eq!((say(&saved).as_str(), saved.home), ("idle: succeeded", Some(Slot::B)));
    assert_eq!(saved.last_success, Some(Success { version: Some(version("2")), at: Some(now()) }));
}

#[test]
fn a_slot_that_was_given_up_is_left_once_and_only_if_the_bootloader_would_leave_it() {
    for content in [tried(is_bad), Content::Incomplete] {
        for (next, then, ordered) in [
            (Some(Slot::A), "going back, fellBack, order 1", "forget B; restart"),
            (Some(Slot::B), "idle: failed, stuck", ""),
            (None, "idle: failed, stuck", ""),
        ] {
            let (saved, orders) = away(content.clone(), Some(FailureKind::Unhealthy), next);
            assert_eq!((say(&saved).as_str(), say_orders(&orders).as_str()), (then, ordered));
            // It comes up in the same slot again, and again.
            let boot = |number: u8| Facts {
                boot: BootId(format!("boot {number}")),
                next: Some(Slot::A),
                ..in_b()
            };
            let (saved, _) = step(saved, Event::Started, &boot(8));
            let (saved, orders) = step(saved, Event::Started, &boot(9));
            assert_eq!((say(&saved).as_str(), &orders[..]), ("idle: failed, stuck", &[][..]));
        }
    }
}

#[test]
fn the_reason_survives_a_bootloader_that_was_not_told_in_time() {
    // GRUB's script begins anew when both slots have been tried.
    let mut saved = home_is_a();
    saved.slots.b = tried(is_bad);
    let kind = OutcomeKind::RolledBack(cause(FailureKind::Unhealthy));
    saved.last = Some(Outcome::new(Some(run()), kind.clone(), Some(now())));
    let (saved, _) = step(saved, Event::Started, &in_b());
    assert_eq!(say(&saved), "going back, unhealthy, order 1");
    let (saved, _) = step(saved, Event::Started, &in_a());
    assert_eq!(saved.last.unwrap().kind, kind);
}

#[test]
fn a_bootloader_that_does_not_obey_ends_the_update_instead_of_looping() {
    // It starts slot B at every boot, healthy or not, whatever it is told.
    let (mut saved, _) = scene("on trial");
    let mut restarts = 0;
    for boot in 2..50 {
        let facts = Facts { boot: BootId(format!("boot {boot}")), ..in_b() };
        let (next, mut orders) = step(saved, Event::Started, &facts);
        saved = next;
        if orders.iter().any(|order| matches!(order, Order::Watch(_))) {
            let (next, more) = step(saved, Event::TrialExpired("sick".into()), &facts);
            saved = next;
            orders = more;
        }
        if !orders.contains(&Order::Restart) {
            break;
        }
        restarts += 1;
    }
    assert_eq!((say(&saved).as_str(), restarts), ("idle: failed, stuck", 1));
    let detail = match &saved.last.as_ref().unwrap().kind {
        OutcomeKind::Failed(cause) => cause.detail.clone(),
        other => panic!("{other:?}"),
    };
    assert!(detail.contains("sick") && detail.contains("slot A"), "{detail}");
    assert_eq!(saved.slots.b.name(), "bad");
}

#[test]
fn orders_that_lead_nowhere_are_given_up() {
    // The machine does not restart into the new slot...
    let (mut saved, facts) = scene("restarting");
    let mut orders = Vec::new();
    for _ in 0..3 {
        (saved, orders) = step(saved, event("not restarted"), &facts);
        if orders == [Order::TryNext(Slot::B)] {
            (saved, orders) = step(saved, event("switched"), &facts);
        }
    }
    assert_eq!(say(&saved), "idle: failed, restartFailed");
    assert_eq!(orders, [Order::CancelTry(Slot::B)]);
    assert_eq!(saved.slots.b.name(), "written", "it is whole, and an operator may still try it");

    // ... nor back into the old one...
    let (mut saved, facts) = scene("going back");
    for _ in 0..3 {
        (saved, orders) = step(saved, event("not restarted"), &facts);
    }
    assert_eq!((say(&saved).as_str(), &orders[..]), ("idle: failed, stuck", &[][..]));

    // ... and the power fails at every switch.
    let (mut saved, _) = scene("switching");
    for boot in 2..10 {
        let facts = Facts { boot: BootId(format!("boot {boot}")), ..in_a() };
        (saved, orders) = step(saved, Event::Started, &facts);
        if saved.state == State::Idle {
            break;
        }
    }
    assert_eq!(say(&saved), "idle: failed, fellBack");
    assert_eq!(say_orders(&orders), "forget B; confirm");
    assert_eq!(saved.slots.b.name(), "written", "it was never tried");
}

#[test]
fn starts_without_progress_end_a_download_and_progress_buys_new_ones() {
    let again = |saved| step(saved, Event::Started, &in_a());
    let (mut saved, _) = scene("fetching");
    for _ in 0..20 {
        (saved, _) = again(saved);
        assert_eq!(say(&saved), "fetching behind a checkpoint, start 3");
        (saved, _) = step(saved, event("checkpoint"), &in_a());
        (saved, _) = again(saved);
    }
    let (saved, _) = again(saved);
    let (saved, orders) = again(saved);
    assert_eq!(say(&saved), "idle: failed, tooManyStarts");
    assert_eq!(orders, [Order::Confirm], "the boot attempts of the old slot are refreshed");

    let (mut saved, _) = scene("verifying");
    for _ in 0..2 {
        (saved, _) = again(saved);
    }
    assert_eq!(say(&saved), "idle: failed, tooManyStarts");
}

#[test]
fn even_progress_does_not_buy_starts_without_end() {
    let (mut saved, _) = scene("fetching");
    let mut starts = 0;
    while saved.state != State::Idle {
        (saved, _) = step(saved, Event::Started, &in_a());
        (saved, _) = step(saved, event("checkpoint"), &in_a());
        starts += 1;
        assert!(starts < 1000, "never ends");
    }
    assert_eq!(say(&saved), "idle: failed, tooManyStarts");
}

#[test]
fn an_agent_that_keeps_dying_in_the_trial_loses_it() {
    let (mut saved, facts) = scene("on trial");
    let mut orders = Vec::new();
    for _ in 0..3 {
        (saved, orders) = step(saved, Event::Started, &facts);
    }
    assert_eq!(say(&saved), "going back, tooManyStarts, order 1");
    assert_eq!(orders, [Order::CancelTry(Slot::B), Order::Restart]);
}

#[test]
fn a_trial_has_one_deadline_per_boot_however_often_the_agent_starts() {
    let (saved, facts) = scene("switching");
    let (saved, _) =
        step(saved, Event::Started, &Facts { running: Slot::B, since_boot_s: 30, ..facts });
    let later = Facts { running: Slot::B, since_boot_s: 500, ..in_a() };
    let (_, orders) = step(saved.clone(), Event::Started, &later);
    assert_eq!(say_orders(&orders), "watch until 630 s");
    let next_boot = Facts { boot: BootId("another".into()), since_boot_s: 40, ..later };
    let (_, orders) = step(saved, Event::Started, &next_boot);
    assert_eq!(say_orders(&orders), "watch until 640 s");
}

#[test]
fn a_healthy_slot_that_cannot_be_made_the_default_is_left_when_its_time_is_over() {
    let (saved, facts) = scene("confirming");
    let in_time = Facts { since_boot_s: 614, ..facts.clone() };
    let (same, orders) = step(saved.clone(), event("not confirmed"), &in_time);
    assert_eq!((same, orders), (saved.clone(), vec![]), "it is tried again");
    let late = Facts { since_boot_s: 615, ..facts };
    let (saved, orders) = step(saved, event("not confirmed"), &late);
    assert_eq!(say(&saved), "going back, bootloader, order 1");
    assert_eq!(say_orders(&orders), "forget B; restart");
}

#[test]
fn an_outcome_tells_why_the_machine_did_not_restart() {
    let refused = || Event::RestartFailed(Failure::new(FailureKind::RestartFailed, "no polkit"));
    for (scene_name, ended) in
        [("restarting", "idle: failed, restartFailed"), ("going back", "idle: failed, stuck")]
    {
        let (mut saved, facts) = scene(scene_name);
        for _ in 0..3 {
            saved = step(saved, refused(), &facts).0;
        }
        assert_eq!(say(&saved), ended);
        let told = format!("{:?}", saved.last.unwrap().kind);
        assert!(told.contains("no polkit"), "{told}");
    }
}

#[test]
fn success_and_failure_leave_the_right_memory() {
    // Success: the new slot is home, and known by what it says of itself.
    let (saved, facts) = scene("confirming");
    let facts = Facts { running_version: Some(version("2.0.1")), ..facts };
    let (saved, _) = step(saved, Event::Confirmed, &facts);
    assert_eq!(saved.home, Some(Slot::B));
    assert_eq!(
        saved.slots.b,
        Content::Good { version: Some(version("2.0.1")), digest: Some(Digest::new([2; 32])) }
    );
    assert_eq!(saved.slots.a, good("1"), "the old slot stays the way back");
    let success = Success { version: Some(version("2.0.1")), at: Some(now()) };
    assert_eq!(saved.last_success, Some(success.clone()));

    // A failure after it does not erase it, and costs the way back only what was overwritten.
    let (saved, _) = step(saved, event("an install"), &facts);
    assert_eq!(saved.slots.a, Content::Incomplete);
    let (saved, _) = step(saved, event("not fetched"), &facts);
    assert_eq!(saved.last_success, Some(success));
    assert_eq!(say(&saved), "idle: failed, network");
    let (_, orders) = step(saved, event("roll back"), &facts);
    assert_eq!(orders, [Order::Answer(Verdict::NoWayBack)]);

    // What was tried in vain is no way back either.
    let (saved, _) = start("on trial", "in A");
    assert_eq!(saved.slots.b, tried(is_bad));
    let (_, orders) = step(saved, event("roll back"), &in_a());
    assert_eq!(orders, [Order::Answer(Verdict::NoWayBack)]);
}

#[test]
fn a_request_after_success_is_a_new_run_even_for_the_same_image() {
    let (saved, facts) = scene("confirming");
    let facts = Facts { next: Some(Slot::B), ..facts };
    let (saved, _) = step(saved, Event::Confirmed, &facts);
    let (saved, orders) = step(saved, event("the same install"), &facts);
    assert_eq!(saved.state.run().unwrap().from, Slot::B);
    assert_eq!(say_orders(&orders), "answer Accepted(new); retire A; fetch 2 into A",);
}

#[test]
fn going_back_is_a_run_like_any_other() {
    // From the good slot A to the image of slot B, that still lies there.
    let (saved, facts) = scene("idle, the other slot good");
    let (saved, _) = step(saved, event("roll back"), &facts);
    let (saved, _) = step(saved, event("switched"), &facts);
    let in_old = Facts { running_version: Some(version("0")), ..in_b() };
    let (works, orders) = step(saved.clone(), Event::Started, &in_old);
    assert_eq!(say_orders(&orders), "watch until 620 s");
    let (works, _) = step(works, Event::Healthy, &in_old);
    let (works, _) = step(works, Event::Confirmed, &in_old);
    assert_eq!(say(&works), "idle: succeeded");
    assert_eq!(works.last_success.unwrap().version, Some(version("0")));
    assert_eq!(works.slots.a, good("1"), "and one may change one's mind again");

    // It does not start any more.
    let (fails, orders) =
        step(saved, Event::Started, &Facts { boot: BootId("3".into()), ..in_a() });
    assert_eq!(say(&fails), "idle: rolled back, fellBack");
    assert_eq!(say_orders(&orders), "forget B; confirm; read the journal");
    assert_eq!(fails.home, Some(Slot::A));
}

#[test]
fn the_desired_properties_are_pursued_until_they_are_settled() {
    let desired = |version_text, fingerprint, rewritten| Event::Desired {
        id: id("new"),
        wanted: Some(wanted(version_text, fingerprint)),
        rewritten,
    };
    // It failed: reading the twin again does not start it again...
    let (saved, facts) = scene("fetching the desired");
    let (failed, _) = step(saved, event("not fetched"), &facts);
    let (same, orders) = step(failed.clone(), desired("2", 7, false), &facts);
    assert_eq!((same, orders), (failed.clone(), vec![]));
    // ... but writing it again does, and so does any other content.
    let (again, _) = step(failed.clone(), desired("2", 7, true), &facts);
    assert_eq!(say(&again), "fetching, start 1");
    let (other, _) = step(failed.clone(), desired("2", 8, false), &facts);
    assert_eq!(say(&other), "fetching, start 1");
    // ... and so does taking it away and bringing it back.
    let (none, _) = step(failed, event("desired: nothing"), &facts);
    let (back, _) = step(none, desired("2", 7, false), &facts);
    assert_eq!(say(&back), "fetching, start 1");

    // ... and writing it again while something else is under way, as soon as that has ended.
    let (mut saved, facts) = scene("fetching");
    saved.settled = Some(Digest::new([7; 32]));
    let (busy, _) = step(saved, desired("2", 7, true), &facts);
    let (idle, _) = step(busy, event("not fetched"), &facts);
    let (again, _) = step(idle, desired("2", 7, false), &facts);
    assert_eq!(say(&again), "fetching, start 1");

    // It was rolled back, or taken back by an operator: likewise settled.
    for (scene_name, last_event) in
        [("fetching the desired", "cancel"), ("fetching the desired", "not fetched")]
    {
        let (saved, facts) = scene(scene_name);
        let (saved, _) = step(saved, event(last_event), &facts);
        let (_, orders) = step(saved, event("desired: the same"), &facts);
        assert_eq!(orders, [], "after {last_event}");
    }
    let (mut saved, _) = scene("on trial");
    *saved.state.run_mut().unwrap() = desired_run();
    let (saved, _) = step(saved, Event::Started, &in_a());
    let (_, orders) = step(saved, event("desired: the same"), &in_a());
    assert_eq!(orders, [], "after a rollback");

    // It succeeded, and an operator installed something else since: his word is the newer.
    let (mut saved, facts) = scene("confirming");
    *saved.state.run_mut().unwrap() = desired_run();
    let (saved, _) = step(saved, Event::Confirmed, &facts);
    let newer = Facts { running_version: Some(version("3")), ..facts };
    let (_, orders) = step(saved, event("desired: the same"), &newer);
    assert_eq!(orders, []);
}

#[test]
fn a_version_that_runs_unconfirmed_is_not_up_to_date() {
    let (saved, facts) = scene("idle, nothing known");
    let asks = event("desired: what runs in A");
    let (after, orders) = step(saved.clone(), asks.clone(), &facts);
    assert_eq!((&after, &orders[..]), (&saved, &[][..]));
    let (confirmed, _) = step(after, Event::Confirmed, &facts);
    let (done, _) = step(confirmed, asks, &facts);
    assert_eq!(say(&done), "idle: up to date");
}

#[test]
fn nothing_needs_the_clock_to_be_set() {
    let unset = |facts: Facts| Facts { now: None, ..facts };
    let (saved, facts) = scene("idle");
    let facts = unset(facts);
    let (saved, _) = step(saved, event("an install"), &facts);
    let (saved, _) = step(saved, event("fetched"), &facts);
    let (saved, _) = step(saved, event("verified"), &facts);
    let (saved, _) = step(saved, event("switched"), &facts);
    let booted = unset(in_b());
    let (saved, _) = step(saved, Event::Started, &booted);
    let (saved, _) = step(saved, Event::Healthy, &booted);
    let (saved, _) = step(saved, Event::Confirmed, &booted);
    assert_eq!(say(&saved), "idle: succeeded");
    assert_eq!(saved.last_success, Some(Success { version: Some(version("2")), at: None }));
}

#[test]
fn each_phase_notes_when_it_began() {
    let at = |seconds: i64| Facts { now: Some(WallTime::from_unix_ms(seconds * 1000)), ..in_a() };
    let in_b_at = |seconds| Facts { now: at(seconds).now, ..in_b() };
    let (saved, _) = scene("idle");
    let (saved, _) = step(saved, event("an install"), &at(1));
    let (saved, _) = step(saved, event("first bytes"), &at(2));
    let (saved, _) = step(saved, event("first bytes"), &at(3));
    let (saved, _) = step(saved, event("fetched"), &at(4));
    let (saved, _) = step(saved, event("verified"), &at(5));
    let (saved, _) = step(saved, event("switched"), &at(6));
    let (saved, _) = step(saved, Event::Started, &in_b_at(7));
    let (saved, _) = step(saved, Event::Started, &in_b_at(8));
    let (saved, _) = step(saved, Event::Healthy, &in_b_at(9));
    let (saved, _) = step(saved, Event::Confirmed, &in_b_at(10));
    let second = |number: i64| Some(WallTime::from_unix_ms(number * 1000));
    let last = saved.last.unwrap();
    assert_eq!(
        last.run.unwrap().times,
        Times {
            requested: second(1),
            downloading: second(2),
            downloaded: second(4),
            applying: second(5),
            rebooted: second(7),
        }
    );
    assert_eq!((last.at, saved.last_success.unwrap().at), (second(10), second(10)));
}

/// What the outcome of the last update knows of the failed boot's journal.
fn journal(saved: &Saved) -> Option<LastWords> {
    saved.last.as_ref().and_then(|last| last.journal.clone())
}

fn boot(name: &str) -> BootId {
    BootId(name.into())
}

#[test]
fn the_journal_of_the_boot_that_failed_is_wanted() {
    let unknown = |after, others: &[&str]| FailedBoot::Unknown {
        after: boot(after),
        others: others.iter().map(|name| boot(name)).collect(),
    };
    for (scene_name, failed) in [
        // The new system never got as far as the agent.
        ("restarting", unknown("boot 1", &["boot 3"])),
        // It got there once, and was restarted cleanly.
        ("stopped", unknown("boot 2", &["boot 3"])),
        ("on trial", FailedBoot::Known(boot("boot 2"))),
        ("confirming", FailedBoot::Known(boot("boot 2"))),
        ("going back", FailedBoot::Known(boot("boot 2"))),
    ] {
        let (saved, orders) = start(scene_name, "in A");
        assert_eq!(journal(&saved), Some(LastWords::Wanted(failed.clone())), "{scene_name}");
        assert_eq!(orders.last(), Some(&Order::ReadJournal(failed)), "{scene_name}");
    }
    // Nothing failed to boot.
    for (scene_name, event_name) in
        [("fetching", "not fetched"), ("confirming", "confirmed"), ("switching", "not switched")]
    {
        let (saved, facts) = scene(scene_name);
        assert_eq!(journal(&step(saved, event(event_name), &facts).0), None, "{scene_name}");
    }
    // The bootloader left a good slot: no update ended, so none is told of.
    assert_eq!(journal(&start("idle", "in B, B is next").0), None);
}

#[test]
fn the_journal_is_asked_for_until_it_is_read_and_then_no_more() {
    let asked = |orders: &[Order]| {
        orders.iter().find_map(|order| match order {
            Order::ReadJournal(failed) => Some(failed.clone()),
            _ => None,
        })
    };
    let (mut saved, orders) = start("restarting", "in A");
    let first = asked(&orders).unwrap();
    // The power goes before it is read. Whatever came since is not the failed boot.
    for number in 4..6 {
        let facts = Facts { boot: boot(&format!("boot {number}")), ..in_a() };
        let (next, orders) = step(saved, Event::Started, &facts);
        let Some(FailedBoot::Unknown { others, .. }) = asked(&orders) else { panic!("{orders:?}") };
        assert_eq!(others.last(), Some(&facts.boot));
        assert_eq!(step(next.clone(), Event::Started, &facts), (next.clone(), orders), "same boot");
        saved = next;
    }
    let (_, orders) = step(saved.clone(), Event::Started, &in_a());
    let of = asked(&orders).unwrap();

    // Also while the next update is under way.
    let (busy, _) = step(saved.clone(), event("an install"), &in_a());
    assert!(asked(&step(busy, Event::Started, &in_a()).1).is_some());

    for (result, then) in [
        (Ok(vec!["1.0s app: no".to_owned()]), LastWords::Lines(vec!["1.0s app: no".to_owned()])),
        (Ok(vec![]), LastWords::read(Ok(vec![]))),
        (Err("no journalctl".to_owned()), LastWords::read(Err("no journalctl".to_owned()))),
    ] {
        // An answer to an earlier question is none.
        let late = Event::JournalRead { of: first.clone(), result: result.clone() };
        let (saved, _) = step(saved.clone(), Event::Started, &in_a());
        assert_eq!(step(saved.clone(), late, &in_a()), (saved.clone(), vec![]));

        let (read, orders) = step(saved, Event::JournalRead { of: of.clone(), result }, &in_a());
        let told = format!("{then:?}");
        assert_eq!((journal(&read), orders), (Some(then), vec![]));
        assert_eq!(say(&read), "idle: rolled back, fellBack");
        let is_over = !told.contains("could not be read");
        assert_eq!(asked(&step(read, Event::Started, &in_a()).1).is_none(), is_over, "{told}");
    }
}

#[test]
fn a_journal_that_cannot_be_read_is_tried_at_the_next_starts_and_then_let_be() {
    let ends = [(1, Some("late")), (4, Some("late")), (5, None)];
    for (failures, read_then) in ends {
        let (mut saved, mut orders) = start("restarting", "in A");
        let (mut asked, mut facts) = (0, in_a());
        for number in 4..20 {
            let Some(Order::ReadJournal(of)) = orders.last().cloned() else { break };
            asked += 1;
            let result = match read_then {
                Some(line) if asked > failures => Ok(vec![line.to_owned()]),
                _ => Err("the card is slow".to_owned()),
            };
            let missing = LastWords::read(result.clone());
            (saved, _) = step(saved, Event::JournalRead { of, result }, &facts);
            assert_eq!(journal(&saved), Some(missing), "it is shown meanwhile");
            facts.boot = boot(&format!("boot {number}"));
            (saved, orders) = step(saved, Event::Started, &facts);
        }
        assert_eq!(asked, if read_then.is_some() { failures + 1 } else { failures });
        let lines = read_then.map(|line| LastWords::Lines(vec![line.to_owned()]));
        let told = journal(&saved);
        assert!(lines.is_none() || told == lines, "{told:?}");
    }
}

#[test]
fn a_journal_that_cannot_be_read_for_power_cuts_is_let_be() {
    let (mut saved, _) = start("restarting", "in A");
    for number in 4..20 {
        let facts = Facts { boot: boot(&format!("boot {number}")), ..in_a() };
        saved = step(saved, Event::Started, &facts).0;
    }
    assert_eq!(journal(&saved), None);
    assert_eq!(say(&saved), "idle: rolled back, fellBack");
}

// No sequence of events -----------------------------------------------------------------------

/// What comes next in a random life.
#[derive(Clone, Debug)]
enum Turn {
    Happens(&'static str),
    /// The agent starts again in the same boot.
    Starts,
    /// The machine starts, wherever the bootloader likes.
    Boots {
        running: Slot,
        next: Option<Slot>,
    },
}

fn any_slot() -> impl Strategy<Value = Slot> {
    prop_oneof![Just(Slot::A), Just(Slot::B)]
}

fn any_turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        12 => proptest::sample::select(&EVENTS[..]).prop_map(Turn::Happens),
        1 => Just(Turn::Starts),
        2 => (any_slot(), proptest::option::of(any_slot()))
            .prop_map(|(running, next)| Turn::Boots { running, next }),
    ]
}

/// An event that fits what was ordered, so that random lives get far.
fn likely(saved: &Saved) -> &'static [&'static str] {
    match &saved.state {
        State::Idle => &["an install", "the same install", "desired: another", "roll back"],
        State::Fetching { .. } => &["fetched", "checkpoint", "first bytes"],
        State::Verifying { .. } => &["verified"],
        State::Switching { .. } => &["switched"],
        State::Trial { stopped: true, .. } => &["not restarted", "machine restarts"],
        State::Trial { healthy: false, .. } => &["healthy", "trial over", "no network", "reboot"],
        State::Trial { .. } => &["confirmed"],
        State::RollingBack { .. } => &["not restarted"],
    }
}

fn reboot(facts: &Facts, number: usize, running: Slot, next: Option<Slot>) -> Facts {
    let running_version = Some(version(if running == Slot::A { "1" } else { "2" }));
    Facts {
        running,
        next,
        boot: BootId(format!("boot {number}")),
        running_version,
        ..facts.clone()
    }
}

fn is_operators(event: &Event) -> bool {
    matches!(
        event,
        Event::Requested { .. }
            | Event::CancelRequested
            | Event::ConfirmRequested
            | Event::RollBackRequested { .. }
            | Event::RestartRequested
    )
}

/// What must hold of every single step.
fn check_step(before: &Saved, event: &Event, facts: &Facts, after: &Saved, orders: &[Order]) {
    let context = || format!("{} + {event:?} -> {} + {orders:?}", say(before), say(after));
    for order in orders {
        if let Order::Fetch(_, slot, _) | Order::Retire(slot) = order {
            assert_ne!(*slot, facts.running, "writes the running slot: {}", context());
            assert_ne!(Some(*slot), after.home, "writes the good slot: {}", context());
        }
        if let Order::CancelTry(slot) = order {
            assert_ne!(Some(*slot), after.home, "takes back the good slot: {}", context());
        }
        if *order == Order::Confirm && before.home.is_some_and(|home| home != facts.running) {
            let vouched = matches!(after.state, State::Trial { healthy: true, .. })
                || after.home == Some(facts.running);
            assert!(vouched, "confirms a slot that was not found healthy: {}", context());
        }
    }
    let position = |wanted: fn(&Order) -> bool| orders.iter().position(wanted);
    if let Some(fetch) = position(|order| matches!(order, Order::Fetch(..))) {
        let retired = position(|order| matches!(order, Order::Retire(_)));
        assert!(retired.is_some_and(|at| at < fetch), "writes a slot that boots: {}", context());
    }
    let answers: Vec<&Order> =
        orders.iter().filter(|order| matches!(order, Order::Answer(_))).collect();
    assert_eq!(answers.len(), usize::from(is_operators(event)), "answers: {}", context());
    if let Some(Order::Answer(Verdict::Accepted(id))) = answers.first() {
        assert_eq!(before.state, State::Idle, "accepted while busy: {}", context());
        assert_eq!(before.home, Some(facts.running), "accepted unconfirmed: {}", context());
        assert_eq!(after.state.run().map(|run| &run.id), Some(id), "{}", context());
    }
    let succeeded =
        |saved: &Saved| saved.last.as_ref().is_some_and(|last| last.kind == OutcomeKind::Succeeded);
    if before.last_success != after.last_success || succeeded(after) && before.last != after.last {
        assert_eq!(*event, Event::Confirmed, "success without confirmation: {}", context());
        assert!(matches!(before.state, State::Trial { healthy: true, .. }), "{}", context());
    }
    // A run that ends has an outcome; a run never becomes another one without one.
    let ended =
        before.state.run().filter(|run| after.state.run().map(|run| &run.id) != Some(&run.id));
    if let Some(run) = ended {
        let last = after.last.as_ref();
        let told = last.and_then(|last| last.run.as_ref()).is_some_and(|last| last.id == run.id);
        let replaced = matches!(event, Event::Desired { .. });
        assert!(told || replaced, "ended without an outcome: {}", context());
    }
    if after.state != State::Idle && before.state == State::Idle {
        let away = before.home.is_some_and(|home| home != facts.running);
        assert!(away || before.home == Some(facts.running), "{}", context());
    }
    if let Some(run) = after.state.run() {
        assert_eq!(Some(run.from), after.home, "the way back is not the good slot: {}", context());
    }
}

/// Lives on until nothing is under way; `obeys` is whether the device does what it is told.
fn settle(mut saved: Saved, mut facts: Facts, obeys: bool) -> Saved {
    let mut events = std::collections::VecDeque::from([Event::Started]);
    let mut boot = 1000;
    for _ in 0..200 {
        let Some(event) = events.pop_front() else { break };
        let (after, orders) = step(saved.clone(), event.clone(), &facts);
        check_step(&saved, &event, &facts, &after, &orders);
        saved = after;
        for order in orders {
            match order {
                Order::Fetch(..) if obeys => events.push_back(self::event("fetched")),
                Order::Fetch(..) => events.push_back(self::event("not fetched")),
                Order::Verify(..) if obeys => events.push_back(self::event("verified")),
                Order::Verify(..) => events.push_back(self::event("not verified")),
                Order::TryNext(slot) if obeys => {
                    facts.next = Some(slot);
                    events.push_back(self::event("switched"));
                }
                Order::TryNext(_) => events.push_back(self::event("not switched")),
                Order::CancelTry(slot) if obeys => facts.next = Some(slot.other()),
                Order::Confirm if obeys => events.push_back(self::event("confirmed")),
                Order::Watch(Some(_)) if obeys => events.push_back(self::event("healthy")),
                Order::Watch(Some(_)) => events.push_back(self::event("trial over")),
                Order::RestartToTry | Order::Restart if obeys => {
                    boot += 1;
                    let slot = facts.next.unwrap_or(facts.running);
                    facts = reboot(&facts, boot, slot, Some(saved.home.unwrap_or(slot)));
                    events = [Event::Started].into();
                }
                Order::RestartToTry | Order::Restart => {
                    events.push_back(self::event("not restarted"));
                }
                _ => {}
            }
        }
    }
    assert!(events.is_empty(), "no end in {:?}", saved.state);
    saved
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_events_breaks_a_promise_or_leads_into_a_dead_end(
        known in any::<bool>(),
        turns in proptest::collection::vec((any_turn(), any::<bool>(), any::<proptest::sample::Index>()), 1..60),
    ) {
        let mut saved = if known { home_is_a() } else { Saved::new() };
        let mut facts = in_a();
        for (number, (turn, is_likely, which)) in turns.into_iter().enumerate() {
            let happens = match turn {
                Turn::Happens(_) if is_likely => self::event(which.get::<&'static str>(likely(&saved))),
                Turn::Happens(name) => self::event(name),
                Turn::Starts => Event::Started,
                Turn::Boots { running, next } => {
                    facts = reboot(&facts, number, running, next);
                    Event::Started
                }
            };
            let (after, orders) = step(saved.clone(), happens.clone(), &facts);
            check_step(&saved, &happens, &facts, &after, &orders);
            saved = after;
        }
        prop_assert_eq!(&settle(saved.clone(), facts.clone(), true).state, &State::Idle);
        // Where confirming fails for good, an operator leads back.
        let ended = settle(saved, facts.clone(), false);
        if ended.state != State::Idle {
            let (back, _) = step(ended, self::event("roll back"), &facts);
            prop_assert_eq!(&settle(back, facts, false).state, &State::Idle);
        }
    }

    #[test]
    fn every_order_may_be_ordered_again(
        scene_name in proptest::sample::select(&SCENES[..]),
        starts in 1_usize..4,
    ) {
        // An agent that dies right after each save goes on as if it had died once.
        let (saved, facts) = scene(scene_name);
        let mut after = saved;
        for _ in 0..starts {
            (after, _) = step(after, Event::Started, &facts);
        }
        settle(after, facts, true);
    }
}
