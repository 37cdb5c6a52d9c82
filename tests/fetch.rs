//! Images from servers of every kind into a slot: what comes of it, and what it costs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::as_conversions,
    reason = "tests"
)]

#[path = "support/count.rs"]
mod count;
#[path = "support/images.rs"]
mod images;
#[path = "support/proxy.rs"]
mod proxy;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use count::counted;
use images::{Authority, Fault, File, ImageServer, set_mode};
use sha2::Digest as _;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use twinboot::agent::{FetchEvent, Images, JobChannels};
use twinboot::config::Config;
use twinboot::fetch::Fetcher;
use twinboot::install::installer;
use twinboot::update::{Checkpoint, Digest, Failure, FailureKind, Job, Progress, Slot, Written};

const MIB: usize = 1 << 20;
const SLOT_BYTES: usize = 8 * MIB;
/// Far more than any of these tests may take; ends a test that hangs.
const HANG: Duration = Duration::from_secs(60);
const SECRET: &str = "hunter2";

/// A device with two slots, and a server.
struct Rig {
    folder: TempDir,
    authority: Authority,
    server: ImageServer,
    /// Bytes of images that the installer was given.
    written: Arc<AtomicU64>,
}

struct Outcome {
    result: Result<Written, Failure>,
    events: Vec<FetchEvent>,
    progress: Progress,
}

impl Outcome {
    fn checkpoints(&self) -> Vec<Checkpoint> {
        let checkpoint = |event: &FetchEvent| match event {
            FetchEvent::Checkpoint(checkpoint) => Some(checkpoint.clone()),
            FetchEvent::Began => None,
        };
        self.events.iter().filter_map(checkpoint).collect()
    }
}

impl Rig {
    async fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let authority = Authority::new(folder.path());
        let server = ImageServer::start(&authority, false).await;
        for slot in ["a.img", "b.img"] {
            std::fs::write(folder.path().join(slot), vec![0xEE; SLOT_BYTES]).unwrap();
        }
        Rig { folder, authority, server, written: Arc::default() }
    }

    fn slot(&self) -> PathBuf {
        self.folder.path().join("b.img")
    }

    fn slot_content(&self) -> Vec<u8> {
        std::fs::read(self.slot()).unwrap()
    }

    /// The configuration, with more lines for `[fetch]`, `[install]` and `[update]`.
    fn config(&self, [fetch, install, update]: [&str; 3]) -> Config {
        let folder = self.folder.path().display();
        let defaults = ["retry_max_s = 1", "retry_budget_s = 3", "stall_limit_s = 1"];
        let is_set = |line: &&str| fetch.contains(line.split(' ').next().unwrap());
        let defaults: Vec<_> = defaults.into_iter().filter(|line| !is_set(line)).collect();
        Config::parse(&format!(
            "slots.a.device = '{folder}/a.img'\nslots.b.device = '{folder}/b.img'\n\
             [fetch]\nca_file = '{}'\n{}\n{fetch}\n[install]\ncheckpoint_mib = 1\n{install}\n[update]\n{update}\n",
            self.authority.ca_file.display(),
            defaults.join("\n")
        ))
        .unwrap()
    }

    fn url(&self, path: &str) -> String {
        format!("https://user:{SECRET}@localhost:{}{path}?sig={SECRET}", self.server.port)
    }

    async fn run(&self, job: Job) -> Outcome {
        self.run_with(["", "", ""], job, None).await
    }

    async fn run_with(
        &self,
        settings: [&str; 3],
        job: Job,
        checkpoint: Option<Checkpoint>,
    ) -> Outcome {
        self.run_until(settings, job, checkpoint, |_| false).await
    }

    /// Fetches until `is_enough` says so, or to the end.
    async fn run_until(
        &self,
        settings: [&str; 3],
        job: Job,
        checkpoint: Option<Checkpoint>,
        is_enough: impl Fn(&[FetchEvent]) -> bool,
    ) -> Outcome {
        let config = self.config(settings);
        let installer =
            counted(installer(&config.install, &config.slots, &config.rauc), &self.written);
        let fetcher = Fetcher::new(&config, installer, "test/1");
        let (events, mut told) = mpsc::channel(64);
        let (progress, seen) = watch::channel(Progress::default());
        let cancel = CancellationToken::new();
        let channels = JobChannels { events, progress, cancel: cancel.clone() };
        let mut events = Vec::new();
        let work = async {
            let fetch = fetcher.fetch(job, Slot::B, checkpoint, channels);
            tokio::pin!(fetch);
            loop {
                tokio::select! {
                    biased;
                    Some(event) = told.recv() => {
                        events.push(event);
                        if is_enough(&events) {
                            cancel.cancel();
                        }
                    }
                    result = &mut fetch => break result,
                }
            }
        };
        let result = timeout(HANG, work).await.expect("the fetch hangs");
        while let Ok(event) = told.try_recv() {
            events.push(event);
        }
        Outcome { result, events, progress: *seen.borrow() }
    }

    /// `image` in a file, packed by a program that writes to its standard output.
    fn packed(&self, image: &[u8], [program, arguments]: [&str; 2]) -> Vec<u8> {
        let path = self.folder.path().join("image");
        std::fs::write(&path, image).unwrap();
        let mut command = Command::new(program);
        let output = command.args(arguments.split(' ')).arg(&path).output().unwrap();
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    async fn verify(&self, written: Written) -> Result<(), Failure> {
        let config = self.config(["", "", ""]);
        let fetcher = Fetcher::new(
            &config,
            installer(&config.install, &config.slots, &config.rauc),
            "test/1",
        );
        let (events, _told) = mpsc::channel(64);
        let progress = watch::channel(Progress::default()).0;
        let cancel = CancellationToken::new();
        fetcher.verify(written, Slot::B, JobChannels { events, progress, cancel }).await
    }
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::new(sha2::Sha256::digest(bytes).into())
}

fn job(url: &str, file: &[u8]) -> Job {
    Job { digest: Some(digest(file)), ..bare_job(url) }
}

fn bare_job(url: &str) -> Job {
    Job { url: url.parse().unwrap(), version: None, digest: None, size_bytes: None }
}

/// An image as file systems are: some pages random, some repeated, some empty.
fn image(bytes: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut image = vec![0; bytes];
    for (index, page) in image.chunks_mut(4096).enumerate() {
        match index % 4 {
            1 => random.fill(page),
            2 | 3 => page.fill(random.u8(1..)),
            _ => {}
        }
    }
    image
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 0);
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 3).unwrap()
}

/// Separate compressed parts of `step` bytes behind each other.
fn parts(bytes: &[u8], step: usize, compress: fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
    bytes.chunks(step).flat_map(compress).collect()
}

fn status(code: u16, headers: &[(&str, &str)]) -> Fault {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    Fault::Status(code, headers.iter().map(owned).collect())
}

#[tokio::test]
async fn installs_every_format_from_every_kind_of_good_server() {
    let rig = Rig::new().await;
    let image = image(5 * MIB + 1234, 1);
    let skippable = [&0x184D_2A50_u32.to_le_bytes()[..], &4_u32.to_le_bytes(), b"size"].concat();
    let files = [
        ("raw", image.clone()),
        ("gzip", gzip(&image)),
        ("gzip members", parts(&image, 300_000, gzip)),
        // As a tape block, `dd conv=sync` or a file cut to whole sectors leaves it.
        ("gzip with padding", [gzip(&image), vec![0; 10_243]].concat()),
        (
            "gzip members with padding",
            [gzip(&image[..MIB]), vec![0; 7], gzip(&image[MIB..])].concat(),
        ),
        ("xz", xz(&image)),
        ("xz streams with padding", [xz(&image[..MIB]), vec![0; 8], xz(&image[MIB..])].concat()),
        ("zstd", zstd(&image)),
        ("zstd frames", [skippable, parts(&image, 700_000, zstd)].concat()),
    ];
    for (name, file) in files {
        for (has_length, has_ranges) in [(true, true), (false, false)] {
            let served = File { has_length, has_ranges, ..File::new(file.clone()) };
            rig.server.put("/fw", served);
            std::fs::write(rig.slot(), vec![0xEE; SLOT_BYTES]).unwrap();
            let outcome = rig.run(job(&rig.url("/fw"), &file)).await;
            let written = outcome.result.unwrap_or_else(|failure| panic!("{name}: {failure}"));
            let expected = Written {
                image_bytes: image.len() as u64,
                image_digest: digest(&image),
                fetched_bytes: file.len() as u64,
            };
            assert_eq!(written, expected, "{name}");
            assert!(rig.slot_content()[..image.len()] == image[..], "{name}");
            assert!(rig.slot_content()[image.len()..].iter().all(|byte| *byte == 0xEE), "{name}");
            assert_eq!(rig.verify(written).await, Ok(()), "{name}");
            assert_eq!(outcome.events[0], FetchEvent::Began);
            let progress = outcome.progress;
            assert_eq!(progress.written_bytes, image.len() as u64, "{name}");
            assert_eq!(progress.fetched_bytes, file.len() as u64, "{name}");
            assert_eq!(progress.total_bytes, has_length.then_some(file.len() as u64), "{name}");
        }
    }
}

#[tokio::test]
async fn takes_the_digest_that_lies_beside_the_image() {
    let rig = Rig::new().await;
    let image = image(MIB, 2);
    let right = digest(&image).to_string().trim_start_matches("sha256:").to_owned();
    let other = "ab".repeat(32);
    rig.server.put("/dir/fw%20v2.img", File::new(image.clone()));
    for (beside, expected) in [
        (Some(format!("{right}  fw v2.img\n")), Ok(())),
        (Some(format!("{other}  fw.img\n{right} *fw v2.img\n")), Ok(())),
        (Some(format!("{other}  fw v2.img\n")), Err(FailureKind::DigestMismatch)),
        (Some("<html>".to_owned()), Err(FailureKind::BadServer)),
        (Some("x".repeat(100_000)), Err(FailureKind::BadServer)),
        (None, Err(FailureKind::DigestMissing)),
    ] {
        let mut file = File::new(beside.clone().unwrap_or_default());
        file.faults.push_back(status(503, &[]));
        if beside.is_none() {
            file.faults.push_back(status(404, &[]));
        }
        rig.server.put("/dir/fw%20v2.img.sha256", file);
        let outcome = rig.run(bare_job(&rig.url("/dir/fw%20v2.img"))).await;
        let result = outcome.result.map(|_| ()).map_err(|failure| failure.kind);
        assert_eq!(result, expected, "{beside:?}");
    }
    // A setting allows to do without.
    rig.server.edit("/dir/fw%20v2.img.sha256", |file| file.faults = [status(403, &[])].into());
    let settings = ["", "", "allow_missing_digest = true"];
    let outcome = rig.run_with(settings, bare_job(&rig.url("/dir/fw%20v2.img")), None).await;
    assert_eq!(outcome.result.unwrap().image_digest, digest(&image));
}

#[tokio::test]
async fn reads_files_of_the_device() {
    let rig = Rig::new().await;
    let image = image(3 * MIB, 3);
    let path = rig.folder.path().join("stick.zst");
    std::fs::write(&path, parts(&image, MIB, zstd)).unwrap();
    let url = format!("file://{}", path.display());
    let outcome = rig.run(bare_job(&url)).await;
    assert_eq!(outcome.result.unwrap_err().kind, FailureKind::DigestMissing);
    let hex = digest(&std::fs::read(&path).unwrap()).to_string().replace("sha256:", "");
    std::fs::write(rig.folder.path().join("stick.zst.sha256"), format!("{hex}  stick.zst\n"))
        .unwrap();
    let outcome = rig.run(bare_job(&url)).await;
    let checkpoints = outcome.checkpoints();
    assert_eq!(outcome.result.unwrap().image_digest, digest(&image));
    let outcome = rig.run_with(["", "", ""], bare_job(&url), checkpoints.last().cloned()).await;
    assert_eq!(outcome.result.unwrap().image_digest, digest(&image));
    for (url, kind) in [
        ("file:///nowhere/fw.img".to_owned(), FailureKind::NotFound),
        (format!("file://{}", rig.folder.path().display()), FailureKind::NotFound),
    ] {
        let outcome = rig.run(job(&url, b"")).await;
        assert_eq!(outcome.result.unwrap_err().kind, kind, "{url}");
    }
}

/// What a server can do wrong, and what must come of it. Every failure names a way out and none
/// names the secrets of the URL.
#[tokio::test]
async fn fails_for_the_right_reason() {
    let rig = Rig::new().await;
    let image = image(3 * MIB, 4);
    let good = File::new(image.clone());
    let url = rig.url("/fw");
    let of_image = job(&url, &image);
    let sized = |bytes: usize| Job { size_bytes: Some(bytes as u64), ..of_image.clone() };
    let always = |fault: Fault| File { faults: vec![fault; 50].into(), ..good.clone() };
    let to = |url: &str| status(302, &[("Location", url)]);
    let http_url = format!("http://localhost:{}/fw?sig={SECRET}", rig.server.http_port);
    let endless = u64::MAX.to_string();
    let small = vec![7; 3 * MIB];
    let cut_zstd = zstd(&image)[..MIB / 2].to_vec();
    let tail_gzip = [gzip(&image), b"garbage".to_vec()].concat();
    let tail_xz = [xz(&image), vec![0; 3]].concat();
    let tail_zstd = [zstd(&image), b"garbage".to_vec()].concat();
    let bomb = zstd(&vec![0; SLOT_BYTES + 1]);
    let quiet_bomb = gzip(&vec![0; SLOT_BYTES + 1]);
    let bent_zstd = {
        let mut file = zstd(&image);
        let middle = file.len() / 2;
        file[middle..middle + 64].fill(0x55);
        file
    };
    let wide = {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(24).unwrap();
        encoder.write_all(&image).unwrap();
        encoder.finish().unwrap()
    };
    let table: Vec<(&str, Job, File, FailureKind, &str)> = vec![
        (
            "404",
            of_image.clone(),
            good.clone().with([status(404, &[])]),
            FailureKind::NotFound,
            "correct the URL",
        ),
        (
            "410",
            of_image.clone(),
            good.clone().with([status(410, &[])]),
            FailureKind::NotFound,
            "correct the URL",
        ),
        (
            "401",
            of_image.clone(),
            good.clone().with([status(401, &[])]),
            FailureKind::AccessDenied,
            "access",
        ),
        (
            "403",
            of_image.clone(),
            good.clone().with([status(403, &[])]),
            FailureKind::AccessDenied,
            "access",
        ),
        (
            "400",
            of_image.clone(),
            good.clone().with([status(400, &[])]),
            FailureKind::BadServer,
            "400",
        ),
        (
            "204",
            of_image.clone(),
            good.clone().with([status(204, &[])]),
            FailureKind::BadServer,
            "204",
        ),
        (
            "304",
            of_image.clone(),
            good.clone().with([status(304, &[])]),
            FailureKind::BadServer,
            "304",
        ),
        (
            "206 unasked",
            of_image.clone(),
            good.clone().with([status(206, &[])]),
            FailureKind::BadServer,
            "206",
        ),
        ("500 for ever", of_image.clone(), always(status(500, &[])), FailureKind::Network, "500"),
        (
            "429 beyond the budget",
            of_image.clone(),
            always(status(429, &[("Retry-After", "9")])),
            FailureKind::Network,
            "429",
        ),
        (
            "an absurd wait, some seconds in",
            of_image.clone(),
            good.clone().with([Fault::Stall(0), status(503, &[("Retry-After", &endless)])]),
            FailureKind::Network,
            &endless,
        ),
        (
            "cut without progress",
            of_image.clone(),
            always(Fault::Cut(0)),
            FailureKind::Network,
            "check the server",
        ),
        (
            "stall for ever",
            of_image.clone(),
            always(Fault::Stall(0)),
            FailureKind::Network,
            "nothing for 1 s",
        ),
        (
            "redirect loop",
            of_image.clone(),
            always(to(&url)),
            FailureKind::BadServer,
            "more than 5 times",
        ),
        (
            "redirect to http",
            of_image.clone(),
            always(to(&http_url)),
            FailureKind::InsecureUrl,
            "without TLS",
        ),
        (
            "redirect to nowhere",
            of_image.clone(),
            always(status(302, &[])),
            FailureKind::BadServer,
            "302",
        ),
        (
            "wrong digest",
            job(&url, b"other"),
            good.clone(),
            FailureKind::DigestMismatch,
            "should have",
        ),
        (
            "wrong digest, compressed",
            job(&url, b"other"),
            File::new(zstd(&image)),
            FailureKind::DigestMismatch,
            "should have",
        ),
        (
            "longer than said",
            sized(3 * MIB - 1),
            good.clone(),
            FailureKind::DigestMismatch,
            "3145728 bytes and should have 3145727",
        ),
        (
            "shorter than said",
            sized(3 * MIB + 1),
            good.clone(),
            FailureKind::DigestMismatch,
            "should have 3145729",
        ),
        (
            "longer than said, chunked",
            sized(3 * MIB - 1),
            File { has_length: false, ..good.clone() },
            FailureKind::DigestMismatch,
            "should have 3145727",
        ),
        (
            "shorter than said, chunked",
            sized(3 * MIB + 1),
            File { has_length: false, ..good.clone() },
            FailureKind::DigestMismatch,
            "should have 3145729",
        ),
        (
            "changed after a cut",
            of_image.clone(),
            good.clone().with([Fault::Change(MIB, small.clone(), Some("\"v2\"".into()))]),
            FailureKind::ImageChanged,
            "changed on the server",
        ),
        (
            "other length after a cut",
            of_image.clone(),
            File { etag: None, ..good.clone() }.with([Fault::Change(
                MIB,
                small[1..].to_vec(),
                None,
            )]),
            FailureKind::ImageChanged,
            "changed on the server",
        ),
        (
            "changed, no ranges",
            of_image.clone(),
            File { has_ranges: false, ..good.clone() }.with([Fault::Change(
                MIB,
                small.clone(),
                Some("\"v2\"".into()),
            )]),
            FailureKind::ImageChanged,
            "changed on the server",
        ),
        (
            "changed, no validator",
            of_image.clone(),
            File { etag: None, ..good.clone() }.with([Fault::Change(MIB, small, None)]),
            FailureKind::DigestMismatch,
            "should have",
        ),
        (
            "lying range",
            of_image.clone(),
            good.clone().with([Fault::Cut(MIB), Fault::Lie("bytes 0-3145727/3145728".into())]),
            FailureKind::BadServer,
            "when asked for bytes from",
        ),
        (
            "range that is none",
            of_image.clone(),
            good.clone().with([Fault::Cut(MIB), Fault::Lie("everything".into())]),
            FailureKind::BadServer,
            "when asked for bytes from",
        ),
        (
            "too large",
            job(&url, &image),
            File::new(vec![1; SLOT_BYTES + 1]),
            FailureKind::TooLarge,
            "8388609 bytes and slot B only 8388608",
        ),
        (
            "too large, chunked",
            job(&url, &image),
            File { has_length: false, ..File::new(vec![1; SLOT_BYTES + 1]) },
            FailureKind::TooLarge,
            "8388608",
        ),
        (
            "bomb",
            job(&url, &bomb),
            File::new(bomb.clone()),
            FailureKind::TooLarge,
            "8388609 bytes and slot B",
        ),
        (
            "bomb of unknown length",
            job(&url, &quiet_bomb),
            File::new(quiet_bomb.clone()),
            FailureKind::TooLarge,
            "8388608",
        ),
        (
            "truncated",
            job(&url, &cut_zstd),
            File::new(cut_zstd.clone()),
            FailureKind::CorruptImage,
            "ends in the middle",
        ),
        (
            "damaged",
            job(&url, &bent_zstd),
            File::new(bent_zstd.clone()),
            FailureKind::CorruptImage,
            "build and upload it again",
        ),
        (
            "garbage behind gzip",
            job(&url, &tail_gzip),
            File::new(tail_gzip.clone()),
            FailureKind::CorruptImage,
            "damaged",
        ),
        (
            "bad padding behind xz",
            job(&url, &tail_xz),
            File::new(tail_xz.clone()),
            FailureKind::CorruptImage,
            "ends in the middle",
        ),
        (
            "garbage behind zstd",
            job(&url, &tail_zstd),
            File::new(tail_zstd.clone()),
            FailureKind::CorruptImage,
            "damaged",
        ),
        (
            "wide window",
            job(&url, &wide),
            File::new(wide.clone()),
            FailureKind::DecoderMemory,
            "fetch.decoder_memory_mib",
        ),
        (
            "empty",
            job(&url, b""),
            File::new(Vec::new()),
            FailureKind::CorruptImage,
            "holds no image",
        ),
    ];
    for (name, job, file, kind, hint) in table {
        rig.server.put("/fw", file);
        let outcome = rig.run_with(["decoder_memory_mib = 8", "", ""], job, None).await;
        let failure = outcome.result.expect_err(name);
        assert_eq!(failure.kind, kind, "{name}: {failure}");
        assert!(failure.detail.contains(hint), "{name}: {failure}");
        assert!(!failure.detail.contains(SECRET), "{name}: {failure}");
    }
}

#[tokio::test]
async fn refuses_what_cannot_fit_before_it_writes_a_byte() {
    let rig = Rig::new().await;
    let before = rig.slot_content();
    for file in [vec![1; SLOT_BYTES + 1], zstd(&vec![0; SLOT_BYTES + 1])] {
        rig.server.put("/fw", File::new(file.clone()));
        let failure = rig.run(job(&rig.url("/fw"), &file)).await.result.unwrap_err();
        assert_eq!(failure.kind, FailureKind::TooLarge);
        assert!(rig.slot_content() == before);
    }
}

/// Faults that heal: the image arrives, and no byte is sent twice that the server could spare.
#[tokio::test]
async fn goes_on_where_a_transfer_broke_off() {
    let rig = Rig::new().await;
    let image = image(6 * MIB, 5);
    let good = File::new(image.clone());
    let dated = "Sun, 06 Nov 1994 08:49:37 GMT".to_owned();
    let cuts = [Fault::Cut(MIB + 1), Fault::Cut(1), Fault::Stall(2 * MIB), Fault::Cut(MIB)];
    let retry_after = status(429, &[("Retry-After", "1")]);
    // What the sockets of both sides may swallow at a cut, after TLS.
    let slack = 256 * 1024;
    for (name, file, again_bytes) in [
        ("ranges by ETag", good.clone().with(cuts.clone()), slack),
        (
            "ranges by date",
            File { etag: None, last_modified: Some(dated), ..good.clone() }.with(cuts.clone()),
            slack,
        ),
        ("no validator", File { etag: None, ..good.clone() }.with(cuts.clone()), slack),
        (
            "a weak validator",
            File { etag: Some("W/\"1\"".into()), ..good.clone() }.with(cuts.clone()),
            slack,
        ),
        (
            "no ranges",
            File { has_ranges: false, ..good.clone() }.with([Fault::Cut(2 * MIB)]),
            2 * MIB,
        ),
        ("5xx first", good.clone().with([status(500, &[]), status(503, &[])]), 0),
        ("429", good.clone().with([retry_after.clone()]), 0),
        (
            "408 and 429 in the middle",
            good.clone().with([Fault::Cut(MIB), status(408, &[]), retry_after]),
            slack,
        ),
        ("silence", good.clone().with([Fault::Silence]), 0),
    ] {
        rig.server.put("/fw", file);
        let before = rig.server.seen("/fw").len();
        std::fs::write(rig.slot(), vec![0xEE; SLOT_BYTES]).unwrap();
        // Silence lasts for the connect and the stall limit together.
        let settings = ["connect_limit_s = 1\nretry_budget_s = 20", "", ""];
        let outcome = rig.run_with(settings, job(&rig.url("/fw"), &image), None).await;
        outcome.result.unwrap_or_else(|failure| panic!("{name}: {failure}"));
        assert!(rig.slot_content()[..image.len()] == image[..], "{name}");
        let sent = rig.server.sent_since("/fw", before);
        assert!(sent <= image.len() + again_bytes, "{name}: {sent} of {}", image.len());
    }
}

#[tokio::test]
async fn survives_servers_that_end_without_a_word() {
    let rig = Rig::new().await;
    let image = image(2 * MIB, 6);
    // Neither length nor chunks: only the size in the request tells that this is not all.
    rig.server.put("/fw", File::new(image.clone()).with([Fault::Close(MIB)]));
    let sized = Job { size_bytes: Some(image.len() as u64), ..job(&rig.url("/fw"), &image) };
    let outcome = rig.run(sized).await;
    outcome.result.unwrap();
    assert!(rig.slot_content()[..image.len()] == image[..]);
    // Without it the digest does.
    rig.server.put("/fw", File::new(image.clone()).with([Fault::Close(MIB)]));
    let failure = rig.run(job(&rig.url("/fw"), &image)).await.result.unwrap_err();
    assert_eq!(failure.kind, FailureKind::DigestMismatch);
}

/// A compressed image goes on in the middle of the decoder's state while the process lives.
#[tokio::test]
async fn goes_on_in_the_middle_of_a_compressed_part() {
    let rig = Rig::new().await;
    let image = image(6 * MIB, 7);
    for compress in [gzip, xz, zstd] {
        let file = compress(&image);
        let cut = file.len() / 3;
        rig.server.put("/fw", File::new(file.clone()).with([Fault::Cut(cut), Fault::Cut(cut)]));
        let before = rig.server.seen("/fw").len();
        let outcome = rig.run(job(&rig.url("/fw"), &file)).await;
        assert_eq!(outcome.result.unwrap().image_digest, digest(&image));
        assert!(rig.server.sent_since("/fw", before) <= file.len() + 256 * 1024);
    }
}

/// After a restart, what is proven on the medium is not written again. It is not fetched again
/// either, as far as a decoder can start in the middle of the file.
#[tokio::test]
async fn goes_on_after_a_restart() {
    let rig = Rig::new().await;
    let image = image(7 * MIB + 77, 8);
    let packed = |command| rig.packed(&image, command);
    for (name, file, goes_on_in_the_middle) in [
        ("raw", image.clone(), true),
        ("gzip", packed(["gzip", "-1c"]), false),
        ("gzip members", parts(&image, 200_001, gzip), true),
        ("xz, blocks", packed(["xz", "-0cT2 --block-size=512KiB"]), false),
        ("xz streams", parts(&image, 200_001, xz), true),
        ("zstd", packed(["zstd", "-1qc"]), false),
        ("zstd frames", parts(&image, 200_001, zstd), true),
        ("pzstd", packed(["pzstd", "-1 -q -p2 -c"]), true),
    ] {
        rig.server.put("/fw", File::new(file.clone()).with([Fault::Slow(64 * 1024)]));
        std::fs::write(rig.slot(), vec![0xEE; SLOT_BYTES]).unwrap();
        let job = job(&rig.url("/fw"), &file);
        let third = |events: &[FetchEvent]| events.len() > 3;
        let cut = rig.run_until(["", "", ""], job.clone(), None, third).await;
        assert_eq!(cut.result.as_ref().unwrap_err().kind, FailureKind::Cancelled, "{name}");
        let checkpoint = cut.checkpoints().pop().unwrap();
        let (had, proven) = (checkpoint.fetched_bytes, checkpoint.written_bytes);
        assert!(proven >= 3 * MIB as u64, "{name}: {proven}");
        assert_eq!(had > 0, goes_on_in_the_middle, "{name}: {had}");

        let before = rig.server.seen("/fw").len();
        rig.written.store(0, Ordering::Relaxed);
        let outcome = rig.run_with(["", "", ""], job, Some(checkpoint)).await;
        let checkpoints = outcome.checkpoints();
        let written = outcome.result.unwrap_or_else(|failure| panic!("{name}: {failure}"));
        let given = rig.written.load(Ordering::Relaxed);
        assert_eq!(given, image.len() as u64 - proven, "{name}: written again");
        let sent = rig.server.sent_since("/fw", before) as u64;
        assert_eq!(sent, file.len() as u64 - had, "{name}: fetched again");
        assert_eq!(written.image_digest, digest(&image), "{name}");
        assert_eq!(written.fetched_bytes, file.len() as u64, "{name}");
        assert!(checkpoints.iter().all(|later| later.written_bytes > proven), "{name}");
        assert!(!checkpoints.is_empty(), "{name}");
        assert_eq!(rig.verify(written).await, Ok(()), "{name}");
    }
}

/// Without a digest only the server's word says that a file is the one that was begun. If it lies,
/// the image must at least be as long as what is on the medium.
#[tokio::test]
async fn notices_that_a_file_with_the_same_name_is_shorter() {
    let rig = Rig::new().await;
    let image = image(4 * MIB, 17);
    let settings = ["", "", "allow_missing_digest = true"];
    rig.server.put("/fw.sha256", File::new([]).with(vec![status(404, &[]); 2]));
    let unsized_file = |content| File { has_length: false, ..File::new(content) };
    rig.server.put("/fw", unsized_file(zstd(&image)));
    let whole = rig.run_with(settings, bare_job(&rig.url("/fw")), None).await;
    let checkpoint = whole.checkpoints().pop().unwrap();
    rig.server.put("/fw", unsized_file(zstd(&image[..MIB])));
    let outcome = rig.run_with(settings, bare_job(&rig.url("/fw")), Some(checkpoint)).await;
    assert_eq!(outcome.result.unwrap_err().kind, FailureKind::ImageChanged);
}

/// A checkpoint is a claim. What it claims is proven before it is used.
#[tokio::test]
async fn starts_again_if_the_checkpoint_cannot_be_proven() {
    let rig = Rig::new().await;
    let image = image(4 * MIB, 9);
    let served = File::new(image.clone());
    rig.server.put("/fw", served.clone());
    let job = job(&rig.url("/fw"), &image);
    let whole = rig.run(job.clone()).await;
    let checkpoint = whole.checkpoints().remove(1);
    assert_eq!(checkpoint.written_bytes, 2 * MIB as u64);
    type Spoil = fn(&mut Checkpoint, &Path);
    let spoils: [(&str, Spoil, Option<usize>); 5] = [
        ("nothing", |_, _| {}, Some(2 * MIB)),
        ("a bit in the slot", |_, slot| flip(slot, MIB as u64), None),
        ("the file on the server", |checkpoint, _| checkpoint.etag = Some("\"v0\"".into()), None),
        ("the length on the server", |checkpoint, _| checkpoint.total_bytes = Some(9), None),
        ("the state of the hash", |checkpoint, _| checkpoint.image_hash.0.truncate(9), None),
    ];
    for (name, spoil, from) in spoils {
        let mut checkpoint = checkpoint.clone();
        spoil(&mut checkpoint, &rig.slot());
        let before = rig.server.seen("/fw").len();
        let outcome = rig.run_with(["", "", ""], job.clone(), Some(checkpoint)).await;
        let written = outcome.result.unwrap_or_else(|failure| panic!("{name}: {failure}"));
        assert_eq!(rig.verify(written).await, Ok(()), "{name}");
        let requests = rig.server.seen("/fw");
        assert!(requests.len() <= before + 2, "{name}");
        assert_eq!(requests.last().unwrap().from, from, "{name}");
    }
    // The last checkpoint of a raw image may be its end: nothing is left to ask for.
    let last = whole.checkpoints().pop().unwrap();
    assert_eq!(last.fetched_bytes, image.len() as u64);
    let before = rig.server.seen("/fw").len();
    let outcome = rig.run_with(["", "", ""], job.clone(), Some(last)).await;
    assert_eq!(outcome.result.unwrap().image_digest, digest(&image));
    assert_eq!(rig.server.seen("/fw").len(), before);
}

fn flip(path: &Path, offset: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
    file.sync_all().unwrap();
}

#[tokio::test]
async fn the_read_back_finds_a_single_wrong_bit() {
    let rig = Rig::new().await;
    let image = image(3 * MIB + 5, 10);
    rig.server.put("/fw", File::new(image.clone()));
    for offset in [0, MIB as u64, image.len() as u64 - 1] {
        let written = rig.run(job(&rig.url("/fw"), &image)).await.result.unwrap();
        assert_eq!(rig.verify(written.clone()).await, Ok(()));
        flip(&rig.slot(), offset);
        let failure = rig.verify(written).await.unwrap_err();
        assert_eq!(failure.kind, FailureKind::ReadBack, "{offset}: {failure}");
    }
    // What lies behind the image does not matter.
    let written = rig.run(job(&rig.url("/fw"), &image)).await.result.unwrap();
    flip(&rig.slot(), image.len() as u64);
    assert_eq!(rig.verify(written).await, Ok(()));
}

#[tokio::test]
async fn http_needs_the_setting_and_a_digest_of_the_request() {
    let rig = Rig::new().await;
    let image = image(MIB, 11);
    let hex = digest(&image).to_string();
    rig.server.put("/fw", File::new(image.clone()));
    rig.server.put("/fw.sha256", File::new(hex));
    let to_http = format!("http://localhost:{}/fw?sig={SECRET}", rig.server.http_port);
    rig.server
        .put("/redirect", File::new([]).with(vec![status(301, &[("Location", &to_http)]); 9]));
    let allow = ["allow_http = true", "", ""];
    let redirected = rig.url("/redirect");
    for (settings, job, expected) in [
        (["", "", ""], job(&to_http, &image), Some(FailureKind::InsecureUrl)),
        (allow, bare_job(&to_http), Some(FailureKind::InsecureUrl)),
        (allow, job(&to_http, &image), None),
        (["", "", ""], job(&redirected, &image), Some(FailureKind::InsecureUrl)),
        (allow, job(&redirected, &image), None),
    ] {
        let outcome = rig.run_with(settings, job.clone(), None).await;
        let failure = outcome.result.err();
        assert_eq!(failure.as_ref().map(|failure| failure.kind), expected, "{settings:?} {job:?}");
        assert!(failure.is_none_or(|failure| !failure.detail.contains(SECRET)));
    }
}

#[tokio::test]
async fn goes_through_a_proxy_if_one_is_set() {
    let rig = Rig::new().await;
    let image = image(MIB, 5);
    rig.server.put("/fw", File::new(image.clone()));
    let (proxy, mut tunnels) = proxy::start().await;
    let setting = format!("proxy = '{proxy}'");
    rig.run_with([&setting, "", ""], job(&rig.url("/fw"), &image), None).await.result.unwrap();
    assert_eq!(tunnels.recv().await.unwrap(), format!("localhost:{}", rig.server.port));
}

#[tokio::test]
async fn tells_the_server_as_little_as_it_must() {
    let rig = Rig::new().await;
    let image = image(MIB, 12);
    rig.server.put("/fw", File::new(image.clone()));
    rig.server.put(
        "/redirect",
        File::new([]).with([status(302, &[("Location", "/fw"), ("Set-Cookie", "a=b")])]),
    );
    rig.run(job(&rig.url("/redirect"), &image)).await.result.unwrap();
    let seen = rig.server.seen("/fw").remove(0);
    for name in ["referer", "cookie", "range", "if-range"] {
        assert_eq!(seen.headers.get(name), None, "{name}");
    }
    assert_eq!(seen.headers["user-agent"], "test/1");
    assert_eq!(seen.headers["accept-encoding"], "identity");
}

#[tokio::test]
async fn trusts_only_the_configured_certificates() {
    let rig = Rig::new().await;
    let stranger = TempDir::new().unwrap();
    let stranger_authority = Authority::new(stranger.path());
    let other = ImageServer::start(&stranger_authority, false).await;
    let image = image(MIB, 13);
    other.put("/fw", File::new(image.clone()));
    let url = format!("https://localhost:{}/fw?sig={SECRET}", other.port);
    let settings = ["retry_budget_s = 0", "", ""];
    let failure = rig.run_with(settings, job(&url, &image), None).await.result.unwrap_err();
    assert_eq!(failure.kind, FailureKind::Network);
    assert!(failure.detail.contains("certificate verify failed"), "{failure}");
    assert!(!failure.detail.contains(SECRET), "{failure}");
    assert_eq!(other.seen("/fw"), []);
}

#[tokio::test]
async fn shows_its_own_certificate_and_keeps_its_key() {
    let rig = Rig::new().await;
    let server = ImageServer::start(&rig.authority, true).await;
    let image = image(MIB, 14);
    server.put("/fw", File::new(image.clone()));
    let url = format!("https://localhost:{}/fw", server.port);
    let (certificate, key) = &rig.authority.client;
    let identity = format!(
        "retry_budget_s = 0\nclient_certificate_file = '{}'\nclient_key_file = '{}'",
        certificate.display(),
        key.display()
    );
    let without = rig.run_with(["retry_budget_s = 0", "", ""], job(&url, &image), None).await;
    assert_eq!(without.result.unwrap_err().kind, FailureKind::Network);
    let with = rig.run_with([&identity, "", ""], job(&url, &image), None).await;
    assert_eq!(with.result.unwrap().image_digest, digest(&image));
    let config = rig.config([&identity, "", ""]);
    let refuse = |complaint: &str| {
        let error = Fetcher::check(&config.fetch).unwrap_err().to_string();
        assert!(error.contains(complaint), "{error}");
    };
    set_mode(key, 0o640);
    refuse("mode 0640: others must not read it");
    set_mode(key, 0o600);
    std::fs::write(key, "nonsense").unwrap();
    refuse("must hold the PKCS #8 private key");
    std::fs::remove_file(key).unwrap();
    refuse("cannot read fetch.client_key_file");
}

#[tokio::test]
async fn can_be_called_off_at_any_time() {
    let rig = Rig::new().await;
    let image = image(4 * MIB, 15);
    let slow_installer = "kind = 'command'\ncommand = ['sleep', '1000']";
    for (name, settings, file) in [
        (
            "server stalls",
            ["stall_limit_s = 3600", "", ""],
            File::new(image.clone()).with([Fault::Stall(MIB)]),
        ),
        ("bandwidth limit", ["rate_limit_bytes_per_s = 1024", "", ""], File::new(image.clone())),
        ("installer hangs", ["", slow_installer, ""], File::new(image.clone())),
    ] {
        rig.server.put("/fw", file);
        let began = |events: &[FetchEvent]| events.contains(&FetchEvent::Began);
        let outcome = rig.run_until(settings, job(&rig.url("/fw"), &image), None, began).await;
        assert_eq!(outcome.result.unwrap_err().kind, FailureKind::Cancelled, "{name}");
    }
    // The installer hangs at the end of a small image.
    rig.server.put("/fw", File::new(image[..1000].to_vec()));
    let began = |events: &[FetchEvent]| events.contains(&FetchEvent::Began);
    let job = job(&rig.url("/fw"), &image[..1000]);
    let outcome = rig.run_until(["", slow_installer, ""], job, None, began).await;
    assert_eq!(outcome.result.unwrap_err().kind, FailureKind::Cancelled);
}

#[tokio::test]
async fn an_outside_installer_gets_the_image_and_answers_for_it() {
    let rig = Rig::new().await;
    let image = image(3 * MIB, 16);
    let file = zstd(&image);
    rig.server.put("/fw", File::new(file.clone()));
    let program =
        |script: &str| format!("kind = 'command'\ncommand = ['sh', '-c', '''{script}''']");
    let good = program(r#"test "$TWINBOOT_SLOT" = B && exec cat > "$TWINBOOT_DEVICE""#);
    let job = job(&rig.url("/fw"), &file);
    let outcome = rig.run_with(["", &good, ""], job.clone(), None).await;
    assert_eq!(outcome.result.unwrap().image_digest, digest(&image));
    assert!(std::fs::read(rig.slot()).unwrap() == image);
    assert_eq!(outcome.events, [FetchEvent::Began]);
    let bad = program("cat > /dev/null; echo no such bundle >&2; exit 3");
    let failure = rig.run_with(["", &bad, ""], job.clone(), None).await.result.unwrap_err();
    assert_eq!(failure.kind, FailureKind::Installer);
    assert!(failure.detail.contains("exit status: 3; its last words: no such bundle"), "{failure}");
    // It never learns that a wrong image is complete.
    let mark = rig.folder.path().join("complete");
    let marker = program(&format!("cat > /dev/null; touch {}", mark.display()));
    let wrong = Job { digest: Some(digest(b"other")), ..job };
    let failure = rig.run_with(["", &marker, ""], wrong, None).await.result.unwrap_err();
    assert_eq!(failure.kind, FailureKind::DigestMismatch);
    assert!(!mark.exists());
}
