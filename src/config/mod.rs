//! The configuration: TOML text to values that cannot be wrong. Every range is part of a type.

mod sections;
mod values;

use std::path::{Path, PathBuf};

use serde::{Deserialize, de};

pub use sections::*;
pub use values::{ProxyUrl, Seconds, Whole};

/// Everything that can be set. `docs/configuration.md` explains each key.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What this device is.
    pub device: Device,
    /// The IoT Hub connection.
    pub hub: Hub,
    /// What the twin shows, and how often.
    pub report: Report,
    /// How updates run.
    pub update: Update,
    /// How images are fetched.
    pub fetch: Fetch,
    /// The two slots.
    pub slots: Slots,
    /// How images get into a slot.
    pub install: Install,
    /// How the next boot is chosen.
    pub boot: Boot,
    /// RAUC's service.
    pub rauc: Rauc,
    /// What a new slot must pass.
    pub health: Health,
    /// How the machine is restarted.
    pub restart: Restart,
    /// Where the state is kept.
    pub state: State,
    /// The local socket of the device command.
    pub control: Control,
    /// What is logged.
    pub log: Log,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The text breaks a rule; the message tells line, key, value and rule.
    #[error("the configuration{} is wrong: {message}", path.as_ref().map(|path| format!(" {}", path.display())).unwrap_or_default())]
    Invalid {
        /// The file, if it came from one.
        path: Option<PathBuf>,
        /// Line, key, value and rule.
        message: String,
    },
}

impl Config {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// The file cannot be read, or its text breaks a rule.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text).map_err(|error| match error {
            ConfigError::Invalid { message, .. } => {
                ConfigError::Invalid { path: Some(path.to_owned()), message }
            }
            other => other,
        })
    }

    /// Checks `text`.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with the line, the key, the value and the rule it breaks.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let invalid = |message: String| ConfigError::Invalid { path: None, message };
        let config: Config = toml::from_str(text).map_err(|error| invalid(explain(error, text)))?;
        config.check_together().map_err(invalid)?;
        Ok(config)
    }

    /// What can still be used of the file at `path`, section by section; the rest has its
    /// defaults. For the trial guard alone, which must work when nothing else does.
    #[must_use]
    pub fn salvage(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let sections: toml::Table = text.parse().unwrap_or_default();
        let mut salvaged = Config {
            update: section(&sections, "update"),
            slots: section(&sections, "slots"),
            boot: section(&sections, "boot"),
            rauc: section(&sections, "rauc"),
            restart: section(&sections, "restart"),
            state: section(&sections, "state"),
            ..Config::default()
        };
        if salvaged.restart.command.is_empty() {
            salvaged.restart = Restart::default();
        }
        salvaged
    }

    /// The rules that tie several keys together.
    fn check_together(&self) -> Result<(), String> {
        if self.slots.a.device == self.slots.b.device {
            return Err(format!(
                "slots.a.device and slots.b.device are both {}: must be two different devices",
                self.slots.a.device.display()
            ));
        }
        if self.install.kind == InstallKind::Command && self.install.command.is_empty() {
            return Err(
                "install.command = []: must name a program when install.kind = \"command\""
                    .to_owned(),
            );
        }
        if self.boot.kind == BootKind::Custom && self.boot.custom.command.is_empty() {
            return Err(
                "boot.custom.command = []: must name a program when boot.kind = \"custom\""
                    .to_owned(),
            );
        }
        if self.restart.command.is_empty() {
            return Err("restart.command = []: must name a program".to_owned());
        }
        let places = self.restart.command.iter().any(|word| word.contains("{argument}"));
        if self.boot.kind == BootKind::Tryboot && !places {
            return Err(format!(
                "restart.command = {:?}: must have a word with {{argument}} when boot.kind = \
                 \"tryboot\": the firmware tries the other slot only if the restart carries it",
                self.restart.command
            ));
        }
        if self.hub.certificate_file.is_some() != self.hub.private_key_file.is_some() {
            return Err("hub.certificate_file, hub.private_key_file: set both or none".to_owned());
        }
        if self.fetch.client_certificate_file.is_some() != self.fetch.client_key_file.is_some() {
            return Err(
                "fetch.client_certificate_file, fetch.client_key_file: set both or none".to_owned()
            );
        }
        Ok(())
    }
}

fn section<T: de::DeserializeOwned + Default>(sections: &toml::Table, name: &str) -> T {
    sections.get(name).and_then(|table| table.clone().try_into().ok()).unwrap_or_default()
}

/// ``line 2, `hub.port`: invalid value: ..., expected ...``. The line itself is not shown: a secret
/// that somebody put into the file against the rules must not get into the journal.
fn explain(mut error: toml::de::Error, text: &str) -> String {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    error.set_input(None);
    let message = error.to_string();
    let (message, place) = match message.trim_end().rsplit_once("\nin ") {
        Some((message, key)) => (message, format!(", {key}")),
        None => (message.trim_end(), String::new()),
    };
    format!("line {line}{place}: {}", message.replace('\n', ", "))
}
