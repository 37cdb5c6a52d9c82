//! The shipped `write-slot` for the Raspberry Pi: what it refuses to format, and what it reads back.
//!
//! It runs in a mount namespace of its own with a `/proc` that has the firmware's word. What touches a
//! device is played: `tests/vm` has the real one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/boot/tryboot/write-slot");

/// Programs that touch devices, as shell scripts. `$BOARD` has the image as it reads back in `image`,
/// and what is on the boot partition in `boot`. All that is formatted is in `formatted`.
const PLAYED: [(&str, &str); 7] = [
    ("dd", "cat >/dev/null"),
    // boot-a is partition 2, boot-b is partition 3, everything else is none.
    (
        "blkid",
        "for device; do :; done\n\
         case $*:$device in *NUMBER*/boot-a) echo 2 ;; *NUMBER*/boot-b) echo 3 ;; *UUID*) echo 77-05 ;; \
         *) exit 2 ;; esac",
    ),
    ("mkfs.vfat", "for device; do :; done; echo \"$device\" >>$BOARD/formatted"),
    (
        "mount",
        "for place; do :; done; rmdir \"$place\"\n\
         case $place in */root) ln -s $BOARD/image \"$place\" ;; *) ln -s $BOARD/boot \"$place\" ;; esac",
    ),
    ("umount", "[ -L \"$1\" ] && rm \"$1\" && mkdir \"$1\""),
    ("sync", ":"),
    ("blockdev", "if [ -e $BOARD/forgets ]; then echo >$BOARD/boot/kernel8.img; fi"),
];

struct Board(TempDir);

impl Board {
    fn new() -> Self {
        let board = Board(TempDir::with_prefix("twinboot-write-slot-").unwrap());
        for folder in ["bin", "boot", "image/boot/firmware/overlays"] {
            fs::create_dir_all(board.path(folder)).unwrap();
        }
        for (name, text) in PLAYED {
            let program = board.path(&format!("bin/{name}"));
            fs::write(&program, format!("#!/bin/sh\n{text}\n")).unwrap();
            fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
        }
        for (name, text) in [
            ("image/boot/vmlinuz", "a kernel"),
            ("image/boot/firmware/overlays/x.dtbo", "an overlay"),
            ("image/boot/firmware/cmdline.txt", "root=LABEL=x quiet twinboot.slot=Z\n"),
            (
                "autoboot.txt",
                "[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n",
            ),
        ] {
            fs::write(board.path(name), text).unwrap();
        }
        let link = board.path("image/boot/firmware/kernel8.img");
        std::os::unix::fs::symlink("../vmlinuz", link).unwrap();
        for device in ["boot-a", "boot-b", "disk", "root"] {
            let made =
                Command::new("mknod").arg(board.path(device)).args(["b", "7", "250"]).status();
            assert!(made.unwrap().success(), "this test makes device nodes: run it as root");
        }
        board
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn has(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    /// Runs it for `slot` with these boot partitions; the firmware says that it started `partition`.
    fn write(&self, slot: &str, boot: [&str; 2], partition: Option<u8>) -> Output {
        let says = partition.map(|number| {
            format!(
                "mkdir -p /proc/device-tree/chosen/bootloader\n\
                 printf '\\000\\000\\000\\00{number}' >/proc/device-tree/chosen/bootloader/partition\n"
            )
        });
        let inside = format!(
            "set -eu\nmount -t tmpfs none /run\nmount -t tmpfs none /proc\n{}\
             PATH=$BOARD/bin:$PATH exec {SCRIPT} $BOARD/{} $BOARD/{} $BOARD/autoboot.txt",
            says.unwrap_or_default(),
            boot[0],
            boot[1],
        );
        Command::new("unshare")
            .args(["--mount", "sh", "-c", &inside])
            .env("BOARD", self.0.path())
            .env("TWINBOOT_SLOT", slot)
            .env("TWINBOOT_DEVICE", self.path("root"))
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn the_boot_files_of_the_image_come_into_the_boot_partition_of_the_slot() {
    let board = Board::new();
    let output = board.write("B", ["boot-a", "boot-b"], Some(2));
    assert!(output.status.success(), "{}", words(&output));
    assert!(text(&board.path("formatted")).ends_with("/boot-b\n"));
    assert_eq!(text(&board.path("boot/kernel8.img")), "a kernel");
    assert_eq!(text(&board.path("boot/overlays/x.dtbo")), "an overlay");
    let line = text(&board.path("boot/cmdline.txt"));
    assert!(line.starts_with("root=PARTUUID=77-05 twinboot.slot=B  quiet"), "{line}");
    assert!(!line.contains("LABEL") && !line.contains("slot=Z"), "{line}");
}

#[test]
fn the_boot_partition_that_runs_or_usually_starts_is_never_formatted() {
    let usual_3 = "[all]\r\nboot_partition = 3\r\n[tryboot]\r\nboot_partition=2\r\n";
    for (boot, partition, autoboot, complaint) in [
        // The two were exchanged.
        (["boot-b", "boot-a"], Some(2), None, "boot-a is the boot partition that runs"),
        // The firmware says nothing, or not this.
        (["boot-b", "boot-a"], None, None, "is the boot partition that"),
        (["boot-a", "boot-b"], Some(2), Some(usual_3), "boot-b is the boot partition that"),
        (["boot-a", "boot-b"], Some(2), Some("[tryboot]\nboot_partition=3\n"), "no boot_partition"),
        (["boot-a", "boot-b"], Some(2), Some(""), "is it mounted?"),
        (["boot-a", "disk"], Some(2), None, "disk is no partition"),
    ] {
        let board = Board::new();
        if let Some(autoboot) = autoboot {
            fs::write(board.path("autoboot.txt"), autoboot).unwrap();
        }
        let output = board.write("B", boot, partition);
        assert_eq!(output.status.code(), Some(1), "{}", words(&output));
        assert!(words(&output).contains(complaint), "{complaint}: {}", words(&output));
        assert!(!board.has("formatted"), "{complaint}");
    }
}

#[test]
fn a_medium_that_keeps_something_else_is_found_out() {
    let board = Board::new();
    fs::write(board.path("forgets"), "").unwrap();
    let output = board.write("B", ["boot-a", "boot-b"], Some(2));
    assert_eq!(output.status.code(), Some(1));
    let words = words(&output);
    assert!(words.contains("kernel8.img") && words.contains("does not read back"), "{words}");
}
