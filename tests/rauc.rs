//! RAUC as installer and as boot loader, against Debian's real service on a bus of its own, with
//! bundles made by `rauc bundle`. Needs root, loop devices and squashfs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::print_stderr,
    missing_docs,
    missing_debug_implementations,
    reason = "tests"
)]

#[path = "support/mounted.rs"]
mod mounted;
#[path = "support/rauc.rs"]
mod service;
#[path = "support/slots.rs"]
mod slots;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use nix::mount::MsFlags;
use sha2::Digest as _;
use tempfile::TempDir;
use twinboot::boot::{self, BootFacts, Bootloader, Grub, RaucBoot};
use twinboot::config::{self, Seconds, SlotDevice};
use twinboot::install::{InstallError, Installer, RaucInstaller};
use twinboot::os::Sysroot;
use twinboot::rauc::Rauc;
use twinboot::update::{Digest, Failure, FailureKind, Slot, Written};

use mounted::Mounted;
use service::{Backend, Bundle, Plan, RaucService};

const MIB: usize = 1 << 20;
const SLOT_BYTES: u64 = 8 << 20;

/// A board with two slots on loop devices; slot A runs.
struct Board {
    rauc: RaucService,
    slots: [slots::Slot; 2],
    image: PathBuf,
    install: config::Install,
    settings: config::Rauc,
    folder: TempDir,
}

impl Board {
    fn new() -> Self {
        Board::with(Backend::Custom, false, "raw")
    }

    fn with(backend: Backend, activates: bool, kind: &str) -> Self {
        let mut board = Board::without_service(backend, activates, kind);
        board.rauc.start_service('A');
        board
    }

    fn without_service(backend: Backend, activates: bool, kind: &str) -> Self {
        let folder = TempDir::with_prefix("twinboot-rauc-").unwrap();
        let slots = ["a.img", "b.img"].map(|name| {
            let file = folder.path().join(name);
            fs::File::create(&file).unwrap().set_len(SLOT_BYTES).unwrap();
            let slot = slots::Slot::attach(&file, true).unwrap();
            assert!(slot.is_block_device(), "this test uses loop devices: run it as root");
            slot
        });
        let plan = Plan {
            folder: folder.path(),
            devices: [&slots[0].device, &slots[1].device],
            backend,
            activates,
            kind,
        };
        let rauc = RaucService::bus(&plan);
        let image = folder.path().join("image.img");
        fs::write(&image, noise(3 * MIB + 4096)).unwrap();
        let settings = rauc.settings();
        let board =
            Board { rauc, slots, image, install: config::Install::default(), settings, folder };
        board.runs(Slot::A);
        board
    }

    /// The slot that the kernel says was started.
    fn runs(&self, slot: Slot) {
        fs::create_dir_all(self.folder.path().join("proc")).unwrap();
        let line = format!("quiet rauc.slot={slot}\n");
        fs::write(self.folder.path().join("proc/cmdline"), line).unwrap();
    }

    /// Restarts the machine into `slot`.
    fn restart(&mut self, slot: Slot) {
        self.rauc.kill_service();
        self.runs(slot);
        self.rauc.start_service(slot.name().chars().next().unwrap());
    }

    fn devices(&self) -> config::Slots {
        let of = |slot: &slots::Slot| SlotDevice { device: slot.device.clone() };
        config::Slots { a: of(&self.slots[0]), b: of(&self.slots[1]) }
    }

    fn installer(&self) -> RaucInstaller {
        RaucInstaller::new(&self.install, &self.devices(), &self.settings)
    }

    fn bootloader(&self) -> RaucBoot {
        RaucBoot::new(&self.settings, self.devices(), Sysroot::new(self.folder.path()))
    }

    fn bundle(&self, bundle: Bundle<'_>) -> Vec<u8> {
        fs::read(self.rauc.bundle(&self.image, bundle)).unwrap()
    }

    /// Slot B holds the image.
    fn holds_image(&self) -> bool {
        let image = fs::read(&self.image).unwrap();
        fs::read(&self.slots[1].device).unwrap().starts_with(&image)
    }
}

/// Lets a bundle that waits go on when a test is over, or has failed.
struct Go(PathBuf);

impl Drop for Go {
    fn drop(&mut self) {
        fs::write(&self.0, "").unwrap();
    }
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut noise = vec![0; bytes];
    fastrand::Rng::with_seed(bytes as u64).fill(&mut noise);
    noise
}

/// Fetched whole, as the agent knows it.
fn keep(installer: &mut RaucInstaller, bundle: &[u8]) -> Result<Written, InstallError> {
    installer.prepare(Slot::B, Some(bundle.len() as u64))?;
    let mut sink = installer.begin(Slot::B)?;
    for part in bundle.chunks(100_000) {
        sink.write(part)?;
    }
    sink.finish()?;
    Ok(Written {
        image_bytes: bundle.len() as u64,
        image_digest: Digest::new(sha2::Sha256::digest(bundle).into()),
        fetched_bytes: bundle.len() as u64,
    })
}

fn install(installer: &mut RaucInstaller, bundle: &[u8]) -> Result<(), InstallError> {
    let written = keep(installer, bundle)?;
    installer.apply(Slot::B, &written, &mut |_| true)
}

/// What the twin would say of it.
#[track_caller]
fn assert_failure(error: InstallError, kind: FailureKind, complaints: &[&str]) {
    let failure = Failure::from(error);
    assert_eq!(failure.kind, kind, "{failure}");
    for complaint in complaints {
        assert!(failure.detail.contains(complaint), "{complaint:?} is not in: {failure}");
    }
}

#[test]
fn a_bundle_is_in_the_slot_once_and_twice() {
    for (backend, kind) in
        [(Backend::Custom, "raw"), (Backend::Custom, "ext4"), (Backend::Noop, "raw")]
    {
        let board = Board::with(backend, false, kind);
        let mut installer = board.installer();
        let written = keep(&mut installer, &board.bundle(Bundle::default())).unwrap();
        let mut told = Vec::new();
        for _ in 0..2 {
            let progress = &mut |percent| {
                told.push(percent);
                true
            };
            installer.apply(Slot::B, &written, progress).unwrap();
            assert!(board.holds_image());
        }
        assert!(told.iter().all(|percent| *percent <= 99), "{told:?}");
        assert_eq!(installer.digest(Slot::B, 1, &mut |_| true).unwrap(), None);
        // Nothing was made to boot, and the bundle is there until somebody removes it.
        assert_eq!(board.rauc.text("primary"), "A");
        assert!(installer.kept().unwrap().exists());
        let mode = installer.kept().unwrap().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}

#[test]
fn the_progress_is_that_of_rauc() {
    let mut board = Board::new();
    board.install.stall_limit_s = Seconds::of(60);
    let mut installer = board.installer();
    let bundle = board.bundle(Bundle { waits: true, ..Bundle::default() });
    let written = keep(&mut installer, &bundle).unwrap();
    let mut told = Vec::new();
    let progress = &mut |percent| {
        told.push(percent);
        // RAUC has written the image when it runs the hook.
        if percent == 90 {
            board.rauc.go();
        }
        true
    };
    installer.apply(Slot::B, &written, progress).unwrap();
    assert!(told.contains(&90) && told.is_sorted(), "{told:?}");
}

#[test]
fn a_bundle_that_rauc_refuses_is_told_with_its_words_and_what_to_do() {
    let board = Board::new();
    let mut installer = board.installer();
    let good = board.bundle(Bundle::default());
    let mut damaged = good.clone();
    damaged[1000..1004].copy_from_slice(b"xxxx");
    for (bundle, complaints) in [
        (
            board.bundle(Bundle { compatible: "other-board", ..Bundle::default() }),
            ["ompatible", "other-board", "build the bundle for the compatible"],
        ),
        (
            board.bundle(Bundle { key: "stranger", ..Bundle::default() }),
            ["signature verification failed", "", "sign the bundle with a certificate"],
        ),
        (damaged, ["signature verification failed", "", "sign the bundle"]),
        (noise(100_000), ["Invalid bundle", "", "build the bundle again"]),
        (
            board.bundle(Bundle { class: "other", ..Bundle::default() }),
            ["RAUC did not install the bundle", "other", "journalctl -u rauc"],
        ),
    ] {
        let error = install(&mut installer, &bundle).unwrap_err();
        assert_failure(error, FailureKind::Installer, &complaints);
    }
    assert!(!board.holds_image());
    install(&mut installer, &good).unwrap();
    assert!(board.holds_image());
}

#[test]
fn a_missing_bus_and_a_missing_service_are_told_before_anything_is_fetched() {
    let mut board = Board::without_service(Backend::Custom, false, "raw");
    let error = board.installer().prepare(Slot::B, Some(1)).unwrap_err();
    assert_failure(error, FailureKind::Installer, &["RAUC's service is not there", "install RAUC"]);
    let error = board.bootloader().facts().unwrap_err().to_string();
    assert!(error.contains("RAUC's service is not there"), "{error}");
    assert_eq!(board.bootloader().running().unwrap(), Slot::A);

    board.settings.bus = "/nowhere/bus".into();
    let error = board.installer().prepare(Slot::B, Some(1)).unwrap_err();
    assert_failure(error, FailureKind::Installer, &["/nowhere/bus", "No such file", "rauc.bus"]);
}

#[test]
fn a_busy_service_is_told_and_an_earlier_order_is_waited_for() {
    let board = Board::new();
    let mut installer = board.installer();
    let waits = board.bundle(Bundle { waits: true, ..Bundle::default() });
    let written = keep(&mut installer, &waits).unwrap();
    let (says, heard) = mpsc::channel();
    std::thread::scope(|scope| {
        let _go = Go(board.folder.path().join("go"));
        let (mut first, mut second) = (board.installer(), board.installer());
        let (one, two) = (written.clone(), written.clone());
        let first = scope.spawn(move || first.apply(Slot::B, &one, &mut |_| true));
        board.rauc.says("the hook waits");
        let error = installer.prepare(Slot::B, Some(1)).unwrap_err();
        assert_failure(error, FailureKind::Installer, &["RAUC is busy", "ask again"]);
        // The agent was restarted in the middle: the same work is ordered once more.
        let second = scope.spawn(move || {
            second.apply(Slot::B, &two, &mut |percent| {
                // Nobody listens any more once it is seen to wait.
                let _ = says.send(percent);
                true
            })
        });
        // It ends, and with it the channel, if it does not wait.
        assert!(heard.iter().any(|percent| percent == 90), "it did not wait");
        // What runs is known all the same.
        let facts = board.bootloader().facts().unwrap();
        assert_eq!(facts, BootFacts { running: Slot::A, next: None, tried: None });
        board.rauc.go();
        first.join().unwrap().unwrap();
        second.join().unwrap().unwrap();
    });
    assert!(board.holds_image());
    assert_eq!(board.rauc.log().matches("finished").count(), 2);
}

#[test]
fn a_service_that_dies_in_the_middle_is_told_and_the_next_try_works() {
    let mut board = Board::new();
    let mut installer = board.installer();
    let bundle = board.bundle(Bundle { waits: true, ..Bundle::default() });
    let written = keep(&mut installer, &bundle).unwrap();
    let error = std::thread::scope(|scope| {
        let _go = Go(board.folder.path().join("go"));
        let mut installer = board.installer();
        let written = written.clone();
        let work = scope.spawn(move || installer.apply(Slot::B, &written, &mut |_| true));
        board.rauc.says("the hook waits");
        board.rauc.kill_service();
        work.join().unwrap().unwrap_err()
    });
    assert_failure(error, FailureKind::Installer, &["ended or fell silent", "journalctl -u rauc"]);
    board.rauc.start_service('A');
    board.rauc.go();
    installer.apply(Slot::B, &written, &mut |_| true).unwrap();
    assert!(board.holds_image());
}

#[test]
fn an_update_that_was_called_off_ends_with_a_slot_that_does_not_boot() {
    for backend in [Backend::Custom, Backend::Noop] {
        called_off(&Board::with(backend, true, "raw"));
    }
}

fn called_off(board: &Board) {
    let mut installer = board.installer();
    let bundle = board.bundle(Bundle { waits: true, ..Bundle::default() });
    let written = keep(&mut installer, &bundle).unwrap();
    let progress = &mut |percent| {
        if percent < 90 {
            return true;
        }
        board.rauc.go();
        false
    };
    let error = installer.apply(Slot::B, &written, progress).unwrap_err();
    assert_failure(error, FailureKind::Cancelled, &["interrupted"]);
    // RAUC went on and activated the slot.
    assert!(board.rauc.log().contains("finished"));
    assert_eq!(
        (board.rauc.text("primary"), board.rauc.text("state-B")),
        ("A".into(), "bad".into())
    );
    assert!(installer.uninterruptible().unwrap().contains("cannot be interrupted"));
}

#[test]
fn an_installation_that_stands_still_is_given_up() {
    let mut board = Board::new();
    board.install.stall_limit_s = Seconds::of(1);
    let bundle = board.bundle(Bundle { waits: true, ..Bundle::default() });
    let error = install(&mut board.installer(), &bundle).unwrap_err();
    assert_failure(
        error,
        FailureKind::Installer,
        &["1 s (install.stall_limit_s)", "cannot be stopped"],
    );
}

#[test]
fn rauc_and_the_configuration_must_mean_the_same_slots() {
    let mut board = Board::new();
    let bundle = board.bundle(Bundle::default());
    let error = board.installer().prepare(Slot::A, Some(1)).unwrap_err();
    assert_failure(error, FailureKind::Installer, &["RAUC says that rootfs.0 runs"]);

    board.settings.slot_b = Some("system.1".to_owned());
    let error = install(&mut board.installer(), &bundle).unwrap_err();
    assert_failure(
        error,
        FailureKind::Installer,
        &["rauc.slot_b = \"system.1\" is no slot", "rootfs.1 (B)"],
    );

    board.settings.slot_b = None;
    board.slots.swap(0, 1);
    let error = install(&mut board.installer(), &bundle).unwrap_err();
    assert_failure(
        error,
        FailureKind::Installer,
        &["RAUC's rootfs.1 is ", "but slots.b.device is "],
    );
    board.slots.swap(0, 1);

    // A slot that is not there is not taken for RAUC's, nor is a file.
    let file = board.folder.path().join("a.img");
    let cannot = "cannot be looked at (No such file";
    for (device, complaint) in [("/dev/no-such-slot".into(), cannot), (file, "RAUC's rootfs.1")] {
        let name = device.display().to_string();
        let slots = config::Slots { b: SlotDevice { device }, ..board.devices() };
        let mut installer = RaucInstaller::new(&board.install, &slots, &board.settings);
        let error = installer.prepare(Slot::B, Some(1)).unwrap_err();
        let ours = format!("slots.b.device is {name}");
        let theirs = board.slots[1].device.display().to_string();
        assert_failure(error, FailureKind::Installer, &[complaint, &ours, &theirs]);
    }

    // Another slot runs than RAUC thinks.
    board.runs(Slot::B);
    let error = board.bootloader().facts().unwrap_err().to_string();
    assert!(error.contains("slot B runs, but RAUC takes rootfs.0 for the running one"), "{error}");
}

#[test]
fn a_slot_that_does_not_keep_what_rauc_wrote_is_found_out() {
    let board = Board::new();
    let image = board.image.clone();
    // The hook is the last that touches the slot.
    let bundle = board.bundle(Bundle { waits: true, ..Bundle::default() });
    let mut installer = board.installer();
    let written = keep(&mut installer, &bundle).unwrap();
    let device = board.slots[1].device.clone();
    let progress = &mut |percent| {
        if percent == 90 {
            let slot = fs::File::options().write(true).open(&device).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&slot, b"worn out", 100_000).unwrap();
            board.rauc.go();
        }
        true
    };
    let error = installer.apply(Slot::B, &written, progress).unwrap_err();
    let digest = Digest::new(sha2::Sha256::digest(fs::read(image).unwrap()).into());
    assert_failure(error, FailureKind::ReadBack, &[&digest.to_string(), "reads back as"]);
    fs::remove_file(board.folder.path().join("go")).unwrap();

    let mut trusting = board.settings.clone();
    trusting.read_back = false;
    let mut installer = RaucInstaller::new(&board.install, &board.devices(), &trusting);
    installer.apply(Slot::B, &written, progress).unwrap();
}

#[test]
fn a_bundle_needs_room_and_leaves_some_for_the_state() {
    let mut board = Board::new();
    let place = board.folder.path().join("small");
    let small = Mounted::new(Path::new("tmpfs"), "tmpfs", &place, MsFlags::empty(), "size=8m");
    board.settings.bundle_file = small.0.join("update.raucb");
    let mut installer = board.installer();
    installer.prepare(Slot::B, Some(4 * MIB as u64)).unwrap();
    let error = installer.prepare(Slot::B, Some(5 * MIB as u64)).unwrap_err();
    assert_failure(error, FailureKind::Installer, &["5242880 bytes", "4194304", "make room"]);

    // A length that nobody told beforehand.
    installer.prepare(Slot::B, None).unwrap();
    let mut sink = installer.begin(Slot::B).unwrap();
    let error = (0..).find_map(|_| sink.write(&noise(MIB)).err()).unwrap();
    assert_failure(error, FailureKind::Installer, &["cannot keep the bundle", "No space left"]);
    // The state needs the room more.
    assert_eq!(board.settings.bundle_file.metadata().unwrap().len(), 0);

    board.settings.bundle_file = "/nowhere/update.raucb".into();
    let error = board.installer().prepare(Slot::B, None).unwrap_err();
    assert_failure(error, FailureKind::Installer, &["/nowhere/update.raucb", "rauc.bundle_file"]);
}

#[test]
fn a_bundle_goes_on_behind_a_checkpoint_that_is_proven() {
    let board = Board::new();
    let bundle = board.bundle(Bundle::default());
    let (half, rest) = bundle.split_at(bundle.len() / 2);
    let proof = Digest::new(sha2::Sha256::digest(half).into());
    let mut installer = board.installer();
    let mut sink = installer.begin(Slot::B).unwrap();
    sink.write(half).unwrap();
    assert!(sink.checkpoint().unwrap());
    sink.write(&noise(1000)).unwrap();
    drop(sink);

    let done = half.len() as u64;
    let wrong = Digest::new([7; 32]);
    assert!(installer.resume(Slot::B, done, wrong, &mut |_| true).unwrap().is_none());
    let beyond = bundle.len() as u64;
    assert!(installer.resume(Slot::B, beyond, proof, &mut |_| true).unwrap().is_none());
    let mut sink = installer.resume(Slot::B, done, proof, &mut |_| true).unwrap().unwrap();
    sink.write(rest).unwrap();
    sink.finish().unwrap();
    assert!(fs::read(installer.kept().unwrap()).unwrap() == bundle);

    fs::remove_file(installer.kept().unwrap()).unwrap();
    assert!(installer.resume(Slot::B, done, proof, &mut |_| true).unwrap().is_none());
}

#[test]
fn a_kept_bundle_that_changed_is_not_handed_over() {
    let board = Board::new();
    let mut installer = board.installer();
    let written = keep(&mut installer, &board.bundle(Bundle::default())).unwrap();
    let file = fs::File::options().write(true).open(installer.kept().unwrap()).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"worn out", 100_000).unwrap();
    let error = installer.apply(Slot::B, &written, &mut |_| true).unwrap_err();
    assert_failure(error, FailureKind::ReadBack, &["update.raucb reads back as"]);
    assert!(!board.rauc.log().contains("installing"), "{}", board.rauc.log());
}

#[test]
fn rauc_chooses_what_boots() {
    for backend in [Backend::Custom, Backend::Grub] {
        let mut board = Board::with(backend, false, "raw");
        let facts = |running, next| BootFacts { running, next: Some(next), tried: None };
        // GRUB's variables are those that our own adapter uses. It can tell more.
        let same_for_grub = |board: &Board, facts: BootFacts| {
            if backend == Backend::Grub {
                let config = config::Grub { environment: board.folder.path().join("grubenv") };
                let sysroot = Sysroot::new(board.folder.path());
                let mut grub = Grub::new(&config, board.devices(), sysroot);
                assert_eq!(BootFacts { tried: None, ..grub.facts().unwrap() }, facts);
            }
        };
        let check = |board: &Board, expected: BootFacts| {
            assert_eq!(board.bootloader().facts().unwrap(), expected, "{backend:?}");
            same_for_grub(board, expected);
        };
        for _ in 0..2 {
            board.bootloader().retire(Slot::B).unwrap();
            check(&board, facts(Slot::A, Slot::A));
        }
        for _ in 0..2 {
            board.bootloader().try_next(Slot::B).unwrap();
            check(&board, facts(Slot::A, Slot::B));
        }
        board.bootloader().cancel_try(Slot::B).unwrap();
        check(&board, facts(Slot::A, Slot::A));

        board.bootloader().try_next(Slot::B).unwrap();
        board.restart(Slot::B);
        board.bootloader().cancel_try(Slot::B).unwrap();
        check(&board, facts(Slot::B, Slot::A));
        board.bootloader().try_next(Slot::B).unwrap();
        for _ in 0..2 {
            board.bootloader().confirm().unwrap();
            check(&board, facts(Slot::B, Slot::B));
        }
        let session = Rauc::new(&board.settings).connect().unwrap();
        let slots = session.slots().unwrap();
        let b = Rauc::new(&board.settings).find(&slots, Slot::B).unwrap().clone();
        assert_eq!((b.boot_status.as_str(), b.is_booted), ("good", true));
    }
}

#[test]
fn a_boot_loader_that_does_not_obey_rauc_is_found_out() {
    let board = Board::new();
    let program = board.folder.path().join("bootloader");
    let obeys = fs::read_to_string(&program).unwrap();
    fs::write(&program, obeys.replace("echo \"$2\" >\"$folder/primary\"", ":")).unwrap();
    let error = board.bootloader().try_next(Slot::B).unwrap_err().to_string();
    assert!(error.contains("told to boot rootfs.1 next, but slot A boots next"), "{error}");
    fs::write(&program, obeys.replace("echo \"$3\"", "echo good")).unwrap();
    let error = board.bootloader().retire(Slot::B).unwrap_err().to_string();
    assert!(error.contains("mark rootfs.1 as bad, but its boot status is \"good\""), "{error}");
    fs::write(&program, "#!/bin/sh\nexit 1\n").unwrap();
    // RAUC cannot tell, and that is no reason not to start.
    assert_eq!(board.bootloader().facts().unwrap().next, None);
    let error = board.bootloader().retire(Slot::B).unwrap_err().to_string();
    assert!(error.contains("RAUC does not mark rootfs.0 as active"), "{error}");
}

#[test]
fn the_service_that_marks_every_boot_good_is_noticed() {
    let folder = TempDir::new().unwrap();
    let systemctl = folder.path().join("systemctl");
    for (load, file, active, notice) in [
        ("loaded", "enabled", "inactive", Some("rauc-mark-good.service is enabled")),
        ("loaded", "enabled-runtime", "active", Some("is enabled-runtime")),
        ("loaded", "disabled", "active", Some("is active")),
        ("loaded", "static", "activating", Some("is activating")),
        ("loaded", "disabled", "inactive", None),
        ("masked", "masked", "inactive", None),
        ("not-found", "", "inactive", None),
    ] {
        let text = format!(
            "#!/bin/sh\n[ \"$1 $4\" = 'show rauc-mark-good.service' ] || exit 1\n\
             printf 'LoadState={load}\\nActiveState={active}\\nUnitFileState={file}\\n'\n"
        );
        fs::write(&systemctl, text).unwrap();
        fs::set_permissions(&systemctl, fs::Permissions::from_mode(0o755)).unwrap();
        let found = boot::rival(&systemctl);
        assert_eq!(found.is_some(), notice.is_some(), "{found:?}");
        if let (Some(found), Some(notice)) = (found, notice) {
            assert!(found.contains(notice) && found.contains("systemctl disable"), "{found}");
        }
    }
    assert_eq!(boot::rival(Path::new("/nowhere/systemctl")), None);
}
