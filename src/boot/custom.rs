//! An outside program that knows the bootloader.
//!
//! It is called with a verb, and with the slot, `A` or `B`, where the verb has one:
//!
//! | call | does | prints |
//! |---|---|---|
//! | `running` | | `A` or `B`: the slot this system was started from |
//! | `next` | | `A`, `B` or `none`: what boots next, as far as it can tell |
//! | `retire SLOT` | makes sure that SLOT does not boot, and that the other one does | |
//! | `try SLOT` | SLOT boots next, once, and then the other one again | |
//! | `cancel SLOT` | takes that back, also while SLOT runs | |
//! | `confirm` | makes the running slot the default | |
//!
//! Exit code 0 means that it is done, and on the medium. Every call may come twice. After
//! `retire`, `cancel` and `confirm` the agent asks `next`, and does not go on if the answer
//! contradicts.

use std::time::Duration;

use super::uboot::tool_error;
use super::{BootError, BootFacts, Bootloader};
use crate::config;
use crate::os::{Finished, Tool};
use crate::update::Slot;

/// An outside program that knows the bootloader.
#[derive(Debug)]
pub struct Custom {
    command: Vec<String>,
    limit: Duration,
}

impl Custom {
    /// The program that `config` names.
    #[must_use]
    pub fn new(config: &config::Custom) -> Self {
        Custom { command: config.command.clone(), limit: config.limit_s.duration() }
    }

    fn call(&self, words: &[&str]) -> Result<String, BootError> {
        let mut command = self.command.iter().cloned();
        let program = command.next().unwrap_or_default();
        let words = words.iter().copied();
        let what = words.clone().collect::<Vec<_>>().join(" ");
        let finished = Tool::new(program, self.limit)
            .arguments(command.chain(words.map(str::to_owned)))
            .run()
            .and_then(Finished::succeeded)
            .map_err(|error| tool_error(&what, error))?;
        Ok(finished.stdout.to_string().trim().to_owned())
    }

    fn next(&self) -> Result<Option<Slot>, BootError> {
        match self.call(&["next"])?.as_str() {
            "none" => Ok(None),
            answer => slot(answer).map(Some).ok_or_else(|| self.invalid("next", answer)),
        }
    }

    /// Asks whether `slot` boots next, where the program can tell.
    fn expect_next(&self, slot: Slot) -> Result<(), BootError> {
        match self.next()? {
            Some(found) if found != slot => Err(BootError::NotSet {
                variable: "the next slot".to_owned(),
                wanted: slot.to_string(),
                found: found.to_string(),
            }),
            _ => Ok(()),
        }
    }

    fn invalid(&self, verb: &str, answer: &str) -> BootError {
        let shown: String = answer.chars().take(64).flat_map(char::escape_default).collect();
        BootError::Invalid {
            where_: format!("{} {verb}", self.command.join(" ")),
            problem: format!("answered \"{shown}\", must be A or B (for next also none)"),
        }
    }
}

impl Bootloader for Custom {
    fn facts(&mut self) -> Result<BootFacts, BootError> {
        Ok(BootFacts { running: self.running()?, next: self.next()?, tried: None })
    }

    fn running(&mut self) -> Result<Slot, BootError> {
        let answer = self.call(&["running"])?;
        slot(&answer).ok_or_else(|| self.invalid("running", &answer))
    }

    fn retire(&mut self, slot: Slot) -> Result<(), BootError> {
        self.call(&["retire", slot.name()])?;
        self.expect_next(slot.other())
    }

    fn try_next(&mut self, slot: Slot) -> Result<(), BootError> {
        self.call(&["try", slot.name()])?;
        Ok(())
    }

    fn cancel_try(&mut self, slot: Slot) -> Result<(), BootError> {
        self.call(&["cancel", slot.name()])?;
        self.expect_next(slot.other())
    }

    fn confirm(&mut self) -> Result<(), BootError> {
        let running = self.running()?;
        self.call(&["confirm"])?;
        self.expect_next(running)
    }
}

fn slot(answer: &str) -> Option<Slot> {
    Slot::BOTH.into_iter().find(|slot| slot.name() == answer)
}
