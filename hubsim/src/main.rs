//! `hubsim`: a local Azure IoT Hub on the command line.

use std::error::Error;
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use hubsim::{Event, Hub, Options};
use tokio::signal::unix::{SignalKind, signal};

/// A local Azure IoT Hub for tests and demonstrations.
///
/// Makes a certificate authority of its own, prints connection strings and then one line per event
/// until it is stopped. Microsoft's SDKs fix the ports, so the defaults are IoT Hub's; ports below
/// 1024 need root or CAP_NET_BIND_SERVICE.
#[derive(Debug, Parser)]
#[command(name = "hubsim", version)]
struct Arguments {
    /// A device to register, or a module as DEVICE/MODULE; may be given more than once
    #[arg(long, value_name = "ID")]
    device: Vec<String>,
    /// Folder for certificates, identities and twins; without it everything is forgotten at the end
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Address to listen on
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    bind: IpAddr,
    /// Port for MQTT over TLS; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8883)]
    mqtt_port: u16,
    /// Port for HTTPS and WebSockets; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 443)]
    https_port: u16,
    /// Port for the admin endpoint (faults, clock, events), plain HTTP on loopback; 0 takes a free one
    #[arg(long, value_name = "PORT")]
    admin_port: Option<u16>,
    /// The hub's host name, as in connection strings
    #[arg(long, value_name = "HOST", default_value = "twinboot.azure-devices.net")]
    name: String,
    /// A further name or address for the certificate; may be given more than once
    #[arg(long, value_name = "HOST")]
    extra_name: Vec<String>,
    /// A certificate, PEM, whose holder may sign the certificates of devices that are registered
    /// with `certificateAuthority`; may be given more than once
    #[arg(long, value_name = "FILE")]
    device_authority: Vec<PathBuf>,
    /// How events are written
    #[arg(long, value_enum, default_value_t = Log::Text)]
    log: Log,
    /// Seconds for which a connection outlives its token
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    sas_grace: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Log {
    Text,
    Json,
}

impl Arguments {
    fn options(&self) -> Options {
        Options {
            hub_name: self.name.clone(),
            mqtt: SocketAddr::new(self.bind, self.mqtt_port),
            https: SocketAddr::new(self.bind, self.https_port),
            admin: self.admin_port.map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
            state: self.state.clone(),
            sas_grace: Duration::from_secs(self.sas_grace),
            device_authorities: self.device_authority.clone(),
            extra_names: self.extra_name.clone(),
            ..Options::default()
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // If not even this can be written, the exit code still tells.
            let _ = writeln!(io::stderr(), "hubsim: {}", with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

/// Runs the hub until a signal ends it.
async fn run(arguments: Arguments) -> Result<(), Box<dyn Error>> {
    // Before anything is printed: whoever reads the output may send the signal at once.
    let mut terminate = signal(SignalKind::terminate())?;
    let hub = Hub::start(arguments.options()).await?;
    let mut devices = Vec::new();
    for id in &arguments.device {
        devices.push((id.clone(), hub.add_device(id)?));
    }
    print_start(&hub, &devices, arguments.log)?;
    let mut events = hub.events_from_start();
    loop {
        // Cancel-safe: all three.
        tokio::select! {
            event = events.next() => print_event(&event, arguments.log)?,
            _ = terminate.recv() => break,
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    hub.stop().await;
    while let Some(event) = events.try_next() {
        print_event(&event, arguments.log)?;
    }
    Ok(())
}

/// What a person or a script needs to connect.
fn print_start(hub: &Hub, devices: &[(String, String)], log: Log) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let service = hub.service_connection_string();
    if log == Log::Json {
        let devices: serde_json::Map<_, _> =
            devices.iter().map(|(id, text)| (id.clone(), text.as_str().into())).collect();
        let start = serde_json::json!({
            "event": "started",
            "hubName": hub.hub_name(),
            "mqtt": hub.mqtt_addr(),
            "https": hub.https_addr(),
            "admin": hub.admin_addr(),
            "ca": hub.ca_path(),
            "service": service,
            "devices": devices,
        });
        return writeln!(out, "{start}");
    }
    let page = format!("page: https://localhost:{}/", hub.https_addr().port());
    writeln!(out, "hub      {}", hub.hub_name())?;
    writeln!(out, "mqtt     {}", hub.mqtt_addr())?;
    writeln!(out, "https    {}  ({page})", hub.https_addr())?;
    if let Some(admin) = hub.admin_addr() {
        writeln!(out, "admin    http://{admin}/")?;
    }
    writeln!(out, "trust    {}", hub.ca_path().display())?;
    writeln!(out, "service  {service}")?;
    devices.iter().try_for_each(|(id, text)| writeln!(out, "device   {id}  {text}"))
}

fn print_event(event: &Event, log: Log) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match log {
        Log::Text => writeln!(out, "{event}"),
        Log::Json => writeln!(out, "{}", serde_json::to_string(event)?),
    }
}

/// The error with all its causes in one line, for a person.
fn with_causes(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
