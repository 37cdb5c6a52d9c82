//! The figures, and how they stand to the aims.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::device::{Idle, Methods};
use crate::process::Cost;
use crate::stage::BIG_BYTES;

/// Time of a raw install by that of `curl | dd`, at most.
const AIM_RAW: f64 = 0.80;
/// Time of a zstd install by that of `curl | zstd -d | dd`, at most.
const AIM_ZSTD: f64 = 0.85;
/// Peak resident memory of an install, below.
const AIM_PEAK_MIB: f64 = 16.0;
/// Resident memory while nothing happens, below.
const AIM_IDLE_MIB: f64 = 10.0;
/// 99 of 100 method answers take less.
const AIM_METHOD_MS: f64 = 10.0;

/// What one round cost.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// `curl | dd`.
    pub dd: Cost,
    /// The same past the page cache.
    pub dd_direct: Cost,
    /// twinbootd with the image as it is.
    pub raw: Cost,
    /// `curl | zstd -d | dd`.
    pub zstd_dd: Cost,
    /// twinbootd with the compressed image.
    pub zstd: Cost,
}

/// Everything that was measured.
#[derive(Debug)]
pub struct Report {
    /// Bytes of the image.
    pub image_bytes: u64,
    /// The idle daemon.
    pub idle: Idle,
    /// The daemon's answers.
    pub methods: Methods,
    /// The installs.
    pub rounds: Vec<Round>,
    /// Installs of the big images.
    pub big: [Cost; 2],
}

/// A line of the upper table: its name, its costs, and what its time is compared with.
type Line = (&'static str, fn(&Round) -> Cost, fn(&Round) -> Cost);

const LINES: [Line; 5] = [
    ("curl | dd", |round| round.dd, |round| round.dd),
    ("curl | dd oflag=direct", |round| round.dd_direct, |round| round.dd),
    ("twinbootd", |round| round.raw, |round| round.dd),
    ("curl | zstd -d | dd", |round| round.zstd_dd, |round| round.zstd_dd),
    ("twinbootd, zstd", |round| round.zstd, |round| round.zstd_dd),
];

impl Report {
    fn median(&self, value: impl Fn(&Round) -> f64) -> f64 {
        let mut values: Vec<f64> = self.rounds.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        if values.len().is_multiple_of(2) {
            f64::midpoint(values[middle - 1], values[middle])
        } else {
            values[middle]
        }
    }

    fn ratio(&self, (_, cost, base): &Line) -> f64 {
        self.median(|round| cost(round).seconds / base(round).seconds)
    }

    fn peak_mib(&self, cost: fn(&Round) -> Cost) -> f64 {
        let kib = self.rounds.iter().map(|round| cost(round).peak_kib).max();
        mebibytes(kib.unwrap_or(0))
    }

    /// What was measured, the figure, its unit, the aim, and whether the aim itself is good enough.
    fn aims(&self) -> Vec<(String, f64, &'static str, f64, bool)> {
        let big = |what: &str| format!("peak memory, {what} image of {} MiB", BIG_BYTES >> 20);
        vec![
            ("time by curl | dd, raw image".into(), self.ratio(&LINES[2]), "", AIM_RAW, true),
            (
                "time by curl | zstd -d | dd, zstd image".into(),
                self.ratio(&LINES[4]),
                "",
                AIM_ZSTD,
                true,
            ),
            (
                "peak memory, raw image".into(),
                self.peak_mib(|round| round.raw),
                "MiB",
                AIM_PEAK_MIB,
                false,
            ),
            (
                "peak memory, zstd image".into(),
                self.peak_mib(|round| round.zstd),
                "MiB",
                AIM_PEAK_MIB,
                false,
            ),
            (big("raw"), mebibytes(self.big[0].peak_kib), "MiB", AIM_PEAK_MIB, false),
            (big("zstd"), mebibytes(self.big[1].peak_kib), "MiB", AIM_PEAK_MIB, false),
            (
                "idle memory, connected".into(),
                mebibytes(self.idle.resident_kib),
                "MiB",
                AIM_IDLE_MIB,
                false,
            ),
            (
                "method, from the hub's PUBLISH to the answer, p99".into(),
                self.methods.percentile(99),
                "ms",
                AIM_METHOD_MS,
                false,
            ),
        ]
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(
            text,
            "An image of {} MB into a slot; medians of {} rounds. Ratios within a round.\n",
            self.image_bytes / 1_000_000,
            self.rounds.len()
        );
        let _ = writeln!(
            text,
            "{:<23} {:>6} {:>6} {:>10} {:>6} {:>9} {:>9} {:>11} {:>11}",
            "install",
            "s",
            "ratio",
            "read-back",
            "CPU s",
            "peak MiB",
            "anon MiB",
            "fetched MB",
            "written MB"
        );
        for line in &LINES {
            let (name, cost, _) = line;
            let of = |value: fn(&Cost) -> f64| self.median(|round| value(&cost(round)));
            let read_back = of(|cost| cost.read_back_seconds);
            let read_back =
                if read_back > 0.0 { format!("+ {read_back:.2} s") } else { "none".to_owned() };
            let _ = writeln!(
                text,
                "{name:<23} {:>6.2} {:>6.2} {read_back:>10} {:>6.2} {:>9.1} {:>9.1} {:>11.0} {:>11.0}",
                of(|cost| cost.seconds),
                self.ratio(line),
                of(|cost| cost.cpu_seconds),
                of(|cost| mebibytes(cost.peak_kib)),
                of(|cost| mebibytes(cost.anonymous_kib)),
                of(|cost| cost.fetched_bytes as f64 / 1e6),
                of(|cost| cost.written_bytes as f64 / 1e6),
            );
        }
        let _ = writeln!(
            text,
            "\nThe idle daemon: {:.1} MiB, {:.1} of them anonymous, {} threads, {:.1} wake-ups a \
             second.\n{} method calls: p50 {:.2} ms, p99 {:.2} ms, worst {:.2} ms.\n",
            mebibytes(self.idle.resident_kib),
            mebibytes(self.idle.anonymous_kib),
            self.idle.threads,
            self.idle.wake_ups_per_s,
            self.methods.count(),
            self.methods.percentile(50),
            self.methods.percentile(99),
            self.methods.percentile(100),
        );
        for (name, value, unit, aim, inclusive) in self.aims() {
            let (sign, met) = judged(value, aim, inclusive);
            let met = if met { "met" } else { "NOT MET" };
            let aim = format!("{sign} {aim}");
            let _ = writeln!(text, "{name:<50} {value:>7.2} {unit:<4} aim {aim:<7} {met}");
        }
        text
    }

    /// For programs: all of it.
    pub fn json(&self) -> Value {
        let costs = |cost: &Cost| {
            json!({
                "seconds": cost.seconds,
                "readBackSeconds": cost.read_back_seconds,
                "cpuSeconds": cost.cpu_seconds,
                "peakKib": cost.peak_kib,
                "anonymousKib": cost.anonymous_kib,
                "fetchedBytes": cost.fetched_bytes,
                "writtenBytes": cost.written_bytes,
            })
        };
        let installs = LINES.iter().map(|line| {
            let (name, cost, _) = line;
            let rounds: Vec<Value> = self.rounds.iter().map(|round| costs(&cost(round))).collect();
            json!({ "name": name, "ratio": self.ratio(line), "rounds": rounds })
        });
        let aims = self.aims().into_iter().map(|(name, value, unit, aim, inclusive)| {
            let met = judged(value, aim, inclusive).1;
            json!({ "name": name, "value": value, "unit": unit, "aim": aim, "met": met })
        });
        json!({
            "imageBytes": self.image_bytes,
            "aims": aims.collect::<Vec<_>>(),
            "installs": installs.collect::<Vec<_>>(),
            "bigImages": self.big.iter().map(costs).collect::<Vec<_>>(),
            "idle": {
                "residentKib": self.idle.resident_kib,
                "anonymousKib": self.idle.anonymous_kib,
                "threads": self.idle.threads,
                "wakeUpsPerSecond": self.idle.wake_ups_per_s,
            },
            "methodMs": {
                "calls": self.methods.count(),
                "p50": self.methods.percentile(50),
                "p99": self.methods.percentile(99),
                "worst": self.methods.percentile(100),
            },
        })
    }
}

/// How a figure is compared with its aim, and whether it meets it.
fn judged(value: f64, aim: f64, inclusive: bool) -> (&'static str, bool) {
    if inclusive { ("<=", value <= aim) } else { ("<", value < aim) }
}

fn mebibytes(kib: u64) -> f64 {
    kib as f64 / 1024.0
}
