//! A network of its own for a test: Microsoft's SDKs fix the hub's ports at 8883 and 443.
#![allow(dead_code, reason = "each test uses a part")]

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

/// Set to the test's name in the copy of the program that runs inside the network.
const INSIDE: &str = "TWINBOOT_TEST_INSIDE";

/// Ends a copy that hangs, with everything it started.
const LIMIT_S: &str = "600";

/// The test whose network this process is in, if it is in one.
pub fn inside() -> Option<OsString> {
    std::env::var_os(INSIDE)
}

/// Runs `check` in a copy of this test program that has its own network, mounts and processes;
/// `host` means the loopback address there. `name` is the test that calls this, with its modules.
/// The copy and all that it starts are gone when this returns.
pub fn in_own_network(name: &str, host: &str, check: impl FnOnce()) {
    if inside().is_some() {
        make_network(host);
        return check();
    }
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", LIMIT_S]);
    command.args(["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child"]);
    if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
        command.arg("--map-root-user");
    }
    command.arg(std::env::current_exe().unwrap()).args(["--exact", name, "--nocapture"]);
    let output = command.env(INSIDE, name).stdin(Stdio::null()).output().expect("timeout runs");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && told.contains("1 passed"),
        "{command:?}: {}{}\n--- stdout\n{told}\n--- stderr\n{}",
        output.status,
        if output.status.signal() == Some(9) { ", the time was over" } else { "" },
        String::from_utf8_lossy(&output.stderr),
    );
}

/// Brings the loopback device up and lets the name mean it.
fn make_network(host: &str) {
    let hosts = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(hosts.path(), format!("127.0.0.1 localhost {host}\n")).unwrap();
    for words in [
        vec!["ip", "link", "set", "lo", "up"],
        vec!["mount", "--bind", hosts.path().to_str().unwrap(), "/etc/hosts"],
    ] {
        let status = Command::new(words.first().unwrap()).args(words.iter().skip(1)).status();
        assert!(status.as_ref().is_ok_and(|status| status.success()), "{words:?}: {status:?}");
    }
}
