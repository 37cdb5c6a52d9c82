//! Who the device is and how it proves it: connection string, SAS tokens, X.509 files.
//!
//! Nothing in here ever prints a key or a token.

mod connection_string;
mod sas;

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secrecy::{ExposeSecret, SecretSlice, SecretString};

use self::connection_string::ConnectionString;
use crate::config;
use crate::update::WallTime;

/// Name of the systemd credential that goes before the file.
pub const SYSTEMD_CREDENTIAL: &str = "hub-credential";
/// The service API the device speaks.
const API_VERSION: &str = "2021-04-12";
/// No credential is larger.
const MAX_FILE_BYTES: u64 = 16 * 1024;

/// Why there is no credential. Never shows one.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// The file cannot be read.
    #[error("cannot read the credential file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Others than its owner can read the file.
    #[error("{} has mode {mode:04o}: must not be open to group or others, run chmod 0600 {0}", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The file belongs to somebody else.
    #[error("{} belongs to user {owner}: must belong to root or to the user twinbootd runs as", path.display())]
    ForeignOwner {
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// The text is no connection string of a device.
    #[error("{key}: {rule}")]
    Invalid {
        /// The key in question.
        key: String,
        /// What it must be.
        rule: String,
    },
    /// The ready-made token is over.
    #[error("SharedAccessSignature: expired at {at}, put a new one into the credential file")]
    Expired {
        /// When.
        at: WallTime,
    },
}

impl CredentialError {
    fn invalid(key: impl Into<String>, rule: impl Into<String>) -> Self {
        CredentialError::Invalid { key: key.into(), rule: rule.into() }
    }
}

/// Where the credential is read from, anew for every connection. systemd makes its copy of a
/// credential when the service starts, so that one changes with a restart only.
#[derive(Clone, Debug)]
pub struct Source {
    file: PathBuf,
    /// systemd keeps strangers out of its folder; the mode of a file in it tells nothing.
    guarded: bool,
    certificate: Option<CertificateFiles>,
}

impl Source {
    /// The systemd credential `hub-credential`, if `credentials_directory` (the environment's
    /// `CREDENTIALS_DIRECTORY`) has it, else the file of the settings.
    #[must_use]
    pub fn new(hub: &config::Hub, credentials_directory: Option<&Path>) -> Self {
        let of_systemd = credentials_directory
            .map(|directory| directory.join(SYSTEMD_CREDENTIAL))
            .filter(|file| file.exists());
        let certificate = match (&hub.certificate_file, &hub.private_key_file) {
            (Some(chain), Some(key)) => {
                Some(CertificateFiles { chain: chain.clone(), key: key.clone() })
            }
            _ => None,
        };
        Source {
            guarded: of_systemd.is_some(),
            file: of_systemd.unwrap_or_else(|| hub.credential_file.clone()),
            certificate,
        }
    }

    /// Where the credential is, for people.
    #[must_use]
    pub fn place(&self) -> String {
        if self.guarded {
            format!("the systemd credential {SYSTEMD_CREDENTIAL}")
        } else {
            self.file.display().to_string()
        }
    }

    /// What to do after a change, as the end of a sentence; empty if nothing.
    #[must_use]
    pub fn advice(&self) -> &'static str {
        if self.guarded {
            "; systemd reads its credentials only when the service starts, so after a change run \
             systemctl restart twinbootd"
        } else {
            ""
        }
    }

    /// The file that is read, to name it to people.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Reads and checks the credential. Blocks for the time of reading two small files.
    ///
    /// # Errors
    /// See [`CredentialError`].
    pub fn load(&self) -> Result<Credential, CredentialError> {
        let text = read_secret(&self.file, self.guarded)?;
        let string: ConnectionString = text.expose_secret().parse()?;
        if let Some(files) = &self.certificate {
            read_secret(&files.key, false)?;
        }
        string.with_files(self.certificate.clone())
    }
}

impl Source {
    /// Every form in which the secret of the present credential may stand in a text. None if there is
    /// no credential that can be used, or its secret is a file.
    #[must_use]
    pub fn secrets(&self) -> Vec<SecretString> {
        self.load().map(|credential| credential.secrets()).unwrap_or_default()
    }
}

/// Reads a file that nobody else may read.
fn read_secret(path: &Path, guarded: bool) -> Result<SecretString, CredentialError> {
    let failed = |source| CredentialError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !guarded {
        let mode = metadata.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(CredentialError::Exposed { path: path.to_owned(), mode });
        }
        let owner = metadata.uid();
        if owner != 0 && owner != nix::unistd::geteuid().as_raw() {
            return Err(CredentialError::ForeignOwner { path: path.to_owned(), owner });
        }
    }
    let mut text = String::new();
    file.take(MAX_FILE_BYTES).read_to_string(&mut text).map_err(failed)?;
    Ok(SecretString::from(text))
}

/// A device or module, and how it proves to be that.
#[derive(Debug)]
pub struct Credential {
    /// Who it is.
    pub identity: Identity,
    proof: Proof,
}

/// A device or module of a hub.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Identity {
    /// Host name of the hub.
    pub hub: String,
    /// Host name of the gateway between, if there is one.
    pub gateway: Option<String>,
    /// Device id.
    pub device: String,
    /// Module id.
    pub module: Option<String>,
}

/// `pump-01`, or `pump-01/updater` for a module.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.device)?;
        self.module.iter().try_for_each(|module| write!(f, "/{module}"))
    }
}

#[derive(Debug)]
enum Proof {
    Key(SecretSlice<u8>),
    Token(sas::Token),
    Certificate(CertificateFiles),
}

/// Files of an X.509 identity.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CertificateFiles {
    /// The device certificate with its chain, PEM.
    pub chain: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
}

/// What a CONNECT needs.
#[derive(Debug)]
pub struct Login {
    /// MQTT client id.
    pub client_id: String,
    /// MQTT user name.
    pub user_name: String,
    /// MQTT password: a SAS token; none with X.509.
    pub password: Option<SecretString>,
    /// Files for the TLS handshake; X.509 only.
    pub certificate: Option<CertificateFiles>,
    /// Host to connect to, if the settings name no other.
    pub host: String,
    /// Time from now until a new token can and must be made; `None` if nothing is to be renewed.
    pub renew_within: Option<Duration>,
}

impl Credential {
    /// Every form in which the secret may stand in a text.
    fn secrets(&self) -> Vec<SecretString> {
        match &self.proof {
            Proof::Key(key) => {
                let text = sas::encoded(key.expose_secret());
                [sas::escaped(&text), text].map(SecretString::from).into()
            }
            Proof::Token(token) => vec![token.text.clone()],
            Proof::Certificate(_) => Vec::new(),
        }
    }

    /// Makes a login, with a fresh token of `lifetime` where a key signs.
    ///
    /// # Errors
    /// A ready-made token is over.
    pub fn login(&self, now: WallTime, lifetime: Duration) -> Result<Login, CredentialError> {
        let Identity { hub, gateway, device, module } = &self.identity;
        let client_id = self.identity.to_string();
        let product = concat!("twinboot/", env!("CARGO_PKG_VERSION"));
        let mut login = Login {
            user_name: format!(
                "{hub}/{client_id}/?api-version={API_VERSION}&DeviceClientType={}",
                sas::escaped(product)
            ),
            client_id,
            password: None,
            certificate: None,
            host: gateway.as_ref().unwrap_or(hub).clone(),
            renew_within: None,
        };
        match &self.proof {
            Proof::Key(key) => {
                let lifetime_s = i64::try_from(lifetime.as_secs()).unwrap_or(i64::MAX);
                let expires_s = now.unix_s().saturating_add(lifetime_s);
                let resource = match module {
                    Some(module) => format!("{hub}/devices/{device}/modules/{module}"),
                    None => format!("{hub}/devices/{device}"),
                };
                login.password = Some(sas::sign(key, &resource, expires_s));
                login.renew_within = Some(lifetime);
            }
            Proof::Token(token) if token.expires <= now => {
                return Err(CredentialError::Expired { at: token.expires });
            }
            Proof::Token(token) => login.password = Some(token.text.clone()),
            Proof::Certificate(files) => login.certificate = Some(files.clone()),
        }
        Ok(login)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// Key and signatures of this test were calculated independently.
    const KEY: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
    const NOW: WallTime = WallTime::from_unix_ms(1_899_996_400_000);
    const HOUR: Duration = Duration::from_secs(3600);

    fn credential(text: &str) -> Result<Credential, CredentialError> {
        text.parse::<ConnectionString>()?.with_files(None)
    }

    fn password(login: &Login) -> &str {
        login.password.as_ref().unwrap().expose_secret()
    }

    #[test]
    fn logs_in_as_a_device() {
        let text =
            format!("HostName=contoso.azure-devices.net;DeviceId=pump-01;SharedAccessKey={KEY}\n");
        let login = credential(&text).unwrap().login(NOW, HOUR).unwrap();
        assert_eq!(login.client_id, "pump-01");
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(
            login.user_name,
            format!(
                "contoso.azure-devices.net/pump-01/?api-version=2021-04-12\
                 &DeviceClientType=twinboot%2F{version}"
            )
        );
        assert_eq!(login.host, "contoso.azure-devices.net");
        assert_eq!(login.renew_within, Some(HOUR));
        assert!(password(&login).ends_with("&se=1900000000"), "an hour after now");
        assert!(
            password(&login).contains("sig=VvpxCjNknWB%2FTKyBRuukZyCE16ntj2TS%2FpEGdd4Za9Y%3D")
        );
    }

    #[test]
    fn logs_in_as_a_module_through_a_gateway() {
        let text = format!(
            "gatewayhostname=edge.local;HostName=h;DeviceId=d;ModuleId=m;SharedAccessKey={KEY}"
        );
        let login = credential(&text).unwrap().login(NOW, HOUR).unwrap();
        assert_eq!(login.client_id, "d/m");
        assert!(login.user_name.starts_with("h/d/m/?api-version="));
        assert_eq!(login.host, "edge.local");
        assert!(password(&login).contains("sr=h%2Fdevices%2Fd%2Fmodules%2Fm&"));
    }

    #[test]
    fn a_ready_made_token_is_used_until_it_ends() {
        let text = "HostName=h;DeviceId=d;SharedAccessSignature=SharedAccessSignature \
                    sr=h%2Fdevices%2Fd&sig=abc%3D&se=1899999999";
        let login = credential(text).unwrap().login(NOW, HOUR).unwrap();
        assert_eq!(
            password(&login),
            "SharedAccessSignature sr=h%2Fdevices%2Fd&sig=abc%3D&se=1899999999"
        );
        assert_eq!(login.renew_within, None);
        let late = WallTime::from_unix_ms(1_900_000_000_000);
        let error = credential(text).unwrap().login(late, HOUR).unwrap_err();
        assert_eq!(
            error.to_string(),
            "SharedAccessSignature: expired at 2030-03-17T17:46:39.000Z, \
             put a new one into the credential file"
        );
    }

    #[test]
    fn a_certificate_needs_no_password() {
        let files = CertificateFiles { chain: "/c.pem".into(), key: "/k.pem".into() };
        for text in ["HostName=h;DeviceId=d;x509=true", "HostName=h;DeviceId=d"] {
            let string: ConnectionString = text.parse().unwrap();
            let login = string.with_files(Some(files.clone())).unwrap().login(NOW, HOUR).unwrap();
            assert!(login.password.is_none());
            assert_eq!(login.certificate, Some(files.clone()));
        }
    }

    #[test]
    fn what_is_printed_for_debugging_holds_no_secret() {
        for proof in [
            format!("SharedAccessKey={KEY}"),
            "SharedAccessSignature=SharedAccessSignature sr=a&sig=MDEyMz&se=9999999999".to_owned(),
        ] {
            let credential = credential(&format!("HostName=h;DeviceId=d;{proof}")).unwrap();
            let login = credential.login(NOW, HOUR).unwrap();
            let printed = format!("{credential:?} {login:?}");
            assert!(!printed.contains("MDEyMz") && !printed.contains("sig="), "{printed}");
        }
    }

    fn source(file: &Path) -> Source {
        let hub = config::Hub { credential_file: file.to_owned(), ..config::Hub::default() };
        Source::new(&hub, None)
    }

    #[test]
    fn refuses_a_file_that_others_can_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("hub-credential");
        fs::write(&file, format!("HostName=h;DeviceId=d;SharedAccessKey={KEY}")).unwrap();
        for (mode, usable) in [
            (0o600, true),
            (0o400, true),
            (0o640, false),
            (0o604, false),
            (0o620, false),
            (0o644, false),
        ] {
            fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
            let loaded = source(&file).load();
            assert_eq!(loaded.is_ok(), usable, "{mode:o}");
            if let Err(error) = loaded {
                assert!(error.to_string().contains("run chmod 0600"), "{error}");
            }
        }
    }

    #[test]
    fn refuses_a_private_key_that_others_can_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for (name, text) in [("credential", "HostName=h;DeviceId=d;x509=true"), ("key.pem", "k")] {
            fs::write(path(name), text).unwrap();
            fs::set_permissions(path(name), Permissions::from_mode(0o600)).unwrap();
        }
        let hub = config::Hub {
            credential_file: path("credential"),
            certificate_file: Some(path("chain.pem")),
            private_key_file: Some(path("key.pem")),
            ..config::Hub::default()
        };
        assert!(Source::new(&hub, None).load().is_ok());
        fs::set_permissions(path("key.pem"), Permissions::from_mode(0o644)).unwrap();
        let error = Source::new(&hub, None).load().unwrap_err();
        assert!(error.to_string().contains("key.pem has mode 0644"), "{error}");
    }

    #[test]
    fn the_credential_of_systemd_goes_first() {
        let folder = tempfile::tempdir().unwrap();
        let hub = config::Hub::default();
        let source = Source::new(&hub, Some(folder.path()));
        assert_eq!(source.place(), hub.credential_file.display().to_string());
        assert_eq!(source.advice(), "");
        let file = folder.path().join(SYSTEMD_CREDENTIAL);
        fs::write(&file, format!("HostName=h;DeviceId=d;SharedAccessKey={KEY}")).unwrap();
        // systemd guards the folder and may give the group a bit by an ACL.
        fs::set_permissions(&file, Permissions::from_mode(0o440)).unwrap();
        let source = Source::new(&hub, Some(folder.path()));
        assert_eq!(source.place(), "the systemd credential hub-credential");
        assert!(source.advice().contains("systemctl restart twinbootd"));
        assert_eq!(source.load().unwrap().identity.to_string(), "d");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = source(Path::new("/nowhere/hub-credential")).load().unwrap_err();
        assert_eq!(error.to_string(), "cannot read the credential file /nowhere/hub-credential");
    }
}
