//! What is wrong with a configuration, said so that an operator can mend it: file, line, column, field, found, expected.

use std::fmt;
use std::path::PathBuf;

/// One thing that is wrong with a configuration.
///
/// Displays as `file:line:column: field: found …, expected …`, the form that editors jump to.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Diagnostic {
    /// The file, as it was named when it was read.
    pub file: PathBuf,
    /// The line, from 1.
    pub line: usize,
    /// The column, from 1, in characters.
    pub column: usize,
    /// The dotted path of the field, empty for the whole document.
    pub field: String,
    /// What was found there.
    pub found: String,
    /// What would have been right.
    pub expected: String,
}

impl Diagnostic {
    /// A diagnostic without a field of its own (an unreadable file, say).
    pub fn file_level(file: impl Into<PathBuf>, found: impl Into<String>, expected: impl Into<String>) -> Self {
        Self {
            file: file.into(),
            line: 1,
            column: 1,
            field: String::new(),
            found: found.into(),
            expected: expected.into(),
        }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: ", self.file.display(), self.line, self.column)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        write!(f, "found {}, expected {}", self.found, self.expected)
    }
}

/// Everything that is wrong with a configuration, in file and line order.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Diagnostics(pub Vec<Diagnostic>);

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, d) in self.0.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{d}")?;
        }
        Ok(())
    }
}

/// The known name that is closest to a misspelt one, if any is close enough to be meant.
pub(crate) fn closest<'a>(found: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|k| (edit_distance(found, k), k))
        .filter(|(d, k)| *d <= 2.max(k.len() / 3))
        .min_by_key(|(d, _)| *d)
        .map(|(_, k)| k)
}

/// "one of `a`, `b` (did you mean `a`?)", for the `expected` side of a diagnostic. Long lists are cut.
pub(crate) fn one_of<'a>(kind: &str, found: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    const SHOWN: usize = 12;
    let known: Vec<&str> = known.into_iter().collect();
    if known.is_empty() {
        return format!("{kind}, but none is defined");
    }
    let mut out = format!("{kind}: ");
    for (i, k) in known.iter().take(SHOWN).enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        out.push('`');
        out.push_str(k);
        out.push('`');
    }
    if known.len() > SHOWN {
        out.push_str(&format!(", … ({} in all)", known.len()));
    }
    if let Some(near) = closest(found, known.iter().copied()) {
        out.push_str(&format!(" (did you mean `{near}`?)"));
    }
    out
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_near_miss_is_suggested_and_a_stranger_is_not() {
        assert_eq!(closest("odoo-sharde", ["odoo-shared", "other"]), Some("odoo-shared"));
        assert_eq!(closest("zzz", ["odoo-shared"]), None);
    }
}
