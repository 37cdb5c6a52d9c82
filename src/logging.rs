//! Logging to the journal or to a terminal, and errors with their causes.

use std::error::Error;
use std::fmt;
use std::io::{self, IsTerminal};

use nix::sys::stat::fstat;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{Layer, fmt as terminal};

use crate::config::Level;

/// The daemon's name in the journal, as the trial guard's.
pub const IDENTIFIER: &str = "twinbootd";

/// Before the names of our fields in the journal: `error` is `TWINBOOT_ERROR` there.
pub const FIELD_PREFIX: &str = "TWINBOOT";

/// Starts logging for the whole process: with fields to the journal if systemd connected our
/// error output to it, else as lines to the error output, coloured on a terminal. Libraries log
/// from warnings up only, whatever `level` says: their details can hold URLs with secrets.
///
/// # Errors
/// Logging was started before.
pub fn start(level: Level) -> Result<(), TryInitError> {
    let ours = LevelFilter::from(level);
    let filter = Targets::new()
        .with_default(ours.min(LevelFilter::WARN))
        .with_target(env!("CARGO_PKG_NAME"), ours);
    let journal = if is_journal() { tracing_journald::layer().ok() } else { None };
    let output = match journal {
        Some(journal) => journal
            .with_field_prefix(Some(FIELD_PREFIX.to_owned()))
            .with_syslog_identifier(IDENTIFIER.to_owned())
            .boxed(),
        None => terminal::layer()
            .with_writer(io::stderr)
            .with_ansi(io::stderr().is_terminal())
            .with_target(false)
            .boxed(),
    };
    tracing_subscriber::registry().with(output.with_filter(filter)).try_init()
}

/// Shows an error and all its causes: `cannot save the state: No space left on device`.
#[must_use]
pub fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl fmt::Display + 'a {
    Chain(error)
}

struct Chain<'a>(&'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl From<Level> for LevelFilter {
    fn from(level: Level) -> Self {
        match level {
            Level::Error => LevelFilter::ERROR,
            Level::Warn => LevelFilter::WARN,
            Level::Info => LevelFilter::INFO,
            Level::Debug => LevelFilter::DEBUG,
        }
    }
}

/// Whether our error output is the very stream that systemd made, see `$JOURNAL_STREAM` in
/// systemd.exec(5): somebody may have sent it elsewhere since.
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    fstat(io::stderr()).is_ok_and(|found| stream == format!("{}:{}", found.st_dev, found.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot save")]
    struct Outer(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("cannot write /x")]
    struct Inner(#[source] io::Error);

    #[test]
    fn shows_every_cause_once() {
        let error = Outer(Inner(io::Error::other("disk full")));
        assert_eq!(chain(&error).to_string(), "cannot save: cannot write /x: disk full");
    }
}
