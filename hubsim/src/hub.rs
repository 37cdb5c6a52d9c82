//! The hub as a library: started, asked, disturbed and stopped by tests.

mod disturb;
mod identities;
mod watch;

pub use disturb::Faults;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openssl::x509::X509;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::access::Policies;
use crate::core::{Book, Core};
use crate::error::StartError;
use crate::events::Reason;
use crate::options::Options;
use crate::tls::Credential;
use crate::{admin, https, mqtt, persist, rest, tls};

/// A running hub. Dropping it stops it; [`Hub::stop`] also waits and allows a new start.
#[derive(Debug)]
pub struct Hub {
    core: Arc<Core>,
    certificates: Arc<Certificates>,
    addresses: Addresses,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

/// A hub that is down but remembers everything. [`Stopped::start`] brings it back.
#[derive(Debug)]
pub struct Stopped {
    core: Arc<Core>,
    certificates: Arc<Certificates>,
    addresses: Addresses,
}

#[derive(Debug, Clone, Copy)]
struct Addresses {
    mqtt: SocketAddr,
    https: SocketAddr,
    admin: Option<SocketAddr>,
}

#[derive(Debug)]
struct Certificates {
    authority: Credential,
    server: Credential,
    folder: PathBuf,
    /// Removes the folder with the hub, where no state folder was asked for.
    _temporary: Option<TempDir>,
}

impl Hub {
    /// Starts a hub; it listens when this returns.
    ///
    /// # Errors
    /// An address or the state folder cannot be used; nothing listens then.
    pub async fn start(options: Options) -> Result<Self, StartError> {
        let addresses =
            Addresses { mqtt: options.mqtt, https: options.https, admin: options.admin };
        if let Some(admin) = options.admin.filter(|admin| !admin.ip().is_loopback()) {
            return Err(StartError::AdminNotLoopback(admin));
        }
        let certificates = Certificates::new(&options)?;
        let saved = match &options.state {
            Some(folder) => persist::load(folder)?,
            None => None,
        };
        let (policies, mut book) = saved.unwrap_or_else(|| (Policies::fresh(), Book::default()));
        for path in &options.device_authorities {
            let pem = std::fs::read(path)
                .map_err(|source| StartError::File { path: path.clone(), source })?;
            let authority = X509::from_pem(&pem)
                .map_err(|source| StartError::DeviceAuthority { path: path.clone(), source })?;
            book.trust(authority);
        }
        let core = Arc::new(Core::new(options, policies, book));
        Self::listen(core, Arc::new(certificates), addresses).await
    }

    async fn listen(
        core: Arc<Core>,
        certificates: Arc<Certificates>,
        wanted: Addresses,
    ) -> Result<Self, StartError> {
        let acceptor = tls::acceptor(&certificates.server, &certificates.authority.certificate)
            .map_err(StartError::Certificate)?;
        let (mqtt_listener, mqtt_addr) = bind(wanted.mqtt).await?;
        let (https_listener, https_addr) = bind(wanted.https).await?;
        let admin = match wanted.admin {
            Some(address) => Some(bind(address).await?),
            None => None,
        };
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let addresses = Addresses {
            mqtt: mqtt_addr,
            https: https_addr,
            admin: admin.as_ref().map(|(_, address)| *address),
        };
        tasks.spawn(mqtt::listen(
            Arc::clone(&core),
            mqtt_listener,
            acceptor.clone(),
            stop.child_token(),
        ));
        let router = rest::router(Arc::clone(&core));
        tasks.spawn(https::listen(
            Arc::clone(&core),
            https_listener,
            acceptor,
            router,
            stop.child_token(),
        ));
        if let Some((listener, _)) = admin {
            let router = admin::router(Arc::clone(&core));
            tasks.spawn(https::listen_plain(listener, router, stop.child_token()));
        }
        if let Some(folder) = core.options.state.clone() {
            tasks.spawn(persist::keep_saving(Arc::clone(&core), folder, stop.child_token()));
        }
        Ok(Self { core, certificates, addresses, stop, tasks })
    }

    /// Cuts every connection, stops listening and saves. Events and fault settings are kept.
    pub async fn stop(mut self) -> Stopped {
        self.core.cut_all(&Reason::HubStopped);
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
        self.core.cut_all(&Reason::HubStopped);
        Stopped {
            core: Arc::clone(&self.core),
            certificates: Arc::clone(&self.certificates),
            addresses: self.addresses,
        }
    }

    /// The certificate authority that clients must trust, in PEM.
    pub fn ca_pem(&self) -> String {
        let pem = self.certificates.authority.certificate.to_pem().unwrap_or_default();
        String::from_utf8_lossy(&pem).into_owned()
    }

    /// The same as a file.
    pub fn ca_path(&self) -> PathBuf {
        self.certificates.folder.join("ca.pem")
    }

    /// Where MQTT over TLS is.
    pub fn mqtt_addr(&self) -> SocketAddr {
        self.addresses.mqtt
    }

    /// Where HTTPS and WebSockets are.
    pub fn https_addr(&self) -> SocketAddr {
        self.addresses.https
    }

    /// Where the admin endpoint is, if there is one.
    pub fn admin_addr(&self) -> Option<SocketAddr> {
        self.addresses.admin
    }

    /// The hub's name, as in connection strings.
    pub fn hub_name(&self) -> &str {
        &self.core.options.hub_name
    }

    /// Moves the hub's clock against the machine's. Tokens expire by it.
    pub fn set_clock_offset(&self, seconds: i64) {
        self.core.clock.set_offset(seconds);
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Stopped {
    /// Listens again on the same ports, with the same certificates, identities and twins.
    ///
    /// # Errors
    /// A port has been taken meanwhile.
    pub async fn start(self) -> Result<Hub, StartError> {
        Hub::listen(self.core, self.certificates, self.addresses).await
    }
}

impl Certificates {
    fn new(options: &Options) -> Result<Self, StartError> {
        let (folder, temporary) = match &options.state {
            Some(folder) => (folder.clone(), None),
            None => {
                let temporary = TempDir::with_prefix("hubsim-")
                    .map_err(|source| StartError::File { path: std::env::temp_dir(), source })?;
                (temporary.path().to_owned(), Some(temporary))
            }
        };
        let authority = persist::authority(&folder)?;
        let mut names = vec![options.hub_name.clone()];
        names.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
        names.extend(options.extra_names.iter().cloned());
        let server = tls::new_server(&authority, &names).map_err(StartError::Certificate)?;
        persist::save_server(Path::new(&folder), &server)?;
        Ok(Self { authority, server, folder, _temporary: temporary })
    }
}

async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let error = |source| StartError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(error)?;
    let bound = listener.local_addr().map_err(error)?;
    Ok((listener, bound))
}
