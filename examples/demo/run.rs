//! The story: one update from the call to the confirmed boot, or back.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use hubsim::{EventKind, Events};
use serde_json::{Value, json};
use tokio::sync::watch;
use twinboot::control::{Ask, Client};

use crate::Arguments;
use crate::machine::{Happening, LIMIT, Machine};
use crate::outcome::{self, Figures, at};
use crate::service::Service;
use crate::stage::{self, DEVICE, Image, Stage};
use crate::view::View;

/// Between two looks at the daemon's status.
const LOOK: Duration = Duration::from_millis(100);

/// How much of the daemon's log is shown after a failure.
const LOG_LINES: usize = 5;

/// Runs the demo.
///
/// # Errors
/// The update did not end as it should, or something could not be set up.
pub async fn run(arguments: &Arguments) -> Result<()> {
    let mut view = View::new()?;
    view.line(&introduction(arguments));
    let (mut stage, image) = stage::set(arguments, &view).await?;
    let end = story(arguments, &mut stage, &image, &mut view).await;
    // Asked to end, so that the log's last line is not about the hub that goes next.
    let stopped = stage.machine.sigterm(LIMIT).await;
    view.end();
    match end {
        Ok(end) => {
            stopped.context("twinbootd did not end when asked to")?;
            view.line(&format!("\n{end}"));
            Ok(())
        }
        Err(error) => {
            let log = stage.machine.log_file();
            let text = fs::read_to_string(&log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
            let last = lines.get(lines.len().saturating_sub(LOG_LINES)..).unwrap_or_default();
            let (last, log) = (last.join("\n"), log.display());
            Err(anyhow!("{error:#}\nThe end of twinbootd's log, {log}:\n{last}"))
        }
    }
}

fn introduction(arguments: &Arguments) -> String {
    let end = if arguments.fail {
        "This time the health check fails in release 2.0.0: watch the device go back and say why."
    } else {
        "This time all is well: watch release 2.0.0 being confirmed."
    };
    format!(
        "twinboot: one firmware update, from the cloud call to the confirmed boot\n\
         \n\
         A device runs release 1.0.0 of a Debian system from slot A. Its operator calls one method\n\
         of Azure IoT Hub, and release 2.0.0 goes over HTTPS into slot B while the device works on.\n\
         It is read back, compared with its SHA-256 and booted once, on trial. Only a healthy system\n\
         that reaches the hub is kept; after anything else the next boot is slot A again.\n\
         {end}\n\
         \n\
         Lines of \"twin\" show what the hub has received of the device's reported properties.\n"
    )
}

/// From the first boot to the last report. Returns the end in a sentence.
async fn story(
    arguments: &Arguments,
    stage: &mut Stage,
    image: &Image,
    view: &mut View,
) -> Result<String> {
    let service = Service::new(&stage.hub, DEVICE)?;
    let mut events = stage.hub.events();
    let mut figures = Figures::start();
    let (status, _) = watch_status(stage.machine.socket());
    boot(&mut stage.machine, view, "the bootloader's default").await?;
    let ready = |reported: &Value| at(reported, "/twinboot/confirmed") == &json!(true);
    follow(stage, view, &mut events, &status, &mut figures, &ready).await?;

    let url = stage.images.url(image.file);
    view.line("");
    view.tell("operator", &format!("POST {}", service.method_url()));
    view.more(r#"{"methodName":"firmwareUpdate","#);
    view.more(&format!(r#" "payload":{{"fwPackageUri":"{url}","#));
    view.more(r#"            "fwVersion":"2.0.0"}}"#);
    figures = Figures::start();
    let payload = json!({ "fwPackageUri": url, "fwVersion": "2.0.0" });
    let (code, answer) = service.call("firmwareUpdate", payload).await?;
    view.tell("device", &format!("answers {code} after {} ms", figures.elapsed().as_millis()));
    view.more(&answer.to_string());
    view.line("");
    if code != 200 {
        bail!("the device refused the update");
    }

    let over = |reported: &Value| {
        at(reported, "/twinboot/update/phase") == "idle"
            && at(reported, "/twinboot/lastUpdate/id") == at(&answer, "/id")
    };
    follow(stage, view, &mut events, &status, &mut figures, &over).await?;
    figures.end();
    figures.count(&stage.machine);
    view.end();

    view.line("");
    view.tell("operator", &format!("GET {}", service.twin_url()));
    let reported = service.reported().await?;
    let whole = Value::Object(outcome::without_metadata(&reported));
    fs::write(stage.machine.folder.join("twin.json"), format!("{whole:#}\n"))?;
    outcome::show_twin(view, &reported);
    outcome::summary(view, stage, image, &figures)?;
    outcome::judge(arguments, stage, &reported)
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
        // only when it is read, and `changed` is. The reports come before the order they announce.
        tokio::select! {
            biased;
            event = events.next() => match event.kind {
                EventKind::Reported { patch, status: 200..=299, .. } => {
                    figures.phase(at(&patch, "/twinboot/update/phase").as_str().unwrap_or("idle"));
                    view.twin(&patch);
                    let twin = stage.hub.twin(DEVICE)?;
                    if done(at(&twin, "/properties/reported")) {
                        return Ok(());
                    }
                }
                EventKind::Connected { .. } => view.tell("device", "is connected to the hub"),
                EventKind::AuthFailed { reason, .. } => bail!("the hub refused: {reason}"),
                _ => {}
            },
            happening = stage.machine.next() => match happening? {
                Happening::RestartOrdered => {
                    figures.phase("rebooting");
                    restart(&mut stage.machine, view, figures).await?;
                }
                Happening::Ended(status) => bail!("twinbootd ended by itself: {status}"),
            },
            Ok(()) = status.changed() => view.progress(&status.borrow_and_update()),
        }
    }
}

/// The daemon ordered it: the machine goes down and comes up as the bootloader says.
async fn restart(machine: &mut Machine, view: &View, figures: &mut Figures) -> Result<()> {
    figures.count(machine);
    view.line("");
    view.tell("machine", "restarts, as twinbootd ordered");
    view.dark();
    machine.sigterm(LIMIT).await.context("twinbootd did not end when asked to")?;
    let (default, once) = machine.variables()?;
    let why = if once.is_empty() {
        "the bootloader's default".to_owned()
    } else {
        format!("told to try {once} once; the default is still {default}")
    };
    boot(machine, view, &why).await
}

async fn boot(machine: &mut Machine, view: &View, why: &str) -> Result<()> {
    let boot = machine.restart().await.context("the machine does not start")?;
    view.tell(
        "machine",
        &format!("boots slot {}, {why}: release {} runs", boot.slot, boot.version),
    );
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
