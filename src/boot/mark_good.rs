//! RAUC's own service that marks every boot good, and that ours cannot live with.

use std::path::Path;
use std::time::Duration;

use tracing::debug;

use crate::logging::chain;
use crate::os::Tool;

/// Its usual name: meta-rauc ships it, and RAUC's manual describes it.
const UNIT: &str = "rauc-mark-good.service";
/// How long systemd may take to tell.
const LIMIT: Duration = Duration::from_secs(10);

/// What an operator should know of the unit, if it will mark, or has marked, slots good by itself.
/// Asks systemd with the program `systemctl`; where that fails, there is no such unit either.
#[must_use]
pub fn rival(systemctl: &Path) -> Option<String> {
    let asked = Tool::new(systemctl, LIMIT)
        .arguments(["show", "--property=LoadState,UnitFileState,ActiveState", "--", UNIT])
        .run()
        .and_then(crate::os::Finished::succeeded);
    let told = match asked {
        Ok(finished) => finished.stdout.to_string(),
        Err(error) => {
            debug!(error = %chain(&error), "systemd does not tell of {UNIT}");
            return None;
        }
    };
    let value = |key: &str| {
        told.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).unwrap_or_default()
    };
    let (file, active) = (value("UnitFileState"), value("ActiveState"));
    if value("LoadState") != "loaded" {
        return None;
    }
    let is_enabled = file.starts_with("enabled");
    if !is_enabled && !["active", "activating", "reloading"].contains(&active) {
        return None;
    }
    let state = if is_enabled { file } else { active };
    Some(format!(
        "{UNIT} is {state}: it marks a new image good before the checks of its trial are done, so \
         that a bad one is not left by the boot loader; disable it in every image (systemctl \
         disable {UNIT})"
    ))
}
