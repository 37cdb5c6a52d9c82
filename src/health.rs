//! Checks that a new slot must pass: systemd units, and programs in a folder.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;
use tracing::debug;

use crate::config;
use crate::os::{Finished, Tool};

/// Longest name of a systemd unit (`UNIT_NAME_MAX`).
const MAX_UNIT_NAME_BYTES: usize = 255;
/// Permissions that nobody but the owner may have on what is run here.
const WRITABLE_BY_OTHERS: u32 = 0o022;
const EXECUTABLE: u32 = 0o111;

/// Runs every check once: the units in their order, then the programs in the order of their
/// names. Whether the hub was reached is not asked here.
///
/// Programs are the executable files in the folder, apart from hidden ones; what is not
/// executable is passed over. They and the folder must belong to root or to the user of this
/// process, and only the owner may be able to write to them.
///
/// # Errors
/// The first check that did not pass, for people: which one, and its last words.
pub async fn check(health: &config::Health) -> Result<(), String> {
    let health = health.clone();
    tokio::task::spawn_blocking(move || check_blocking(&health))
        .await
        .unwrap_or_else(|error| Err(format!("the health checks were broken off: {error}")))
}

fn check_blocking(health: &config::Health) -> Result<(), String> {
    health.units.iter().try_for_each(|unit| check_unit(unit, health))?;
    programs(&health.directory)?.iter().try_for_each(|program| check_program(program, health))?;
    debug!("the health checks passed");
    Ok(())
}

fn check_unit(unit: &str, health: &config::Health) -> Result<(), String> {
    if !is_unit_name(unit) {
        return Err(format!(
            "health.units: \"{}\" is not the name of a systemd unit",
            unit.escape_default()
        ));
    }
    // Not quiet: it prints the state, which says more than that it is not active.
    let finished = Tool::new(&health.systemctl, health.program_limit_s.duration())
        .arguments(["is-active", "--", unit])
        .run()
        .map_err(|error| format!("unit {unit}: {}", crate::logging::chain(&error)))?;
    if finished.status.success() {
        return Ok(());
    }
    Err(match finished.last_line() {
        line if line.is_empty() => format!("unit {unit} is not active"),
        line => format!("unit {unit} is not active: {line}"),
    })
}

/// The programs in `folder`, by name. None if there is no such folder.
fn programs(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let failed = |error: std::io::Error| format!("health.directory {}: {error}", folder.display());
    if !folder.try_exists().map_err(failed)? {
        return Ok(Vec::new());
    }
    check_owner(folder)?;
    let mut programs = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden {
            continue;
        }
        let found = path.metadata().map_err(|error| format!("{}: {error}", path.display()))?;
        if found.is_file() && found.permissions().mode() & EXECUTABLE != 0 {
            programs.push(path);
        }
    }
    programs.sort();
    Ok(programs)
}

fn check_program(program: &Path, health: &config::Health) -> Result<(), String> {
    // Not passed over: a check that silently does not run would make every slot healthy.
    check_owner(program)?;
    Tool::new(program, health.program_limit_s.duration())
        .run()
        .and_then(Finished::succeeded)
        .map(drop)
        .map_err(|error| crate::logging::chain(&error).to_string())
}

fn check_owner(path: &Path) -> Result<(), String> {
    let found = path.metadata().map_err(|error| format!("{}: {error}", path.display()))?;
    if ![0, geteuid().as_raw()].contains(&found.uid()) {
        return Err(format!(
            "{} belongs to user {}: must belong to root",
            path.display(),
            found.uid()
        ));
    }
    if found.permissions().mode() & WRITABLE_BY_OTHERS != 0 {
        return Err(format!(
            "{} can be written to by others: must have mode 0755 or less",
            path.display()
        ));
    }
    Ok(())
}

fn is_unit_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    (1..=MAX_UNIT_NAME_BYTES).contains(&name.len())
        && name.bytes().all(allowed)
        && !name.starts_with(['-', '.'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_names_of_units() {
        for name in ["nginx.service", "getty@tty1.service", "dev-disk-by\\x2dlabel.mount", "a"] {
            assert!(is_unit_name(name), "{name}");
        }
        for name in ["", "-H", "--host=x", "a b", "a;b", "../x", "a/b", "ä.service", "x\ny"] {
            assert!(!is_unit_name(name), "{name}");
        }
        assert!(!is_unit_name(&"a".repeat(256)));
    }
}
