//! The device command against the real daemon: what people read, and what programs get.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::world::machine::{LIMIT, LOOK};
use crate::world::release::{digest, digest_of};
use crate::world::{World, image, is_over};

const TWINBOOT: &str = env!("CARGO_BIN_EXE_twinboot");

/// A command that runs while the world goes on.
struct Running {
    child: Child,
    output: PathBuf,
    errors: PathBuf,
}

/// A command that has ended.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    output: String,
    errors: String,
}

impl Running {
    fn start(world: &World, name: &str, command: &mut Command) -> Self {
        let output = world.folder().join(format!("{name}.out"));
        let errors = world.folder().join(format!("{name}.err"));
        let child = command
            .stdin(Stdio::null())
            .stdout(File::create(&output).unwrap())
            .stderr(File::create(&errors).unwrap())
            .spawn()
            .unwrap();
        Running { child, output, errors }
    }

    fn output(&self) -> String {
        std::fs::read_to_string(&self.output).unwrap()
    }

    /// Waits until it has printed this, and plays the machine meanwhile.
    async fn prints(&mut self, world: &mut World, text: &str) {
        let wait = async {
            while !self.output().contains(text) {
                let ended = self.child.try_wait().unwrap();
                assert!(ended.is_none(), "it ended without {text:?}: {}", self.output());
                world.play(LOOK).await;
            }
        };
        let printed = tokio::time::timeout(LIMIT, wait).await;
        printed.unwrap_or_else(|_| panic!("it never printed {text:?}"));
    }

    fn interrupt(&self) {
        let id = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(id, Signal::SIGINT).unwrap();
    }

    /// Waits for its end, and plays the machine meanwhile.
    async fn end(mut self, world: &mut World) -> Ended {
        let wait = async {
            loop {
                if let Some(status) = self.child.try_wait().unwrap() {
                    return status;
                }
                world.play(LOOK).await;
            }
        };
        let Ok(status) = tokio::time::timeout(LIMIT, wait).await else {
            let _ = self.child.kill();
            panic!("it does not end: {}", self.output());
        };
        let errors = std::fs::read_to_string(&self.errors).unwrap();
        Ended { code: status.code(), output: self.output(), errors }
    }
}

/// The command with the world's socket.
fn twinboot(world: &World, arguments: &[&str]) -> Command {
    let mut command = Command::new(TWINBOOT);
    command.arg("--socket").arg(world.machine.socket()).args(arguments);
    command
}

fn start(world: &World, arguments: &[&str]) -> Running {
    start_as(world, "command", arguments)
}

/// The same with a name of its own, beside another one.
fn start_as(world: &World, name: &str, arguments: &[&str]) -> Running {
    Running::start(world, name, &mut twinboot(world, arguments))
}

async fn run(world: &mut World, arguments: &[&str]) -> Ended {
    start(world, arguments).end(world).await
}

/// Runs a command that needs no world.
fn alone(arguments: &[&str]) -> Ended {
    ended(Command::new(TWINBOOT).args(arguments).output().unwrap())
}

fn ended(output: Output) -> Ended {
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    Ended { code: output.status.code(), output: stdout, errors: stderr }
}

impl Ended {
    /// It failed with this code and these words, in one line on standard error.
    #[track_caller]
    fn assert_failed(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert_eq!(self.errors.trim_end().lines().count(), 1, "{self:?}");
        assert!(self.errors.starts_with("twinboot: "), "{self:?}");
        for word in words {
            assert!(self.errors.contains(word), "{word:?} is missing: {self:?}");
        }
    }

    #[track_caller]
    fn assert_done(&self, words: &[&str]) {
        assert_eq!((self.code, self.errors.as_str()), (Some(0), ""), "{self:?}");
        for word in words {
            assert!(self.output.contains(word), "{word:?} is missing: {self:?}");
        }
    }

    #[track_caller]
    fn json(&self) -> Vec<Value> {
        let parse = |line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{self:?}"));
        self.output.lines().map(parse).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_and_slots_are_for_people_and_for_programs() {
    let mut world = World::started().await;
    let status = run(&mut world, &["status"]).await;
    status.assert_done(&["idle\n", "running    slot A, version 1.0.0, confirmed\n", "hub   "]);
    let status = run(&mut world, &["status", "--json"]).await.json();
    assert_eq!(status.len(), 1);
    assert_eq!(status[0]["bootedSlot"], "A");
    assert_eq!(status[0]["update"], json!({ "phase": "idle" }));
    assert_eq!(status[0]["hub"]["online"], true);
    let slots = run(&mut world, &["slots"]).await;
    slots.assert_done(&["A*    ", "B     ", "* runs now"]);
    let slots = run(&mut world, &["slots", "--json"]).await.json();
    assert!(slots[0]["A"]["state"].is_string(), "{slots:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_install_is_followed_to_the_confirmed_boot() {
    let mut world = World::started().await;
    world.slow("2.0.0.img", 1);
    let url = world.url("2.0.0.img");
    let ended = run(&mut world, &["install", &url, "--image-version", "2.0.0"]).await;
    ended.assert_done(&[
        "Firmware update started",
        "fetching version 2.0.0 into slot B, 5",
        "The update is confirmed; slot B runs\n",
    ]);
    assert!(!ended.output.contains('\u{1b}'), "no terminal codes in a pipe: {ended:?}");
    assert!(ended.output.lines().count() < 40, "{ended:?}");
    world.assert_runs('B', "2.0.0");

    // A file of the device, for a program.
    let file = image("3.0.0");
    let (path, sha256) = (file.to_str().unwrap(), digest(&file));
    let ended = run(&mut world, &["install", path, "--sha256", &sha256, "--json"]).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let lines = ended.json();
    assert_eq!(lines[0]["result"], "accepted");
    assert_eq!(lines.last().unwrap()["result"], "succeeded");
    assert_eq!(lines.last().unwrap()["id"], lines[0]["id"]);
    world.assert_runs('A', "3.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_terminal_an_install_draws_a_bar() {
    let mut world = World::started().await;
    world.slow("2.0.0.img", 1);
    let line = format!(
        "'{TWINBOOT}' --socket '{}' install {}",
        world.machine.socket().display(),
        world.url("2.0.0.img")
    );
    let mut command = Command::new("script");
    command.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
    let ended = Running::start(&world, "command", &mut command).end(&mut world).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.output.contains("downloading  [="), "{ended:?}");
    assert!(ended.output.contains("The update is confirmed; slot B runs"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_install_that_fails_tells_why_and_what_to_do() {
    let mut world = World::started().await;
    let url = world.url("nothing.img");
    let ended = run(&mut world, &["install", &url, "--sha256", &digest_of(b"")]).await;
    ended.assert_failed(1, &["the update failed, and slot A runs on", "404", "notFound"]);

    let wrong = digest_of(b"something else");
    let url = world.url("2.0.0.img");
    let ended = run(&mut world, &["install", &url, "--sha256", &wrong, "--json"]).await;
    ended.assert_failed(1, &["digestMismatch", &wrong]);
    assert_eq!(ended.json().last().unwrap()["code"], "digestMismatch");
    world.assert_bootable();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_update_at_a_time_and_it_can_be_taken_back() {
    let mut world = World::started().await;
    world.slow("2.0.0.img", 1);
    let (first, other) = (world.url("2.0.0.img"), world.url("3.0.0.img"));
    let begun = run(&mut world, &["install", "--detach", &first]).await;
    begun.assert_done(&["Firmware update started"]);
    let refused = run(&mut world, &["install", &other]).await;
    refused.assert_failed(1, &["Another firmware update is under way", "cancel it", "busy"]);
    let refused = run(&mut world, &["install", "--json", &other]).await;
    assert_eq!(refused.json()[0]["error"], "busy");
    let again = run(&mut world, &["install", "--detach", "--json", &first]).await.json();
    assert_eq!(again[0]["result"], "alreadyRunning");

    run(&mut world, &["cancel"]).await.assert_done(&["Firmware update cancelled"]);
    run(&mut world, &["cancel"]).await.assert_failed(1, &["nothing"]);
    let status = run(&mut world, &["status"]).await;
    status.assert_done(&["idle; ", "last       cancelled: unknown version from https://"]);
    assert_eq!(world.images.seen("/3.0.0.img").len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_install_that_is_cancelled_elsewhere_says_so() {
    let mut world = World::started().await;
    world.slow("2.0.0.img", 1);
    let url = world.url("2.0.0.img");
    let mut install = start(&world, &["install", &url]);
    install.prints(&mut world, "fetching").await;
    world.call("cancelFirmwareUpdate", Value::Null).await.unwrap();
    let ended = install.end(&mut world).await;
    ended.assert_failed(1, &["the update was cancelled; slot A runs on"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_values_are_named_with_their_rule_and_nothing_begins() {
    let mut world = World::started().await;
    let url = world.url("2.0.0.img");
    let plain = url.replace("https:", "http:");
    let long = "9".repeat(200);
    let folder = world.folder().to_str().unwrap().to_owned();
    for (arguments, words) in [
        (&["install", "no-such-file.img"][..], &["no-such-file.img", "https URL or a file"][..]),
        (&["install", &folder], &[&folder, "must be a regular file"]),
        (&["install", "ftp://host/2.0.0.img"], &["url = ftp://host/2.0.0.img", "must be an https"]),
        (&["install", "https://"], &["url = ", "must be an absolute https URL"]),
        (&["install", &plain], &["url = http://", "fetch.allow_http"]),
        (&["install", &url, "--sha256", "abc"], &["sha256 = \"abc\"", "64 hexadecimal digits"]),
        (&["install", &url, "--image-version", "a b"], &["version = \"a b\"", "visible ASCII"]),
        (&["install", &url, "--image-version", &long], &["version = ", "1 to 128"]),
    ] {
        run(&mut world, arguments).await.assert_failed(2, words);
    }
    assert_eq!(run(&mut world, &["install"]).await.code, Some(2), "clap's");
    assert_eq!(world.images.seen("/2.0.0.img").len(), 0);
    assert_eq!(world.history("/twinboot/update/phase"), ["idle"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ctrl_c_ends_the_waiting_and_not_the_update() {
    let mut world = World::started().await;
    world.slow("2.0.0.img", 1);
    let url = world.url("2.0.0.img");
    let mut install = start(&world, &["install", &url]);
    install.prints(&mut world, "fetching").await;
    install.interrupt();
    let ended = install.end(&mut world).await;
    ended.assert_failed(130, &["the update goes on", "twinboot cancel"]);
    let over = |twin: &Value| twin["twinboot"]["lastUpdate"]["result"] == "succeeded";
    world.until("it is confirmed", over).await;
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_install_outlives_a_new_start_of_the_daemon_and_not_its_loss() {
    let mut world = World::started().await;
    world.slow("2.0.0.img", 2);
    let url = world.url("2.0.0.img");
    let mut install = start(&world, &["install", &url]);
    install.prints(&mut world, "fetching").await;
    world.machine.sigterm(LIMIT).await.unwrap();
    world.machine.start_daemon().unwrap();
    install.prints(&mut world, "fetching an update into slot B, 5").await;
    world.machine.sigterm(LIMIT).await.unwrap();
    let ended = install.end(&mut world).await;
    ended.assert_failed(3, &["went away in the phase downloading", "goes on", "systemctl status"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_install_whose_url_is_a_secret_is_read_from_standard_input() {
    let mut world = World::started().await;
    let url = world.url("2.0.0.img?sig=secret");
    let mut command = Command::new("sh");
    command.args(["-c", "printf '%s\\n' \"$URL\" | \"$0\" --socket \"$1\" install -", TWINBOOT]);
    command.arg(world.machine.socket()).env("URL", &url);
    let ended = Running::start(&world, "command", &mut command).end(&mut world).await;
    ended.assert_done(&["The update is confirmed; slot B runs\n"]);
    world.assert_runs('B', "2.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn confirm_and_rollback_do_what_they_say() {
    let mut world = World::started().await;
    run(&mut world, &["rollback"]).await.assert_failed(1, &["noWayBack", "no image known"]);
    run(&mut world, &["confirm"]).await.assert_failed(1, &["nothing"]);

    // Nobody but the command says that the new system is good.
    let release = world.folder().join("sysroot/etc/os-release");
    let only_old = format!("#!/bin/sh\ngrep -q 1.0.0 '{}'\n", release.display());
    world.machine.health_program("well", Some(&only_old)).unwrap();
    let id = world.update("2.0.0.img").await;
    world.until("it is on trial", |twin| twin["twinboot"]["update"]["phase"] == "trial").await;
    run(&mut world, &["confirm"]).await.assert_done(&["The running slot is being confirmed"]);
    world.over(&id).await;
    world.assert_runs('B', "2.0.0");

    run(&mut world, &["rollback"]).await.assert_done(&["Going back to the other slot"]);
    let home = |twin: &Value| {
        twin["twinboot"]["bootedSlot"] == "A" && twin["twinboot"]["confirmed"] == true
    };
    world.until("slot A is home again", home).await;
    world.assert_runs('A', "1.0.0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watched_status_follows_the_phases_and_ends_cleanly() {
    let mut world = World::started().await;
    let mut watch = start(&world, &["status", "--watch"]);
    watch.prints(&mut world, "idle\n").await;

    // A reader that has seen enough ends it, even if nothing changes.
    let line = format!(
        "'{TWINBOOT}' --socket '{}' status --watch | head -n 1",
        world.machine.socket().display()
    );
    let mut command = Command::new("bash");
    command.args(["-o", "pipefail", "-c", &line]);
    let ended = Running::start(&world, "piped", &mut command).end(&mut world).await;
    assert_eq!((ended.output.as_str(), ended.errors.as_str()), ("idle\n", ""));
    assert_eq!(ended.code, Some(0));

    world.slow("2.0.0.img", 1);
    world.update("2.0.0.img").await;
    watch.prints(&mut world, "update     downloading: ").await;

    // Ctrl-C is how it is meant to end.
    let mut json = start_as(&world, "json", &["status", "--watch", "--json"]);
    json.prints(&mut world, "\"phase\":\"downloading\"").await;
    json.interrupt();
    let ended = json.end(&mut world).await;
    assert_eq!((ended.code, ended.errors.as_str()), (Some(0), ""), "{ended:?}");
    assert!(!ended.json().is_empty());

    // The daemon goes away.
    world.machine.sigterm(LIMIT).await.unwrap();
    watch.end(&mut world).await.assert_failed(3, &["the connection to twinbootd broke"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_daemon_is_told_and_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control.sock");
    let socket = socket.to_str().unwrap();
    for command in [&["status"][..], &["status", "--watch"], &["slots"], &["cancel"]] {
        let ended = alone(&[&["--socket", socket], command].concat());
        ended.assert_failed(3, &["twinbootd is not there", socket, "systemctl start twinbootd"]);
    }
    // What a killed daemon leaves behind.
    drop(std::os::unix::net::UnixListener::bind(socket).unwrap());
    alone(&["--socket", socket, "status"]).assert_failed(3, &["twinbootd is not there"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_kept_out_and_told_whom_to_ask() {
    let mut world = World::new().await;
    open_folder(world.folder());
    world.start().await;
    let mode =
        |world: &World| std::fs::metadata(world.machine.socket()).unwrap().permissions().mode();
    let as_nobody = |world: &World| {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid",
            "nobody",
            "--regid",
            "nogroup",
            "--clear-groups",
            TWINBOOT,
            "--socket",
        ]);
        ended(command.arg(world.machine.socket()).arg("status").output().unwrap())
    };
    assert_eq!(mode(&world) & 0o777, 0o600);
    as_nobody(&world).assert_failed(3, &["not allowed to use", "as root", "control.group"]);

    // Its group may be let in.
    world.machine.sigterm(LIMIT).await.unwrap();
    world.machine.set("control.group", "nogroup");
    world.start_daemon_again().await;
    assert_eq!(mode(&world) & 0o777, 0o660);
    as_nobody(&world).assert_done(&["running    slot A"]);
}

/// Lets other users as far as the socket, so that its own mode is what keeps them out.
fn open_folder(folder: &Path) {
    for path in [folder.to_owned(), folder.join("run")] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_path_that_is_another_file_is_left_alone() {
    let mut world = World::new().await;
    let file = world.folder().join("precious");
    std::fs::write(&file, "mine").unwrap();
    world.machine.set("control.socket", file.display().to_string());
    world.machine.boot().unwrap();
    let status = world.ended().await;
    assert!(!status.success());
    assert!(world.log().contains("there is a file that is no socket"), "{}", world.log());
    assert_eq!(std::fs::read_to_string(file).unwrap(), "mine");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_misbehave_do_not_disturb_the_others() {
    let mut world = World::started().await;
    let connect = |world: &World| {
        let client = UnixStream::connect(world.machine.socket()).unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        client
    };
    let answer = |mut client: &UnixStream| {
        let mut text = String::new();
        client.read_to_string(&mut text).map(|_| text)
    };
    for garbage in
        [&b"\n"[..], b"nonsense\n", b"{}\n", b"\xff\xfe\0\n", b"{\"command\":\"format\"}\n"]
    {
        let mut client = connect(&world);
        client.write_all(garbage).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let text = answer(&client).unwrap();
        assert!(text.contains("the request makes no sense"), "{garbage:?}: {text}");
    }
    // A line without an end is not collected for ever. Only the answer's line is read: behind it
    // the client may find that its other bytes were thrown away unread (ECONNRESET, unix(7)).
    let mut client = connect(&world);
    let _ = client.write_all(&vec![b'a'; 1 << 20]);
    let mut line = String::new();
    BufReader::new(client).read_line(&mut line).unwrap();
    assert!(line.contains("65536 bytes"), "{line}");
    // Half a line, and gone.
    connect(&world).write_all(b"{\"comm").unwrap();

    // More silent clients than are served at a time, and than a daemon has file descriptors.
    let silent: Vec<UnixStream> = std::iter::from_fn(|| {
        let client = UnixStream::connect(world.machine.socket());
        client.ok()
    })
    .take(100)
    .collect();
    let status = run(&mut world, &["status"]).await;
    status.assert_done(&["running    slot A"]);
    for client in silent {
        assert_eq!(answer(&client).unwrap(), "", "it is sent away");
    }

    // Many at once, each served.
    let many: Vec<Child> = (0..40)
        .map(|_| twinboot(&world, &["slots", "--json"]).stdout(Stdio::piped()).spawn().unwrap())
        .collect();
    for child in many {
        let output = tokio::task::spawn_blocking(|| child.wait_with_output()).await.unwrap();
        ended(output.unwrap()).assert_done(&["{\"A\":"]);
    }
    let id = world.update("2.0.0.img").await;
    world.until("an update still works", |twin| is_over(twin, &id)).await;
    world.assert_runs('B', "2.0.0");
}

#[test]
fn config_check_names_key_value_and_rule() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("twinboot.toml");
    let path = file.to_str().unwrap();
    let check = |text: &str| {
        std::fs::write(&file, text).unwrap();
        alone(&["config", "check", path])
    };
    check("[log]\nlevel = \"debug\"\n").assert_done(&[path, "good"]);
    for (text, words) in [
        ("[log]\nlevle = \"debug\"", &["line 2", "`log`", "unknown field `levle`", "`level`"][..]),
        ("[hub]\nport = \"x\"", &["`hub.port`", "\"x\"", "a whole number from 1 to 65535"]),
        ("[update]\ntrial_limit_s = 1", &["`update.trial_limit_s`", "`1`", "from 5 to 86400"]),
        ("[boot]\nkind = \"lilo\"", &["`boot.kind`", "`lilo`", "`uboot`"]),
        ("[boot\n", &["line 1"]),
    ] {
        check(text).assert_failed(1, &[&[path], words].concat());
    }
    alone(&["config", "check", "/no/such/file"])
        .assert_failed(1, &["/no/such/file", "No such file"]);
}

#[test]
fn help_version_and_completions() {
    alone(&["--version"]).assert_done(&["twinboot ", env!("CARGO_PKG_VERSION")]);
    alone(&["--help"]).assert_done(&["install", "rollback", "Exit codes:"]);
    alone(&["install", "--help"]).assert_done(&["--sha256", "Ctrl-C", "Exit codes:"]);
    alone(&["completions", "zsh"]).assert_done(&["#compdef twinboot", "rollback"]);
    alone(&["completions", "fish"]).assert_done(&["complete -c twinboot", "rollback"]);
    let script = alone(&["completions", "bash"]);
    script.assert_done(&["rollback"]);
    let mut bash = Command::new("bash").arg("-n").stdin(Stdio::piped()).spawn().unwrap();
    bash.stdin.take().unwrap().write_all(script.output.as_bytes()).unwrap();
    assert!(bash.wait().unwrap().success());
    assert_eq!(alone(&[]).code, Some(2));
    assert_eq!(alone(&["no-such-command"]).code, Some(2));
}

#[test]
fn the_command_carries_no_mqtt_tls_or_http() {
    let tool = |name: &str, arguments: &[&str]| {
        let output = Command::new(name).args(arguments).arg(TWINBOOT).output().unwrap();
        assert!(output.status.success(), "{name}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let needed = tool("readelf", &["--dynamic", "--wide"]);
    let libraries: Vec<&str> = needed
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
        .filter_map(|line| line.split(['[', ']']).nth(1))
        .collect();
    let system = ["libc.so", "libgcc_s.so", "libm.so", "ld-linux"];
    assert!(libraries.iter().any(|name| name.starts_with("libc.so")), "{needed}");
    for library in libraries {
        assert!(system.iter().any(|name| library.starts_with(name)), "it links {library}");
    }
    let symbols = tool("nm", &["--demangle"]).to_lowercase();
    assert!(symbols.contains("twinboot"), "the symbols can be read");
    for part in ["mqtt", "paho", "ssl_", "openssl", "reqwest", "hyper"] {
        let found = symbols.lines().find(|line| line.contains(part));
        assert_eq!(found, None, "{part}");
    }
}
