//! Health checks by real programs, and the runner behind every outside program.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use twinboot::config::{self, Seconds};
use twinboot::health;
use twinboot::os::{RestartError, Sysroot, VersionError};
use twinboot::os::{Tool, ToolError, boot_id, restart, running_version};

const LONG: Duration = Duration::from_secs(60);

/// A health.d folder, and a `systemctl` that knows one active unit.
struct Device {
    folder: TempDir,
    health: config::Health,
}

impl Device {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let directory = folder.path().join("health.d");
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
        let systemctl = folder.path().join("systemctl");
        install(&systemctl);
        fs::write(
            folder.path().join("systemctl.does"),
            "[ \"$1 $2\" = 'is-active --' ] || exit 9\n\
             case $3 in good.service) echo active ;; mute.service) exit 3 ;; \
             slow.service) sleep 60 ;; *) echo failed; exit 3 ;; esac\n",
        )
        .unwrap();
        let health = config::Health { directory, systemctl, ..config::Health::default() };
        Device { folder, health }
    }

    /// Puts a program into the folder that does what `script` says.
    fn program(&self, name: &str, script: &str) -> PathBuf {
        let path = self.health.directory.join(name);
        install(&path);
        fs::write(self.health.directory.join(format!("{name}.does")), script).unwrap();
        path
    }

    fn check(&self) -> Result<(), String> {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(health::check(&self.health))
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.folder.path().join(name)).unwrap_or_default()
    }
}

/// By another process: a program that this one has open for writing, be it in a child that was
/// just forked by another test, could not be run.
fn install(path: &PathBuf) {
    let does = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/tools/does");
    let status = Command::new("install").args(["-m", "755"]).arg(does).arg(path).status();
    assert!(status.unwrap().success());
}

#[test]
fn programs_run_in_the_order_of_their_names_until_one_fails() {
    let device = Device::new();
    assert_eq!(device.check(), Ok(()), "an empty folder");
    let log = device.folder.path().join("log");
    let say = |text: &str| format!("echo {text} >>{}", log.display());
    device.program("20-second", &say("second"));
    device.program("10-first", &say("first"));
    device.program("40-never", &say("never"));
    assert_eq!(device.check(), Ok(()));
    assert_eq!(device.text("log"), "first\nsecond\nnever\n");

    device.program("30-bad", "echo before; echo; echo ' the camera is not there ' >&2; exit 4");
    let reason = device.check().unwrap_err();
    assert!(
        reason.ends_with("30-bad ended with exit status: 4: the camera is not there"),
        "{reason}"
    );
    assert_eq!(device.text("log"), "first\nsecond\nnever\nfirst\nsecond\n");
}

#[test]
fn each_bad_check_is_named_with_its_last_words() {
    type Case = (fn(&mut Device), &'static str);
    let cases: [Case; 10] = [
        (|d| drop(d.program("x", "exit 1")), "health.d/x ended with exit status: 1"),
        (|d| drop(d.program("x", "echo said; exit 1")), "exit status: 1: said"),
        (|d| drop(d.program("x", "kill -11 $$")), "health.d/x ended with signal: 11"),
        (
            |d| {
                d.health.program_limit_s = Seconds::of(1);
                d.program("x", "echo waiting; sleep 60");
            },
            "health.d/x did not end within 1 s: waiting",
        ),
        (
            |d| {
                let path = d.program("x", "exit 0");
                fs::set_permissions(path, fs::Permissions::from_mode(0o775)).unwrap();
            },
            "health.d/x can be written to by others",
        ),
        (
            |d| {
                let path = d.health.directory.clone();
                fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
            },
            "health.d can be written to by others",
        ),
        (
            |d| d.health.units = vec!["bad.service".to_owned()],
            "unit bad.service is not active: failed",
        ),
        (|d| d.health.units = vec!["mute.service".to_owned()], "unit mute.service is not active"),
        (|d| d.health.units = vec!["-H evil".to_owned()], "\"-H evil\" is not the name"),
        (
            |d| {
                d.health.systemctl = "/nowhere/systemctl".into();
                d.health.units = vec!["good.service".to_owned()];
            },
            "unit good.service: cannot run /nowhere/systemctl: No such file",
        ),
    ];
    for (spoil, complaint) in cases {
        let mut device = Device::new();
        device.health.units = vec!["good.service".to_owned()];
        device.program("a", "exit 0");
        assert_eq!(device.check(), Ok(()));
        spoil(&mut device);
        let reason = device.check().unwrap_err();
        assert!(reason.contains(complaint), "{reason}");
    }
}

#[test]
fn files_that_are_no_programs_are_passed_over() {
    let mut device = Device::new();
    let off = device.program("50-off", "exit 1");
    fs::set_permissions(off, fs::Permissions::from_mode(0o644)).unwrap();
    device.program(".hidden", "exit 1");
    fs::create_dir(device.health.directory.join("folder")).unwrap();
    assert_eq!(device.check(), Ok(()));
    device.health.directory = device.folder.path().join("missing");
    assert_eq!(device.check(), Ok(()));
}

fn shell(script: &str, limit: Duration) -> Tool {
    Tool::new("/bin/sh", limit).arguments(["-c", script])
}

#[test]
fn a_program_gets_its_input_and_its_output_is_kept() {
    let input = "line\n".repeat(100_000);
    let finished = Tool::new("cat", LONG)
        .input(input.clone())
        .output_limit(1 << 20)
        .run()
        .unwrap()
        .succeeded()
        .unwrap();
    assert_eq!(finished.stdout.to_string(), input);
    assert!(!finished.stdout.truncated);

    // Without input there is nothing to wait for, and what is not read does no harm.
    assert!(shell("cat; exec true", LONG).run().unwrap().status.success());
    assert!(Tool::new("true", LONG).input(input).run().unwrap().status.success());
}

#[test]
fn only_the_end_of_much_output_is_kept() {
    let script = "seq 1 200000; seq 1 200000 >&2; echo last";
    let finished = shell(script, LONG).output_limit(1000).run().unwrap();
    assert!(finished.stdout.truncated && finished.stderr.truncated);
    assert_eq!((finished.stdout.bytes.len(), finished.stderr.bytes.len()), (1000, 1000));
    assert!(finished.stdout.to_string().ends_with("199999\n200000\nlast\n"));
    assert!(finished.stderr.to_string().ends_with("199999\n200000\n"));
}

#[test]
fn a_program_that_does_not_end_is_killed_with_all_that_it_started() {
    let folder = TempDir::new().unwrap();
    let child = folder.path().join("child");
    let script = format!("sleep 1000 & echo $! >{}; echo waiting; wait", child.display());
    let error = shell(&script, Duration::from_secs(1)).run().unwrap_err();
    let text = error.to_string();
    assert!(text.contains("/bin/sh did not end within 1 s: waiting"), "{text}");
    let id = fs::read_to_string(child).unwrap();
    let stat = format!("/proc/{}/stat", id.trim());
    // The kernel takes a moment; a zombie is gone for all that matters.
    let gone = || fs::read_to_string(&stat).map_or(true, |text| text.contains(") Z "));
    let mut patience = 1000;
    while !gone() && patience > 0 {
        std::thread::sleep(Duration::from_millis(10));
        patience -= 1;
    }
    assert!(gone(), "{id} is still there");
}

#[test]
fn what_a_program_leaves_running_does_not_hold_us_up() {
    let folder = TempDir::new().unwrap();
    let release = folder.path().join("release");
    // The one left behind keeps both outputs open until the file is there.
    let script =
        format!("(until [ -e {0} ]; do sleep 0.05; done) & echo done; exit 0", release.display());
    let finished = shell(&script, LONG).run().unwrap();
    assert!(finished.status.success());
    assert_eq!(finished.stdout.to_string(), "done\n");
    fs::write(release, "").unwrap();
}

#[test]
fn programs_do_not_see_what_systemd_tells_the_agent() {
    // Set for a process of its own: other tests run in this one.
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "in_the_service", "--ignored"])
        .env("NOTIFY_SOCKET", "/run/x")
        .env("CREDENTIALS_DIRECTORY", "/run/secrets")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "programs_do_not_see_what_systemd_tells_the_agent runs it"]
fn in_the_service() {
    assert!(std::env::var("NOTIFY_SOCKET").is_ok());
    let printed = Tool::new("env", LONG).run().unwrap().stdout.to_string();
    assert!(!printed.contains("NOTIFY_SOCKET") && !printed.contains("CREDENTIALS"), "{printed}");
    assert!(printed.contains("PATH="), "{printed}");
}

#[test]
fn the_restart_command_is_run_with_its_argument() {
    let folder = TempDir::new().unwrap();
    let said = folder.path().join("said");
    let order = |script: String| config::Restart {
        command: ["/bin/sh", "-c", &script, "reboot", "{argument}"].map(str::to_owned).to_vec(),
        ..config::Restart::default()
    };
    let write = order(format!("echo \"$#:$*\" >>{}", said.display()));
    restart(&write, Some("0 tryboot")).unwrap();
    restart(&write, None).unwrap();
    assert_eq!(fs::read_to_string(said).unwrap(), "1:0 tryboot\n0:\n");

    let error = restart(&order("echo not now >&2; exit 7".to_owned()), None).unwrap_err();
    let RestartError::Tool(ToolError::Failed { last_line, .. }) = &error else {
        panic!("{error:?}")
    };
    assert_eq!(last_line, "not now");
}

#[test]
fn the_machine_tells_its_version_and_its_boot() {
    let folder = TempDir::new().unwrap();
    let sysroot = Sysroot::new(folder.path());
    let device = config::Device::default();
    assert_eq!(running_version(&device, &sysroot).unwrap(), None);
    boot_id(&sysroot).unwrap_err();

    let write = |path: &str, text: &str| {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("proc/sys/kernel/random/boot_id", "5d2c\n");
    assert_eq!(boot_id(&sysroot).unwrap().0, "5d2c");
    for (text, version) in [
        ("ID=x\nIMAGE_VERSION=\"1.2\"\n", Some("1.2")),
        ("IMAGE_VERSION=\n", None),
        ("ID=x\n", None),
    ] {
        write("etc/os-release", text);
        let found = running_version(&device, &sysroot).unwrap();
        assert_eq!(found.map(|version| version.to_string()).as_deref(), version);
    }
    write("etc/os-release", "IMAGE_VERSION='one two'\n");
    let error = running_version(&device, &sysroot).unwrap_err();
    assert!(
        matches!(&error, VersionError::Invalid { key, .. } if key == "IMAGE_VERSION"),
        "{error}"
    );
    assert_eq!(boot_id(&Sysroot::default()).unwrap(), boot_id(&Sysroot::default()).unwrap());
}
