//! Cuts secrets out of text that other programs wrote, before it leaves the device.
//!
//! Nobody can know every secret, so when in doubt it is cut: a line that says too little can be read
//! on the device, a key that got into the cloud is lost.

use std::collections::BTreeSet;
use std::sync::Arc;

use regex_lite::{Captures, Regex};
use secrecy::{ExposeSecret, SecretString};

/// Stands where something was cut out.
pub const CUT: &str = "[redacted]";

/// Gives the secrets of this device, to be cut out wherever they stand. It may read files.
pub type OwnSecrets = Arc<dyn Fn() -> Vec<SecretString> + Send + Sync>;

/// Shorter texts are no keys; they would cut holes into everything.
const LEAST_SECRET_BYTES: usize = 8;

/// Escape sequences of terminals (ECMA-48): they could hide a name or a secret from the rules.
const ESCAPES: &str = r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.";

/// `scheme://`, user with password, host and path, query or fragment.
const URL: &str = r#"(?i)\b([a-z][a-z0-9+.-]*://)([^\s/?#"'<>]*@)?([^\s?#"'<>]*)([?#][^\s"'<>]*)?"#;

/// Names of secrets. What follows the first ones is cut to the end of the line, because it may have
/// spaces in it.
macro_rules! secret_names {
    () => {
        r"passw(?:or)?d|passphrase|passcode|pwd|psk|secret"
    };
}
macro_rules! key_names {
    () => {
        r"token|key|signature|\bsig|\bpin"
    };
}

/// `password is x` and `token was x`: a name, what joins it, and a word.
const SAID: &str = concat!(
    r#"(?i)((?:"#,
    secret_names!(),
    "|",
    key_names!(),
    r#")["']?\s+(?:is|was)\s+(?:set\s+to\s+)?)([^\s\[(][^\s,;]*)"#
);

/// What is said of a secret without telling it.
const REMARKS: [&str; 20] = [
    "a",
    "already",
    "correct",
    "empty",
    "expired",
    "for",
    "incorrect",
    "invalid",
    "missing",
    "no",
    "not",
    "of",
    "ok",
    "required",
    "set",
    "the",
    "too",
    "unknown",
    "valid",
    "wrong",
];

/// What may be a key in base64, in its URL form, or in hexadecimal digits.
const RUN: &str = r"[A-Za-z0-9+/]{32,}={0,2}|[A-Za-z0-9_-]{40,}={0,2}";

/// A whole line of base64.
const ENCODED: &str = r"^[A-Za-z0-9+/=]*$";

/// Patterns and what takes the place of a match, in their order.
const RULES: [(&str, &str); 12] = [
    // PEM (RFC 7468), also without its end.
    (r"(?s)-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|$)", "[redacted]"),
    // HTTP headers, and programs that print them.
    (
        r#"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie|x-[a-z-]*(?:key|token))(["']?\s*[:=]).*"#,
        "${1}${2} [redacted]",
    ),
    (r"(?i)\bSharedAccessSignature\s+\S+", "SharedAccessSignature [redacted]"),
    (r#"(?i)\b(bearer)\s+[^\s,;"']+"#, "${1} [redacted]"),
    // JSON Web Tokens (RFC 7519).
    (r"\beyJ[\w-]{6,}\.[\w.-]+", "[redacted]"),
    // user:password@host without a scheme.
    (r"\b([\w.+-]+):[^\s@/]{3,}@([\w.-]+)", "${1}:[redacted]@${2}"),
    // Names with a value in quotes, which may be quoted themselves.
    (
        concat!(
            r"(?i)((?:",
            secret_names!(),
            "|",
            key_names!(),
            r#")[\w.-]*\\*["']?\s*(?:=>|[:=])\s*)(?:\\+["'].*?\\+["']|"(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?)"#
        ),
        "${1}[redacted]",
    ),
    // password=correct horse battery
    (
        concat!(r#"(?i)((?:"#, secret_names!(), r#")[\w.-]*["']?\s*(?:=>|[:=])\s*)[^\s"'\[].*"#),
        "${1}[redacted]",
    ),
    // SharedAccessKey=..., token=..., sig=...
    (
        concat!(r#"(?i)((?:"#, key_names!(), r#")[\d_]*["']?\s*=>?\s*)[^\s&;,"'\[>][^\s&;,"']*"#),
        "${1}[redacted]",
    ),
    // token: 12ab or abcDef, but not: cannot read the key: No such file
    (
        concat!(
            r#"(?i)((?:"#,
            key_names!(),
            r#")[\d_]*["']?\s*:\s*)(?:[a-z]*[^a-z\s&;,:"'\[]|(?-i:[A-Za-z]*[a-z][A-Z]))[^\s&;,"']*"#
        ),
        "${1}[redacted]",
    ),
    // passphrase hunter2 or hunTer, but not: Failed password for root
    (
        concat!(
            r#"(?i)((?:"#,
            secret_names!(),
            r#")\s+)(?:[^\s,;:"'()\[]*\d|(?-i:[A-Za-z]*[a-z][A-Z]))[^\s,;"']*"#
        ),
        "${1}[redacted]",
    ),
    // --password hunter
    (
        concat!(r"(?i)(\s--?[\w-]*(?:", secret_names!(), r"|token|key)[\w-]*\s+)[^\s\[-]\S*"),
        "${1}[redacted]",
    ),
];

/// Cuts secrets out of text.
#[derive(Debug)]
pub struct Redactor {
    own: Vec<SecretString>,
    escapes: Regex,
    url: Regex,
    said: Regex,
    rules: Vec<(Regex, &'static str)>,
    run: Regex,
    encoded: Regex,
}

impl Redactor {
    /// A redactor that knows some secrets literally, beside those that it knows by their form.
    ///
    /// # Errors
    /// A rule is broken. Nothing may be shown then.
    pub fn new(own: Vec<SecretString>) -> Result<Self, regex_lite::Error> {
        let rule = |(pattern, with): &(&str, &'static str)| Ok((Regex::new(pattern)?, *with));
        Ok(Redactor {
            own,
            escapes: Regex::new(ESCAPES)?,
            url: Regex::new(URL)?,
            said: Regex::new(SAID)?,
            rules: RULES.iter().map(rule).collect::<Result<_, regex_lite::Error>>()?,
            run: Regex::new(RUN)?,
            encoded: Regex::new(ENCODED)?,
        })
    }

    /// `text` as one line without secrets and without characters that do something.
    #[must_use]
    pub fn redact(&self, text: &str) -> String {
        let mut text = self.visible(text);
        for secret in &self.own {
            let secret = secret.expose_secret();
            if secret.len() >= LEAST_SECRET_BYTES {
                text = text.replace(secret, CUT);
            }
        }
        text = self.url.replace_all(&text, bare_url).into_owned();
        for (pattern, with) in &self.rules {
            text = pattern.replace_all(&text, *with).into_owned();
        }
        text = self.said.replace_all(&text, unless_remark).into_owned();
        text = self.run.replace_all(&text, bare_run).into_owned();
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// Messages of several speakers, oldest first: each as one line without secrets. A key that a
    /// speaker printed line by line is cut out of all of them.
    #[must_use]
    pub fn redact_all(&self, messages: Vec<(String, String)>) -> Vec<(String, String)> {
        let in_keys = self.lines_of_keys(&messages);
        let lines = messages.into_iter().zip(in_keys);
        lines
            .map(|((speaker, message), in_key)| {
                let message = if in_key { CUT.to_owned() } else { self.redact(&message) };
                (speaker, message)
            })
            .collect()
    }

    /// Which messages are lines of a key in PEM form: they stand between the marks of its begin and
    /// its end, or only one of these was kept.
    fn lines_of_keys(&self, messages: &[(String, String)]) -> Vec<bool> {
        let mut found = vec![false; messages.len()];
        let mark = |from: &mut dyn Iterator<Item = usize>, edge: &str, found: &mut [bool]| {
            let mut inside = BTreeSet::new();
            for at in from {
                let Some((speaker, message)) = messages.get(at) else { continue };
                let message = self.visible(message);
                if message.contains(edge) {
                    inside.insert(speaker);
                } else if inside.contains(speaker) && self.encoded.is_match(message.trim()) {
                    found.iter_mut().skip(at).take(1).for_each(|found| *found = true);
                } else {
                    inside.remove(speaker);
                }
            }
        };
        mark(&mut (0..messages.len()), "-----BEGIN ", &mut found);
        mark(&mut (0..messages.len()).rev(), "-----END ", &mut found);
        found
    }

    fn visible(&self, text: &str) -> String {
        visible(&self.escapes, text)
    }
}

/// Words of another program as one line of at most `most` characters and a mark where there was more,
/// without characters that do something. Nothing is cut in the middle of a word: a piece of a secret
/// could not be known for one any more. Secrets are still in it.
#[must_use]
pub fn one_line(text: &str, most: usize) -> String {
    let Ok(escapes) = Regex::new(ESCAPES) else { return CUT.to_owned() };
    let mut line = String::new();
    let mut length = 0_usize;
    for word in visible(&escapes, text).split_whitespace() {
        length = length.saturating_add(word.chars().count()).saturating_add(1);
        if length > most {
            line.push('…');
            break;
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    line
}

/// What a person sees of `text`; line ends stay, because rules end there.
fn visible(escapes: &Regex, text: &str) -> String {
    escapes
        .replace_all(text, "")
        .chars()
        .map(|c| if matches!(c, '\t' | '\r') { '\n' } else { c })
        .filter(|c| *c == '\n' || !c.is_control() && !is_invisible(*c))
        .collect()
}

/// Joiners and marks of writing direction: they can hide what a text says.
fn is_invisible(c: char) -> bool {
    matches!(
        c,
        '\u{ad}'
            | '\u{61c}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{2069}'
            | '\u{feff}'
            | '\u{e0000}'..='\u{e007f}'
    )
}

/// A URL without user, password, query and fragment.
fn bare_url(url: &Captures<'_>) -> String {
    let part = |at| url.get(at).map_or("", |part| part.as_str());
    let user = if part(2).is_empty() { String::new() } else { format!("{CUT}@") };
    let query = match part(4).get(..1) {
        Some(mark) => format!("{mark}{CUT}"),
        None => String::new(),
    };
    format!("{}{user}{}{query}", part(1), part(3))
}

/// A name of a secret with what is said of it, if that does not tell it.
fn unless_remark(said: &Captures<'_>) -> String {
    let part = |at| said.get(at).map_or("", |part| part.as_str());
    let remark = part(2).trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase();
    let kept = if REMARKS.contains(&remark.as_str()) { part(2) } else { CUT };
    format!("{}{kept}", part(1))
}

/// Keys look random. Names of units, paths and identifiers with dashes do not.
fn bare_run(run: &Captures<'_>) -> String {
    let text = run.get(0).map_or("", |run| run.as_str());
    let has = |kind: fn(&char) -> bool| text.chars().any(|c| kind(&c));
    let is_path = text.starts_with('/')
        && text.split('/').all(|name| name.len() < 20)
        && text.split('/').map(changes).sum::<usize>() < text.len() / 4;
    let mixed = has(char::is_ascii_lowercase) && has(char::is_ascii_uppercase);
    let hexadecimal = text.chars().all(|c| c.is_ascii_hexdigit());
    if !is_path && has(char::is_ascii_digit) && (mixed || hexadecimal) {
        CUT.to_owned()
    } else {
        text.to_owned()
    }
}

/// How often `name` changes between small letters, capital ones and others: seldom in a name, all the
/// time in a key.
fn changes(name: &str) -> usize {
    let kind = |c: char| (c.is_ascii_lowercase(), c.is_ascii_uppercase());
    name.chars().zip(name.chars().skip(1)).filter(|(one, next)| kind(*one) != kind(*next)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_ends_with_a_whole_word() {
        for (text, most, line) in [
            ("", 9, ""),
            (" a\tb\r\nc ", 9, "a b c"),
            ("pass\u{1b}[1mword\u{0}=x", 99, "password=x"),
            ("got c2VjcmV0LWtleQ== here", 12, "got…"),
            ("c2VjcmV0LWtleQ==", 12, "…"),
        ] {
            assert_eq!(one_line(text, most), line);
        }
    }
}
