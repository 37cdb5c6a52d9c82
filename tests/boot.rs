//! The bootloaders against tools and files that obey, and against some that do not. What boots is
//! decided by the rules of RAUC's boot scripts and of the Raspberry Pi firmware, written down here
//! a second time.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::as_conversions,
    reason = "tests"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use twinboot::boot::{self, BootError, BootFacts, Bootloader};
use twinboot::config::{self, BootKind, SlotDevice, Whole};
use twinboot::os::Sysroot;
use twinboot::update::Slot::{self, A, B};

/// What the agent asks of a bootloader.
#[derive(Clone, Copy, Debug)]
enum Order {
    Retire(Slot),
    TryNext(Slot),
    CancelTry(Slot),
    Confirm,
}

use Order::{CancelTry, Confirm, Retire, TryNext};

impl Order {
    fn give(self, bootloader: &mut dyn Bootloader) -> Result<(), BootError> {
        match self {
            Retire(slot) => bootloader.retire(slot),
            TryNext(slot) => bootloader.try_next(slot),
            CancelTry(slot) => bootloader.cancel_try(slot),
            Confirm => bootloader.confirm(),
        }
    }
}

/// A machine in a folder: `/proc` with what the kernel would tell, and the bootloader's files.
struct Board {
    folder: TempDir,
    config: config::Boot,
}

impl Board {
    fn new(kind: BootKind) -> Self {
        let folder = TempDir::new().unwrap();
        let path = |name: &str| folder.path().join(name);
        let tool =
            |name: &str| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/tools").join(name);
        for name in ["fw_printenv", "fw_setenv"] {
            symlink(tool("fw_env"), path(name)).unwrap();
        }
        symlink(tool("bootctl"), path("bootctl")).unwrap();
        fs::create_dir_all(path("proc")).unwrap();
        let config = config::Boot {
            kind,
            uboot: config::Uboot {
                fw_printenv: path("fw_printenv"),
                fw_setenv: path("fw_setenv"),
                confirmed_attempts: Whole::of(3),
            },
            grub: config::Grub { environment: path("grubenv") },
            tryboot: config::Tryboot { autoboot: path("autoboot.txt"), ..Default::default() },
            custom: config::Custom {
                command: vec![path("bootctl").display().to_string()],
                ..Default::default()
            },
        };
        let board = Board { folder, config };
        board.runs(A);
        board
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn runs(&self, slot: Slot) {
        self.write("proc/cmdline", format!("quiet rauc.slot={slot}\n"));
        self.write("running", slot.name());
    }

    fn slots(&self) -> config::Slots {
        let of = |name: &str| SlotDevice { device: self.path(name) };
        config::Slots { a: of("slot-a"), b: of("slot-b") }
    }

    fn sysroot(&self) -> Sysroot {
        Sysroot::new(self.folder.path())
    }

    fn open(&self) -> Box<dyn Bootloader> {
        boot::open(&self.config, &self.slots(), &config::Rauc::default(), &self.sysroot())
    }

    fn give(&self, order: Order) -> Result<(), BootError> {
        order.give(self.open().as_mut())
    }

    /// What runs, and what boots next.
    fn facts(&self) -> (Slot, Option<Slot>) {
        let BootFacts { running, next, .. } = self.open().facts().unwrap();
        (running, next)
    }

    /// Whether the other slot was tried.
    fn tried(&self) -> Option<bool> {
        self.open().facts().unwrap().tried
    }
}

fn facts(running: Slot, next: impl Into<Option<Slot>>) -> (Slot, Option<Slot>) {
    (running, next.into())
}

mod uboot {
    use super::*;

    const BOOTCMD: &str = "bootcmd=run distro_bootcmd; echo a=b\nbootdelay=2\n";

    type Variables = BTreeMap<String, String>;

    fn board(environment: &str) -> Board {
        let board = Board::new(BootKind::Uboot);
        board.write("env", format!("{BOOTCMD}{environment}"));
        board
    }

    fn variables(board: &Board) -> Variables {
        let text = board.text("env");
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// One start by RAUC's `uboot.sh`; `None` if it found nothing, gave new boots and resets.
    fn start(env: &mut Variables) -> Option<Slot> {
        env.entry("BOOT_ORDER".to_owned()).or_insert_with(|| "A B".to_owned());
        for slot in ["A", "B"] {
            env.entry(format!("BOOT_{slot}_LEFT")).or_insert_with(|| "3".to_owned());
        }
        for name in env["BOOT_ORDER"].clone().split_ascii_whitespace() {
            let Some(left) = env.get_mut(&format!("BOOT_{name}_LEFT")) else { continue };
            let boots = u64::from_str_radix(left, 16).unwrap_or(0);
            if boots > 0 {
                *left = format!("{:x}", boots - 1);
                return Some(if name == "A" { A } else { B });
            }
        }
        for slot in ["A", "B"] {
            env.insert(format!("BOOT_{slot}_LEFT"), "3".to_owned());
        }
        None
    }

    /// Restarts the machine: what boots is what runs from now on.
    fn restart(board: &Board) -> Option<Slot> {
        let mut env = variables(board);
        let slot = start(&mut env);
        let lines: String = env.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
        board.write("env", lines);
        if let Some(slot) = slot {
            board.runs(slot);
        }
        slot
    }

    #[test]
    fn an_update_is_tried_once_and_then_kept_or_left() {
        let board = board("");
        assert_eq!(restart(&board), Some(A));
        board.give(Confirm).unwrap();
        assert_eq!(board.facts(), facts(A, A));

        board.give(Retire(B)).unwrap();
        let env = variables(&board);
        assert_eq!((env["BOOT_ORDER"].as_str(), env["BOOT_B_LEFT"].as_str()), ("A", "0"));
        assert_eq!(env["bootcmd"], "run distro_bootcmd; echo a=b");

        assert_eq!(board.tried(), Some(false), "it may not even boot");
        board.give(TryNext(B)).unwrap();
        assert_eq!((board.facts(), board.tried()), (facts(A, B), Some(false)));
        assert_eq!(restart(&board), Some(B));
        assert_eq!(board.facts(), facts(B, A));
        // Nobody confirmed.
        assert_eq!(restart(&board), Some(A));
        assert_eq!(board.tried(), Some(true));
        board.give(CancelTry(B)).unwrap();
        board.give(Confirm).unwrap();
        assert_eq!(board.facts(), facts(A, A));

        board.give(TryNext(B)).unwrap();
        assert_eq!(restart(&board), Some(B));
        board.give(Confirm).unwrap();
        assert_eq!(board.facts(), facts(B, B));
        // A confirmed slot may fail three times; then the other one is still there.
        let boots: Vec<_> = (0..4).map(|_| restart(&board).unwrap()).collect();
        assert_eq!(boots, [B, B, B, A]);
    }

    #[test]
    fn a_retired_slot_does_not_come_back_when_the_other_one_has_used_up_its_boots() {
        let board = board("BOOT_ORDER=A B\nBOOT_A_LEFT=3\nBOOT_B_LEFT=3\n");
        board.give(Retire(B)).unwrap();
        board.give(Confirm).unwrap();
        let mut env = variables(&board);
        let boots: Vec<_> = (0..20).map(|_| start(&mut env)).collect();
        assert!(!boots.contains(&Some(B)), "{boots:?}");
    }

    #[test]
    fn the_way_back_of_a_running_trial_is_the_other_slot() {
        let board = board("");
        board.give(TryNext(B)).unwrap();
        assert_eq!(restart(&board), Some(B));
        board.give(CancelTry(B)).unwrap();
        assert_eq!(board.facts(), facts(B, A));
        assert_eq!(restart(&board), Some(A));
    }

    #[test]
    fn counts_boots_as_every_boot_script_reads_them() {
        for (attempts, written) in [(1, "1"), (9, "9")] {
            let mut board = board("BOOT_ORDER=A B\nBOOT_A_LEFT=2\nBOOT_B_LEFT=0\n");
            board.config.uboot.confirmed_attempts = Whole::of(attempts);
            board.give(Confirm).unwrap();
            let mut env = variables(&board);
            assert_eq!(env["BOOT_A_LEFT"], written);
            let boots = (0..attempts).filter(|_| start(&mut env) == Some(A)).count();
            assert_eq!(boots as u64, attempts);
            assert_eq!(start(&mut env), None);
        }
    }

    #[test]
    fn what_is_set_already_is_not_written_again() {
        let board = board("");
        board.give(TryNext(B)).unwrap();
        assert_eq!(board.text("writes"), "\n", "one call writes everything");
        board.give(TryNext(B)).unwrap();
        board.give(TryNext(B)).unwrap();
        assert_eq!(board.text("writes"), "\n");
    }

    #[test]
    fn tools_that_do_not_know_scripts_are_used_one_variable_at_a_time() {
        let board = board("");
        board.write("mood", "old");
        for order in [Retire(B), TryNext(B), CancelTry(B), Confirm] {
            board.give(order).unwrap();
        }
        board.give(TryNext(B)).unwrap();
        assert_eq!(restart(&board), Some(B));
    }

    #[test]
    fn tools_that_disobey_are_found_out() {
        for (mood, complaint) in [
            ("deaf", "BOOT_ORDER was set to \"A\" but reads back as \"A B\""),
            ("half 0", "BOOT_ORDER was set to \"A\" but reads back as \"A B\""),
            ("half 1", "BOOT_B_LEFT was set to \"0\" but reads back as \"3\""),
            ("refuses", "exit status: 1: Cannot lock /dev/mtd1: Read-only file system"),
            ("dies 1", "signal: 9"),
            ("unreadable", "cannot read the environment"),
            ("garbage", "are not lines of NAME=value"),
            ("endless", "did not end within"),
            ("hangs", "did not end within"),
        ] {
            let board = board("BOOT_ORDER=A B\nBOOT_A_LEFT=3\nBOOT_B_LEFT=3\n");
            board.write("mood", mood);
            let limit = match mood {
                "hangs" | "endless" => Duration::from_millis(300),
                _ => Duration::from_secs(60),
            };
            let mut bootloader =
                boot::Uboot::new(&board.config.uboot, board.slots(), board.sysroot())
                    .with_tool_limit(limit);
            let error = bootloader.retire(B).unwrap_err().to_string();
            assert!(error.contains(complaint), "{mood}: {error}");
        }
    }

    #[test]
    fn a_missing_tool_is_named() {
        let mut board = board("");
        board.config.uboot.fw_printenv = "/nowhere/fw_printenv".into();
        let error = board.give(Retire(B)).unwrap_err().to_string();
        assert!(error.contains("/nowhere/fw_printenv: No such file"), "{error}");
    }

    /// Cut after every variable of every order, from every state that the agent can be in.
    #[test]
    fn something_always_boots_wherever_it_is_cut() {
        let mut cuts = 0;
        for order in ["A B", "B A", "A", ""] {
            for (left_a, left_b) in [("3", "0"), ("2", "3"), ("0", "1"), ("", "")] {
                for (running, given) in [
                    (A, Retire(B)),
                    (A, TryNext(B)),
                    (A, CancelTry(B)),
                    (A, Confirm),
                    (B, CancelTry(B)),
                    (B, Confirm),
                ] {
                    for mood in ["dies 0", "dies 1", "dies 2", "half 1", "obedient"] {
                        let env = format!(
                            "BOOT_ORDER={order}\nBOOT_A_LEFT={left_a}\nBOOT_B_LEFT={left_b}\n"
                        );
                        let env: String = env
                            .lines()
                            .filter(|l| !l.ends_with('='))
                            .map(|l| format!("{l}\n"))
                            .collect();
                        let board = board(&env);
                        board.runs(running);
                        board.write("mood", mood);
                        let boots_before = start(&mut variables(&board)).is_some();
                        let result = board.give(given);
                        let after = start(&mut variables(&board));
                        let case = format!("{env}{running} {given:?} {mood} {result:?}: {after:?}");
                        // Nothing may boot only where nothing would have booted anyway.
                        assert!(after.is_some() || !boots_before, "{case}");
                        if result.is_ok() {
                            let expected = match given {
                                Retire(slot) | CancelTry(slot) => slot.other(),
                                TryNext(slot) => slot,
                                Confirm => running,
                            };
                            assert_eq!(after, Some(expected), "{case}");
                        }
                        cuts += 1;
                    }
                }
            }
        }
        assert_eq!(cuts, 480);
    }
}

mod grub {
    use super::*;

    const SIGNATURE: &str = "# GRUB Environment Block\n";
    const WARNING: &str = "# WARNING: Do not edit this file by tools other than grub-editenv!!!\n";

    fn block(text: &str) -> Vec<u8> {
        let mut bytes = format!("{SIGNATURE}{text}").into_bytes();
        bytes.resize(1024, b'#');
        bytes
    }

    fn board(text: &str) -> Board {
        let board = Board::new(BootKind::Grub);
        board.write("grubenv", block(text));
        board
    }

    fn value(block: &[u8], wanted: &str) -> Option<String> {
        let text = String::from_utf8(block.to_vec()).unwrap();
        text.lines()
            .filter_map(|line| line.split_once('='))
            .find(|(name, _)| *name == wanted)
            .map(|(_, value)| value.to_owned())
    }

    /// One start by `packaging/boot/grub/grub.cfg`: what boots (`None`: no slot is good, which begins
    /// anew with both), and the counters that it saves.
    fn start(block: &[u8]) -> (Option<Slot>, [u8; 2]) {
        let ok = [A, B].map(|slot| value(block, &format!("{slot}_OK")).as_deref() == Some("1"));
        let mut tries = [A, B].map(|slot| {
            value(block, &format!("{slot}_TRY")).map_or(0, |value| value.parse().unwrap())
        });
        let order = value(block, "ORDER").unwrap_or("A B".to_owned());
        let good = value(block, "GOOD");
        let boots = |slot: Slot| if good.as_deref() == Some(slot.name()) { 3 } else { 1 };
        let choose = |tries: [u8; 2]| {
            let mut slots = order.split(' ').map(|name| if name == "A" { A } else { B });
            slots.find(|slot| ok[*slot as usize] && tries[*slot as usize] < boots(*slot))
        };
        let mut chosen = choose(tries);
        if chosen.is_none() {
            let other =
                [A, B].into_iter().find(|slot| good.as_deref() == Some(slot.other().name()));
            match other {
                Some(other) if ok[other.other() as usize] && tries[other as usize] == 1 => {
                    tries[other as usize] = 2;
                    tries[other.other() as usize] = 0;
                }
                _ => tries = [0; 2],
            }
            chosen = choose(tries);
        }
        if let Some(slot) = chosen {
            tries[slot as usize] += 1;
        }
        (chosen, tries)
    }

    /// Restarts the machine. GRUB's `save_env` writes `A_TRY` and `B_TRY`.
    fn restart(board: &Board) -> Option<Slot> {
        let bytes = fs::read(board.path("grubenv")).unwrap();
        let (slot, tries) = start(&bytes);
        let mut text = String::from_utf8(bytes).unwrap();
        for (name, tries) in ["A_TRY", "B_TRY"].into_iter().zip(tries) {
            for old in 0..=3 {
                text = text.replace(&format!("\n{name}={old}\n"), &format!("\n{name}=#{tries}\n"));
            }
        }
        board.write("grubenv", text.replace("=#", "="));
        if let Some(slot) = slot {
            board.runs(slot);
        }
        slot
    }

    #[test]
    fn an_update_is_tried_once_and_then_kept_or_left() {
        let board = board("ORDER=A B\nA_OK=1\nA_TRY=0\nB_OK=0\nB_TRY=0\nsaved_entry=x\\\ny\n");
        let inode = fs::metadata(board.path("grubenv")).unwrap().ino();
        assert_eq!(restart(&board), Some(A));
        // GRUB counts this boot as a try until somebody confirms it.
        assert_eq!(board.facts(), facts(A, None));
        board.give(Confirm).unwrap();
        assert_eq!(board.facts(), facts(A, A));

        board.give(Retire(B)).unwrap();
        assert_eq!(board.facts(), facts(A, A));
        assert_eq!(board.tried(), Some(false), "it may not even boot");
        board.give(TryNext(B)).unwrap();
        assert_eq!((board.facts(), board.tried()), (facts(A, B), Some(false)));
        assert_eq!(restart(&board), Some(B));
        assert_eq!(board.facts(), facts(B, A));
        // Nobody confirmed.
        assert_eq!(restart(&board), Some(A));
        assert_eq!(board.tried(), Some(true));
        board.give(CancelTry(B)).unwrap();
        board.give(Confirm).unwrap();
        assert_eq!(restart(&board), Some(A));

        board.give(TryNext(B)).unwrap();
        assert_eq!(restart(&board), Some(B));
        board.give(Confirm).unwrap();
        assert_eq!(board.facts(), facts(B, B));
        // Power that comes and goes does not lead out of a confirmed slot at once.
        for _ in 0..3 {
            assert_eq!(board.facts().1, Some(B));
            assert_eq!(restart(&board), Some(B));
        }
        assert_eq!(board.facts(), facts(B, A));
        assert_eq!(restart(&board), Some(A), "three unconfirmed boots of B, then the other slot");

        let bytes = fs::read(board.path("grubenv")).unwrap();
        assert_eq!(bytes.len(), 1024);
        assert!(String::from_utf8(bytes).unwrap().contains("\nsaved_entry=x\\\ny\n"));
        assert_eq!(fs::metadata(board.path("grubenv")).unwrap().ino(), inode, "written in place");
    }

    /// Cut after cut, on the way back from a bad slot.
    #[test]
    fn a_slot_that_failed_is_not_tried_again_because_the_way_back_was_cut() {
        let board = board("");
        board.give(Confirm).unwrap();
        board.give(TryNext(B)).unwrap();
        assert_eq!(restart(&board), Some(B));
        for _ in 0..6 {
            assert_eq!(restart(&board), Some(A));
        }
        // A slot that fails for good is not tried for ever either.
        assert_eq!(restart(&board), Some(B));
    }

    /// The scripts of others do not write `GOOD`, nor do the factories of yesterday.
    #[test]
    fn without_a_confirmed_slot_each_boots_once() {
        let board = board("ORDER=B A\nA_OK=1\nA_TRY=0\nB_OK=1\nB_TRY=0\n");
        let boots: Vec<_> = (0..4).map(|_| restart(&board).unwrap()).collect();
        assert_eq!(boots, [B, A, B, A]);
    }

    #[test]
    fn a_retired_slot_never_boots() {
        let board = board("ORDER=B A\nA_OK=1\nA_TRY=1\nB_OK=1\nB_TRY=0\n");
        board.give(Retire(B)).unwrap();
        board.give(Confirm).unwrap();
        for _ in 0..10 {
            assert_ne!(restart(&board), Some(B));
        }
    }

    /// The block has two sectors. A cut leaves each of them old or new.
    #[test]
    fn something_always_boots_wherever_it_is_cut() {
        let long: String = (0..20).map(|i| format!("variable_{i}={}\n", "v".repeat(24))).collect();
        // Behind this one, our variables would lie across the border of the sectors.
        let border = format!("saved_entry={}\n", "v".repeat(384));
        for foreign in ["saved_entry=0\n", &border, &long] {
            for flags in [
                "ORDER=A B\nA_OK=1\nA_TRY=0\nB_OK=0\nB_TRY=0\n",
                "A_OK=1\nA_TRY=1\nB_OK=1\nB_TRY=1\nORDER=B A\n",
                "A_OK=1\nB_OK=1\n",
            ] {
                for text in
                    [format!("{WARNING}{flags}{foreign}"), format!("{WARNING}{foreign}{flags}")]
                {
                    let board = board(&text);
                    // Brings an unknown block into our form, as the agent does at its start.
                    board.give(Confirm).unwrap();
                    for order in [Retire(B), TryNext(B), CancelTry(B), TryNext(B), Confirm] {
                        let old = fs::read(board.path("grubenv")).unwrap();
                        board.give(order).unwrap();
                        let new = fs::read(board.path("grubenv")).unwrap();
                        let states = [&old, &new].map(|block| start(block).0);
                        for torn in [[&old[..512], &new[512..]], [&new[..512], &old[512..]]] {
                            let torn = torn.concat();
                            let boots = start(&torn).0;
                            assert!(boots.is_some() && states.contains(&boots), "{order:?} {text}");
                            assert!(torn == old || torn == new, "{order:?} {text}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_block_that_has_lost_its_content_is_made_anew() {
        for bytes in [Vec::new(), vec![0; 1024], vec![0xff; 1024], block("what is this\n")] {
            let board = board("");
            board.write("grubenv", &bytes);
            // The agent starts, and knows that the loader would find nothing.
            assert_eq!((board.facts().1, board.tried()), (None, None));
            for order in [Retire(B), Confirm, TryNext(B), CancelTry(B)] {
                board.write("grubenv", &bytes);
                board.give(order).unwrap();
                let made = fs::read(board.path("grubenv")).unwrap();
                assert_eq!(made.len(), 1024);
                let tried = matches!(order, TryNext(_));
                assert_eq!(value(&made, "ORDER").unwrap(), if tried { "B A" } else { "A B" });
                assert_eq!(value(&made, "A_OK").unwrap(), "1", "the running slot boots");
                assert_eq!(value(&made, "B_OK").unwrap(), if tried { "1" } else { "0" });
            }
        }
    }

    #[test]
    fn a_file_that_is_no_block_or_is_missing_is_left_alone() {
        for (bytes, complaint) in [
            (block("")[..512].to_vec(), "has 512 bytes, but an environment block has 1024"),
            ([block(""), b"#".to_vec()].concat(), "has more than 1024 bytes"),
            (block(&format!("x={}\n", "y".repeat(980))), "remove variables"),
        ] {
            let board = board("");
            board.write("grubenv", &bytes);
            for order in [Retire(B), TryNext(B), CancelTry(B), Confirm] {
                let error = board.give(order).unwrap_err().to_string();
                assert!(error.contains(complaint), "{error}");
                assert!(error.contains(&board.path("grubenv").display().to_string()), "{error}");
                assert_eq!(fs::read(board.path("grubenv")).unwrap(), bytes);
            }
        }
        let board = board("");
        fs::remove_file(board.path("grubenv")).unwrap();
        let error = board.give(Retire(B)).unwrap_err();
        assert!(matches!(error, BootError::File { what: "read", .. }), "{error}");
        assert!(!board.path("grubenv").exists());
    }
}

mod tryboot {
    use super::*;

    const USUAL: &str =
        "# by the factory\n[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n";

    fn board(autoboot: &str) -> Board {
        let board = Board::new(BootKind::Tryboot);
        board.write("autoboot.txt", autoboot);
        board
    }

    /// One start of the firmware, with or without the one-shot flag.
    fn start(board: &Board, one_shot: bool) -> u32 {
        let (mut applies, mut partition) = (true, 1);
        for line in board.text("autoboot.txt").lines() {
            match line.trim() {
                "[all]" => applies = true,
                "[tryboot]" => applies = one_shot,
                section if section.starts_with('[') => applies = false,
                line => {
                    if let Some(value) = line.strip_prefix("boot_partition=").filter(|_| applies) {
                        partition = value.parse().unwrap();
                    }
                }
            }
        }
        partition
    }

    /// Restarts the machine, with the argument if there is one.
    fn restart(board: &Board, argument: Option<&str>) -> Slot {
        let partition = start(board, argument == Some("0 tryboot"));
        let slot = match partition {
            2 => A,
            3 => B,
            other => panic!("started from partition {other}"),
        };
        board.runs(slot);
        board.write("proc/device-tree/chosen/bootloader/partition", partition.to_be_bytes());
        slot
    }

    #[test]
    fn an_update_is_tried_once_and_then_kept_or_left() {
        for autoboot in [USUAL, "", "boot_partition=2"] {
            let board = board(autoboot);
            let argument = board.open().restart_argument();
            assert_eq!(argument, Some("0 tryboot"));
            board.give(Confirm).unwrap();
            assert_eq!(board.facts(), facts(A, A));

            board.give(Retire(B)).unwrap();
            assert_eq!([restart(&board, argument), restart(&board, None)], [A, A]);
            board.give(Confirm).unwrap();
            assert_eq!(restart(&board, argument), A, "a retired slot stays out of reach");

            board.give(TryNext(B)).unwrap();
            assert_eq!(board.facts(), facts(A, A), "without the argument nothing changes");
            assert_eq!(restart(&board, argument), B);
            assert_eq!(board.facts(), facts(B, A));
            // Nobody confirmed.
            assert_eq!(restart(&board, None), A);
            board.give(CancelTry(B)).unwrap();
            assert_eq!(restart(&board, argument), A);

            board.give(TryNext(B)).unwrap();
            assert_eq!(restart(&board, argument), B);
            board.give(Confirm).unwrap();
            assert_eq!(board.facts(), facts(B, B));
            assert_eq!(restart(&board, None), B);
            assert_eq!(restart(&board, argument), A, "the slot before stays in reach");
        }
    }

    #[test]
    fn a_file_in_our_form_is_changed_in_place_and_keeps_the_rest() {
        let board = board(USUAL);
        let inode = fs::metadata(board.path("autoboot.txt")).unwrap().ino();
        for order in [TryNext(B), Retire(B), TryNext(B), CancelTry(B), Confirm] {
            board.give(order).unwrap();
            assert_eq!(board.text("autoboot.txt").len(), USUAL.len());
        }
        board.runs(B);
        board.give(TryNext(B)).unwrap();
        board.give(Confirm).unwrap();
        assert_eq!(fs::metadata(board.path("autoboot.txt")).unwrap().ino(), inode);
        assert_eq!(
            board.text("autoboot.txt"),
            "# by the factory\n[all]\ntryboot_a_b=1\nboot_partition=3\n[tryboot]\nboot_partition=2\n"
        );
    }

    #[test]
    fn the_firmware_and_the_kernel_must_name_the_same_slot() {
        let path = "proc/device-tree/chosen/bootloader/partition";
        for (partition, expected) in [
            (Some(vec![0, 0, 0, 2]), Ok(A)),
            (None, Ok(A)),
            (Some(vec![0, 0, 0, 7]), Ok(A)),
            (Some(vec![0, 0, 0, 3]), Err(["boot partition 3", "rauc.slot=A"])),
            (Some(vec![2]), Err(["has 1 bytes", "must have 4"])),
        ] {
            let board = board(USUAL);
            if let Some(bytes) = &partition {
                board.write(path, bytes);
            }
            match (board.open().facts(), expected) {
                (Ok(found), Ok(slot)) => assert_eq!(found.running, slot),
                (Err(error), Err(parts)) => {
                    let text = error.to_string();
                    assert!(parts.iter().all(|part| text.contains(part)), "{text}");
                }
                (found, _) => panic!("{partition:?}: {found:?}"),
            }
        }
    }

    #[test]
    fn a_missing_file_is_not_invented() {
        let board = board(USUAL);
        fs::remove_file(board.path("autoboot.txt")).unwrap();
        for order in [Retire(B), TryNext(B), CancelTry(B), Confirm] {
            let error = board.give(order).unwrap_err().to_string();
            assert!(error.contains("does not exist: mount the first FAT partition"), "{error}");
            assert!(!board.path("autoboot.txt").exists(), "{order:?}");
        }
        assert!(board.open().facts().is_err());
    }

    #[test]
    fn a_file_that_the_firmware_would_not_read_to_its_end_is_not_written() {
        let long = format!("{}[all]\nboot_partition=2\n", "# a long comment\n".repeat(29));
        let board = board(&long);
        let error = board.give(TryNext(B)).unwrap_err().to_string();
        assert!(error.contains("the firmware reads 512: remove comments"), "{error}");
        assert_eq!(board.text("autoboot.txt"), long);
    }
}

mod custom {
    use super::*;

    fn board(mood: &str) -> Board {
        let board = Board::new(BootKind::Custom);
        board.write("next", "A");
        board.write("mood", mood);
        board
    }

    #[test]
    fn the_program_is_called_with_verbs() {
        let board = board("");
        assert_eq!(board.facts(), facts(A, A));
        for order in [Retire(B), TryNext(B), CancelTry(B), Confirm] {
            board.give(order).unwrap();
        }
        assert_eq!(
            board.text("calls"),
            "running\nnext\nretire B\nnext\ntry B\ncancel B\nnext\nrunning\nconfirm\nnext\n"
        );
        board.write("next", "none\n");
        assert_eq!(board.facts(), facts(A, None));
    }

    #[test]
    fn a_program_that_disobeys_is_found_out() {
        for (mood, order, complaint) in [
            ("deaf", Retire(B), "the next slot was set to \"A\" but reads back as \"B\""),
            ("deaf", CancelTry(B), "the next slot was set to \"A\" but reads back as \"B\""),
            ("deaf", Confirm, "the next slot was set to \"A\" but reads back as \"B\""),
            ("garbage", Retire(B), "answered \"slot a\", must be A or B"),
            ("garbage", Confirm, "answered \"slot a\", must be A or B"),
            ("refuses", Confirm, "exit status: 3: the variable store is full"),
        ] {
            let board = board(mood);
            board.write("next", "B");
            let error = board.give(order).unwrap_err().to_string();
            assert!(error.contains(complaint), "{mood} {order:?}: {error}");
        }
    }
}
