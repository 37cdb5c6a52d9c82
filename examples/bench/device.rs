//! twinbootd: idle, asked, and installing.

use std::fs;
use std::time::{Duration, Instant};

use hubsim::HubError;
use serde_json::{Value, json};

use crate::machine::{Happening, LIMIT};
use crate::pipeline::{Peaks, settle};
use crate::process::{Cost, cpu_seconds, memory_kib, written_bytes};
use crate::stage::{DEVICE, Stage};

/// Method calls that are timed.
const CALLS: usize = 1000;
/// Calls before them, which find nothing in the processor's caches.
const WARM_UP_CALLS: usize = 50;
/// How long nothing happens before idle memory counts.
const IDLE: Duration = Duration::from_secs(3);
/// Between two looks at the saved state.
const LOOK: Duration = Duration::from_millis(2);
/// Longer than any install takes.
const INSTALL_LIMIT: Duration = Duration::from_secs(600);

/// What the daemon takes while it has nothing to do.
#[derive(Clone, Copy, Debug)]
pub struct Idle {
    /// Resident memory.
    pub resident_kib: u64,
    /// The part of it that no file backs.
    pub anonymous_kib: u64,
    /// Its threads.
    pub threads: u64,
    /// Times that one of them was put to sleep, each second.
    pub wake_ups_per_s: f64,
}

/// Times of method calls, in milliseconds, ascending.
#[derive(Clone, Debug)]
pub struct Methods(Vec<f64>);

impl Methods {
    /// The time that `percent` of the calls kept.
    pub fn percentile(&self, percent: usize) -> f64 {
        self.0[(self.0.len() * percent).div_ceil(100) - 1]
    }

    /// Calls that were timed.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

impl Stage {
    /// Switches the machine on, as if nothing had ever been installed, and waits until the
    /// device is connected and knows its slot as good.
    pub async fn start(&mut self) {
        self.machine.kill9();
        let state = self.machine.folder.join("state");
        for entry in fs::read_dir(state).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        let variables = self.machine.folder.join("bootloader.env");
        fs::write(variables, "default=A\ntry=\n").unwrap();
        self.machine.boot().unwrap();
        let is_up = async {
            while self.call("getFirmwareStatus", Value::Null).await["confirmed"] != true {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(LIMIT, is_up).await.expect("the device does not come up");
    }

    /// What the connected daemon takes while nothing happens.
    pub async fn idle(&self) -> Idle {
        let process = self.machine.pid().unwrap();
        tokio::time::sleep(IDLE).await;
        let before = sleeps(process);
        tokio::time::sleep(IDLE).await;
        Idle {
            resident_kib: memory_kib(process, "VmRSS"),
            anonymous_kib: memory_kib(process, "RssAnon"),
            threads: memory_kib(process, "Threads"),
            wake_ups_per_s: (sleeps(process) - before) as f64 / IDLE.as_secs_f64(),
        }
    }

    /// Calls a method again and again, each after the answer to the last one. A time is from the
    /// hub's PUBLISH to the device's, with MQTT and TLS at both ends.
    pub async fn methods(&self) -> Methods {
        let mut times = Vec::new();
        for _ in 0..WARM_UP_CALLS + CALLS {
            let begin = Instant::now();
            let answer = self.call("getFirmwareStatus", Value::Null).await;
            times.push(begin.elapsed().as_secs_f64() * 1000.0);
            assert_eq!(answer["confirmed"], true, "{answer}");
        }
        let mut times = times.split_off(WARM_UP_CALLS);
        times.sort_by(f64::total_cmp);
        Methods(times)
    }

    /// One install by a fresh daemon, asked for by method.
    pub async fn install(&mut self, file: &str) -> Cost {
        self.start().await;
        settle();
        let process = self.machine.pid().unwrap();
        let (cpu, written) = (cpu_seconds(process), written_bytes(process));
        let peaks = Peaks::watch(vec![process]);
        let begin = Instant::now();
        let payload = json!({ "fwPackageUri": self.images.url(file) });
        let answer = self.call("firmwareUpdate", payload).await;
        assert!(answer["id"].is_string(), "{answer}");
        self.phase("verifying", begin).await;
        let mut cost = Cost {
            seconds: begin.elapsed().as_secs_f64(),
            cpu_seconds: cpu_seconds(process) - cpu,
            fetched_bytes: self.size(file),
            written_bytes: written_bytes(process) - written,
            ..Cost::default()
        };
        self.phase("switching", begin).await;
        cost.read_back_seconds = begin.elapsed().as_secs_f64() - cost.seconds;
        let ordered = tokio::time::timeout(LIMIT, self.machine.next()).await;
        assert_eq!(ordered.unwrap().unwrap(), Happening::RestartOrdered);
        (cost.peak_kib, cost.anonymous_kib) = peaks.end();
        self.machine.kill9();
        cost
    }

    /// Waits until the saved state says that the update is in `phase`.
    async fn phase(&mut self, phase: &str, begin: Instant) {
        loop {
            let saved = self.machine.saved();
            let state = &saved["saved"]["state"];
            if state.get(phase).is_some() {
                return;
            }
            let is_over = state == "idle" || self.machine.ended().unwrap().is_some();
            assert!(!is_over && begin.elapsed() < INSTALL_LIMIT, "not {phase} but {saved}");
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Calls a method; null while the device is not connected.
    async fn call(&self, method: &str, payload: Value) -> Value {
        match self.hub.invoke(DEVICE, method, payload, LIMIT).await {
            Ok((_, answer)) => answer,
            Err(HubError::NotOnline { .. }) => Value::Null,
            Err(error) => panic!("{method}: {error}"),
        }
    }
}

/// How often the threads of a process went to sleep by themselves.
fn sleeps(process: u32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let count = |thread: std::io::Result<fs::DirEntry>| {
        let thread: u32 = thread.unwrap().file_name().to_str().unwrap().parse().unwrap();
        memory_kib(thread, "voluntary_ctxt_switches")
    };
    threads.map(count).sum()
}
