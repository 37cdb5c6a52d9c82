//! The others: programs of Debian, one piped into the next.

use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::process::{Cost, cpu_seconds, memory_kib, wait_unreaped, written_bytes};
use crate::stage::Stage;

impl Stage {
    /// `curl | dd`, with more operands for `dd`.
    pub fn curl_dd(&self, file: &str, more: &[&str]) -> Cost {
        self.pipe(file, &[self.curl(file), self.dd(more)])
    }

    /// `curl | zstd -d | dd`.
    pub fn curl_zstd_dd(&self, file: &str) -> Cost {
        let unpack = ["zstd", "-d", "-q", "-c"].map(str::to_owned).to_vec();
        self.pipe(file, &[self.curl(file), unpack, self.dd(&[])])
    }

    fn curl(&self, file: &str) -> Vec<String> {
        let ca = self.images.ca().display().to_string();
        ["curl", "-sSf", "--cacert", &ca, &self.images.url(file)].map(str::to_owned).to_vec()
    }

    fn dd(&self, more: &[&str]) -> Vec<String> {
        let of = format!("of={}", self.machine.slot('B').device.display());
        let dd = ["dd", &of, "bs=1M", "iflag=fullblock", "conv=fsync,notrunc", "status=none"];
        dd.iter().chain(more).map(|word| (*word).to_owned()).collect()
    }

    fn pipe(&self, file: &str, commands: &[Vec<String>]) -> Cost {
        settle();
        let begin = Instant::now();
        let mut children: Vec<Child> = Vec::new();
        let mut input: Option<ChildStdout> = None;
        for (index, command) in commands.iter().enumerate() {
            let is_last = index + 1 == commands.len();
            let mut child = Command::new(&command[0])
                .args(&command[1..])
                .stdin(input.take().map_or_else(Stdio::null, Stdio::from))
                .stdout(if is_last { Stdio::null() } else { Stdio::piped() })
                .spawn()
                .unwrap_or_else(|error| panic!("cannot run {}: {error}", command[0]));
            input = child.stdout.take();
            children.push(child);
        }
        let peaks = Peaks::watch(children.iter().map(Child::id).collect());
        for child in &children {
            wait_unreaped(child);
        }
        let seconds = begin.elapsed().as_secs_f64();
        let (peak_kib, anonymous_kib) = peaks.end();
        let fetched_bytes = self.size(file);
        let mut cost = Cost { seconds, peak_kib, anonymous_kib, fetched_bytes, ..Cost::default() };
        for child in &mut children {
            cost.cpu_seconds += cpu_seconds(child.id());
            cost.written_bytes += written_bytes(child.id());
            assert!(child.wait().unwrap().success());
        }
        cost
    }
}

/// What earlier runs left to be written must not slow the next one.
pub fn settle() {
    nix::unistd::sync();
}

/// Looks at the memory of processes until it is told to end.
pub struct Peaks {
    stop: Arc<AtomicBool>,
    watcher: thread::JoinHandle<(u64, u64)>,
}

impl Peaks {
    /// Begins.
    pub fn watch(processes: Vec<u32>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let watcher = thread::spawn(move || {
            let mut peaks = vec![(0, 0); processes.len()];
            while !stopped.load(Ordering::Relaxed) {
                for (peak, process) in peaks.iter_mut().zip(&processes) {
                    peak.0 = memory_kib(*process, "VmHWM").max(peak.0);
                    peak.1 = memory_kib(*process, "RssAnon").max(peak.1);
                }
                thread::sleep(Duration::from_millis(20));
            }
            peaks.iter().fold((0, 0), |sum, peak| (sum.0 + peak.0, sum.1 + peak.1))
        });
        Peaks { stop, watcher }
    }

    /// The sums over the processes: peak resident memory, and the anonymous part of it.
    pub fn end(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.watcher.join().unwrap()
    }
}
