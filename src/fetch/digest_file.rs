//! The digest that lies beside an image: `<uri>.sha256`, as `sha256sum` writes it.

use crate::update::Digest;

/// Longest digest file that is read; it may list a whole release.
pub(super) const MAX_BYTES: usize = 64 * 1024;

/// The digest of the file `name` in `text`: the only line, or the one that names the file.
/// `None` if there is no such line.
pub(super) fn parse(text: &str, name: &str) -> Option<Digest> {
    let lines: Vec<_> = text.lines().filter_map(line).collect();
    match lines.as_slice() {
        [(digest, _)] => Some(*digest),
        lines => {
            let base = |path: &str| path.rsplit('/').next().map(str::to_owned);
            lines.iter().find(|(_, path)| base(path).as_deref() == Some(name)).map(|found| found.0)
        }
    }
}

/// `<hex>  <path>`, `<hex> *<path>`, `<hex>` alone, or `SHA256 (<path>) = <hex>`.
fn line(line: &str) -> Option<(Digest, &str)> {
    let line = line.trim();
    if let Some(rest) = line.strip_prefix("SHA256 (") {
        let (path, digest) = rest.rsplit_once(") = ")?;
        return Some((digest.parse().ok()?, path));
    }
    // A backslash in front tells that the path is escaped; such paths are no URL's last part.
    let line = line.trim_start_matches('\\');
    let (digest, path) = line.split_once(' ').unwrap_or((line, ""));
    let path = path.trim_start();
    Some((digest.parse().ok()?, path.strip_prefix('*').unwrap_or(path)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn finds_the_line_of_the_image() {
        let (a, b) = ("aa".repeat(32), "bb".repeat(32));
        for (text, found) in [
            (format!("{a}  fw.img\n"), Some(&a)),
            (format!("{a} *other-name.img"), Some(&a)),
            (a.clone(), Some(&a)),
            (format!("{}\r\n", a.to_uppercase()), Some(&a)),
            (format!("SHA256 (fw.img) = {a}\n"), Some(&a)),
            (format!("# release 2\n{b}  other.img\n{a}  ./out/fw.img\n"), Some(&a)),
            (format!("{b}  old-fw.img\n{b}  fw.img.zst\n{a} *fw.img\n"), Some(&a)),
            (format!("{b}  other.img\n{a}  third.img\n"), None),
            (String::new(), None),
            ("<html>not here</html>".to_owned(), None),
            (format!("{}  fw.img", &a[2..]), None),
        ] {
            let found = found.map(|hex| hex.parse().unwrap());
            assert_eq!(parse(&text, "fw.img"), found, "{text}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in any::<String>(), name in any::<String>()) {
            let _ = parse(&text, &name);
        }
    }
}
