//! Journals of boots that were never made: real journal files, written by systemd's own program.
#![allow(dead_code, reason = "each test uses a part")]

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Writes what it reads in the journal's export format into a journal file.
const WRITER: &str = "/lib/systemd/systemd-journal-remote";

/// 2027-01-15, in microseconds.
const START_US: u64 = 1_800_000_000_000_000;

/// One entry: when, how bad, who, what.
#[derive(Clone, Debug)]
pub struct Entry {
    pub since_boot_ms: u64,
    pub priority: u8,
    pub identifier: String,
    pub unit: Option<String>,
    pub fields: Vec<(String, String)>,
    pub message: Vec<u8>,
}

/// An entry of a service.
pub fn entry(since_boot_ms: u64, priority: u8, service: &str, message: &str) -> Entry {
    Entry {
        since_boot_ms,
        priority,
        identifier: service.to_owned(),
        unit: Some(format!("{service}.service")),
        fields: Vec::new(),
        message: message.as_bytes().to_vec(),
    }
}

impl Entry {
    /// The same with a field of its own.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.fields.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The same by a program that is no service.
    pub fn of_no_service(mut self) -> Self {
        self.unit = None;
        self
    }
}

/// A machine's journal folder below `folder`, with boots one after the other.
pub struct Machine {
    file: PathBuf,
    id: u128,
    export: Vec<u8>,
    now_us: u64,
}

impl Machine {
    /// The journal of the machine with this id.
    pub fn new(folder: &Path, id: u128) -> Self {
        let folder = folder.join(format!("{id:032x}"));
        std::fs::create_dir_all(&folder).unwrap();
        Machine { file: folder.join("system.journal"), id, export: Vec::new(), now_us: START_US }
    }

    /// The clock shows so many hours after the beginning of the story.
    pub fn at_hour(mut self, hour: u64) -> Self {
        self.now_us = START_US + hour * 3_600_000_000;
        self
    }

    /// A boot with these entries. `boot` as the kernel names it, or without dashes.
    pub fn boot(mut self, boot: &str, entries: &[Entry]) -> Self {
        let boot = boot.replace('-', "");
        for entry in entries {
            let monotonic_us = entry.since_boot_ms * 1000;
            let mut text = String::new();
            let realtime_us = self.now_us + monotonic_us;
            writeln!(text, "__REALTIME_TIMESTAMP={realtime_us}").unwrap();
            writeln!(text, "__MONOTONIC_TIMESTAMP={monotonic_us}").unwrap();
            writeln!(text, "_BOOT_ID={boot}\n_MACHINE_ID={:032x}", self.id).unwrap();
            writeln!(text, "PRIORITY={}\nSYSLOG_IDENTIFIER={}", entry.priority, entry.identifier)
                .unwrap();
            for (name, value) in &entry.fields {
                writeln!(text, "{name}={value}").unwrap();
            }
            if let Some(unit) = &entry.unit {
                writeln!(text, "_SYSTEMD_UNIT={unit}").unwrap();
            }
            self.export.extend(text.as_bytes());
            // The form for any bytes: the name, their number, the bytes.
            self.export.extend(b"MESSAGE\n");
            self.export.extend(u64::try_from(entry.message.len()).unwrap().to_le_bytes());
            self.export.extend(&entry.message);
            self.export.extend(b"\n\n");
        }
        self.now_us += 3_600_000_000;
        self
    }

    /// Writes the file.
    pub fn write(self) {
        let mut writer = Command::new(WRITER)
            .arg("--split-mode=none")
            .arg(format!("--output={}", self.file.display()))
            .arg("-")
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{WRITER}: {error}; run make packages"));
        writer.stdin.take().unwrap().write_all(&self.export).unwrap();
        let output = writer.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(self.file.exists());
    }
}
