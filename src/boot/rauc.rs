//! RAUC's service, with whatever boot loader it knows: barebox, U-Boot, GRUB, EFI or a program.
//!
//! What is told to RAUC reads back through RAUC. How often a slot is tried that nobody confirmed is
//! up to RAUC's backend: once with GRUB, as often as `boot-attempts` says with U-Boot and barebox.

use super::{BootError, BootFacts, Bootloader, running};
use crate::config;
use crate::os::Sysroot;
use crate::rauc::{Mark, Rauc, RaucError, Session, SlotStatus};
use crate::update::Slot;

/// The boot loader behind RAUC.
#[derive(Debug)]
pub struct RaucBoot {
    rauc: Rauc,
    slots: config::Slots,
    sysroot: Sysroot,
}

impl RaucBoot {
    /// The boot loader that RAUC's service knows.
    #[must_use]
    pub fn new(config: &config::Rauc, slots: config::Slots, sysroot: Sysroot) -> Self {
        RaucBoot { rauc: Rauc::new(config), slots, sysroot }
    }

    /// Opens a conversation, if RAUC and we mean the same slot when we say that one runs.
    fn connect(&self) -> Result<(Session, Vec<SlotStatus>, Slot), BootError> {
        let running = running::running(&self.slots, &self.sysroot)?;
        let session = self.rauc.connect()?;
        let slots = session.slots()?;
        for slot in Slot::BOTH {
            let found = self.rauc.find(&slots, slot)?;
            if found.is_booted != (slot == running) {
                let problem = format!(
                    "slot {running} runs, but RAUC takes {} for {}",
                    found.name,
                    if found.is_booted { "the running one" } else { "one that does not" },
                );
                return Err(RaucError::Slot { problem }.into());
            }
        }
        Ok((session, slots, running))
    }

    /// The slot that boots next, if it is one of ours.
    fn next(&self, session: &Session, slots: &[SlotStatus]) -> Result<Option<Slot>, RaucError> {
        let Some(primary) = session.primary()? else { return Ok(None) };
        for slot in Slot::BOTH {
            if self.rauc.find(slots, slot)?.name == primary {
                return Ok(Some(slot));
            }
        }
        Ok(None)
    }

    /// Makes `slot` the one that boots next, and finds that so.
    fn activate(&self, session: &Session, slot: Slot) -> Result<(), RaucError> {
        let slots = session.slots()?;
        let name = &self.rauc.find(&slots, slot)?.name;
        session.mark(Mark::Active, name)?;
        match self.next(session, &slots)? {
            Some(next) if next == slot => Ok(()),
            next => Err(RaucError::NotSet {
                what: format!("boot {name} next"),
                found: next.map_or_else(
                    || "it cannot tell what boots next".to_owned(),
                    |next| format!("slot {next} boots next"),
                ),
            }),
        }
    }

    /// Marks `slot`, and finds that so.
    fn mark(&self, session: &Session, mark: Mark, slot: Slot) -> Result<(), RaucError> {
        let slots = session.slots()?;
        let name = self.rauc.find(&slots, slot)?.name.clone();
        session.mark(mark, &name)?;
        let wanted = if mark == Mark::Bad { "bad" } else { "good" };
        let slots = session.slots()?;
        let found = &self.rauc.find(&slots, slot)?.boot_status;
        if found == wanted {
            return Ok(());
        }
        let what = format!("mark {name} as {wanted}");
        Err(RaucError::NotSet { what, found: format!("its boot status is \"{found}\"") })
    }
}

impl Bootloader for RaucBoot {
    fn facts(&mut self) -> Result<BootFacts, BootError> {
        match self.connect() {
            Ok((session, slots, running)) => {
                Ok(BootFacts { running, next: self.next(&session, &slots)?, tried: None })
            }
            // It still installs what was ordered before a restart of the agent.
            Err(BootError::Rauc(RaucError::Busy)) => {
                Ok(BootFacts { running: self.running()?, next: None, tried: None })
            }
            Err(error) => Err(error),
        }
    }

    fn running(&mut self) -> Result<Slot, BootError> {
        running::running(&self.slots, &self.sysroot)
    }

    fn retire(&mut self, slot: Slot) -> Result<(), BootError> {
        let (session, ..) = self.connect()?;
        // First, so that there is always one that boots.
        self.activate(&session, slot.other())?;
        self.mark(&session, Mark::Bad, slot)?;
        Ok(())
    }

    fn try_next(&mut self, slot: Slot) -> Result<(), BootError> {
        let (session, ..) = self.connect()?;
        self.activate(&session, slot)?;
        Ok(())
    }

    fn cancel_try(&mut self, slot: Slot) -> Result<(), BootError> {
        self.retire(slot)
    }

    fn confirm(&mut self) -> Result<(), BootError> {
        let (session, slots, running) = self.connect()?;
        if self.next(&session, &slots)? != Some(running) {
            self.activate(&session, running)?;
        }
        self.mark(&session, Mark::Good, running)?;
        Ok(())
    }
}
