//! U-Boot with RAUC's variables: `BOOT_ORDER`, and `BOOT_x_LEFT` for the boots that slot x has
//! left.
//!
//! The boot script takes the first slot in the order with boots left and takes one off
//! (`contrib/uboot.sh` of RAUC); a missing `BOOT_ORDER` counts as `A B`, a missing counter as 3.
//! If no slot has boots left, it gives every slot in the order 3 of them, so a slot that must not
//! boot has to leave the order as well.
//!
//! The counters are hexadecimal, because U-Boot's `setexpr` and RAUC write them so. (The `rauc`
//! boot method of newer U-Boots counts in decimal: up to 9, the most that we write, they agree.)

use std::collections::BTreeMap;
use std::time::Duration;

use tracing::warn;

use super::{BootError, BootFacts, Bootloader, running};
use crate::config;
use crate::os::{Finished, Sysroot, Tool, ToolError};
use crate::update::Slot;

/// Writing a slow NOR flash takes seconds.
const TOOL_LIMIT: Duration = Duration::from_secs(30);
/// The largest environment that is believed; usual ones have 8 to 256 KiB.
const MAX_ENVIRONMENT_BYTES: usize = 1024 * 1024;
/// What the boot script takes a missing counter for.
const DEFAULT_LEFT: u64 = 3;
/// What it takes a missing order for.
const DEFAULT_ORDER: &str = "A B";
const ORDER: &str = "BOOT_ORDER";

/// U-Boot, by `fw_printenv` and `fw_setenv`: U-Boot's own, or those of libubootenv.
#[derive(Debug)]
pub struct Uboot {
    config: config::Uboot,
    slots: config::Slots,
    sysroot: Sysroot,
    tool_limit: Duration,
}

impl Uboot {
    /// U-Boot with the tools that `config` names.
    #[must_use]
    pub fn new(config: &config::Uboot, slots: config::Slots, sysroot: Sysroot) -> Self {
        Uboot { config: config.clone(), slots, sysroot, tool_limit: TOOL_LIMIT }
    }

    /// Gives each call of a tool `limit` instead of 30 seconds.
    #[must_use]
    pub fn with_tool_limit(mut self, limit: Duration) -> Self {
        self.tool_limit = limit;
        self
    }

    fn read(&self) -> Result<Environment, BootError> {
        // All at once: one moment in time, and the same answer from both families of tools,
        // which differ in what they say of a variable that is missing.
        let tool = Tool::new(&self.config.fw_printenv, self.tool_limit)
            .output_limit(MAX_ENVIRONMENT_BYTES);
        let printed = self.run("read the environment", tool)?;
        Environment::parse(&printed.stdout.to_string()).filter(|_| !printed.stdout.truncated).ok_or(
            BootError::Invalid {
                where_: self.config.fw_printenv.display().to_string(),
                problem: format!(
                    "printed {} bytes that are not lines of NAME=value",
                    printed.stdout.bytes.len()
                ),
            },
        )
    }

    /// Sets what is not set yet, and reads back. The order is that of the least harm if only the
    /// first ones arrive.
    fn set(&self, wanted: &[Assignment]) -> Result<(), BootError> {
        let missing = self.read()?.lacks(wanted);
        if missing.is_empty() {
            return Ok(());
        }
        // One call writes the environment once. `key=value` is what libubootenv asks for; it
        // skips `key value` and says that all is well.
        let script: String = missing.iter().map(|set| format!("{}={}\n", set.0, set.1)).collect();
        let tool =
            Tool::new(&self.config.fw_setenv, self.tool_limit).arguments(["-s", "-"]).input(script);
        self.run("set the environment", tool)?;
        // Tools of before 2017 do not understand that script, and do not say so.
        for (name, value) in self.read()?.lacks(wanted) {
            let tool =
                Tool::new(&self.config.fw_setenv, self.tool_limit).arguments([&name, &value]);
            self.run("set a variable", tool)?;
        }
        let environment = self.read()?;
        match environment.lacks(wanted).into_iter().next() {
            None => Ok(()),
            Some((variable, wanted)) => {
                let found = environment.0.get(&variable).cloned().unwrap_or_default();
                Err(BootError::NotSet { variable, wanted, found })
            }
        }
    }

    fn run(&self, what: &str, tool: Tool) -> Result<Finished, BootError> {
        tool.run().and_then(Finished::succeeded).map_err(|error| tool_error(what, error))
    }

    /// Boots that a slot gets when it is the way back, or confirmed.
    fn attempts(&self) -> u64 {
        self.config.confirmed_attempts.get()
    }
}

impl Bootloader for Uboot {
    fn facts(&mut self) -> Result<BootFacts, BootError> {
        let running = self.running()?;
        let environment = self.read()?;
        let (next, tried) = (environment.next(), environment.was_tried(running.other()));
        Ok(BootFacts { running, next, tried })
    }

    fn running(&mut self) -> Result<Slot, BootError> {
        running::running(&self.slots, &self.sysroot)
    }

    fn retire(&mut self, slot: Slot) -> Result<(), BootError> {
        let environment = self.read()?;
        let other = slot.other();
        self.set(&[
            (left_of(other.name()), hex(environment.left_or(other, self.attempts()))),
            (ORDER.to_owned(), environment.order_with(&[other])),
            (left_of(slot.name()), hex(0)),
        ])
    }

    fn try_next(&mut self, slot: Slot) -> Result<(), BootError> {
        let environment = self.read()?;
        let other = slot.other();
        self.set(&[
            (left_of(other.name()), hex(environment.left_or(other, self.attempts()))),
            (left_of(slot.name()), hex(1)),
            (ORDER.to_owned(), environment.order_with(&[slot, other])),
        ])
    }

    fn cancel_try(&mut self, slot: Slot) -> Result<(), BootError> {
        self.retire(slot)
    }

    fn confirm(&mut self) -> Result<(), BootError> {
        let running = running::running(&self.slots, &self.sysroot)?;
        let environment = self.read()?;
        let other = running.other();
        // A retired slot stays out: in the order, the boot script would give it new boots once
        // the running slot has used up its own.
        let order = if environment.order().iter().any(|name| name == other.name()) {
            environment.order_with(&[running, other])
        } else {
            environment.order_with(&[running])
        };
        self.set(&[(left_of(running.name()), hex(self.attempts())), (ORDER.to_owned(), order)])
    }
}

pub(super) fn tool_error(what: &str, error: ToolError) -> BootError {
    let message = match &error {
        ToolError::NotRun { source, .. } => source.to_string(),
        ToolError::TimedOut { .. } | ToolError::Failed { .. } => error.to_string(),
    };
    let (ToolError::NotRun { program, .. }
    | ToolError::TimedOut { program, .. }
    | ToolError::Failed { program, .. }) = error;
    BootError::Tool { what: what.to_owned(), program, message }
}

/// A variable and the value it is to have.
type Assignment = (String, String);

/// All variables.
#[derive(Debug)]
struct Environment(BTreeMap<String, String>);

impl Environment {
    /// Reads what `fw_printenv` prints; `None` if that is something else. Lines without `=` are
    /// the rest of a value with line breaks.
    fn parse(text: &str) -> Option<Self> {
        let variables: BTreeMap<String, String> = text
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        (text.trim().is_empty() || !variables.is_empty()).then_some(Environment(variables))
    }

    /// A variable; an empty one counts as missing, as it does for the boot script.
    fn value(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    fn lacks(&self, wanted: &[Assignment]) -> Vec<Assignment> {
        let is_set = |(name, value): &&Assignment| self.value(name) == Some(value.as_str());
        wanted.iter().filter(|set| !is_set(set)).cloned().collect()
    }

    fn order(&self) -> Vec<String> {
        let order = self.value(ORDER).unwrap_or(DEFAULT_ORDER);
        order.split_ascii_whitespace().map(str::to_owned).collect()
    }

    /// `slots`, and behind them what else is in the order: a rescue system.
    fn order_with(&self, slots: &[Slot]) -> String {
        let ours = Slot::BOTH.map(Slot::name);
        let others = self.order().into_iter().filter(|name| !ours.contains(&name.as_str()));
        let names: Vec<String> =
            slots.iter().map(|slot| slot.name().to_owned()).chain(others).collect();
        names.join(" ")
    }

    /// Boots left, as the boot script counts; `None` if it has no counter.
    fn left(&self, name: &str) -> Option<u64> {
        let variable = left_of(name);
        let value = self.value(&variable)?;
        let left = u64::from_str_radix(value, 16).unwrap_or_else(|_| {
            warn!(variable, value, "not a hexadecimal number, the boot script takes it for 0");
            0
        });
        Some(left)
    }

    /// Boots left of `slot`, or `least` if there are none.
    fn left_or(&self, slot: Slot, least: u64) -> u64 {
        match self.left(slot.name()).unwrap_or(DEFAULT_LEFT) {
            0 => least,
            left => left,
        }
    }

    /// Whether the boot script took `slot` since it was armed with its one boot. A slot that is not
    /// armed is not in the order.
    fn was_tried(&self, slot: Slot) -> Option<bool> {
        self.value(ORDER)?;
        let may_boot = self.order().iter().any(|name| name == slot.name());
        Some(may_boot && self.left(slot.name())? == 0)
    }

    /// What the boot script will take: the first in the order that has boots left.
    fn next(&self) -> Option<Slot> {
        for name in self.order() {
            let slot = Slot::BOTH.into_iter().find(|slot| slot.name() == name);
            // What the script does with other names is its own affair; without a counter we take
            // it that it does nothing.
            let left = self.left(&name).unwrap_or(if slot.is_some() { DEFAULT_LEFT } else { 0 });
            if left > 0 {
                return slot;
            }
        }
        None
    }
}

fn left_of(name: &str) -> String {
    format!("BOOT_{name}_LEFT")
}

fn hex(left: u64) -> String {
    format!("{left:x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_slot_is_the_one_that_the_boot_script_takes() {
        for (text, next) in [
            ("", Some(Slot::A)),
            ("bootdelay=2\n", Some(Slot::A)),
            ("BOOT_ORDER=B A\n", Some(Slot::B)),
            ("BOOT_ORDER=\nBOOT_A_LEFT=\n", Some(Slot::A)),
            ("BOOT_A_LEFT=0\n", Some(Slot::B)),
            ("BOOT_ORDER=B A\nBOOT_B_LEFT=0\nBOOT_A_LEFT=a\n", Some(Slot::A)),
            ("BOOT_ORDER=B\nBOOT_B_LEFT=0\nBOOT_A_LEFT=3\n", None),
            ("BOOT_ORDER=A B\nBOOT_A_LEFT=0\nBOOT_B_LEFT=0\n", None),
            ("BOOT_ORDER=A B\nBOOT_A_LEFT=0x3\nBOOT_B_LEFT=1\n", Some(Slot::B)),
            // A rescue system: with boots of its own it goes first, else it is passed over.
            ("BOOT_ORDER=R B A\nBOOT_R_LEFT=1\n", None),
            ("BOOT_ORDER=R B A\n", Some(Slot::B)),
        ] {
            assert_eq!(Environment::parse(text).unwrap().next(), next, "{text}");
        }
    }

    #[test]
    fn what_else_is_in_the_order_stays_behind() {
        let environment = Environment::parse("BOOT_ORDER=R A B\n").unwrap();
        assert_eq!(environment.order_with(&[Slot::B, Slot::A]), "B A R");
        assert_eq!(environment.order_with(&[Slot::A]), "A R");
    }

    #[test]
    fn refuses_output_that_is_no_environment() {
        assert!(Environment::parse("Usage: fw_printenv\n").is_none());
        assert!(Environment::parse("a=1\nrest of a\n").is_some());
    }
}
