//! The state file against power cuts, full disks, flipped bits and two daemons at once.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;
use tempfile::TempDir;
use twinboot::clock::{BUILD_TIME, Clock, SystemClock};
use twinboot::config::{self, SlotDevice};
use twinboot::os::{self, Sysroot};
use twinboot::store::{FileStore, Loaded, StateStore, StoreError, state_would_be_lost};
use twinboot::update::{
    BootId, Content, Digest, Failure, FailureKind, Job, Origin, Outcome, OutcomeKind, Passage, Run,
    RunId, Saved, Slot, Source, State, Success, Times, WallTime,
};

/// A state with something in every corner.
fn saved(note: &str) -> Saved {
    let run = Run {
        id: RunId("run-1".to_owned()),
        source: Source::Image(Job {
            url: "https://h/fw.img?sig=1".parse().unwrap(),
            version: Some("2.0".parse().unwrap()),
            digest: Some(Digest::new([7; 32])),
            size_bytes: Some(u64::MAX),
        }),
        origin: Origin::Desired(Digest::new([8; 32])),
        from: Slot::A,
        times: Times { requested: Some(WallTime::from_unix_ms(-1)), ..Times::default() },
        starts: 3,
        passage: Passage::default(),
    };
    let reason = Failure::new(FailureKind::Unhealthy, note);
    Saved {
        state: State::RollingBack {
            run: run.clone(),
            reason: reason.clone(),
            ordered_in: BootId("b".to_owned()),
            attempt: 1,
        },
        last: Some(Outcome::new(Some(run), OutcomeKind::RolledBack(reason), None)),
        last_success: Some(Success { version: None, at: None }),
        home: Some(Slot::A),
        slots: twinboot::update::Slots { a: Content::Incomplete, b: Content::Unknown },
        ..Saved::new()
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn what_is_saved_is_loaded_by_the_next_daemon() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path().join("var/lib/twinboot");
    let mut store = FileStore::open(&folder).unwrap();
    assert_eq!(store.load().unwrap(), Loaded::default());
    for note in ["first", "second \"quoted\" \u{1f600} \\ \n"] {
        store.save(&saved(note)).unwrap();
    }
    drop(store);

    let mut store = FileStore::open(&folder).unwrap();
    let expected = saved("second \"quoted\" \u{1f600} \\ \n");
    assert_eq!(store.load().unwrap(), Loaded { saved: Some(expected), set_aside: None });
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&folder.join("state.json")), 0o600);
    assert_eq!(mode(&folder), 0o700);
    assert_eq!(names(&folder), ["state.json"]);
}

#[test]
fn only_one_daemon_works_with_a_folder() {
    let folder = TempDir::new().unwrap();
    let first = FileStore::open(folder.path()).unwrap();
    let error = FileStore::open(folder.path()).unwrap_err();
    assert!(matches!(error, StoreError::InUse { .. }), "{error}");
    assert!(error.to_string().contains("another twinbootd"), "{error}");
    drop(first);
    FileStore::open(folder.path()).unwrap();
}

#[test]
fn what_cannot_be_understood_is_set_aside_and_told_of() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("state.json");
    let mut store = FileStore::open(folder.path()).unwrap();
    store.save(&saved("good")).unwrap();
    let good = fs::read_to_string(&file).unwrap();
    for (number, (content, complaint)) in [
        (String::new(), "not a saved state: EOF"),
        ("null".to_owned(), "not a saved state"),
        (good[..good.len() / 2].to_owned(), "not a saved state: EOF"),
        (
            good.replacen("\"schema\":1", "\"schema\":2", 1),
            "layout 2, but this agent knows layout 1",
        ),
        (good.replace("run-1", "run-2"), "but it should have sha256:"),
        ("\0".repeat(4096), "not a saved state"),
        (" ".repeat(2 << 20), "longer than 1048576 bytes"),
    ]
    .into_iter()
    .enumerate()
    {
        fs::write(&file, &content).unwrap();
        let loaded = store.load().unwrap();
        let (path, problem) = loaded.set_aside.unwrap();
        assert_eq!(loaded.saved, None);
        assert!(problem.contains(complaint), "{problem}");
        assert_eq!(path, folder.path().join(format!("state.json.bad-{}", number + 1)));
        assert_eq!(fs::read_to_string(path).unwrap(), content);
        assert_eq!(store.load().unwrap(), Loaded::default(), "it is told of once");
    }
    let kept = ["state.json.bad-5", "state.json.bad-6", "state.json.bad-7"];
    assert_eq!(names(folder.path()), kept);
    store.save(&saved("after")).unwrap();
    assert_eq!(store.load().unwrap().saved, Some(saved("after")));
}

/// After a rollback: the older agent is back, and finds the file of the newer one.
#[test]
fn what_a_newer_agent_added_to_the_file_is_passed_over() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("state.json");
    let mut store = FileStore::open(folder.path()).unwrap();
    store.save(&saved("good")).unwrap();
    let text = fs::read_to_string(&file).unwrap().replacen('{', "{\"more\":0,", 1);
    fs::write(&file, text).unwrap();
    assert_eq!(store.load().unwrap(), Loaded { saved: Some(saved("good")), set_aside: None });
}

#[test]
fn a_folder_that_is_gone_is_an_error() {
    let folder = TempDir::new().unwrap();
    let mut store = FileStore::open(folder.path()).unwrap();
    fs::remove_dir_all(folder.path()).unwrap();
    assert!(matches!(store.load(), Err(StoreError::Read { .. })));
    assert!(matches!(store.save(&saved("x")), Err(StoreError::Write { .. })));
}

#[test]
fn what_a_cut_save_left_behind_is_removed_and_never_loaded() {
    let folder = TempDir::new().unwrap();
    let mut store = FileStore::open(folder.path()).unwrap();
    store.save(&saved("good")).unwrap();
    let temporary = os::temporary_of(&folder.path().join("state.json"));
    fs::write(&temporary, "half a sta").unwrap();
    assert_eq!(store.load().unwrap().saved, Some(saved("good")));
    drop(store);
    let mut store = FileStore::open(folder.path()).unwrap();
    assert!(!temporary.exists());
    // Left behind while the daemon runs (it can only be a link or a file of somebody else).
    let victim = folder.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    symlink(&victim, &temporary).unwrap();
    store.save(&saved("new")).unwrap();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    assert_eq!(store.load().unwrap().saved, Some(saved("new")));
}

/// Runs the part below in a process of its own that cannot write files of more than a few
/// kilobytes, which fails in the middle of a write as a full disk does.
#[test]
fn a_full_disk_keeps_the_earlier_state() {
    let folder = TempDir::new().unwrap();
    FileStore::open(folder.path()).unwrap().save(&saved("good")).unwrap();
    let output = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "on_the_full_disk", "--ignored", "--nocapture"])
        .env("TWINBOOT_TEST_FOLDER", folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
    assert_eq!(names(folder.path()), ["state.json"]);
    let mut store = FileStore::open(folder.path()).unwrap();
    assert_eq!(store.load().unwrap(), Loaded { saved: Some(saved("good")), set_aside: None });
}

#[test]
#[ignore = "a_full_disk_keeps_the_earlier_state runs it"]
fn on_the_full_disk() {
    let folder = std::env::var("TWINBOOT_TEST_FOLDER").unwrap();
    let mut store = FileStore::open(Path::new(&folder)).unwrap();
    let error = store.save(&saved(&"long ".repeat(20_000))).unwrap_err();
    assert!(matches!(error, StoreError::Write { .. }), "{error:?}");
    assert_eq!(names(Path::new(&folder)), ["state.json"], "no temporary file stays");
    assert_eq!(store.load().unwrap().saved, Some(saved("good")));
    // There is still room for what fits.
    store.save(&saved("good")).unwrap();
}

#[test]
fn the_state_must_not_lie_on_a_slot() {
    let machine = TempDir::new().unwrap();
    let sysroot = Sysroot::new(machine.path());
    let number = os::file_system_number(machine.path()).unwrap();
    let slots = |a: &str| config::Slots {
        a: SlotDevice { device: a.into() },
        b: SlotDevice { device: "/nowhere".into() },
    };
    let proc = |cmdline: &str, number: &str, kind: &str| {
        fs::create_dir_all(machine.path().join("proc/self")).unwrap();
        fs::write(machine.path().join("proc/cmdline"), cmdline).unwrap();
        let line = format!("21 1 {number} / / rw - {kind} /dev/dm-0 rw\n");
        fs::write(machine.path().join("proc/self/mountinfo"), line).unwrap();
    };
    let folder = machine.path().join("not/made/yet");
    let lies = |slots: &config::Slots| state_would_be_lost(&folder, slots, &sysroot);

    assert_eq!(lies(&slots("/nowhere/a")), None);
    proc("rauc.slot=A", "250:1", "ext4");
    assert_eq!(lies(&slots("/nowhere/a")), None, "the root is another file system");
    for (kind, words) in [
        ("overlay", "an overlay, whose changes mostly are kept in memory"),
        ("tmpfs", "in memory (tmpfs), and a restart would lose it"),
        ("ramfs", "in memory (ramfs)"),
    ] {
        proc("quiet", &number.to_string(), kind);
        let why = lies(&slots("/nowhere/a")).unwrap();
        assert!(why.contains(words) && why.contains("state.allow_on_slot"), "{why}");
    }
    proc("quiet", &number.to_string(), "ext4");
    assert_eq!(lies(&slots("/nowhere/a")), None, "the root is no slot");
    proc("rauc.slot=A", &number.to_string(), "ext4");
    let why = lies(&slots("/nowhere/a")).unwrap();
    for part in ["not/made/yet", "slot A (/nowhere/a)", "state.directory"] {
        assert!(why.contains(part), "{why}");
    }
    assert_eq!(
        folder.ancestors().find(|f| f.exists()).unwrap().metadata().unwrap().dev(),
        machine.path().metadata().unwrap().dev()
    );
}

#[test]
fn the_clock_is_trusted_above_the_floor_or_when_synchronised() {
    let machine = TempDir::new().unwrap();
    let clock = SystemClock::new(Sysroot::new(machine.path()));
    let now = clock.wall().expect("this machine's clock shows more than the build date");
    assert!(now > BUILD_TIME);
    let boot = clock.since_boot();
    assert!(!boot.is_zero() && clock.since_boot() >= boot);

    let tomorrow = WallTime::from_unix_ms(now.unix_ms() + 86_400_000);
    clock.raise_floor(tomorrow);
    clock.raise_floor(BUILD_TIME);
    assert_eq!(clock.wall(), None, "it shows less than a time that is known to have passed");
    fs::create_dir_all(machine.path().join("run/systemd/timesync")).unwrap();
    fs::write(machine.path().join("run/systemd/timesync/synchronized"), "").unwrap();
    assert!(clock.wall().is_some_and(|time| time >= now && time < tomorrow));
}

#[test]
fn only_a_synchronised_clock_is_kept_as_the_floor() {
    let machine = TempDir::new().unwrap();
    let clock = SystemClock::new(Sysroot::new(machine.path()));
    assert!(clock.wall().is_some(), "it is trusted, but it may be years ahead");
    assert_eq!(clock.synchronised(), None);
    fs::create_dir_all(machine.path().join("run/systemd/timesync")).unwrap();
    fs::write(machine.path().join("run/systemd/timesync/synchronized"), "").unwrap();
    assert!(clock.synchronised().is_some_and(|time| time > BUILD_TIME));
}

/// Asks the kernel by another way: chrony, ntpd and ptp4l leave no file of systemd's.
#[test]
fn the_kernel_tells_whether_the_clock_is_synchronised() {
    // The status is the first int behind four longs, the first of which is padded from an int.
    let script = "import ctypes\n\
        timex = (ctypes.c_long * 64)()\n\
        assert ctypes.CDLL(None, use_errno=True).adjtimex(timex) >= 0\n\
        status = ctypes.c_int.from_buffer(timex, 5 * ctypes.sizeof(ctypes.c_long)).value\n\
        print(status & 0x40 == 0)";
    let output = Command::new("python3").args(["-c", script]).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let expected = match said.trim() {
        "True" => true,
        "False" => false,
        _ => panic!("{}", String::from_utf8_lossy(&output.stderr)),
    };
    assert_eq!(os::kernel_clock_is_synchronised(&Sysroot::default()), expected);
    let played = TempDir::new().unwrap();
    assert!(!os::kernel_clock_is_synchronised(&Sysroot::new(played.path())));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// A flipped bit is noticed, or it changed nothing.
    #[test]
    fn a_flipped_bit_never_makes_another_state(place in any::<prop::sample::Index>(), bit in 0..8u8) {
        let folder = TempDir::new().unwrap();
        let mut store = FileStore::open(folder.path()).unwrap();
        store.save(&saved("good")).unwrap();
        let file = folder.path().join("state.json");
        let mut bytes = fs::read(&file).unwrap();
        let place = place.index(bytes.len());
        bytes[place] ^= 1 << bit;
        fs::write(&file, bytes).unwrap();
        let loaded = store.load().unwrap();
        prop_assert_eq!(loaded.saved.is_none(), loaded.set_aside.is_some());
        prop_assert!(loaded.saved.is_none_or(|found| found == saved("good")));
    }
}
