//! What somebody asked for, as values that cannot be wrong: they are built only by parsing.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use url::Url;

/// Longest image URL; leaves room for it in a twin string of 4096 bytes.
pub const MAX_IMAGE_URL_BYTES: usize = 2048;
/// Longest version; it has to be read by people in a table.
pub const MAX_VERSION_BYTES: usize = 128;

/// A value that breaks its rule. The text carries the value (without secrets) and the rule.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{value}: {rule}")]
pub struct ParseError {
    /// The value as it may be shown to people.
    pub value: String,
    /// What would have been right.
    pub rule: String,
}

impl ParseError {
    fn new(value: impl Into<String>, rule: impl Into<String>) -> Self {
        ParseError { value: value.into(), rule: rule.into() }
    }
}

/// Names one run of an update, in reports and logs.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunId(pub String);

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Version of an image: 1 to 128 bytes of visible ASCII.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version(String);

impl FromStr for Version {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let fits = (1..=MAX_VERSION_BYTES).contains(&text.len());
        if fits && text.bytes().all(|byte| byte.is_ascii_graphic()) {
            Ok(Version(text.to_owned()))
        } else {
            let shown: String = text.chars().take(64).flat_map(char::escape_default).collect();
            Err(ParseError::new(
                format!("\"{shown}\""),
                format!("must be 1 to {MAX_VERSION_BYTES} visible ASCII characters"),
            ))
        }
    }
}

impl TryFrom<String> for Version {
    type Error = ParseError;

    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<Version> for String {
    fn from(version: Version) -> String {
        version.0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A SHA-256 digest. Parsed from 64 hexadecimal digits, with or without `sha256:` before them.
#[derive(Clone, Copy, Eq, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest with these bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Digest(bytes)
    }
}

impl FromStr for Digest {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let wrong = || {
            let shown: String = text.chars().take(80).flat_map(char::escape_default).collect();
            ParseError::new(
                format!("\"{shown}\""),
                "must be a SHA-256 digest: 64 hexadecimal digits, optionally after \"sha256:\"",
            )
        };
        let hex = match text.split_once(':') {
            Some((name, hex)) if name.eq_ignore_ascii_case("sha256") => hex,
            Some(_) => return Err(wrong()),
            None => text,
        };
        let digits: Vec<u8> = hex
            .chars()
            .map(|digit| digit.to_digit(16).and_then(|value| u8::try_from(value).ok()))
            .collect::<Option<_>>()
            .ok_or_else(wrong)?;
        let (pairs, rest) = digits.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(wrong());
        }
        let bytes: Vec<u8> = pairs.iter().map(|[high, low]| high << 4 | low).collect();
        bytes.try_into().map(Digest).map_err(|_| wrong())
    }
}

impl TryFrom<String> for Digest {
    type Error = ParseError;

    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

/// `sha256:` and 64 lower-case hexadecimal digits.
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where an image is. `https`, or `http` or `file` where the caller of the parser allows it.
///
/// Its text forms leave out user, password and query, which may be secrets;
/// [`ImageUrl::with_secrets`] alone has them.
#[derive(Clone, Eq, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ImageUrl(Url);

impl ImageUrl {
    /// The URL as it must be fetched. Never log or report it.
    #[must_use]
    pub fn with_secrets(&self) -> &Url {
        &self.0
    }

    /// Whether the transport protects the image on its way: `https`, or a local file.
    #[must_use]
    pub fn is_protected(&self) -> bool {
        matches!(self.0.scheme(), "https" | "file")
    }

    /// Whether this is a file of the device itself.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.0.scheme() == "file"
    }

    /// The URL of the digest file that may lie beside the image: `.sha256` appended to the path.
    #[must_use]
    pub fn digest_file(&self) -> ImageUrl {
        let mut url = self.0.clone();
        let path = format!("{}.sha256", url.path());
        url.set_path(&path);
        ImageUrl(url)
    }
}

impl FromStr for ImageUrl {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        // The text itself may hold secrets, so an unreadable URL is not shown.
        let hidden = || format!("a text of {} bytes", text.len());
        if text.len() > MAX_IMAGE_URL_BYTES {
            return Err(ParseError::new(
                hidden(),
                format!("a URL must not be longer than {MAX_IMAGE_URL_BYTES} bytes"),
            ));
        }
        let url = Url::parse(text).map_err(|error| {
            ParseError::new(hidden(), format!("must be an absolute https URL ({error})"))
        })?;
        let shown = ImageUrl(url);
        // What must be escaped in it takes three bytes for one.
        if shown.0.as_str().len() > MAX_IMAGE_URL_BYTES {
            return Err(ParseError::new(
                hidden(),
                format!("a URL must not be longer than {MAX_IMAGE_URL_BYTES} bytes once escaped"),
            ));
        }
        let usable = match shown.0.scheme() {
            "https" | "http" => shown.0.has_host() && shown.0.host_str() != Some(""),
            "file" => shown.0.to_file_path().is_ok(),
            _ => false,
        };
        if !usable {
            return Err(ParseError::new(shown.to_string(), "must be an https URL with a host"));
        }
        if shown.0.fragment().is_some() {
            return Err(ParseError::new(shown.to_string(), "must not have a fragment (#...)"));
        }
        Ok(shown)
    }
}

/// The URL without user, password and query.
impl fmt::Display for ImageUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = self.0.clone();
        shown.set_query(None);
        shown.set_fragment(None);
        if !shown.username().is_empty() || shown.password().is_some() {
            // Both fail only for URLs that cannot have user information in the first place.
            let _ = shown.set_username("");
            let _ = shown.set_password(None);
        }
        f.write_str(shown.as_str())
    }
}

impl fmt::Debug for ImageUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// An update that somebody asked for.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Where the image is.
    pub url: ImageUrl,
    /// The version the caller expects in it.
    pub version: Option<Version>,
    /// SHA-256 of the file at `url`, as fetched (before decompression).
    pub digest: Option<Digest>,
    /// Length of the file at `url`, in bytes.
    pub size_bytes: Option<u64>,
}

/// Why a request cannot become a [`Job`].
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{key} = {problem}")]
pub struct JobError {
    /// The key, as the caller spells it.
    pub key: String,
    /// Value and rule.
    pub problem: ParseError,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn shows_urls_without_their_secrets() {
        for (text, shown) in [
            ("https://h/fw.img", "https://h/fw.img"),
            ("https://user:secret@h:8443/fw.img?sig=secret&se=1", "https://h:8443/fw.img"),
            ("http://h/a%20b?secret", "http://h/a%20b"),
            ("file:///srv/fw.img", "file:///srv/fw.img"),
        ] {
            let url: ImageUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), shown);
            assert!(!format!("{url:?}").contains("secret"));
            assert_eq!(url.with_secrets().as_str(), text);
        }
    }

    #[test]
    fn refuses_urls_it_cannot_use() {
        for (text, complaint) in [
            ("fw.img", "must be an absolute https URL"),
            ("", "must be an absolute https URL"),
            ("httpsfoo:bar", "must be an https URL with a host"),
            ("ftp://h/fw.img", "must be an https URL with a host"),
            ("javascript:alert(1)", "must be an https URL with a host"),
            ("https://h/fw.img#part", "must not have a fragment"),
            ("https://", "must be an absolute https URL"),
        ] {
            let error = text.parse::<ImageUrl>().unwrap_err().to_string();
            assert!(error.contains(complaint), "{text}: {error}");
        }
        let long = format!("https://h/{}", "a".repeat(MAX_IMAGE_URL_BYTES));
        assert!(long.parse::<ImageUrl>().unwrap_err().to_string().contains("2048 bytes"));
    }

    #[test]
    fn unreadable_urls_do_not_leak_into_the_error() {
        let error = "https://user:secret@[bad/fw?sig=secret".parse::<ImageUrl>().unwrap_err();
        assert!(!error.to_string().contains("secret"), "{error}");
    }

    #[test]
    fn the_digest_file_lies_beside_the_image_and_keeps_the_query() {
        let url: ImageUrl = "https://h/d/fw.img.zst?sig=1".parse().unwrap();
        assert_eq!(
            url.digest_file().with_secrets().as_str(),
            "https://h/d/fw.img.zst.sha256?sig=1"
        );
    }

    #[test]
    fn refuses_digests_that_are_none() {
        let hex = "ab".repeat(32);
        assert_eq!(
            format!("SHA256:{hex}").parse::<Digest>().unwrap().to_string(),
            format!("sha256:{hex}")
        );
        for text in ["", "sha256:", "md5:00", &hex[1..], &format!("{hex}0"), &hex.replace('a', "g")]
        {
            assert!(text.parse::<Digest>().unwrap_err().to_string().contains("64 hexadecimal"));
        }
    }

    proptest! {
        #[test]
        fn parsers_never_panic(text in any::<String>()) {
            let _ = text.parse::<ImageUrl>();
            let _ = text.parse::<Digest>();
            let _ = text.parse::<Version>();
        }

        #[test]
        fn digests_survive_printing(bytes in any::<[u8; 32]>()) {
            let digest = Digest::new(bytes);
            prop_assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        }

        #[test]
        fn versions_survive_printing(text in "[!-~]{1,128}") {
            prop_assert_eq!(text.parse::<Version>().unwrap().to_string(), text);
        }
    }
}
