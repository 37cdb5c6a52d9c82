//! The journals of earlier boots, read with journalctl(1): what a failed boot said last.
//!
//! Both slots keep their journal in one folder of the data partition. `journalctl --directory=`
//! reads all folders below it, whatever the machine id of the system that wrote them.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde::Deserialize;

use crate::agent::Journal;
use crate::config;
use crate::logging::{FIELD_PREFIX, IDENTIFIER, chain};
use crate::os::{Finished, Tail, Tool};
use crate::redact::{OwnSecrets, Redactor};
use crate::update::{BootId, FailedBoot};

/// A large journal on a slow card takes its time, and nobody waits.
const LIMIT: Duration = Duration::from_secs(60);

/// Entries that are read for one line: what is said again and again takes one line only.
const REPETITIONS: usize = 4;

/// Kept of what journalctl prints, the newest: an entry has mostly two kilobytes.
const OUTPUT_BYTES: usize = 512 * 1024;

/// Longest line in a report; the rest is in the journal.
const MAX_LINE_BYTES: usize = 200;

/// All lines together, as JSON. A twin takes 32 KiB of all programs together.
const MAX_BYTES: usize = 4000;

/// Longest name of who said it.
const MAX_NAME_BYTES: usize = 48;

/// One line in so many is from the very end of the boot, whoever said it: whether the system went
/// down in order or stopped in the middle of something is the first question.
const PART_FROM_THE_END: usize = 4;

/// `PRIORITY=` of syslog(3), as far as they are told by themselves and named in the line.
const WARNINGS: [&str; 5] = ["emerg", "alert", "crit", "err", "warning"];

/// The journal folder of both slots.
#[derive(Clone)]
#[allow(missing_debug_implementations, reason = "holds a function that gives secrets")]
pub struct JournalFolder {
    directory: PathBuf,
    lines: usize,
    secrets: OwnSecrets,
}

impl JournalFolder {
    /// The folder of the settings; none if no line is to be told.
    #[must_use]
    pub fn new(report: &config::Report, secrets: OwnSecrets) -> Option<Self> {
        let lines = usize::try_from(report.journal_lines.get()).ok().filter(|lines| *lines > 0)?;
        Some(JournalFolder { directory: report.journal_directory.clone(), lines, secrets })
    }

    /// The last lines of `boot`, oldest first: what was a warning or worse, what the agent said, and
    /// the very end. Blocks.
    ///
    /// # Errors
    /// The journal cannot be read; the text is for people and without secrets.
    pub fn read(&self, boot: &FailedBoot) -> Result<Vec<String>, String> {
        let redactor = Redactor::new((self.secrets)()).map_err(|error| error.to_string())?;
        let boot = match boot {
            FailedBoot::Known(boot) => Some(boot_match(boot)?),
            FailedBoot::Unknown { after, others } => {
                self.first_boot(after, others).map_err(|problem| redactor.redact(&problem))?
            }
        };
        let Some(boot) = boot else { return Ok(Vec::new()) };
        let entries = self.entries(&boot).map_err(|problem| redactor.redact(&problem))?;
        Ok(bounded(lines(&entries, &redactor)))
    }

    /// The first boot in the journal that came after `after` and is none of `others`. Later ones may
    /// be of the good slot: the power may go before the agent starts in it.
    fn first_boot(&self, after: &BootId, others: &[BootId]) -> Result<Option<String>, String> {
        let after = boot_match(after)?;
        let others = others.iter().map(boot_match).collect::<Result<HashSet<_>, _>>()?;
        let listed = self.journalctl(["--list-boots".to_owned()])?.to_string();
        // `-1 0123456789abcdef0123456789abcdef Mon 2026-...`, oldest first.
        let id = |line: &str| boot_match(&BootId(line.split_whitespace().nth(1)?.to_owned())).ok();
        let boots: Vec<String> = listed.lines().filter_map(id).collect();
        let Some(place) = boots.iter().rposition(|boot| *boot == after) else { return Ok(None) };
        Ok(boots.into_iter().skip(place).find(|boot| *boot != after && !others.contains(boot)))
    }

    /// The entries worth telling, oldest first, each with how often it was said: from the end, what
    /// tells most, and more from the end.
    fn entries(&self, boot: &str) -> Result<Vec<(Entry, usize)>, String> {
        let newest = |matches: Vec<String>| {
            let count = self.lines.saturating_mul(REPETITIONS);
            let options = ["--output=json".to_owned(), format!("--lines={count}")];
            self.journalctl(options.into_iter().chain(matches)).map(|output| parse(&output))
        };
        let all = newest(vec![boot.to_owned()])?;
        let mut telling = vec![boot.to_owned()];
        telling.extend((0..WARNINGS.len()).map(|priority| format!("PRIORITY={priority}")));
        // Or: the daemon and the trial guard.
        telling.extend(["+".to_owned(), boot.to_owned()]);
        telling.push(format!("SYSLOG_IDENTIFIER={IDENTIFIER}"));
        let telling = newest(telling)?;

        let (end, before) =
            all.split_at_checked(self.lines.div_ceil(PART_FROM_THE_END)).unwrap_or((&all, &[]));
        let mut known = HashSet::new();
        let mut chosen: Vec<(Entry, usize)> = Vec::new();
        for entry in end.iter().chain(&telling).chain(before) {
            if !known.insert(&entry.cursor) {
                continue;
            }
            let same = chosen.iter_mut().find(|(newer, _)| newer.says_the_same_as(entry));
            if let Some((_, times)) = same {
                *times = times.saturating_add(1);
            } else if chosen.len() < self.lines {
                chosen.push((entry.clone(), 1));
            }
        }
        chosen.reverse();
        // Stable: entries of one moment stay in their order.
        chosen.sort_by_key(|(entry, _)| entry.since_boot_us());
        Ok(chosen)
    }

    fn journalctl(&self, words: impl IntoIterator<Item = String>) -> Result<Tail, String> {
        let mut folder = std::ffi::OsString::from("--directory=");
        folder.push(&self.directory);
        Tool::new("journalctl", LIMIT)
            .arguments([folder])
            .arguments(["--no-pager", "--quiet"])
            .arguments(words)
            .output_limit(OUTPUT_BYTES)
            .run()
            .and_then(Finished::succeeded)
            .map(|finished| finished.stdout)
            .map_err(|error| chain(&error).to_string())
    }
}

impl Journal for JournalFolder {
    fn last_words(&self, boot: FailedBoot) -> BoxFuture<'static, Result<Vec<String>, String>> {
        let journal = self.clone();
        Box::pin(async move {
            tokio::task::spawn_blocking(move || journal.read(&boot))
                .await
                .unwrap_or_else(|error| Err(format!("the reading was broken off: {error}")))
        })
    }
}

/// `_BOOT_ID=` as the journal writes it. It comes from the state file, so it is looked at.
fn boot_match(boot: &BootId) -> Result<String, String> {
    let id = boot.0.replace('-', "").to_ascii_lowercase();
    if id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        Ok(format!("_BOOT_ID={id}"))
    } else {
        Err("the name of the failed boot is not one of the kernel's".to_owned())
    }
}

/// One entry, as `journalctl --output=json` prints it.
#[derive(Clone, Debug, Deserialize)]
struct Entry {
    #[serde(rename = "__CURSOR")]
    cursor: String,
    #[serde(rename = "__MONOTONIC_TIMESTAMP")]
    since_boot_us: Option<Field>,
    #[serde(rename = "MESSAGE")]
    message: Option<Field>,
    #[serde(rename = "PRIORITY")]
    priority: Option<Field>,
    #[serde(rename = "SYSLOG_IDENTIFIER")]
    identifier: Option<Field>,
    #[serde(rename = "_COMM")]
    program: Option<Field>,
    #[serde(rename = "_SYSTEMD_UNIT")]
    unit: Option<Field>,
    #[serde(flatten)]
    others: BTreeMap<String, Option<Field>>,
}

/// A field: null where it is longer than 4096 bytes, numbers where it is not text, a list where
/// it is there several times. See "Journal JSON Format" of systemd.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(untagged)]
enum Field {
    Text(String),
    Bytes(Vec<u8>),
    Several(Vec<Field>),
}

impl Field {
    fn text(&self) -> String {
        match self {
            Field::Text(text) => text.clone(),
            Field::Bytes(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            Field::Several(fields) => fields.first().map(Field::text).unwrap_or_default(),
        }
    }
}

impl Entry {
    fn since_boot_us(&self) -> u64 {
        self.since_boot_us.as_ref().and_then(|time| time.text().parse().ok()).unwrap_or(0)
    }

    fn says_the_same_as(&self, other: &Self) -> bool {
        self.message.is_some() && self.message == other.message && self.who() == other.who()
    }

    /// The service, or else the program.
    fn who(&self) -> String {
        let unit = self.unit.as_ref().map(Field::text);
        let service = unit.as_deref().and_then(|unit| unit.strip_suffix(".service"));
        let named = || self.identifier.as_ref().or(self.program.as_ref()).map(Field::text);
        service.map(str::to_owned).or_else(named).unwrap_or_else(|| "unknown".to_owned())
    }

    /// The message, and the agent's own fields as its log has them on a terminal: `error=...`.
    fn text(&self) -> String {
        let own = self.others.iter().filter_map(|(name, value)| {
            let name = name.strip_prefix(FIELD_PREFIX)?.strip_prefix('_')?.to_ascii_lowercase();
            Some(format!("{name}={}", value.as_ref()?.text()))
        });
        let words: Vec<String> = self.message.iter().map(Field::text).chain(own).collect();
        if words.is_empty() {
            // journalctl leaves out what is longer than that.
            return "(no text, or more than 4096 bytes of it)".to_owned();
        }
        words.join(" ")
    }
}

/// The entries in what journalctl printed, one a line: the newest first. A line that was cut off is
/// none.
fn parse(output: &Tail) -> Vec<Entry> {
    let entries = output.bytes.split(|byte| *byte == b'\n').rev();
    entries.filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

/// `31.4s err app: cannot open /dev/ttyS7`, one for each entry.
fn lines(entries: &[(Entry, usize)], redactor: &Redactor) -> Vec<String> {
    let messages = entries.iter().map(|(entry, _)| (entry.who(), entry.text())).collect();
    let line = |((entry, times), (who, message)): (&(Entry, usize), (String, String))| {
        let tenths = entry.since_boot_us() / 100_000;
        let priority = entry.priority.as_ref().and_then(|number| number.text().parse().ok());
        let priority = priority.and_then(|number: usize| WARNINGS.get(number));
        let priority = priority.map(|name| format!("{name} ")).unwrap_or_default();
        let who = clipped(&redactor.redact(&who), MAX_NAME_BYTES);
        let times = if *times > 1 { format!(" ({times} times)") } else { String::new() };
        let line = format!("{}.{}s {priority}{who}{times}: {message}", tenths / 10, tenths % 10);
        clipped(&line, MAX_LINE_BYTES)
    };
    entries.iter().zip(redactor.redact_all(messages)).map(line).collect()
}

/// The newest of `lines` that together are small enough.
fn bounded(lines: Vec<String>) -> Vec<String> {
    let mut left = MAX_BYTES;
    let fits = |line: &&String| {
        let bytes = serde_json::to_string(line).map_or(MAX_BYTES, |text| text.len() + 1);
        let rest = left.checked_sub(bytes);
        left = rest.unwrap_or(0);
        rest.is_some()
    };
    let kept = lines.iter().rev().take_while(fits).count();
    lines.into_iter().rev().take(kept).rev().collect()
}

fn clipped(text: &str, bytes: usize) -> String {
    if text.len() <= bytes {
        return text.to_owned();
    }
    const MORE: &str = "…";
    let room = bytes.saturating_sub(MORE.len());
    let end = (0..=room).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    format!("{}{MORE}", text.get(..end).unwrap_or_default())
}
