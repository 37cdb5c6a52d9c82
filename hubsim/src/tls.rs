//! TLS as IoT Hub has it: 1.2 and 1.3, client certificates asked for but not demanded. And the
//! hub's own certificate authority.

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::OnceLock;

use openssl::asn1::Asn1Time;
use openssl::bn::{BigNum, MsbOption};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::ssl::{Ssl, SslAcceptor, SslMethod, SslVerifyMode};
use openssl::x509::extension::{
    AuthorityKeyIdentifier, BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName,
    SubjectKeyIdentifier,
};
use openssl::x509::{X509, X509Builder, X509NameBuilder};
use tokio::net::TcpStream;
use tokio_openssl::SslStream;

use crate::access::ClientCertificate;
use crate::core::Core;
use crate::events::EventKind;

/// IoT Hub's suites are ECDHE-RSA, so the server key is RSA.
const RSA_BITS: u32 = 2048;
const AUTHORITY_DAYS: u32 = 3650;
/// Some clients refuse certificates that live longer than 825 days.
const LEAF_DAYS: u32 = 800;

/// A certificate and its key.
#[derive(Clone)]
pub(crate) struct Credential {
    pub(crate) certificate: X509,
    pub(crate) key: PKey<Private>,
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credential").finish_non_exhaustive()
    }
}

/// A new private authority that signs the hub's certificate.
pub(crate) fn new_authority() -> Result<Credential, ErrorStack> {
    // Making an RSA key takes long compared with everything else; hubs of one process share it.
    let key = shared_key(&AUTHORITY_KEY)?;
    let mut builder = certificate("hubsim root", AUTHORITY_DAYS, &key)?;
    builder.append_extension(BasicConstraints::new().critical().ca().build()?)?;
    builder.append_extension(KeyUsage::new().critical().key_cert_sign().crl_sign().build()?)?;
    let identifier = SubjectKeyIdentifier::new().build(&builder.x509v3_context(None, None))?;
    builder.append_extension(identifier)?;
    let name = name("hubsim root")?;
    builder.set_issuer_name(&name)?;
    builder.sign(&key, MessageDigest::sha256())?;
    Ok(Credential { certificate: builder.build(), key })
}

/// A server certificate for these names and addresses.
pub(crate) fn new_server(
    authority: &Credential,
    names: &[String],
) -> Result<Credential, ErrorStack> {
    let key = shared_key(&SERVER_KEY)?;
    let common_name = names.first().map_or("hubsim", String::as_str);
    let mut builder = certificate(common_name, LEAF_DAYS, &key)?;
    builder.set_issuer_name(authority.certificate.subject_name())?;
    builder.append_extension(BasicConstraints::new().build()?)?;
    builder.append_extension(
        KeyUsage::new().critical().digital_signature().key_encipherment().build()?,
    )?;
    builder.append_extension(ExtendedKeyUsage::new().server_auth().build()?)?;
    let mut alternatives = SubjectAlternativeName::new();
    for name in names {
        match name.parse::<IpAddr>() {
            Ok(address) => alternatives.ip(&address.to_string()),
            Err(_) => alternatives.dns(name),
        };
    }
    let context = builder.x509v3_context(Some(&authority.certificate), None);
    let alternatives = alternatives.build(&context)?;
    let issuer = AuthorityKeyIdentifier::new().keyid(true).build(&context)?;
    builder.append_extension(alternatives)?;
    builder.append_extension(issuer)?;
    builder.sign(&authority.key, MessageDigest::sha256())?;
    Ok(Credential { certificate: builder.build(), key })
}

static AUTHORITY_KEY: OnceLock<PKey<Private>> = OnceLock::new();
static SERVER_KEY: OnceLock<PKey<Private>> = OnceLock::new();

fn shared_key(slot: &OnceLock<PKey<Private>>) -> Result<PKey<Private>, ErrorStack> {
    if let Some(key) = slot.get() {
        return Ok(key.clone());
    }
    let key = PKey::from_rsa(Rsa::generate(RSA_BITS)?)?;
    Ok(slot.get_or_init(|| key).clone())
}

fn name(common_name: &str) -> Result<openssl::x509::X509Name, ErrorStack> {
    let mut name = X509NameBuilder::new()?;
    // A common name holds 64 characters; the full name is in the alternatives.
    let common_name: String = common_name.chars().take(64).collect();
    name.append_entry_by_text("CN", &common_name)?;
    Ok(name.build())
}

fn certificate(
    common_name: &str,
    days: u32,
    key: &PKey<Private>,
) -> Result<X509Builder, ErrorStack> {
    let mut builder = X509::builder()?;
    builder.set_version(2)?;
    let mut serial = BigNum::new()?;
    serial.rand(127, MsbOption::MAYBE_ZERO, false)?;
    let serial = serial.to_asn1_integer()?;
    builder.set_serial_number(&serial)?;
    let subject = name(common_name)?;
    builder.set_subject_name(&subject)?;
    // From yesterday on: clients' clocks differ.
    let yesterday = time::OffsetDateTime::now_utc().unix_timestamp().saturating_sub(86_400);
    let (start, end) = (Asn1Time::from_unix(yesterday)?, Asn1Time::days_from_now(days)?);
    builder.set_not_before(&start)?;
    builder.set_not_after(&end)?;
    builder.set_pubkey(key)?;
    Ok(builder)
}

/// Accepts TLS 1.2 and 1.3. Any client certificate passes here; the registry decides on it.
pub(crate) fn acceptor(server: &Credential, authority: &X509) -> Result<SslAcceptor, ErrorStack> {
    let mut builder = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server())?;
    builder.set_private_key(&server.key)?;
    builder.set_certificate(&server.certificate)?;
    builder.add_extra_chain_cert(authority.clone())?;
    builder.check_private_key()?;
    builder.set_verify_callback(SslVerifyMode::PEER, |_, _| true);
    builder.set_session_id_context(b"hubsim")?;
    Ok(builder.build())
}

/// Shakes hands with a client.
pub(crate) async fn accept(
    acceptor: &SslAcceptor,
    stream: TcpStream,
) -> io::Result<SslStream<TcpStream>> {
    stream.set_nodelay(true)?;
    let ssl = Ssl::new(acceptor.context())?;
    let mut stream = SslStream::new(ssl, stream)?;
    match Pin::new(&mut stream).accept().await {
        Ok(()) => Ok(stream),
        Err(error) => Err(io::Error::other(error)),
    }
}

/// The certificate that a client showed.
pub(crate) fn client_certificate<S>(stream: &SslStream<S>) -> Option<ClientCertificate> {
    let leaf = stream.ssl().peer_certificate()?;
    let chain = stream.ssl().peer_cert_chain();
    let chain = chain.into_iter().flatten().map(ToOwned::to_owned).collect();
    Some(ClientCertificate { leaf, chain })
}

/// A failed handshake is most often a client that does not trust the hub's authority: worth a line.
pub(crate) fn tell_failure(core: &Core, error: &io::Error) {
    let message = format!("TLS handshake failed: {error}");
    core.tell(None, EventKind::Warning { message });
}
