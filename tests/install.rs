//! Images into slots: what the medium holds afterwards, and what outside programs are told.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::as_conversions,
    reason = "tests"
)]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use proptest::prelude::*;
use sha2::Digest as _;
use tempfile::TempDir;
use twinboot::config::{self, Seconds, SlotDevice};
use twinboot::install::{BlockInstaller, CommandInstaller, ImageSink, InstallError, Installer};
use twinboot::update::{Digest, Failure, FailureKind, Slot};

const MIB: usize = 1 << 20;
const OLD: u8 = 0xEE;

fn slots(device: &Path) -> config::Slots {
    let slot = |device: &Path| SlotDevice { device: device.to_owned() };
    config::Slots { a: slot(Path::new("/nowhere")), b: slot(device) }
}

/// A slot in a file of `bytes`, full of old content.
fn slot_file(folder: &TempDir, bytes: usize) -> (BlockInstaller, PathBuf) {
    let path = folder.path().join("slot.img");
    std::fs::write(&path, vec![OLD; bytes]).unwrap();
    (BlockInstaller::new(&slots(&path)), path)
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::new(sha2::Sha256::digest(bytes).into())
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut noise = vec![0; bytes];
    fastrand::Rng::with_seed(bytes as u64).fill(&mut noise);
    noise
}

fn read_back(installer: &mut dyn Installer, bytes: usize) -> Digest {
    installer.digest(Slot::B, bytes as u64, &mut |_| true).unwrap().unwrap()
}

/// What is done to a sink.
#[derive(Clone, Debug)]
enum Step {
    Write(usize),
    Checkpoint,
    /// The power goes after a checkpoint; a new sink goes on behind it.
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let write = prop_oneof![1..5000_usize, 100_000..2_000_000_usize, Just(4096), Just(MIB)];
    let step = prop_oneof![
        6 => write.prop_map(Step::Write),
        1 => Just(Step::Checkpoint),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_split_of_the_image_gives_the_same_slot(steps in steps(), spare in 0..10_000_usize) {
        let folder = TempDir::new().unwrap();
        let bytes: usize = steps.iter().map(|s| if let Step::Write(n) = s { *n } else { 0 }).sum();
        let (mut installer, path) = slot_file(&folder, bytes + spare);
        let image = noise(bytes);
        let mut sink = installer.begin(Slot::B).unwrap();
        let mut rest = &image[..];
        for step in steps {
            match step {
                Step::Write(count) => {
                    sink.write(&rest[..count]).unwrap();
                    rest = &rest[count..];
                }
                Step::Checkpoint => assert!(sink.checkpoint().unwrap()),
                Step::Restart => {
                    assert!(sink.checkpoint().unwrap());
                    drop(sink);
                    let done = bytes - rest.len();
                    let proof = digest(&image[..done]);
                    let resumed = installer.resume(Slot::B, done as u64, proof, &mut |_| true);
                    sink = resumed.unwrap().unwrap();
                }
            }
        }
        sink.finish().unwrap();
        let slot = std::fs::read(&path).unwrap();
        prop_assert_eq!(slot.len(), bytes + spare);
        prop_assert!(slot[..bytes] == image[..]);
        prop_assert!(slot[bytes..].iter().all(|byte| *byte == OLD));
        prop_assert_eq!(read_back(&mut installer, bytes), digest(&image));
    }
}

#[test]
fn a_checkpoint_is_on_the_medium_although_the_image_is_abandoned() {
    let folder = TempDir::new().unwrap();
    let (mut installer, _) = slot_file(&folder, 4 * MIB);
    let image = noise(2 * MIB + 777);
    let mut sink = installer.begin(Slot::B).unwrap();
    sink.write(&image).unwrap();
    sink.checkpoint().unwrap();
    sink.write(&noise(MIB)).unwrap();
    drop(sink);
    assert_eq!(read_back(&mut installer, image.len()), digest(&image));
}

#[test]
fn never_writes_beyond_the_slot_nor_makes_it_longer() {
    let folder = TempDir::new().unwrap();
    // A size that no alignment divides, with the last page only begun.
    let bytes = 2 * MIB + 4096 + 100;
    for too_much in [1, 5000, 3 * MIB] {
        let (mut installer, path) = slot_file(&folder, bytes);
        assert_eq!(installer.capacity(Slot::B).unwrap(), Some(bytes as u64));
        let mut sink = installer.begin(Slot::B).unwrap();
        sink.write(&noise(bytes)).unwrap();
        let error = sink.write(&noise(too_much)).unwrap_err();
        assert!(
            matches!(error, InstallError::Full { capacity_bytes, .. } if capacity_bytes == bytes as u64)
        );
        assert_eq!(Failure::from(error).kind, FailureKind::TooLarge);
        drop(sink);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), bytes as u64);
        // Exactly full is fine.
        let mut sink = installer.begin(Slot::B).unwrap();
        sink.write(&noise(bytes)).unwrap();
        sink.finish().unwrap();
        assert_eq!(read_back(&mut installer, bytes), digest(&noise(bytes)));
    }
}

#[test]
fn goes_on_only_behind_what_reads_back() {
    let folder = TempDir::new().unwrap();
    let (mut installer, path) = slot_file(&folder, 4 * MIB);
    let image = noise(3 * MIB);
    let mut sink = installer.begin(Slot::B).unwrap();
    sink.write(&image).unwrap();
    sink.finish().unwrap();
    let proof = digest(&image);
    let bytes = image.len() as u64;
    let mut resume = |bytes, proof| {
        installer.resume(Slot::B, bytes, proof, &mut |_| true).map(|sink| sink.is_some())
    };
    assert!(resume(bytes, proof).unwrap());
    assert!(!resume(bytes - 1, proof).unwrap());
    assert!(!resume(u64::MAX, proof).unwrap());
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(&[image[MIB] ^ 1], MIB as u64).unwrap();
    assert!(!resume(bytes, proof).unwrap());
}

#[test]
fn reading_back_shows_progress_and_can_be_interrupted() {
    let folder = TempDir::new().unwrap();
    let (mut installer, _) = slot_file(&folder, 5 * MIB);
    let mut seen = Vec::new();
    let mut progress = |bytes| {
        seen.push(bytes);
        true
    };
    installer.digest(Slot::B, 5 * MIB as u64, &mut progress).unwrap();
    assert!(seen.len() >= 5 && seen.is_sorted());
    assert_eq!(seen.last(), Some(&(5 * MIB as u64)));
    let mut calls = 0;
    let mut stop = |_| {
        calls += 1;
        calls < 2
    };
    let error = installer.digest(Slot::B, 5 * MIB as u64, &mut stop).unwrap_err();
    assert!(matches!(error, InstallError::Interrupted));
    assert_eq!(calls, 2);
    let proof = digest(b"");
    let resumed = installer.resume(Slot::B, 5 * MIB as u64, proof, &mut |_| false);
    assert!(matches!(resumed, Err(InstallError::Interrupted)));
}

#[test]
fn names_the_device_it_cannot_use() {
    let folder = TempDir::new().unwrap();
    for (device, complaint) in [
        (folder.path().join("missing"), "No such file"),
        (folder.path().to_owned(), "neither a block device nor a regular file"),
        (PathBuf::from("/dev/null"), "neither a block device nor a regular file"),
    ] {
        let mut installer = BlockInstaller::new(&slots(&device));
        let error = installer.begin(Slot::B).err().unwrap();
        let failure = Failure::from(error);
        assert_eq!(failure.kind, FailureKind::SlotIo);
        for part in [complaint, &device.display().to_string()] {
            assert!(failure.detail.contains(part), "{failure}");
        }
    }
    let (mut installer, _) = slot_file(&folder, MIB);
    let error = installer.digest(Slot::B, MIB as u64 + 1, &mut |_| true).unwrap_err();
    assert!(matches!(error, InstallError::Read { offset, .. } if offset == MIB as u64));
}

/// A loop device on a file, as a stand-in for a partition.
struct Loop {
    device: PathBuf,
}

impl Loop {
    /// `None` where the kernel has no loop devices, such as in most containers.
    fn on(file: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        let device = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        output.status.success().then(|| Loop { device: device.into() })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Command::new("losetup").arg("--detach").arg(&self.device).status().unwrap();
    }
}

#[test]
fn a_block_device_is_claimed_while_it_is_written_and_refused_while_it_is_mounted() {
    let folder = TempDir::new().unwrap();
    // 512 bytes more than whole pages, as partitions may have.
    let bytes = 8 * MIB + 512;
    let (mut file_installer, path) = slot_file(&folder, bytes);
    let Some(device) = Loop::on(&path) else {
        assert!(!Path::new("/dev/loop-control").exists(), "losetup failed although it should work");
        eprintln!("no loop devices here: the same code is tested on files above");
        return;
    };
    let mut installer = BlockInstaller::new(&slots(&device.device));
    assert_eq!(installer.capacity(Slot::B).unwrap(), Some(bytes as u64));
    let image = noise(bytes);
    let mut sink = installer.begin(Slot::B).unwrap();
    sink.write(&image[..5 * MIB + 3]).unwrap();
    sink.checkpoint().unwrap();
    let error = installer.begin(Slot::B).err().unwrap();
    assert!(matches!(error, InstallError::InUse { .. }), "{error}");
    sink.write(&image[5 * MIB + 3..]).unwrap();
    assert!(matches!(sink.write(&[0]), Err(InstallError::Full { .. })));
    sink.finish().unwrap();
    assert_eq!(read_back(&mut installer, bytes), digest(&image));

    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&device.device).status().unwrap();
    assert!(made.success());
    let point = folder.path().join("mounted");
    std::fs::create_dir(&point).unwrap();
    let mount = Command::new("mount").arg(&device.device).arg(&point).status().unwrap();
    assert!(mount.success());
    let by_device = installer.begin(Slot::B).err().map(|error| error.to_string());
    let by_file = file_installer.begin(Slot::B).err().map(|error| error.to_string());
    assert!(Command::new("umount").arg(&point).status().unwrap().success());
    for error in [by_device, by_file] {
        let error = error.expect("a mounted slot must not be opened");
        assert!(error.contains(&format!("mounted at {}", point.display())), "{error}");
    }
    assert!(installer.begin(Slot::B).is_ok());
}

fn script(folder: &TempDir, text: &str) -> CommandInstaller {
    command(folder, &["sh", "-c", text], 60)
}

fn command(folder: &TempDir, command: &[&str], stall_limit_s: u64) -> CommandInstaller {
    let install = config::Install {
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        stall_limit_s: Seconds::of(stall_limit_s),
        ..config::Install::default()
    };
    CommandInstaller::new(&install, &slots(&folder.path().join("slot device")))
}

fn install(installer: &mut CommandInstaller, image: &[u8]) -> Result<(), InstallError> {
    let mut sink = installer.begin(Slot::B)?;
    for piece in image.chunks(100_000) {
        sink.write(piece)?;
    }
    assert!(!sink.checkpoint()?);
    sink.finish()
}

#[test]
fn a_program_gets_the_image_and_the_slot() {
    let folder = TempDir::new().unwrap();
    let text = r#"echo "$TWINBOOT_SLOT $# $NOTIFY_SOCKET" > "$TWINBOOT_DEVICE.slot"
                  exec cat > "$TWINBOOT_DEVICE""#;
    let mut installer = script(&folder, text);
    let image = noise(3 * MIB);
    install(&mut installer, &image).unwrap();
    assert!(std::fs::read(folder.path().join("slot device")).unwrap() == image);
    let slot = std::fs::read_to_string(folder.path().join("slot device.slot")).unwrap();
    assert_eq!(slot, "B 0 \n");
    assert_eq!(installer.capacity(Slot::B).unwrap(), None);
    assert_eq!(installer.digest(Slot::B, 1, &mut |_| true).unwrap(), None);
    assert!(installer.resume(Slot::B, 1, digest(b"a"), &mut |_| true).unwrap().is_none());
}

#[test]
fn a_program_is_reported_with_its_own_words() {
    let folder = TempDir::new().unwrap();
    let image = noise(3 * MIB);
    for (text, expected) in [
        ("cat >/dev/null; exit 7", "exit status: 7; it said nothing"),
        (
            "exec >&-; echo bad key >&2; exit 1",
            "whole image (exit status: 1); its last words: bad key",
        ),
        ("exec <&-; sleep 0.2; echo late words >&2; exit 1", "its last words: late words"),
        ("exit 0", "it ended before it had read the whole image (exit status: 0); it said nothing"),
        (
            "cat >/dev/null; for i in 1 2 3 4 5 6 7; do echo $i >&2; done; exit 1",
            "words: 3 / 4 / 5 / 6 / 7",
        ),
        // A word without an end may be a key: no part of it is told.
        ("cat >/dev/null; yes | tr -d '\\n' | head -c 1000000 >&2; exit 1", "its last words: …"),
        ("cat >/dev/null; kill -9 $$", "signal: 9 (SIGKILL)"),
        // A child that holds standard error open does not keep the agent waiting.
        ("cat >/dev/null; sleep 1000 & echo left >&2; exit 1", "its last words: left"),
    ] {
        let error = install(&mut script(&folder, text), &image).unwrap_err();
        assert!(error.to_string().contains(expected), "{text}: {error}");
        assert!(error.to_string().len() < 2500, "{text}: {error}");
        let failure = Failure::from(error);
        assert_eq!(failure.kind, FailureKind::Installer);
    }
    let mut missing = command(&folder, &["/no/installer"], 60);
    let error = missing.begin(Slot::B).err().unwrap().to_string();
    assert!(error.contains("/no/installer") && error.contains("No such file"), "{error}");
}

/// Runs `work` on a thread and fails if it hangs.
fn within_a_minute<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || tell.send(work()));
    told.recv_timeout(Duration::from_secs(60)).expect("it hangs")
}

#[test]
fn a_program_is_killed_with_its_children_when_the_image_is_abandoned() {
    let folder = TempDir::new().unwrap();
    let fifo = folder.path().join("alive");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // The fifo is at its end when nobody of the group lives any more.
    let text = format!("exec 3>{}; (sleep 1000) & sleep 1000", fifo.display());
    for end in ["drop", "interrupt a write", "interrupt the finish"] {
        let mut installer = script(&folder, &text);
        let mut sink = installer.begin(Slot::B).unwrap();
        let fifo = fifo.clone();
        let alive = within_a_minute(move || std::fs::File::open(fifo).unwrap());
        let interrupt = sink.interrupter().unwrap();
        match end {
            "drop" => within_a_minute(move || drop(sink)),
            "interrupt a write" => {
                let writing = std::thread::spawn(move || sink.write(&noise(MIB)).is_err());
                interrupt();
                assert!(within_a_minute(move || writing.join().unwrap()));
            }
            _ => {
                let finishing = std::thread::spawn(move || sink.finish().is_err());
                interrupt();
                assert!(within_a_minute(move || finishing.join().unwrap()));
            }
        }
        let rest = within_a_minute(move || std::io::read_to_string(alive).unwrap());
        assert_eq!(rest, "", "{end}");
        // Later calls reach nobody.
        interrupt_is_harmless(installer.begin(Slot::B).unwrap());
    }
}

/// Nothing that a program does, or leaves behind outside its group, holds the agent up for ever.
#[test]
fn a_program_that_hangs_is_killed_and_what_it_left_behind_is_not_waited_for() {
    let image = noise(MIB);
    let left = "setsid sh -c 'echo $$ >\"$TWINBOOT_DEVICE.left\"; exec sleep 1000' <&0 & sleep 0.1";
    for (text, limit_s, expected) in [
        ("sleep 1000".to_owned(), 1, Some("it took nothing for 1 s (install.stall_limit_s)")),
        (
            "cat >/dev/null; echo busy >&2; sleep 1000".to_owned(),
            1,
            Some(
                "did not end for 1 s (install.stall_limit_s) and was killed; its last words: busy",
            ),
        ),
        // It holds standard error and the input, and lives in a group of its own.
        (format!("{left}; cat >/dev/null"), 60, None),
        (format!("{left}; cat >/dev/null; echo no >&2; exit 1"), 60, Some("its last words: no")),
        (format!("{left}; exit 1"), 60, Some("it ended before it had read the whole image")),
        // More words than a pipe holds, before it reads anything.
        ("yes | head -c 300000 >&2; cat >/dev/null".to_owned(), 60, None),
    ] {
        let folder = TempDir::new().unwrap();
        let mut installer = command(&folder, &["sh", "-c", &text], limit_s);
        let image = image.clone();
        let result = within_a_minute(move || install(&mut installer, &image));
        match (result, expected) {
            (Ok(()), None) => {}
            (Err(error), Some(words)) => assert!(error.to_string().contains(words), "{error}"),
            (result, _) => panic!("{text}: {result:?}"),
        }
        if let Ok(left) = std::fs::read_to_string(folder.path().join("slot device.left")) {
            let left = nix::unistd::Pid::from_raw(left.trim().parse().unwrap());
            nix::sys::signal::kill(left, nix::sys::signal::Signal::SIGKILL).expect("it lives");
        }
    }
}

#[test]
fn what_systemd_tells_the_agent_does_not_reach_the_program() {
    let folder = TempDir::new().unwrap();
    let script = "cat >/dev/null; [ -z \"$NOTIFY_SOCKET$JOURNAL_STREAM$CREDENTIALS_DIRECTORY\" ]";
    let variables = ["NOTIFY_SOCKET", "JOURNAL_STREAM", "CREDENTIALS_DIRECTORY"];
    if std::env::var_os(variables[1]).is_some() {
        return install(&mut self::script(&folder, script), &noise(1000)).unwrap();
    }
    // The environment of this process is not ours to change: the test once more, in another one.
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "what_systemd_tells_the_agent_does_not_reach_the_program"])
        .envs(variables.map(|name| (name, "8:12345")))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

fn interrupt_is_harmless(sink: Box<dyn ImageSink>) {
    let interrupt = sink.interrupter().unwrap();
    drop(sink);
    interrupt();
}
