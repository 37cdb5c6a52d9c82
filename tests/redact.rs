//! What is cut out of text that leaves the device, and what stays readable.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use proptest::prelude::*;
use secrecy::SecretString;
use twinboot::redact::{CUT, Redactor};

/// A key as the hub makes them.
const OWN_KEY: &str = "c2VjcmV0LWtleS1vZi1waS0xLW5ldmVyLXRvLWJlLXNlZW4=";

fn redactor() -> Redactor {
    Redactor::new(vec![SecretString::from(OWN_KEY)]).unwrap()
}

#[test]
fn secrets_are_cut_out_and_the_rest_stays() {
    // Each with what must be gone, and the whole of what stays.
    for (text, secret, rest) in [
        // Azure.
        (
            "HostName=h.azure-devices.net;DeviceId=pi-1;SharedAccessKey=aGVsbG8=",
            "aGVsbG8",
            "HostName=h.azure-devices.net;DeviceId=pi-1;SharedAccessKey=[redacted]",
        ),
        (
            "password is SharedAccessSignature sr=h%2Fdevices&sig=ab%2Bc&se=1",
            "ab%2Bc",
            "password is [redacted] [redacted]",
        ),
        ("sr=h&sig=ab%2Bc%3D&se=1700000000", "ab%2Bc", "sr=h&sig=[redacted]&se=1700000000"),
        ("primaryKey: 'aGVsbG8='", "aGVsbG8", "primaryKey: [redacted]"),
        // The device's own, without any word that tells what it is.
        (
            "got c2VjcmV0LWtleS1vZi1waS0xLW5ldmVyLXRvLWJlLXNlZW4= here",
            OWN_KEY,
            "got [redacted] here",
        ),
        // URLs.
        (
            "GET https://me:hunter2@h.example/a/b.img?sv=1&sig=xyz failed",
            "hunter2",
            "GET https://[redacted]@h.example/a/b.img?[redacted] failed",
        ),
        ("at <http://h:8080/x#token-hunter2>.", "hunter2", "at <http://h:8080/x#[redacted]>."),
        ("mqtt://u:p@ss@h/x", "ss@", "mqtt://[redacted]@h/x"),
        ("rsync backup:hunter2@nas.local now", "hunter2", "rsync backup:[redacted]@nas.local now"),
        // Headers and tokens.
        ("> Authorization: Basic aHVudGVyMg== x", "aHVudGVyMg", "> Authorization: [redacted]"),
        ("{\"authorization\":\"hunter2\"}", "hunter2", "{\"authorization\": [redacted]"),
        ("Cookie: id=hunter2; b=c", "hunter2", "Cookie: [redacted]"),
        ("x-api-key: hunter2", "hunter2", "x-api-key: [redacted]"),
        ("sent bearer hunter2, refused", "hunter2", "sent bearer [redacted], refused"),
        (
            "jwt eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln was refused",
            "eyJ",
            "jwt [redacted] was refused",
        ),
        // Assignments.
        ("password=correct horse battery", "horse", "password=[redacted]"),
        ("Password: hunter2", "hunter2", "Password: [redacted]"),
        ("DB_PASSWORD='hunter 2' user=x", "hunter", "DB_PASSWORD=[redacted] user=x"),
        ("wpa psk=\"hunter\\\"2\" ssid=home", "hunter", "wpa psk=[redacted] ssid=home"),
        (
            "{\"client_secret\": \"hunter2\", \"a\": 1}",
            "hunter2",
            "{\"client_secret\": [redacted], \"a\": 1}",
        ),
        (
            "body {\\\"token\\\":\\\"hunter2\\\",\\\"a\\\":1}",
            "hunter2",
            "body {\\\"token\\\":[redacted],\\\"a\\\":1}",
        ),
        ("api_key => hunter2 a=1", "hunter2", "api_key => [redacted] a=1"),
        ("access_token=hunter2&x=1", "hunter2", "access_token=[redacted]&x=1"),
        ("token: hunter2 is over", "hunter2", "token: [redacted] is over"),
        ("run tool --password hunter2 --fast", "hunter2", "run tool --password [redacted] --fast"),
        (
            "run tool --api-token=hunter2 --fast",
            "hunter2",
            "run tool --api-token=[redacted] --fast",
        ),
        ("token: abcDEFghij was refused", "abcDEF", "token: [redacted] was refused"),
        ("the password is hunter, they say", "hunter", "the password is [redacted], they say"),
        ("Secret was set to 'hunter2'", "hunter", "Secret was set to [redacted]"),
        ("the API key is 77ab", "77ab", "the API key is [redacted]"),
        ("passphrase hunter2 was refused", "hunter2", "passphrase [redacted] was refused"),
        ("with password hunTer", "hunTer", "with password [redacted]"),
        // Keys by their look.
        ("got /9j4AAQSkZJRgABAQ/EAYABgAAD2wBDAAgG/BgcGBQgH then", "SkZJRg", "got [redacted] then"),
        (
            "-----BEGIN PRIVATE KEY-----\nMIIEvQ\nhunter2\n-----END PRIVATE KEY-----\nthen",
            "MIIEvQ",
            "[redacted] then",
        ),
        ("-----BEGIN EC PRIVATE KEY-----\nMHcCAQEE", "MHcCAQEE", "[redacted]"),
        ("x MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7 y", "MIIE", "x [redacted] y"),
        ("hex 00112233445566778899aabbccddeeff0011 y", "8899aabb", "hex [redacted] y"),
        // What hides the name from the eye hides nothing.
        ("pass\u{0}word=hunter2", "hunter2", "password=[redacted]"),
        ("pass\u{1b}[1mword\u{1b}[0m=hunter2", "hunter2", "password=[redacted]"),
        ("pass\u{200b}word=hunter2", "hunter2", "password=[redacted]"),
        ("a\npassword=hunter2\nb", "hunter2", "a password=[redacted] b"),
    ] {
        let found = redactor().redact(text);
        assert!(!found.contains(secret), "{text:?}: {found}");
        assert_eq!(found, rest, "{text:?}");
        assert_eq!(redactor().redact(&found), found, "twice changes nothing");
    }
}

#[test]
fn what_an_operator_needs_stays() {
    for text in [
        "Failed to start app.service - The application.",
        "app.service: Main process exited, code=killed, status=11/SEGV",
        "Timed out waiting for device dev-disk-by\\x2dpartlabel-data.device - /dev/disk/by-partlabel/data.",
        "mount /dev/disk/by-partuuid/0b9c3b2a-5a1f-4f4e-9d5c-0d3f4a5b6c7d: wrong fs type",
        "EXT4-fs error (device mmcblk0p5): ext4_lookup:1855: inode #1234: comm cp: deleted",
        "cannot read the private key: No such file or directory",
        "cannot read the credential file /var/lib/twinboot/hub-credential: Permission denied",
        "Failed password for root from 10.0.0.1 port 22",
        "no hub session with an answered report: the hub refused the credential",
        "SharedAccessKey: is missing: must be there",
        "the password is wrong, and the key is not valid",
        "the passphrase is required.",
        "NetworkManager-wait-online-and-some-other-long-words.service",
        "/usr/lib/Python3/site/packages/Thing/core/X86/main failed",
        "GET https://h.example:8443/rootfs-2.0.0.img.zst failed",
        "user@1000.service: Deactivated successfully.",
        "received signal=9",
        "Grüße, 世界",
    ] {
        assert_eq!(redactor().redact(text), text);
    }
}

#[test]
fn nothing_that_acts_gets_through() {
    let found = redactor().redact("\u{1b}]0;title\u{7}a\u{8}\u{9b}b\u{202e}c\r\n\td\u{feff}\u{7f}");
    assert_eq!(found, "abc d");
}

proptest! {
    /// Whatever stands around it: the device's own key and one in an assignment do not get out.
    #[test]
    fn a_known_key_never_gets_out(before in "[ -~]{0,40}", after in "\\PC{0,40}") {
        let found = redactor().redact(&format!("{before}{OWN_KEY}{after}"));
        prop_assert!(!found.contains("c2VjcmV0LWtleS1"), "{}", found);
        let found = redactor().redact(&format!("{before} password={OWN_KEY}{after}"));
        prop_assert!(!found.contains("c2VjcmV0LWtleS1"), "{}", found);
    }

    #[test]
    fn any_text_becomes_one_harmless_line(text in any::<String>()) {
        let found = redactor().redact(&text);
        prop_assert!(!found.chars().any(char::is_control), "{:?}", found);
        prop_assert!(found.len() <= text.len() + CUT.len() * (text.len() + 1));
    }
}

#[test]
fn a_key_that_is_printed_line_by_line_is_cut_out_of_every_line() {
    let said = |lines: &[(&str, &str)]| -> Vec<(String, String)> {
        let own = |(who, what): &(&str, &str)| ((*who).to_owned(), (*what).to_owned());
        lines.iter().map(own).collect()
    };
    let whole = [
        ("app", "-----BEGIN RSA PRIVATE KEY-----"),
        ("app", "MIIEvQIBADANBgkq"),
        ("kernel", "hello"),
        ("app", "hunter2="),
        ("app", "-----END RSA PRIVATE KEY-----"),
        ("app", "hello"),
    ];
    let cut = [("app", CUT), ("app", CUT), ("kernel", "hello"), ("app", CUT)];
    let end = ("app", "-----END RSA PRIVATE KEY-----");
    for (lines, expected) in [
        (&whole[..], said(&[&cut[..], &[end, ("app", "hello")]].concat())),
        // Only its begin was kept, or only its end.
        (&whole[..4], said(&cut)),
        (&whole[2..], said(&[cut[2], cut[3], end, ("app", "hello")])),
        (&[("app", "hunter2"), ("app", "hello")], said(&[("app", "hunter2"), ("app", "hello")])),
    ] {
        assert_eq!(redactor().redact_all(said(lines)), expected);
    }
}
