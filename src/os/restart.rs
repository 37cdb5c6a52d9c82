//! Restarts the machine.

use super::tool::{Tool, ToolError};
use crate::config;

/// Stands for the bootloader's one-shot argument in the restart command.
const PLACEHOLDER: &str = "{argument}";

/// Why the restart could not be ordered.
#[derive(Debug, thiserror::Error)]
pub enum RestartError {
    /// The configuration names no program.
    #[error("restart.command = []: must name a program")]
    NoProgram,
    /// The bootloader needs an argument that the command has no place for.
    #[error(
        "restart.command = {command:?}: must have a word with {PLACEHOLDER}, because the \
         bootloader takes the other slot only if the restart carries \"{argument}\""
    )]
    NoPlaceholder {
        /// The command.
        command: Vec<String>,
        /// What it cannot carry.
        argument: String,
    },
    /// The program could not be run, or failed.
    #[error("cannot restart the machine")]
    Tool(#[from] ToolError),
}

/// Orders the restart. The machine, and this process with it, may go down before this returns.
///
/// # Errors
/// The machine goes on running.
pub fn restart(restart: &config::Restart, argument: Option<&str>) -> Result<(), RestartError> {
    let mut words = restart_words(&restart.command, argument)?.into_iter();
    let program = words.next().ok_or(RestartError::NoProgram)?;
    Tool::new(program, restart.limit_s.duration()).arguments(words).run()?.succeeded()?;
    Ok(())
}

/// The words of the restart command: `{argument}` in a word is replaced by `argument`; without
/// one, words that hold it are left out.
///
/// # Errors
/// There is an argument, but no word that could carry it.
pub fn restart_words(
    command: &[String],
    argument: Option<&str>,
) -> Result<Vec<String>, RestartError> {
    let Some(argument) = argument else {
        return Ok(command.iter().filter(|word| !word.contains(PLACEHOLDER)).cloned().collect());
    };
    if !command.iter().any(|word| word.contains(PLACEHOLDER)) {
        return Err(RestartError::NoPlaceholder {
            command: command.to_vec(),
            argument: argument.to_owned(),
        });
    }
    Ok(command.iter().map(|word| word.replace(PLACEHOLDER, argument)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_argument_has_its_place_or_is_an_error() {
        let words = |text: &str| text.split('|').map(str::to_owned).collect::<Vec<_>>();
        for (command, argument, expected) in [
            ("systemctl|reboot", None, Some("systemctl|reboot")),
            ("systemctl|reboot", Some("0 tryboot"), None),
            ("reboot|{argument}", Some("0 tryboot"), Some("reboot|0 tryboot")),
            ("reboot|{argument}", None, Some("reboot")),
            ("r|--reboot-argument={argument}|x", None, Some("r|x")),
            ("r|--a={argument}|x", Some("0 tryboot"), Some("r|--a=0 tryboot|x")),
        ] {
            let found = restart_words(&words(command), argument).ok();
            assert_eq!(found, expected.map(words), "{command} {argument:?}");
        }
    }
}
