//! What the kernel counts for a process, from proc(5).

use std::process::Child;

use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

/// What one install took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// From the order to the image on the medium.
    pub seconds: f64,
    /// Reading the slot back and comparing it; the pipelines do not do that.
    pub read_back_seconds: f64,
    /// User and system time, without the read-back.
    pub cpu_seconds: f64,
    /// Peak resident memory, with the read-back.
    pub peak_kib: u64,
    /// The part of it that no file backs: heap and stacks.
    pub anonymous_kib: u64,
    /// Length of the fetched file.
    pub fetched_bytes: u64,
    /// Bytes sent to the medium.
    pub written_bytes: u64,
}

/// User and system time, of a process that runs or is not reaped yet.
pub fn cpu_seconds(process: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    // USER_HZ is 100 on every Linux that this runs on.
    ticks / 100.0
}

/// A line of `status`, in KiB; 0 when the process has ended.
pub fn memory_kib(process: u32, key: &str) -> u64 {
    value(process, "status", key)
}

/// What a process had written to media.
pub fn written_bytes(process: u32) -> u64 {
    value(process, "io", "write_bytes")
}

fn value(process: u32, file: &str, key: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/{file}")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Waits for a child and leaves its counters to be read.
pub fn wait_unreaped(child: &Child) {
    let process = Pid::from_raw(child.id() as i32);
    waitid(Id::Pid(process), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).unwrap();
}
