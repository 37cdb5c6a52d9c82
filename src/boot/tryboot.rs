//! The Raspberry Pi firmware: `autoboot.txt` names the boot partition for usual starts (`[all]`)
//! and for one-shot starts (`[tryboot]`), which a restart with the argument `0 tryboot` asks for.
//!
//! Source: "autoboot.txt" and "`TRYBOOT` boot flow" in the Raspberry Pi documentation.
//!
//! The file lies on FAT, which has no journal. Replacing it there takes several sectors: the
//! directory entries of both names and the allocation table. A power cut between them can leave
//! two names for one cluster, and a repair of that may cut the file to nothing. But the firmware
//! reads no more than 512 bytes, so the content is one sector, and as long as its length stays the
//! same, writing it in place changes that sector and nothing else: the medium has the old text or
//! the new one. This is how every change is made; the two numbers only change places. Only a file
//! that does not have our form yet is replaced by a new one.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use super::running::{self, Clue};
use super::{BootError, BootFacts, Bootloader};
use crate::config;
use crate::os::{self, Sysroot};
use crate::update::Slot;

/// All that the firmware reads of the file.
const MAX_FILE_BYTES: usize = 512;
/// The partition that the firmware started from: 32 bits, big-endian.
const BOOTED_PARTITION: &str = "/proc/device-tree/chosen/bootloader/partition";
const PARTITION_KEY: &str = "boot_partition";
const AB_KEY: &str = "tryboot_a_b";

/// The Raspberry Pi firmware, by its files.
#[derive(Debug)]
pub struct Tryboot {
    config: config::Tryboot,
    slots: config::Slots,
    sysroot: Sysroot,
}

impl Tryboot {
    /// The firmware with the file and the partitions that `config` names.
    #[must_use]
    pub fn new(config: &config::Tryboot, slots: config::Slots, sysroot: Sysroot) -> Self {
        Tryboot { config: config.clone(), slots, sysroot }
    }

    fn booted(&self) -> Result<Slot, BootError> {
        let mut clues = self.booted_partition()?;
        clues.extend(running::clues(&self.slots, &self.sysroot)?);
        running::decide(&clues)
    }

    /// What the firmware says; nothing if it is too old to say it.
    fn booted_partition(&self) -> Result<Vec<Clue>, BootError> {
        let path = self.sysroot.path(BOOTED_PARTITION);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(BootError::File { what: "read", path, source }),
        };
        let bytes: [u8; 4] = bytes.try_into().map_err(|bytes: Vec<u8>| BootError::Invalid {
            where_: path.display().to_string(),
            problem: format!("has {} bytes, must have 4", bytes.len()),
        })?;
        let partition = u64::from(u32::from_be_bytes(bytes));
        Ok(vec![Clue {
            what: format!("boot partition {partition} in the device tree"),
            slot: self.slot(partition),
        }])
    }

    fn partition(&self, slot: Slot) -> u64 {
        match slot {
            Slot::A => self.config.partition_a.get(),
            Slot::B => self.config.partition_b.get(),
        }
    }

    fn slot(&self, partition: u64) -> Option<Slot> {
        match Slot::BOTH.map(|slot| self.partition(slot) == partition) {
            [true, false] => Some(Slot::A),
            [false, true] => Some(Slot::B),
            [false, false] | [true, true] => None,
        }
    }

    /// The text of the file. A missing one mostly means that its partition is not mounted; one made
    /// in its place would never be read by the firmware.
    fn read(&self) -> Result<String, BootError> {
        match std::fs::read(&self.config.autoboot) {
            Ok(bytes) => {
                String::from_utf8(bytes).map_err(|_| self.invalid("holds bytes that are not text"))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(self.invalid(
                "does not exist: mount the first FAT partition of the medium there, or correct \
                 boot.tryboot.autoboot; on a new medium make an empty file",
            )),
            Err(source) => Err(self.failed("read", source)),
        }
    }

    fn set(&self, usual: Slot, one_shot: Slot) -> Result<(), BootError> {
        let wanted = Partitions {
            usual: Some(self.partition(usual)),
            one_shot: Some(self.partition(one_shot)),
            by_partition: true,
        };
        let old = self.read()?;
        if Partitions::of(&old) != wanted {
            let new = edit(&old, self.partition(usual), self.partition(one_shot));
            if new.len() > MAX_FILE_BYTES {
                return Err(self.invalid(&format!(
                    "would need {} bytes, but the firmware reads {MAX_FILE_BYTES}: remove comments",
                    new.len()
                )));
            }
            self.write(&new, old.len() == new.len())?;
        }
        let found = Partitions::of(&self.read()?);
        if found == wanted {
            return Ok(());
        }
        Err(BootError::NotSet {
            variable: self.config.autoboot.display().to_string(),
            wanted: wanted.to_string(),
            found: found.to_string(),
        })
    }

    fn write(&self, text: &str, in_place: bool) -> Result<(), BootError> {
        let path = &self.config.autoboot;
        if in_place {
            return OpenOptions::new()
                .write(true)
                .open(path)
                .and_then(|file| {
                    file.write_all_at(text.as_bytes(), 0).and_then(|()| file.sync_all())
                })
                .map_err(|source| self.failed("write", source));
        }
        os::replace_file(path, text.as_bytes(), 0o644)?;
        // On FAT the file's directory entry is synced with the file, not with its folder.
        File::open(path)
            .and_then(|file| Ok(nix::unistd::syncfs(&file)?))
            .map_err(|source| self.failed("sync", source))
    }

    fn failed(&self, what: &'static str, source: std::io::Error) -> BootError {
        BootError::File { what, path: self.config.autoboot.clone(), source }
    }

    fn invalid(&self, problem: &str) -> BootError {
        BootError::Invalid {
            where_: self.config.autoboot.display().to_string(),
            problem: problem.to_owned(),
        }
    }
}

impl Bootloader for Tryboot {
    fn facts(&mut self) -> Result<BootFacts, BootError> {
        let text = self.read()?;
        let next = Partitions::of(&text).usual.and_then(|partition| self.slot(partition));
        Ok(BootFacts { running: self.booted()?, next, tried: None })
    }

    fn running(&mut self) -> Result<Slot, BootError> {
        self.booted()
    }

    fn retire(&mut self, slot: Slot) -> Result<(), BootError> {
        // For one-shot starts as well: nobody can start the slot by hand while it is written.
        self.set(slot.other(), slot.other())
    }

    fn try_next(&mut self, slot: Slot) -> Result<(), BootError> {
        self.set(slot.other(), slot)
    }

    fn cancel_try(&mut self, slot: Slot) -> Result<(), BootError> {
        // The one-shot flag cannot be taken back once the restart has begun. It now leads to the
        // other slot, too.
        self.retire(slot)
    }

    fn confirm(&mut self) -> Result<(), BootError> {
        let running = self.booted()?;
        let text = self.read()?;
        let found = Partitions::of(&text);
        // The slot that was the default is good, and stays in reach. A retired one stays out.
        let was_default = found.usual == Some(self.partition(running));
        let is_retired = was_default && found.one_shot == found.usual;
        self.set(running, if is_retired { running } else { running.other() })
    }

    fn restart_argument(&self) -> Option<&'static str> {
        Some("0 tryboot")
    }
}

/// What the firmware reads out of the file.
#[derive(Debug, Eq, PartialEq)]
struct Partitions {
    /// The partition of a usual start.
    usual: Option<u64>,
    /// The partition of a one-shot start.
    one_shot: Option<u64>,
    /// Whether one-shot starts change the partition instead of the configuration file.
    by_partition: bool,
}

impl Partitions {
    /// Follows the sections from top to bottom; the last value that applies counts.
    fn of(text: &str) -> Self {
        let mut found = Partitions { usual: None, one_shot: None, by_partition: false };
        for (section, line) in sectioned(text) {
            let Some((key, value)) = setting(line) else { continue };
            let usual = section == Section::All;
            if key == PARTITION_KEY {
                let partition = value.parse().ok();
                if usual {
                    found.usual = partition;
                }
                if usual || section == Section::Tryboot {
                    found.one_shot = partition;
                }
            } else if key == AB_KEY && (usual || section == Section::Tryboot) {
                found.by_partition = value == "1";
            }
        }
        found
    }
}

impl std::fmt::Display for Partitions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let show = |partition: Option<u64>| partition.map_or("none".to_owned(), |p| p.to_string());
        write!(
            f,
            "[all] {PARTITION_KEY}={}, [tryboot] {PARTITION_KEY}={}, {AB_KEY}={}",
            show(self.usual),
            show(self.one_shot),
            u8::from(self.by_partition),
        )
    }
}

/// The sections that decide here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Section {
    /// `[all]`, and what comes before any section.
    All,
    /// `[tryboot]`.
    Tryboot,
    /// `[none]` and filters we do not know.
    Other,
}

/// Every line with the section it stands in.
fn sectioned(text: &str) -> impl Iterator<Item = (Section, &str)> {
    text.split_inclusive('\n').scan(Section::All, |section, line| {
        match line.trim() {
            "[all]" => *section = Section::All,
            "[tryboot]" => *section = Section::Tryboot,
            other if other.starts_with('[') => *section = Section::Other,
            _ => {}
        }
        Some((*section, line))
    })
}

/// Key and value of a line; `None` for comments, sections and the rest.
fn setting(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.trim().split_once('=')?;
    (!key.starts_with('#')).then_some((key.trim(), value.trim()))
}

/// The text with these partitions. Values are replaced where they stand; what is missing or
/// overruled is added at the end, where it counts. All other lines stay as they are.
fn edit(text: &str, usual: u64, one_shot: u64) -> String {
    let replaced: String = sectioned(text)
        .map(|(section, line)| {
            let value = match (section, setting(line)) {
                (Section::All, Some((PARTITION_KEY, _))) => usual,
                (Section::Tryboot, Some((PARTITION_KEY, _))) => one_shot,
                (Section::All | Section::Tryboot, Some((AB_KEY, _))) => 1,
                _ => return line.to_owned(),
            };
            let key = setting(line).map(|(key, _)| key).unwrap_or_default();
            let end = line.get(line.trim_end().len()..).unwrap_or_default();
            format!("{key}={value}{end}")
        })
        .collect();
    let wanted = Partitions { usual: Some(usual), one_shot: Some(one_shot), by_partition: true };
    // Without a line of its own, a one-shot start would follow later changes of the usual one.
    let has_own = sectioned(&replaced).any(|(section, line)| {
        section == Section::Tryboot && setting(line).is_some_and(|(key, _)| key == PARTITION_KEY)
    });
    if Partitions::of(&replaced) == wanted && has_own {
        return replaced;
    }
    let gap = if replaced.is_empty() || replaced.ends_with('\n') { "" } else { "\n" };
    format!(
        "{replaced}{gap}[all]\n{AB_KEY}=1\n{PARTITION_KEY}={usual}\n[tryboot]\n\
         {PARTITION_KEY}={one_shot}\n"
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_the_file_as_the_firmware_does() {
        for (text, usual, one_shot, by_partition) in [
            ("", None, None, false),
            (
                "[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n",
                Some(2),
                Some(3),
                true,
            ),
            ("boot_partition=2\n", Some(2), Some(2), false),
            // The filter of the section above still applies: the later [all] overrules it.
            ("[tryboot]\nboot_partition=3\n[all]\nboot_partition=2\n", Some(2), Some(2), false),
            ("[none]\nboot_partition=5\n[all]\r\nboot_partition=2\r\n", Some(2), Some(2), false),
            ("# boot_partition=4\n#[tryboot]\nboot_partition=2", Some(2), Some(2), false),
            ("[all]\nboot_partition=x\n", None, None, false),
        ] {
            assert_eq!(
                Partitions::of(text),
                Partitions { usual, one_shot, by_partition },
                "{text}"
            );
        }
    }

    #[test]
    fn changes_only_the_numbers() {
        for (text, changed) in [
            ("", "[all]\ntryboot_a_b=1\nboot_partition=3\n[tryboot]\nboot_partition=2\n"),
            (
                "# ours\r\n[all]\r\ntryboot_a_b=1\r\nboot_partition=2\r\n\r\n[tryboot]\r\nboot_partition=3\r\n",
                "# ours\r\n[all]\r\ntryboot_a_b=1\r\nboot_partition=3\r\n\r\n[tryboot]\r\nboot_partition=2\r\n",
            ),
            (
                "boot_partition=2",
                "boot_partition=3\n[all]\ntryboot_a_b=1\nboot_partition=3\n[tryboot]\nboot_partition=2\n",
            ),
            (
                "[none]\nboot_partition=7\n[all]\ntryboot_a_b=0\nboot_partition=2\n[tryboot]\nboot_partition=3",
                "[none]\nboot_partition=7\n[all]\ntryboot_a_b=1\nboot_partition=3\n[tryboot]\nboot_partition=2",
            ),
        ] {
            assert_eq!(edit(text, 3, 2), changed);
        }
    }

    proptest! {
        #[test]
        fn an_edited_file_says_what_it_should_and_then_keeps_its_length(
            lines in prop::collection::vec(
                prop::sample::select(vec![
                    "[all]", "[tryboot]", "[none]", "[pi4]", "boot_partition=2", "boot_partition=33",
                    "tryboot_a_b=1", "tryboot_a_b=0", "# a comment", "", "other=1",
                ]),
                0..12,
            ),
            usual in 1u64..64,
            one_shot in 1u64..64,
        ) {
            let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
            let once = edit(&text, usual, one_shot);
            let says = |usual, one_shot| Partitions {
                usual: Some(usual),
                one_shot: Some(one_shot),
                by_partition: true,
            };
            prop_assert_eq!(Partitions::of(&once), says(usual, one_shot));
            let kept = |text: &str| {
                text.lines()
                    .filter(|line| ["# a comment", "other=1", "[pi4]"].contains(line))
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            };
            prop_assert_eq!(kept(&text), kept(&once));
            // A second edit finds our form; from then on only the digits change places.
            let twice = edit(&once, one_shot, usual);
            prop_assert_eq!(Partitions::of(&twice), says(one_shot, usual));
            prop_assert_eq!(edit(&twice, usual, one_shot).len(), edit(&once, usual, one_shot).len());
        }
    }
}
