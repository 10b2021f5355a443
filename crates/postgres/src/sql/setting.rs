//! Statements that change a setting of the session and nothing else.

use super::is;

/// A statement that changes settings, in a form that can be said again on another connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Setting {
    /// `SET name TO value`, the value as it was written.
    To(String, String),
    /// `RESET name`, or `SET name TO DEFAULT`.
    Reset(String),
    /// `RESET ALL`
    ResetAll,
}

/// Settings that are more than a value: who the session is, how its text is read, or what belongs to a transaction.
const NOT_JUST_A_VALUE: [&str; 13] = [
    "all",
    "application_name",
    "backslash_quote",
    "client_encoding",
    "escape_string_warning",
    "names",
    "role",
    "seed",
    "session_authorization",
    "standard_conforming_strings",
    "transaction_deferrable",
    "transaction_isolation",
    "transaction_read_only",
];
const MAX_NAME: usize = 128;
const MAX_VALUE: usize = 1_024;

/// Reads a text that is one `SET [SESSION] name TO value` or `RESET name` and nothing else. What is written in any way
/// that needs thought is none: comments, backslashes, quoted names, `SET LOCAL`, `SET TIME ZONE`.
pub fn setting(sql: &[u8]) -> Option<Setting> {
    let text = std::str::from_utf8(sql).ok()?.trim_end_matches('\0').trim_ascii();
    let text = text.strip_suffix(';').unwrap_or(text).trim_ascii_end();
    let (verb, rest) = word(text)?;
    if is(verb.as_bytes(), "reset") {
        let (name, rest) = name(rest)?;
        return match rest {
            "" if name == "all" => Some(Setting::ResetAll),
            "" if is_just_a_value(&name) => Some(Setting::Reset(name)),
            _ => None,
        };
    }
    if !is(verb.as_bytes(), "set") {
        return None;
    }
    let mut rest = rest;
    if let Some((session, after)) = word(rest)
        && is(session.as_bytes(), "session")
        && !after.starts_with(['=', '.'])
    {
        rest = after;
    }
    let (name, rest) = name(rest)?;
    if !is_just_a_value(&name) {
        return None;
    }
    let value = match rest.strip_prefix('=') {
        Some(value) => value,
        None => word(rest).filter(|(to, _)| is(to.as_bytes(), "to"))?.1,
    };
    let value = value.trim_ascii();
    if is(value.as_bytes(), "default") {
        return Some(Setting::Reset(name));
    }
    (value.len() <= MAX_VALUE && is_plain(value)).then(|| Setting::To(name, value.to_owned()))
}

/// Whether a text is one statement that gives the session back the name that it had at login, and perhaps more: `RESET
/// application_name`, `SET application_name TO DEFAULT`, `RESET ALL`.
pub fn resets_name(sql: &[u8]) -> bool {
    // Cheap for everything else.
    let begins = sql.trim_ascii_start().get(..3).unwrap_or_default();
    if !is(begins, "set") && !is(begins, "res") {
        return false;
    }
    let read = || {
        let text = std::str::from_utf8(sql).ok()?.trim_end_matches('\0').trim_ascii();
        let text = text.strip_suffix(';').unwrap_or(text).trim_ascii_end();
        let (verb, rest) = word(text)?;
        if is(verb.as_bytes(), "reset") {
            return Some(is(rest.as_bytes(), "all") || is(rest.as_bytes(), "application_name"));
        }
        let (first, after) = word(rest).filter(|_| is(verb.as_bytes(), "set"))?;
        let (name, rest) = if is(first.as_bytes(), "session") { word(after)? } else { (first, after) };
        let value = match rest.strip_prefix('=') {
            Some(value) => value,
            None => word(rest).filter(|(to, _)| is(to.as_bytes(), "to"))?.1,
        };
        Some(is(name.as_bytes(), "application_name") && is(value.trim_ascii().as_bytes(), "default"))
    };
    read().unwrap_or(false)
}

fn is_just_a_value(name: &str) -> bool {
    !NOT_JUST_A_VALUE.contains(&name)
}

/// The first word of a text, and what follows it without the space between.
fn word(text: &str) -> Option<(&str, &str)> {
    let end = text.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(text.len());
    let starts_well = text.as_bytes().first().is_some_and(|c| c.is_ascii_alphabetic() || *c == b'_');
    starts_well.then(|| (&text[..end], text[end..].trim_ascii_start()))
}

/// The name of a setting, in small letters; with a class before a dot, perhaps.
fn name(text: &str) -> Option<(String, &str)> {
    let end = text.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.')).unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    let parts_are_words = name.split('.').all(|part| word(part).is_some_and(|(_, rest)| rest.is_empty()));
    let fits = parts_are_words && name.len() <= MAX_NAME && name.matches('.').count() <= 1;
    fits.then(|| (name.to_ascii_lowercase(), rest.trim_ascii_start()))
}

/// Whether a value is strings, numbers and words with commas between them: it means the same wherever it is said.
fn is_plain(value: &str) -> bool {
    let mut rest = value;
    loop {
        rest = rest.trim_ascii_start();
        if let Some(string) = rest.strip_prefix('\'') {
            let Some(end) = string.find(['\'', '\\', '\0']) else { return false };
            if !string[end..].starts_with('\'') {
                return false;
            }
            rest = &string[end + 1..];
            // A doubled quote goes on with the string.
            if rest.starts_with('\'') {
                continue;
            }
        } else {
            let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '+')));
            let end = end.unwrap_or(rest.len());
            // Two dashes begin a comment.
            if end == 0 || rest[..end].contains("--") {
                return false;
            }
            rest = &rest[end..];
        }
        rest = rest.trim_ascii_start();
        if rest.is_empty() {
            return true;
        }
        let Some(more) = rest.strip_prefix(',') else { return false };
        rest = more;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_gives_the_name_back_is_told_from_what_gives_another() {
        for sql in [
            "RESET application_name",
            "reset ALL;\0",
            "SET application_name TO DEFAULT",
            "set session Application_Name = default ;",
        ] {
            assert!(resets_name(sql.as_bytes()), "{sql}");
        }
        for sql in
            ["SET application_name = 'default'", "RESET a", "SET LOCAL application_name = DEFAULT", "SELECT 1", ""]
        {
            assert!(!resets_name(sql.as_bytes()), "{sql}");
        }
    }

    #[test]
    fn a_setting_is_read_with_its_value_as_it_was_written() {
        let to = |name: &str, value: &str| Some(Setting::To(name.into(), value.into()));
        for (sql, expected) in [
            ("SET statement_timeout = 5000", to("statement_timeout", "5000")),
            ("set SESSION Statement_Timeout TO '5s';", to("statement_timeout", "'5s'")),
            ("SET search_path TO a, 'b''c' , public", to("search_path", "a, 'b''c' , public")),
            ("SET DateStyle=ISO, DMY", to("datestyle", "ISO, DMY")),
            ("SET my_app.tenant = 'x'", to("my_app.tenant", "'x'")),
            ("SET extra_float_digits = -3", to("extra_float_digits", "-3")),
            ("SET session_replication_role = 'replica'", to("session_replication_role", "'replica'")),
            ("RESET work_mem", Some(Setting::Reset("work_mem".into()))),
            ("SET work_mem TO DEFAULT", Some(Setting::Reset("work_mem".into()))),
            ("RESET ALL", Some(Setting::ResetAll)),
        ] {
            assert_eq!(setting(sql.as_bytes()), expected, "{sql}");
        }
        for sql in [
            "",
            "SELECT 1",
            "SET",
            "SET work_mem",
            "SET work_mem =",
            "SET LOCAL work_mem = 1",
            "SET TRANSACTION READ ONLY",
            "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
            "SET ROLE acme",
            "SET role = acme",
            "SET SESSION AUTHORIZATION acme",
            "SET session_authorization = acme",
            "SET NAMES 'UTF8'",
            "SET TIME ZONE 'UTC'",
            "SET client_encoding = 'UTF8'",
            "SET search_path = \"a\"",
            "SET work_mem = 1; SELECT 1",
            "SET work_mem = 1 -- x",
            "SET work_mem = 1--x",
            "SET work_mem = /* */ 1",
            "SET x = 'a\\'",
            "SET x = 'a",
            "SET x = a,",
            "SET x = $1",
            "SET work_mem FROM CURRENT",
            "RESET SESSION AUTHORIZATION",
            "RESET ROLE",
        ] {
            assert_eq!(setting(sql.as_bytes()), None, "{sql}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(sql in "(?i)(set|reset)?( session)?[ 'a-z=,.;\\\\\\-]{0,40}") {
            let _ = setting(sql.as_bytes());
        }

        #[test]
        fn what_is_read_as_one_setting_pins_and_is_one_statement_for_the_full_reader(sql in "(?i)(set|reset) [a-z=', .;-]{0,30}") {
            if setting(sql.as_bytes()).is_some() {
                let effect = crate::sql::effect(sql.as_bytes());
                prop_assert!(effect.pins || effect.only.is_some(), "{sql}: {effect:?}");
                prop_assert!(!effect.opaque);
            }
        }
    }
}
