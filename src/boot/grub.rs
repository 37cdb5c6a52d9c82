//! GRUB with RAUC's variables in its environment block, `ORDER`, and `x_OK` and `x_TRY` for each
//! slot, and with `GOOD`, the slot that was confirmed last or that an update leaves from.
//!
//! The boot script (`packaging/boot/grub`) takes the first slot in the order with `x_OK=1` and boots
//! left, and counts the boot in `x_TRY` before it boots: `GOOD` has three, so that power cuts during
//! a boot do not end in the old image, any other slot has one. If it finds none, it starts over. Other
//! scripts with RAUC's variables (`contrib/grub.conf` of RAUC) do not know `GOOD` and give every slot
//! one boot. They agree with ours as soon as a boot is confirmed.
//!
//! The block is a file of 1024 bytes that GRUB itself changes in place. So does this code, with
//! one write: `grub-editenv` truncates the file first, and a power cut then leaves no variables at
//! all. A block that has lost its content like that, or to a bad medium, is made anew by the next
//! order: until then the boot script goes on by its spare one, and the agent must not stay away from
//! the hub because of it. Our variables come first in the block and never change their length: they share one
//! sector of 512 bytes, which the medium writes as a whole, and the others never move.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use tracing::warn;

use super::{BootError, BootFacts, Bootloader, running};
use crate::config;
use crate::os::Sysroot;
use crate::update::Slot;

/// Size of the block; GRUB reads no other.
const BLOCK_BYTES: usize = 1024;
/// What every block begins with.
const SIGNATURE: &str = "# GRUB Environment Block\n";
const ORDER: &str = "ORDER";
const GOOD: &str = "GOOD";
/// What the boot script takes a missing order for.
const DEFAULT_ORDER: &str = "A B";

/// GRUB, by its environment block.
#[derive(Debug)]
pub struct Grub {
    file: PathBuf,
    slots: config::Slots,
    sysroot: Sysroot,
}

impl Grub {
    /// GRUB with the block that `config` names. It must exist: GRUB cannot make one, and a
    /// missing one mostly means that the boot partition is not mounted.
    #[must_use]
    pub fn new(config: &config::Grub, slots: config::Slots, sysroot: Sysroot) -> Self {
        Grub { file: config.environment.clone(), slots, sysroot }
    }

    fn read(&self) -> Result<Block, BootError> {
        let mut bytes = Vec::with_capacity(BLOCK_BYTES);
        OpenOptions::new()
            .read(true)
            .open(&self.file)
            // One byte more than there may be is enough to notice.
            .and_then(|file| file.take(1025).read_to_end(&mut bytes))
            .map_err(|source| self.failed("read", source))?;
        match Block::parse(&bytes) {
            // By its length it is a block, or one that was truncated, and no other file that somebody
            // named by mistake.
            Err(problem) if bytes.is_empty() || bytes.len() == BLOCK_BYTES => {
                let file = self.file.display();
                warn!(%file, problem, "the environment block is lost and will be made anew");
                Ok(Block(Vec::new()))
            }
            result => result.map_err(|problem| self.invalid(problem)),
        }
    }

    /// Sets the variables that are not set yet, all with one write, and reads back.
    fn set(&self, block: &Block, mut wanted: [(String, String); 6]) -> Result<(), BootError> {
        // Always the same order, so that nothing moves.
        wanted.sort();
        let changed = block.with(&wanted);
        if changed != *block {
            let bytes = changed.print().map_err(|problem| self.invalid(problem))?;
            OpenOptions::new()
                .write(true)
                .open(&self.file)
                .and_then(|file| file.write_all_at(&bytes, 0).and_then(|()| file.sync_all()))
                .map_err(|source| self.failed("write", source))?;
        }
        let found = self.read()?;
        match wanted.iter().find(|(name, value)| found.value(name) != Some(value.as_str())) {
            None => Ok(()),
            Some((name, value)) => Err(BootError::NotSet {
                variable: name.clone(),
                wanted: value.clone(),
                found: found.value(name).unwrap_or_default().to_owned(),
            }),
        }
    }

    fn failed(&self, what: &'static str, source: std::io::Error) -> BootError {
        BootError::File { what, path: self.file.clone(), source }
    }

    fn invalid(&self, problem: String) -> BootError {
        BootError::Invalid { where_: self.file.display().to_string(), problem }
    }
}

impl Bootloader for Grub {
    fn facts(&mut self) -> Result<BootFacts, BootError> {
        let running = self.running()?;
        let block = self.read()?;
        Ok(BootFacts { running, next: block.next(), tried: block.was_tried(running.other()) })
    }

    fn running(&mut self) -> Result<Slot, BootError> {
        running::running(&self.slots, &self.sysroot)
    }

    fn retire(&mut self, slot: Slot) -> Result<(), BootError> {
        let block = self.read()?;
        let other = slot.other();
        let wanted = [
            block.order(other),
            ok(other, true),
            tried(other, false),
            ok(slot, false),
            tried(slot, false),
            good(other),
        ];
        self.set(&block, wanted)
    }

    fn try_next(&mut self, slot: Slot) -> Result<(), BootError> {
        let block = self.read()?;
        let other = slot.other();
        let wanted = [
            block.order(slot),
            ok(other, true),
            tried(other, false),
            ok(slot, true),
            tried(slot, false),
            good(other),
        ];
        self.set(&block, wanted)
    }

    fn cancel_try(&mut self, slot: Slot) -> Result<(), BootError> {
        self.retire(slot)
    }

    fn confirm(&mut self) -> Result<(), BootError> {
        let running = running::running(&self.slots, &self.sysroot)?;
        let block = self.read()?;
        let other = running.other();
        // The other slot keeps its state, but has one from now on.
        let wanted = [
            block.order(running),
            ok(running, true),
            tried(running, false),
            ok(other, block.is_ok(other.name())),
            tried(other, !block.is_untried(other.name())),
            good(running),
        ];
        self.set(&block, wanted)
    }
}

fn ok(slot: Slot, is_ok: bool) -> (String, String) {
    (format!("{slot}_OK"), flag(is_ok))
}

fn tried(slot: Slot, was_tried: bool) -> (String, String) {
    (format!("{slot}_TRY"), flag(was_tried))
}

/// Every order says it: the slot that runs and is confirmed, or the way back of an update.
fn good(slot: Slot) -> (String, String) {
    (GOOD.to_owned(), slot.name().to_owned())
}

fn flag(is_set: bool) -> String {
    if is_set { "1" } else { "0" }.to_owned()
}

/// One line of the block.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Line {
    /// A comment, with its `#`.
    Comment(String),
    /// A variable. GRUB writes `\` before a line break or a backslash in the value; that is kept
    /// as it is.
    Variable(String, String),
}

/// The content of an environment block, in its order.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Block(Vec<Line>);

impl Block {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let advice = "restore it with `grub-editenv FILE create`";
        if bytes.len() != BLOCK_BYTES {
            let found = if bytes.len() > BLOCK_BYTES {
                "more than 1024".to_owned()
            } else {
                bytes.len().to_string()
            };
            return Err(format!(
                "has {found} bytes, but an environment block has {BLOCK_BYTES}: {advice}"
            ));
        }
        let text = std::str::from_utf8(bytes)
            .map_err(|_| format!("is damaged, it holds bytes that are not text: {advice}"))?;
        let mut rest = text
            .strip_prefix(SIGNATURE)
            .ok_or_else(|| format!("does not begin with \"{}\": {advice}", SIGNATURE.trim_end()))?;
        let mut lines = Vec::new();
        while let Some((line, after)) = split_line(rest) {
            rest = after;
            lines.push(if line.starts_with('#') {
                Line::Comment(line.to_owned())
            } else {
                let (name, value) = line.split_once('=').ok_or_else(|| {
                    let shown: String =
                        line.chars().take(64).flat_map(char::escape_default).collect();
                    format!("is damaged, \"{shown}\" is not NAME=value: {advice}")
                })?;
                Line::Variable(name.to_owned(), value.to_owned())
            });
        }
        if rest.bytes().any(|byte| byte != b'#') {
            return Err(format!("is damaged, it does not end with padding: {advice}"));
        }
        Ok(Block(lines))
    }

    fn print(&self) -> Result<Vec<u8>, String> {
        let mut bytes = SIGNATURE.as_bytes().to_vec();
        for line in &self.0 {
            let text = match line {
                Line::Comment(text) => format!("{text}\n"),
                Line::Variable(name, value) => format!("{name}={value}\n"),
            };
            bytes.extend_from_slice(text.as_bytes());
        }
        if bytes.len() > BLOCK_BYTES {
            return Err(format!(
                "would need {} bytes, but has only {BLOCK_BYTES}: remove variables with \
                 `grub-editenv FILE unset NAME`",
                bytes.len()
            ));
        }
        bytes.resize(BLOCK_BYTES, b'#');
        Ok(bytes)
    }

    /// A variable; the last one counts, as it does for GRUB's `load_env`.
    fn value(&self, wanted: &str) -> Option<&str> {
        self.0.iter().rev().find_map(|line| match line {
            Line::Variable(name, value) if name == wanted => Some(value.as_str()),
            _ => None,
        })
    }

    /// This block with the variables `set`, which come right behind the comments at its head.
    fn with(&self, set: &[(String, String)]) -> Self {
        let is_ours = |line: &Line| matches!(line, Line::Variable(name, _) if set.iter().any(|(other, _)| name == other));
        let is_comment = |line: &&Line| matches!(line, Line::Comment(_));
        let head = self.0.iter().take_while(is_comment);
        let rest = self.0.iter().skip_while(is_comment).filter(|line| !is_ours(line));
        let ours = set.iter().map(|(name, value)| Line::Variable(name.clone(), value.clone()));
        Block(head.cloned().chain(ours).chain(rest.cloned()).collect())
    }

    fn order_names(&self) -> impl Iterator<Item = &str> {
        self.value(ORDER).unwrap_or(DEFAULT_ORDER).split_ascii_whitespace()
    }

    /// The order with `first` before the other slot, and behind them what else is in it. Both
    /// slots are always there: `x_OK` alone says which may boot, and the length stays the same.
    fn order(&self, first: Slot) -> (String, String) {
        let ours = Slot::BOTH.map(Slot::name);
        let others = self.order_names().filter(|name| !ours.contains(name));
        let names: Vec<&str> =
            [first.name(), first.other().name()].into_iter().chain(others).collect();
        (ORDER.to_owned(), names.join(" "))
    }

    fn is_ok(&self, name: &str) -> bool {
        self.value(&format!("{name}_OK")).is_some_and(|value| value == "1")
    }

    fn is_untried(&self, name: &str) -> bool {
        self.value(&format!("{name}_TRY")).is_none_or(|value| value == "0")
    }

    /// Whether the boot script took `slot` since it was armed. A slot that is not armed has `x_OK=0`.
    fn was_tried(&self, slot: Slot) -> Option<bool> {
        let name = slot.name();
        self.value(&format!("{name}_OK")).map(|_| self.is_ok(name) && !self.is_untried(name))
    }

    /// Whether the boot script has boots left for it.
    fn has_boots(&self, name: &str) -> bool {
        let is_good = self.value(GOOD) == Some(name);
        self.is_untried(name)
            || (is_good && matches!(self.value(&format!("{name}_TRY")), Some("1" | "2")))
    }

    /// What the boot script will take; `None` if it would find nothing, or another system.
    fn next(&self) -> Option<Slot> {
        let name = self.order_names().find(|name| self.is_ok(name) && self.has_boots(name))?;
        Slot::BOTH.into_iter().find(|slot| slot.name() == name)
    }
}

/// The first line and what follows it; `None` if no line break comes any more. A backslash takes
/// the character behind it along, also a line break.
fn split_line(text: &str) -> Option<(&str, &str)> {
    let mut escaped = false;
    let end = text.bytes().position(|byte| {
        let ends = byte == b'\n' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    })?;
    Some((text.get(..end)?, text.get(end + 1..)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block(text: &str) -> Vec<u8> {
        let mut bytes = format!("{SIGNATURE}{text}").into_bytes();
        bytes.resize(BLOCK_BYTES, b'#');
        bytes
    }

    #[test]
    fn the_next_slot_is_the_one_that_the_boot_script_takes() {
        for (text, next) in [
            ("", None),
            ("A_OK=1\n", Some(Slot::A)),
            ("ORDER=B A\nA_OK=1\nA_TRY=0\nB_OK=1\nB_TRY=0\n", Some(Slot::B)),
            ("ORDER=B A\nA_OK=1\nA_TRY=0\nB_OK=1\nB_TRY=1\n", Some(Slot::A)),
            // The running slot was not confirmed in this boot, and there is no other.
            ("ORDER=A B\nA_OK=1\nA_TRY=1\nB_OK=0\nB_TRY=0\n", None),
            ("ORDER=A\nA_OK=0\nB_OK=1\n", None),
            // Three boots for the slot that was confirmed, one for the other.
            ("ORDER=B A\nGOOD=B\nA_OK=1\nA_TRY=0\nB_OK=1\nB_TRY=2\n", Some(Slot::B)),
            ("ORDER=B A\nGOOD=B\nA_OK=1\nA_TRY=0\nB_OK=1\nB_TRY=3\n", Some(Slot::A)),
            ("ORDER=B A\nGOOD=B\nA_OK=1\nA_TRY=1\nB_OK=1\nB_TRY=3\n", None),
            ("ORDER=B A\nGOOD=B\nA_OK=1\nA_TRY=0\nB_OK=0\nB_TRY=1\n", Some(Slot::A)),
            ("ORDER=B A\nGOOD=A\nA_OK=1\nA_TRY=2\nB_OK=1\nB_TRY=1\n", Some(Slot::A)),
            ("ORDER=R A B\nR_OK=1\nA_OK=1\n", None),
            ("ORDER=R A B\nA_OK=1\n", Some(Slot::A)),
            ("A_OK=0\nA_OK=1\n", Some(Slot::A)),
        ] {
            assert_eq!(Block::parse(&block(text)).unwrap().next(), next, "{text}");
        }
    }

    #[test]
    fn refuses_blocks_that_are_none() {
        for (bytes, complaint) in [
            (Vec::new(), "has 0 bytes"),
            (block("")[..1023].to_vec(), "has 1023 bytes"),
            ([block(""), vec![b'#']].concat(), "more than 1024 bytes"),
            (vec![0; 1024], "does not begin with \"# GRUB Environment Block\""),
            (vec![b'#'; 1024], "does not begin"),
            (block("rubbish\n"), "\"rubbish\" is not NAME=value"),
            (block("a=1"), "does not end with padding"),
            (block("a=1\n###\0"), "does not end with padding"),
            ([&block("")[..1000], &[0xff; 24]].concat(), "not text"),
        ] {
            let problem = Block::parse(&bytes).unwrap_err();
            assert!(problem.contains(complaint), "{problem}");
            assert!(problem.contains("grub-editenv"), "{problem}");
        }
    }

    #[test]
    fn refuses_to_overflow() {
        let full = Block::parse(&block(&format!("x={}\n", "y".repeat(990)))).unwrap();
        let problem = full.with(&[ok(Slot::A, true)]).print().unwrap_err();
        assert!(problem.contains("would need 1025 bytes"), "{problem}");
    }

    prop_compose! {
        fn foreign()(
            lines in prop::collection::vec(
                ("[a-z_]{1,8}", r"([ -\[\]-~]|\\\\|\\\n){0,20}").prop_map(|(n, v)| format!("{n}={v}\n"))
                    .boxed().prop_union("#[ -\\[\\]-~]{0,20}\n".boxed()),
                0..12,
            ),
        ) -> String {
            lines.concat()
        }
    }

    proptest! {
        #[test]
        fn printing_is_the_inverse_of_parsing(text in foreign()) {
            let bytes = block(&text);
            prop_assert_eq!(Block::parse(&bytes).unwrap().print().unwrap(), bytes);
        }

        #[test]
        fn foreign_lines_survive_and_ours_stay_in_place(text in foreign(), first in any::<bool>()) {
            let before = Block::parse(&block(&text)).unwrap();
            let (slot, other) = if first { (Slot::A, Slot::B) } else { (Slot::B, Slot::A) };
            let set = |block: &Block, slot, is_ok| {
                block.with(&[block.order(slot), ok(slot, is_ok), tried(slot, true)])
            };
            let once = set(&before, slot, true);
            let strangers = |block: &Block| {
                let ours = |name: &str| ["ORDER", "A_OK", "A_TRY", "B_OK", "B_TRY"].contains(&name);
                let lines = block.0.iter();
                lines
                    .filter(|line| !matches!(line, Line::Variable(name, _) if ours(name)))
                    .cloned()
                    .collect::<Vec<_>>()
            };
            prop_assert_eq!(strangers(&before), strangers(&once));
            // From then on only single bytes change.
            let twice = set(&once, slot, false);
            let (one, two) = (once.print().unwrap(), twice.print().unwrap());
            let changed = one.iter().zip(&two).filter(|(a, b)| a != b).count();
            prop_assert_eq!(changed, 1);
            prop_assert_eq!(twice.value("ORDER").map(str::len), Some(3));
            prop_assert_eq!(other.other(), slot);
        }

        #[test]
        fn parsing_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..1100)) {
            let _ = Block::parse(&bytes);
            let _ = Block::parse(&block(&String::from_utf8_lossy(&bytes).replace('\0', "")));
        }
    }
}
