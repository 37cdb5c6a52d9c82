//! The story: one update from the call to the confirmed boot, or back.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hubsim::{EventKind, Events};
use serde_json::{Value, json};
use tokio::sync::watch;
use twinboot::control::{Ask, Client};

use crate::Arguments;
use crate::machine::{Happening, Machine};
use crate::service::Service;
use crate::stage::{self, DEVICE, Image, Stage};
use crate::view::{View, megabytes};

/// Between two looks at the daemon's status.
const LOOK: Duration = Duration::from_millis(100);

/// Times and counts for the summary.
#[derive(Debug)]
struct Figures {
    called: Instant,
    in_slot: Option<Instant>,
    verified: Option<Instant>,
    confirmed: Option<Instant>,
    peak_memory_kib: u64,
    written_bytes: u64,
}

/// Runs the demo.
///
/// # Errors
/// The update did not end as it should, or something could not be set up.
pub async fn run(arguments: &Arguments) -> Result<()> {
    println!("{}", introduction(arguments));
    let (mut stage, image) = stage::set(arguments).await?;
    let mut view = View::new()?;
    let service = Service::new(&stage.hub, DEVICE)?;
    let mut events = stage.hub.events();

    let boot = stage.machine.boot().context("the machine does not start")?;
    let slot = &stage.machine.slot(boot.slot).device;
    let place = slot.display();
    view.tell("machine", &format!("slot {} ({place}) boots: release {}", boot.slot, boot.version));
    let (status, _) = watch_status(stage.machine.socket());
    let ready = |reported: &Value| at(reported, "/twinboot/confirmed") == &json!(true);
    let mut figures = Figures {
        called: Instant::now(),
        in_slot: None,
        verified: None,
        confirmed: None,
        peak_memory_kib: 0,
        written_bytes: 0,
    };
    follow(&mut stage, &mut view, &mut events, &status, &mut figures, &ready).await?;

    let url = stage.images.url(image.file);
    let payload = json!({ "fwPackageUri": url, "fwVersion": "2.0.0" });
    view.line("");
    view.tell("operator", "calls the direct method firmwareUpdate over the hub's REST API:");
    view.tell("", &payload.to_string());
    figures.called = Instant::now();
    let (code, answer) = service.call("firmwareUpdate", payload).await?;
    let took = figures.called.elapsed().as_millis();
    view.tell("device", &format!("answers {code} after {took} ms: {answer}"));
    if code != 200 {
        bail!("the device refused the update");
    }
    view.line("");

    let over = |reported: &Value| {
        at(reported, "/twinboot/update/phase") == "idle"
            && at(reported, "/twinboot/lastUpdate/id") == at(&answer, "/id")
    };
    follow(&mut stage, &mut view, &mut events, &status, &mut figures, &over).await?;
    figures.confirmed = Some(Instant::now());
    count(&stage.machine, &mut figures);
    view.end();

    let reported = service.reported().await?;
    fs::write(stage.machine.folder.join("twin.json"), format!("{reported:#}\n"))?;
    println!("\nThe reported twin, as the operator reads it now:\n{}", shown(&reported)?);
    summary(&stage, &image, &figures)?;
    judge(arguments, &stage, &reported)
}

fn introduction(arguments: &Arguments) -> String {
    let end = if arguments.fail {
        "Release 2.0.0 will start, but a health check of the device fails in it. Watch the device go\n\
         back to release 1.0.0 by itself and tell the operator why."
    } else {
        "At the end release 2.0.0 runs, is confirmed, and the operator reads it in the device's twin."
    };
    format!(
        "twinboot: one firmware update, from the cloud call to the confirmed boot.\n\
         \n\
         A device with two slots runs Debian, release 1.0.0, in slot A. An operator has it updated to\n\
         release 2.0.0: the image goes over HTTPS into slot B while the device works on, is read back\n\
         and compared with its SHA-256, and is then started on trial. Only if the device is healthy\n\
         and reaches the hub is slot B kept; else the next start is slot A again.\n\
         {end}\n\
         \n\
         Real: the images, nginx, the slots (loop devices), twinbootd. Played: Azure IoT Hub (by\n\
         hubsim) and the machine around the daemon. Lines that begin with \"twin\" are what the device\n\
         reports to the hub.\n"
    )
}

/// Plays the machine and shows what happens until `done` is true of the reported twin.
async fn follow(
    stage: &mut Stage,
    view: &mut View,
    events: &mut Events,
    status: &watch::Receiver<Value>,
    figures: &mut Figures,
    done: &dyn Fn(&Value) -> bool,
) -> Result<()> {
    let mut status = status.clone();
    loop {
        // Cancel-safe: an event is taken from the reader only when it is returned, a restart order
        // only when it is read, and `changed` is.
        tokio::select! {
            event = events.next() => match event.kind {
                EventKind::Reported { patch, status: 200..=299, .. } => {
                    view.twin(&patch);
                    let twin = stage.hub.twin(DEVICE)?;
                    if done(at(&twin, "/properties/reported")) {
                        return Ok(());
                    }
                }
                EventKind::Connected { .. } => view.tell("device", "is connected to the hub"),
                EventKind::Disconnected { .. } => view.tell("device", "is gone from the hub"),
                EventKind::AuthFailed { reason, .. } => bail!("the hub refused: {reason}"),
                _ => {}
            },
            Ok(()) = status.changed() => {
                let now = status.borrow_and_update().clone();
                let phase = at(&now, "/update/phase");
                let mark = |moment: &mut Option<Instant>| { moment.get_or_insert_with(Instant::now); };
                match phase.as_str() {
                    Some("verifying") => mark(&mut figures.in_slot),
                    Some("applying" | "rebooting") => {
                        mark(&mut figures.in_slot);
                        mark(&mut figures.verified);
                    }
                    _ => {}
                }
                view.progress(&now);
            }
            happening = stage.machine.next() => match happening? {
                Happening::RestartOrdered => {
                    figures.in_slot.get_or_insert_with(Instant::now);
                    figures.verified.get_or_insert_with(Instant::now);
                    restart(&mut stage.machine, view, figures).await?;
                }
                Happening::Ended(status) => bail!("twinbootd ended by itself: {status}"),
            },
        }
    }
}

/// The daemon ordered it: the machine goes down and comes up as the bootloader says.
async fn restart(machine: &mut Machine, view: &View, figures: &mut Figures) -> Result<()> {
    count(machine, figures);
    let (default, once) = machine.variables()?;
    view.line("");
    view.tell("machine", "restarts, as twinbootd ordered");
    view.dark();
    let boot = machine.restart().await.context("the machine does not start again")?;
    let why = if once.is_empty() {
        format!("the bootloader's default is {default}")
    } else {
        format!("the bootloader was told to try {once} once; its default is still {default}")
    };
    view.tell("machine", &format!("slot {} boots: release {} ({why})", boot.slot, boot.version));
    Ok(())
}

/// The daemon's own account of itself, asked for through the socket of the device command.
fn watch_status(socket: PathBuf) -> (watch::Receiver<Value>, tokio::task::JoinHandle<()>) {
    let (tell, status) = watch::channel(Value::Null);
    let task = tokio::spawn(async move {
        while !tell.is_closed() {
            let socket = socket.clone();
            let asked = tokio::task::spawn_blocking(move || {
                Client::connect(&socket).and_then(|mut client| client.ask(&Ask::Status)).ok()
            });
            if let Ok(Some(reply)) = asked.await {
                tell.send_if_modified(|status| {
                    let new = *status != reply.body;
                    *status = reply.body;
                    new
                });
            }
            tokio::time::sleep(LOOK).await;
        }
    });
    (status, task)
}

/// Adds up what the kernel counted for the daemon that is about to end.
fn count(machine: &Machine, figures: &mut Figures) {
    let Some(pid) = machine.pid() else { return };
    let value = |file: &str, key: &str| -> u64 {
        let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    };
    figures.peak_memory_kib = figures.peak_memory_kib.max(value("status", "VmHWM:"));
    figures.written_bytes += value("io", "write_bytes:");
}

/// The twin without what the hub adds.
fn shown(reported: &Value) -> Result<String> {
    let mut reported = reported.clone();
    if let Some(members) = reported.as_object_mut() {
        members.retain(|name, _| !name.starts_with('$'));
    }
    Ok(serde_json::to_string_pretty(&reported)?)
}

fn summary(stage: &Stage, image: &Image, figures: &Figures) -> Result<()> {
    let mut transfers = stage.images.transfers()?;
    transfers.retain(|transfer| transfer.path.trim_start_matches('/') == image.file);
    let fetched: u64 = transfers.iter().map(|transfer| transfer.body).sum();
    let requests = if transfers.len() == 1 { "request" } else { "requests" };
    let seconds = |end: Option<Instant>| {
        end.map_or(0.0, |end| end.duration_since(figures.called).as_secs_f64())
    };
    let write_s = seconds(figures.in_slot);
    let verify_s = seconds(figures.verified) - write_s;
    let mib = u32::try_from(image.image_bytes >> 20).map(f64::from)?;
    println!("\nSummary");
    println!(
        "  image             {}; {} as {}",
        megabytes(image.image_bytes),
        megabytes(image.file_bytes),
        image.file
    );
    println!("  fetched           {} in {} {requests}", megabytes(fetched), transfers.len());
    println!("  written           {}", megabytes(figures.written_bytes));
    println!("  into the slot     {write_s:.2} s, {:.0} MiB/s of image", mib / write_s.max(0.001));
    println!("  read back         {verify_s:.2} s, {:.0} MiB/s", mib / verify_s.max(0.001));
    println!("  call to the end   {:.2} s", seconds(figures.confirmed));
    println!(
        "  peak memory       {}.{} MiB (twinbootd, VmHWM)",
        figures.peak_memory_kib / 1024,
        figures.peak_memory_kib % 1024 * 10 / 1024
    );
    println!("  log, last twin    {}", stage.machine.folder.display());
    Ok(())
}

/// Whether the twin and the machine say what the demo promised.
fn judge(arguments: &Arguments, stage: &Stage, reported: &Value) -> Result<()> {
    let running = stage.machine.running().context("nothing runs")?;
    let default = stage.machine.variables()?.0;
    let last = at(reported, "/twinboot/lastUpdate");
    let reason = at(last, "/reason").as_str().unwrap_or_default();
    let here = (running.slot, running.version.as_str(), default.as_str());
    let result = at(last, "/result").as_str().unwrap_or_default();
    if arguments.fail {
        let back = here == ('A', "1.0.0", "A")
            && result == "rolledBack"
            && reason.contains("the pump does not answer")
            && at(reported, "/iothubDM/firmwareUpdate/status") == "applyFailed"
            && at(reported, "/firmware/fwUpdateStatus") == "rolledback";
        if !back {
            bail!("the device did not go back and tell why: {here:?}, {last}");
        }
        println!("\nThe device is back on release 1.0.0 and says why: {reason}");
    } else {
        let confirmed = here == ('B', "2.0.0", "B")
            && result == "succeeded"
            && at(reported, "/iothubDM/firmwareUpdate/status") == "applyComplete"
            && at(reported, "/iothubDM/firmwareUpdate/lastFirmwareUpdate").is_string()
            && at(reported, "/firmware/currentFwVersion") == "2.0.0";
        if !confirmed {
            bail!("the update was not confirmed: {here:?}, {last}");
        }
        println!("\nRelease 2.0.0 runs from slot B and is confirmed.");
    }
    Ok(())
}

/// The value at `pointer`; null if there is none.
fn at<'a>(value: &'a Value, pointer: &str) -> &'a Value {
    value.pointer(pointer).unwrap_or(&Value::Null)
}
