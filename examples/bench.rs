//! `make bench`: whole installs of a real image, against `curl | dd` with the same final sync.
//!
//! The competitors take turns in each round, and only ratios within one round are compared: the
//! machine's mood changes from one minute to the next. Memory is the sum over the processes of a
//! pipeline. What is compressed must hold the same image as what is not.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::as_conversions,
    reason = "a measurement that cannot be made must not go on"
)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use twinboot::agent::{Images, JobChannels};
use twinboot::config::Config;
use twinboot::fetch::Fetcher;
use twinboot::install::installer;
use twinboot::update::{Job, Progress, Slot};

/// Wall time of a raw install by that of `curl | dd`, at most.
const AIM_RAW: f64 = 0.80;
/// Wall time of a zstd install by that of `curl | zstd -d | dd`, at most.
const AIM_ZSTD: f64 = 0.85;
/// Peak resident memory of an install, at most.
const AIM_PEAK_KIB: f64 = 16.0 * 1024.0;

/// Measures whole installs against `curl | dd`.
#[derive(Parser)]
struct Arguments {
    /// The image as it is.
    #[arg(default_value = "build/images/rootfs-2.0.0.img")]
    raw: PathBuf,
    /// The same image, compressed with zstd.
    #[arg(default_value = "build/images/rootfs-2.0.0.img.zst")]
    zstd: PathBuf,
    /// Rounds; each runs every competitor once.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Where the result goes.
    #[arg(long, default_value = "build/bench.json")]
    json: PathBuf,
    /// Runs as the installer under test: installs this URL with this configuration.
    #[arg(long, hide = true, num_args = 2, value_names = ["URL", "CONFIG"])]
    install: Option<Vec<String>>,
}

fn main() {
    let arguments = Arguments::parse();
    if let Some([url, config]) = arguments.install.as_deref() {
        return install(url, Path::new(config));
    }
    let stage = Stage::build(&arguments);
    let rows = stage.run(arguments.rounds);
    let report = report(&stage, &rows, arguments.rounds);
    let mut out = std::io::stdout().lock();
    out.write_all(table(&report).as_bytes()).unwrap();
    std::fs::write(&arguments.json, serde_json::to_string_pretty(&report).unwrap()).unwrap();
    writeln!(out, "\nwritten to {}", arguments.json.display()).unwrap();
}

/// The installer under test, as the daemon runs it: one thread for the network. Says when the
/// image is on the medium, then reads it back and says that.
fn install(url: &str, config: &Path) {
    let config = Config::load(config).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let images =
            Fetcher::new(&config, installer(&config.install, &config.slots), "twinboot-bench")
                .unwrap();
        let channels = || {
            let (events, mut told) = mpsc::channel(8);
            tokio::spawn(async move { while told.recv().await.is_some() {} });
            let progress = watch::channel(Progress::default()).0;
            JobChannels { events, progress, cancel: CancellationToken::new() }
        };
        let job = Job { url: url.parse().unwrap(), version: None, digest: None, size_bytes: None };
        let written = images.fetch(job, Slot::B, None, channels()).await.unwrap();
        say("written", written.fetched_bytes);
        images.verify(written, Slot::B, channels()).await.unwrap();
        say("verified", 0);
    });
}

fn say(what: &str, bytes: u64) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{what} {bytes} {}", peak_kib(std::process::id()).unwrap()).unwrap();
    out.flush().unwrap();
}

/// `VmHWM` of a process, in KiB; `None` when it has ended.
fn peak_kib(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// What one install took.
#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    seconds: f64,
    read_back_seconds: Option<f64>,
    cpu_seconds: f64,
    peak_kib: u64,
    peak_with_read_back_kib: u64,
    fetched_bytes: u64,
    written_bytes: u64,
}

/// Server, slot and images.
struct Stage {
    folder: tempfile::TempDir,
    server: Child,
    slot: Medium,
    raw_url: String,
    zstd_url: String,
    /// Bytes of both files.
    sizes: (u64, u64),
}

impl Stage {
    fn build(arguments: &Arguments) -> Self {
        std::fs::create_dir_all("build").unwrap();
        let folder = tempfile::Builder::new().prefix("bench-").tempdir_in("build").unwrap();
        let path = folder.path().canonicalize().unwrap();
        let images =
            arguments.raw.parent().unwrap().canonicalize().expect("run `make image` first");
        let size = |path: &Path| std::fs::metadata(path).expect("run `make image` first").len();
        let sizes = (size(&arguments.raw), size(&arguments.zstd));
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let server = serve(&path, &images, port);
        let slot = Medium::of(&path.join("slot.img"), sizes.0);
        let url = |file: &Path| {
            format!("https://localhost:{port}/{}", file.file_name().unwrap().to_str().unwrap())
        };
        let config = format!(
            "slots.a.device = '/nowhere'\nslots.b.device = '{}'\nfetch.ca_file = '{}'\n",
            slot.device.display(),
            path.join("certificate.pem").display()
        );
        std::fs::write(path.join("config.toml"), config).unwrap();
        let (raw_url, zstd_url) = (url(&arguments.raw), url(&arguments.zstd));
        Stage { folder, server, slot, raw_url, zstd_url, sizes }
    }

    /// All costs by competitor, one for each round.
    fn run(&self, rounds: usize) -> BTreeMap<&'static str, Vec<Cost>> {
        let mut costs: BTreeMap<_, Vec<Cost>> = BTreeMap::new();
        for round in 0..=rounds {
            let (raw, zstd) = self.sizes;
            let device = self.slot.device.to_str().unwrap();
            let of = format!("of={device}");
            let dd = ["dd", &of, "bs=1M", "iflag=fullblock", "conv=fsync,notrunc", "status=none"];
            let direct = [&dd[..], &["oflag=direct"]].concat();
            let unpack = ["zstd", "-d", "-q", "-c"];
            let round_costs = [
                ("curl | dd", self.pipeline(raw, &[&self.curl(&self.raw_url), &dd])),
                ("twinboot", self.twinboot(&self.raw_url)),
                ("curl | dd direct", self.pipeline(raw, &[&self.curl(&self.raw_url), &direct])),
                (
                    "curl | zstd | dd",
                    self.pipeline(zstd, &[&self.curl(&self.zstd_url), &unpack, &dd]),
                ),
                ("twinboot zstd", self.twinboot(&self.zstd_url)),
            ];
            let mut out = std::io::stderr().lock();
            writeln!(
                out,
                "round {round} of {rounds}{}",
                if round == 0 { " (warm-up)" } else { "" }
            )
            .unwrap();
            // The first round fills the caches that the others find full.
            for (name, cost) in round_costs.into_iter().filter(|_| round > 0) {
                costs.entry(name).or_default().push(cost);
            }
        }
        costs
    }

    fn curl<'a>(&self, url: &'a str) -> [&'a str; 5] {
        // The path outlives the process that reads it.
        let ca = self.folder.path().join("certificate.pem").to_str().unwrap().to_owned().leak();
        ["curl", "-sSf", "--cacert", ca, url]
    }

    fn pipeline(&self, fetched_bytes: u64, commands: &[&[&str]]) -> Cost {
        settle();
        let begin = Instant::now();
        let mut children: Vec<Child> = Vec::new();
        let mut input: Option<ChildStdout> = None;
        for (index, command) in commands.iter().enumerate() {
            let is_last = index + 1 == commands.len();
            let mut child = Command::new(command[0])
                .args(&command[1..])
                .stdin(input.take().map_or_else(Stdio::null, Stdio::from))
                .stdout(if is_last { Stdio::null() } else { Stdio::piped() })
                .spawn()
                .unwrap_or_else(|error| panic!("cannot run {}: {error}", command[0]));
            input = child.stdout.take();
            children.push(child);
        }
        let done = Arc::new(AtomicBool::new(false));
        let (processes, stop) =
            (children.iter().map(Child::id).collect::<Vec<_>>(), Arc::clone(&done));
        let watch = thread::spawn(move || {
            let mut peaks = vec![0; processes.len()];
            while !stop.load(Ordering::Relaxed) {
                for (peak, process) in peaks.iter_mut().zip(&processes) {
                    *peak = peak_kib(*process).unwrap_or(0).max(*peak);
                }
                thread::sleep(Duration::from_millis(20));
            }
            peaks.iter().sum::<u64>()
        });
        for child in &children {
            wait_unreaped(child);
        }
        let seconds = begin.elapsed().as_secs_f64();
        done.store(true, Ordering::Relaxed);
        let peak_kib = watch.join().unwrap();
        let mut cost = Cost { seconds, peak_kib, fetched_bytes, ..Cost::default() };
        for child in &mut children {
            cost.cpu_seconds += cpu_seconds(child.id());
            cost.written_bytes += written_bytes(child.id());
            assert!(child.wait().unwrap().success());
        }
        cost
    }

    fn twinboot(&self, url: &str) -> Cost {
        settle();
        let begin = Instant::now();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--install", url])
            .arg(self.folder.path().join("config.toml"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut next = || {
            let line = lines.next().expect("the installer failed").unwrap();
            let at = begin.elapsed().as_secs_f64();
            let words: Vec<u64> = line.split(' ').skip(1).map(|w| w.parse().unwrap()).collect();
            (at, words[0], words[1])
        };
        let (seconds, fetched_bytes, peak_kib) = next();
        let cpu_seconds = cpu_seconds(child.id());
        let (verified, _, peak_with_read_back_kib) = next();
        wait_unreaped(&child);
        let written_bytes = written_bytes(child.id());
        assert!(child.wait().unwrap().success());
        Cost {
            seconds,
            read_back_seconds: Some(verified - seconds),
            cpu_seconds,
            peak_kib,
            peak_with_read_back_kib,
            fetched_bytes,
            written_bytes,
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }
}

/// The slot: a loop device, or the file itself where the kernel has none.
struct Medium {
    device: PathBuf,
    is_loop: bool,
}

impl Medium {
    fn of(file: &Path, bytes: u64) -> Self {
        // Written out, so that no run pays for the file system's allocations.
        let mut out = std::fs::File::create(file).unwrap();
        let mut rest = bytes;
        let block = vec![0xEE; 1 << 20];
        while rest > 0 {
            let count = rest.min(block.len() as u64);
            out.write_all(&block[..count as usize]).unwrap();
            rest -= count;
        }
        out.sync_all().unwrap();
        let attached = ["--direct-io=on", "--direct-io=off"].into_iter().find_map(|direct| {
            let output = Command::new("losetup")
                .args([direct, "--find", "--show"])
                .arg(file)
                .output()
                .ok()?;
            let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
            (output.status.success() && !device.is_empty()).then_some(device)
        });
        match attached {
            Some(device) => Medium { device: device.into(), is_loop: true },
            None => Medium { device: file.to_owned(), is_loop: false },
        }
    }
}

impl Drop for Medium {
    fn drop(&mut self) {
        if self.is_loop {
            Command::new("losetup").arg("--detach").arg(&self.device).status().unwrap();
        }
    }
}

/// Starts nginx over `images`, with its own certificate in `folder`.
fn serve(folder: &Path, images: &Path, port: u16) -> Child {
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"])
        .args(["-keyout", "key.pem", "-out", "certificate.pem"])
        .current_dir(folder)
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(made.success());
    let template =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/https/nginx.conf.in"))
            .unwrap();
    let text = [
        ("@RUN@", folder.display().to_string()),
        ("@ROOT@", images.display().to_string()),
        ("@LISTEN@", format!("127.0.0.1:{port}")),
        ("@SERVER_NAME@", "localhost".to_owned()),
        ("@CERTIFICATE@", folder.join("certificate.pem").display().to_string()),
        ("@KEY@", folder.join("key.pem").display().to_string()),
    ]
    .iter()
    .fold(template, |text, (name, value)| text.replace(name, value));
    std::fs::write(folder.join("nginx.conf"), text).unwrap();
    let server = Command::new("nginx")
        .args(["-e", "stderr", "-p"])
        .arg(folder)
        .arg("-c")
        .arg(folder.join("nginx.conf"))
        .spawn()
        .expect("cannot run nginx");
    for _ in 0..500 {
        if TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return server;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("nginx does not listen");
}

/// What earlier runs left to be written must not slow the next one.
fn settle() {
    nix::unistd::sync();
}

fn wait_unreaped(child: &Child) {
    let process = Pid::from_raw(child.id() as i32);
    waitid(Id::Pid(process), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).unwrap();
}

/// User and system time, from proc(5) `stat`, of a process that runs or is not reaped yet.
fn cpu_seconds(process: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    // USER_HZ is 100 on every Linux that this runs on.
    ticks / 100.0
}

/// What a process had written to media, from proc(5) `io`.
fn written_bytes(process: u32) -> u64 {
    let io = std::fs::read_to_string(format!("/proc/{process}/io")).unwrap_or_default();
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|count| count.parse().ok()).unwrap_or(0)
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) {
        (values[middle - 1] + values[middle]) / 2.0
    } else {
        values[middle]
    }
}

/// The medians, and how they stand to the aims.
fn report(stage: &Stage, costs: &BTreeMap<&str, Vec<Cost>>, rounds: usize) -> Value {
    let of = |name: &str, value: fn(&Cost) -> f64| median(costs[name].iter().map(value));
    let ratio = |name: &str, base: &str| {
        median(costs[name].iter().zip(&costs[base]).map(|(a, b)| a.seconds / b.seconds))
    };
    let competitors = [
        ("curl | dd", "curl | dd"),
        ("curl | dd direct", "curl | dd"),
        ("twinboot", "curl | dd"),
        ("curl | zstd | dd", "curl | zstd | dd"),
        ("twinboot zstd", "curl | zstd | dd"),
    ];
    let installs: Vec<Value> = competitors
        .iter()
        .map(|(name, base)| {
            let read_back = costs[name][0].read_back_seconds.is_some();
            json!({
                "name": name,
                "ratio": ratio(name, base),
                "ratioTo": base,
                "seconds": of(name, |cost| cost.seconds),
                "readBackSeconds": read_back.then(|| of(name, |cost| cost.read_back_seconds.unwrap())),
                "cpuSeconds": of(name, |cost| cost.cpu_seconds),
                "peakKib": of(name, |cost| cost.peak_kib as f64),
                "fetchedBytes": of(name, |cost| cost.fetched_bytes as f64),
                "writtenBytes": of(name, |cost| cost.written_bytes as f64),
                "rounds": costs[name].iter().map(|cost| cost.seconds).collect::<Vec<_>>(),
            })
        })
        .collect();
    let peak = |name: &str| of(name, |cost| cost.peak_kib.max(cost.peak_with_read_back_kib) as f64);
    let rows = [
        ("raw image, time by curl | dd", ratio("twinboot", "curl | dd"), "", AIM_RAW),
        (
            "zstd image, time by curl | zstd -d | dd",
            ratio("twinboot zstd", "curl | zstd | dd"),
            "",
            AIM_ZSTD,
        ),
        ("raw image, peak memory with read-back", peak("twinboot"), "KiB", AIM_PEAK_KIB),
        ("zstd image, peak memory with read-back", peak("twinboot zstd"), "KiB", AIM_PEAK_KIB),
    ];
    let rows: Vec<Value> = rows
        .into_iter()
        .map(|(name, value, unit, aim)| {
            json!({ "name": name, "value": value, "unit": unit, "aim": aim, "met": value <= aim })
        })
        .collect();
    json!({
        "imageBytes": stage.sizes.0,
        "slot": if stage.slot.is_loop { "loop device" } else { "file" },
        "rounds": rounds,
        "installs": installs,
        "rows": rows,
    })
}

fn table(report: &Value) -> String {
    let mut text = String::new();
    let number = |value: &Value| value.as_f64().unwrap_or_default();
    let _ = writeln!(
        text,
        "image of {:.0} MB into a {}, medians of {} rounds\n",
        number(&report["imageBytes"]) / 1e6,
        report["slot"].as_str().unwrap(),
        report["rounds"]
    );
    let _ = writeln!(
        text,
        "{:<18} {:>7} {:>7} {:>10} {:>7} {:>9} {:>11} {:>11}",
        "install", "s", "ratio", "read-back", "CPU s", "peak MiB", "fetched MB", "written MB"
    );
    for row in report["installs"].as_array().unwrap() {
        let read_back = row["readBackSeconds"].as_f64();
        let _ = writeln!(
            text,
            "{:<18} {:>7.2} {:>7.2} {:>10} {:>7.2} {:>9.1} {:>11.0} {:>11.0}",
            row["name"].as_str().unwrap(),
            number(&row["seconds"]),
            number(&row["ratio"]),
            read_back.map_or_else(String::new, |seconds| format!("+ {seconds:.2} s")),
            number(&row["cpuSeconds"]),
            number(&row["peakKib"]) / 1024.0,
            number(&row["fetchedBytes"]) / 1e6,
            number(&row["writtenBytes"]) / 1e6,
        );
    }
    text.push('\n');
    for row in report["rows"].as_array().unwrap() {
        let _ = writeln!(
            text,
            "{:<42} {:>9.2} {:<4} aim {:>8.2}  {}",
            row["name"].as_str().unwrap(),
            number(&row["value"]),
            row["unit"].as_str().unwrap(),
            number(&row["aim"]),
            if row["met"] == true { "met" } else { "MISSED" },
        );
    }
    text
}
