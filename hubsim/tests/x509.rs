//! Devices that show a certificate in place of a token.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod support;

use hubsim::{Hub, Options};
use openssl::asn1::Asn1Time;
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkcs12::Pkcs12;
use openssl::pkey::{PKey, Private};
use openssl::x509::extension::BasicConstraints;
use openssl::x509::{X509, X509NameBuilder};
use rumqttc::{ConnectReturnCode as Code, MqttOptions, TlsConfiguration};
use support::{
    DEVICE, Device, Service, anonymous_options, device_token, hub, now, refusal, user_name,
};

struct Identity {
    certificate: X509,
    key: PKey<Private>,
}

impl Identity {
    /// A certificate of this name, signed by `issuer` or by itself, valid to `days` from now.
    fn new(name: &str, issuer: Option<&Identity>, is_authority: bool, days: i64) -> Self {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
        let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
        let mut subject = X509NameBuilder::new().unwrap();
        subject.append_entry_by_text("CN", name).unwrap();
        let subject = subject.build();
        let mut builder = X509::builder().unwrap();
        builder.set_version(2).unwrap();
        let serial = BigNum::from_u32(7).unwrap().to_asn1_integer().unwrap();
        builder.set_serial_number(&serial).unwrap();
        builder.set_subject_name(&subject).unwrap();
        let issuer_name = issuer.map_or(&*subject, |issuer| issuer.certificate.subject_name());
        builder.set_issuer_name(issuer_name).unwrap();
        builder.set_not_before(&Asn1Time::from_unix(now() - 10 * 86_400).unwrap()).unwrap();
        builder.set_not_after(&Asn1Time::from_unix(now() + days * 86_400).unwrap()).unwrap();
        builder.set_pubkey(&key).unwrap();
        if is_authority {
            let constraints = BasicConstraints::new().critical().ca().build().unwrap();
            builder.append_extension(constraints).unwrap();
        }
        let signing = issuer.map_or(&key, |issuer| &issuer.key);
        builder.sign(signing, MessageDigest::sha256()).unwrap();
        Self { certificate: builder.build(), key }
    }

    fn thumbprint(&self, digest: MessageDigest) -> String {
        let bytes = self.certificate.digest(digest).unwrap();
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn pem(&self) -> String {
        String::from_utf8(self.certificate.to_pem().unwrap()).unwrap()
    }

    fn options(&self, hub: &Hub, id: &str, chain: &[&Identity]) -> MqttOptions {
        let mut pkcs12 = Pkcs12::builder();
        pkcs12.name("device").pkey(&self.key).cert(&self.certificate);
        let mut others = openssl::stack::Stack::new().unwrap();
        for identity in chain {
            others.push(identity.certificate.clone()).unwrap();
        }
        pkcs12.ca(others);
        let der = pkcs12.build2("secret").unwrap().to_der().unwrap();
        let mut options = anonymous_options(hub, id);
        options.set_transport(rumqttc::Transport::Tls(TlsConfiguration::SimpleNative {
            ca: hub.ca_pem().into_bytes(),
            client_auth: Some((der, "secret".to_owned())),
        }));
        options.set_credentials(user_name(hub, id), "");
        options
    }
}

#[tokio::test]
async fn a_self_signed_certificate_is_known_by_its_thumbprint() {
    let hub = hub().await;
    let (good, other) = (Identity::new("x", None, false, 10), Identity::new("x", None, false, 10));
    for (id, digest) in [("short", MessageDigest::sha1()), ("long", MessageDigest::sha256())] {
        hub.add_x509_device(id, &good.thumbprint(digest)).unwrap();
        Device::connect(good.options(&hub, id, &[])).await.unwrap();
        assert_eq!(refusal(other.options(&hub, id, &[])).await, Code::NotAuthorized);
        let mut none = anonymous_options(&hub, id);
        none.set_credentials(user_name(&hub, id), "");
        assert_eq!(refusal(none).await, Code::NotAuthorized);
        assert_eq!(hub.twin(id).unwrap()["authenticationType"], "selfSigned");
    }
    assert!(hub.add_x509_device("bad", "123").is_err());

    // Registered over REST, in capitals with colons, as the second of two.
    let print = good.thumbprint(MessageDigest::sha1()).to_uppercase();
    let colons: Vec<_> = print.as_bytes().chunks(2).map(String::from_utf8_lossy).collect();
    let body = serde_json::json!({ "authentication": { "type": "selfSigned", "x509Thumbprint": {
        "primaryThumbprint": other.thumbprint(MessageDigest::sha1()),
        "secondaryThumbprint": colons.join(":"),
    }}});
    let answer = Service::of(&hub).put("/devices/both", &body.to_string()).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    for identity in [&good, &other] {
        Device::connect(identity.options(&hub, "both", &[])).await.unwrap();
    }
}

#[tokio::test]
async fn the_registry_decides_between_certificate_and_token() {
    let hub = hub().await;
    let certificate = Identity::new(DEVICE, None, false, 10);
    // A device with keys: the certificate does not help, the token does.
    assert_eq!(refusal(certificate.options(&hub, DEVICE, &[])).await, Code::NotAuthorized);
    let mut options = certificate.options(&hub, DEVICE, &[]);
    options.set_credentials(user_name(&hub, DEVICE), device_token(&hub, DEVICE, now() + 600));
    Device::connect(options).await.unwrap();
}

#[tokio::test]
async fn a_signed_certificate_needs_a_registered_authority_and_the_devices_name() {
    let hub = hub().await;
    let root = Identity::new("factory", None, true, 100);
    let line = Identity::new("line 1", Some(&root), true, 100);
    let stranger = Identity::new("factory", None, true, 100);
    hub.add_ca_signed_device("pump").unwrap();
    let direct = Identity::new("pump", Some(&root), false, 10);
    assert_eq!(refusal(direct.options(&hub, "pump", &[])).await, Code::NotAuthorized);

    hub.add_device_authority(&root.pem()).unwrap();
    Device::connect(direct.options(&hub, "pump", &[])).await.unwrap();
    let by_line = Identity::new("pump", Some(&line), false, 10);
    Device::connect(by_line.options(&hub, "pump", &[&line])).await.unwrap();
    for (what, options) in [
        ("chain missing", by_line.options(&hub, "pump", &[])),
        ("another name", Identity::new("Pump", Some(&root), false, 10).options(&hub, "pump", &[])),
        (
            "another authority",
            Identity::new("pump", Some(&stranger), false, 10).options(&hub, "pump", &[]),
        ),
        ("self-signed", Identity::new("pump", None, false, 10).options(&hub, "pump", &[])),
        ("out of date", Identity::new("pump", Some(&root), false, -1).options(&hub, "pump", &[])),
    ] {
        assert_eq!(refusal(options).await, Code::NotAuthorized, "{what}");
    }
    // The program is told of authorities by files; one that is known already is not kept twice.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("factory.pem");
    std::fs::write(&file, root.pem()).unwrap();
    let told =
        Options { device_authorities: vec![file.clone(), file.clone()], ..Options::default() };
    let told = Hub::start(told).await.unwrap();
    told.add_ca_signed_device("pump").unwrap();
    Device::connect(direct.options(&told, "pump", &[])).await.unwrap();
    std::fs::write(&file, "nonsense").unwrap();
    let nonsense = Options { device_authorities: vec![file], ..Options::default() };
    let refused = Hub::start(nonsense).await.unwrap_err().to_string();
    assert!(refused.contains("factory.pem is not a certificate in PEM"), "{refused}");

    // By the hub's clock, not the machine's.
    hub.set_clock_offset(20 * 86_400);
    assert_eq!(refusal(direct.options(&hub, "pump", &[])).await, Code::NotAuthorized);
    assert!(hub.add_device_authority("nonsense").is_err());
}
