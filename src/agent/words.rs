//! Words of other programs on their way into the agent: what a health program, a boot loader's tool,
//! an installer or RAUC said may hold secrets, and goes from here into the state, the twin and the log.

use std::sync::Arc;

use super::{Agent, AgentError};
use crate::boot::BootError;
use crate::logging::chain;
use crate::redact::{CUT, OwnSecrets, Redactor};
use crate::update::{Event, Failure, FailureKind};

impl Agent {
    /// `event`, in which other programs may be quoted, without secrets.
    pub(super) async fn cleaned(&self, mut event: Event) -> Result<Event, AgentError> {
        if let Some(words) = words_of(&mut event) {
            *words = without_secrets(&self.secrets, std::mem::take(words)).await?;
        }
        Ok(event)
    }

    /// The bootloader, or its tool, refused.
    pub(super) async fn bootloader_failed(
        &self,
        what: &str,
        error: &BootError,
    ) -> Result<Failure, AgentError> {
        let detail = format!("cannot {what}: {}", chain(error));
        let detail = without_secrets(&self.secrets, detail).await?;
        Ok(Failure::new(FailureKind::Bootloader, detail))
    }
}

/// `text` as one line without secrets, the device's own included. Reads those on a blocking thread.
pub(super) async fn without_secrets(
    secrets: &OwnSecrets,
    text: String,
) -> Result<String, AgentError> {
    let secrets = Arc::clone(secrets);
    let clean = move || match Redactor::new(secrets()) {
        Ok(redactor) => redactor.redact(&text),
        Err(_) => CUT.to_owned(),
    };
    tokio::task::spawn_blocking(clean).await.map_err(AgentError::Blocking)
}

/// What of `event` may quote other programs.
fn words_of(event: &mut Event) -> Option<&mut String> {
    match event {
        Event::Fetched(Err(failure))
        | Event::Verified(Err(failure))
        | Event::Switched(Err(failure))
        | Event::RestartFailed(failure)
        | Event::ConfirmFailed(failure) => quotes(failure.kind).then_some(&mut failure.detail),
        Event::TrialExpired(problem) | Event::JournalRead { result: Err(problem), .. } => {
            Some(problem)
        }
        _ => None,
    }
}

/// Whether the explanation of such a failure may quote other programs. The others are our own words,
/// in which a digest, which looks like a key, must stay.
fn quotes(kind: FailureKind) -> bool {
    match kind {
        FailureKind::Installer
        | FailureKind::Bootloader
        | FailureKind::RestartFailed
        | FailureKind::Unhealthy
        | FailureKind::Unknown => true,
        FailureKind::InvalidRequest
        | FailureKind::InsecureUrl
        | FailureKind::DigestMissing
        | FailureKind::NotFound
        | FailureKind::AccessDenied
        | FailureKind::Network
        | FailureKind::BadServer
        | FailureKind::ImageChanged
        | FailureKind::TooLarge
        | FailureKind::DigestMismatch
        | FailureKind::CorruptImage
        | FailureKind::DecoderMemory
        | FailureKind::SlotIo
        | FailureKind::ReadBack
        | FailureKind::FellBack
        | FailureKind::Stuck
        | FailureKind::TooManyStarts
        | FailureKind::Cancelled
        | FailureKind::Withdrawn
        | FailureKind::RolledBackByOperator
        | FailureKind::LeftConfirmedSlot => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::update::{BootId, FailedBoot};

    const QUOTE: &str = "x ended with 1: curl https://u:hunter2@h/?sig=hunter2 token=hunter2";
    const CLEAN: &str = "x ended with 1: curl https://[redacted]@h/?[redacted] token=[redacted]";

    #[tokio::test]
    async fn what_other_programs_said_carries_no_secret() {
        let secrets: OwnSecrets = Arc::new(|| vec!["the-own-key".to_owned().into()]);
        let failure = |kind| Failure::new(kind, QUOTE);
        let of = FailedBoot::Known(BootId("b".to_owned()));
        for mut event in [
            Event::Fetched(Err(failure(FailureKind::Installer))),
            Event::Verified(Err(failure(FailureKind::Installer))),
            Event::Switched(Err(failure(FailureKind::Bootloader))),
            Event::ConfirmFailed(failure(FailureKind::Bootloader)),
            Event::RestartFailed(failure(FailureKind::RestartFailed)),
            Event::TrialExpired(QUOTE.to_owned()),
            Event::JournalRead { of, result: Err(QUOTE.to_owned()) },
        ] {
            let words = words_of(&mut event).unwrap();
            assert_eq!(without_secrets(&secrets, words.clone()).await.unwrap(), CLEAN);
        }
        let own = "it said the-own-key".to_owned();
        assert_eq!(without_secrets(&secrets, own).await.unwrap(), "it said [redacted]");
    }

    #[test]
    fn a_digest_stays_readable() {
        for kind in [FailureKind::ReadBack, FailureKind::DigestMismatch] {
            let digest = "00112233445566778899aabbccddeeff".repeat(2);
            assert_eq!(words_of(&mut Event::Verified(Err(Failure::new(kind, digest)))), None);
        }
    }
}
