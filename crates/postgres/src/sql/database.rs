//! Statements about whole databases.

use super::is;
use super::lexer::{Lexer, Token};

/// A statement that makes, takes away or renames a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DatabaseCommand {
    /// `CREATE DATABASE name … TEMPLATE template`
    Create {
        /// The new database.
        name: String,
        /// The one it is a copy of, when the statement names one.
        template: Option<String>,
    },
    /// `DROP DATABASE name`
    Drop(String),
    /// `ALTER DATABASE name RENAME TO to`
    Rename {
        /// Its name so far.
        name: String,
        /// Its name from now on.
        to: String,
    },
    /// `ALTER DATABASE name …`
    Alter(String),
    /// One of these, but it cannot be told of which database.
    Unreadable,
}

/// A token that matters for these statements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part<'a> {
    Word(&'a [u8]),
    Symbol(u8),
}

/// Longer than any of these statements has to be.
const MAX_PARTS: usize = 100;

/// The statements of a text that make, take away or rename databases, or may do so: what cannot be read is
/// [`DatabaseCommand::Unreadable`].
pub fn database_commands(sql: &[u8]) -> Vec<DatabaseCommand> {
    let mut lexer = Lexer { rest: sql, ambiguous: false };
    let (mut commands, mut parts, mut runs_strings) = (Vec::new(), Vec::new(), false);
    loop {
        let token = lexer.next();
        match token {
            Some(Token::Word(word)) if parts.len() < MAX_PARTS => parts.push(Part::Word(word)),
            Some(Token::Other(symbol)) if parts.len() < MAX_PARTS => parts.push(Part::Symbol(symbol)),
            Some(Token::Word(_) | Token::Other(_)) => {}
            Some(Token::Semicolon) | None => {
                if let [Part::Word(verb), Part::Word(what), rest @ ..] = &parts[..]
                    && is(what, "database")
                    && ["create", "drop", "alter"].iter().any(|w| is(verb, w))
                {
                    commands.push(one(sql, verb, rest).unwrap_or(DatabaseCommand::Unreadable));
                }
                runs_strings |= matches!(parts.first(), Some(Part::Word(w)) if is(w, "do") || is(w, "call"));
                parts.clear();
                if token.is_none() {
                    break;
                }
            }
        }
    }
    if (lexer.ambiguous || runs_strings) && super::mentions_databases(sql) {
        commands.push(DatabaseCommand::Unreadable);
    }
    commands
}

/// One statement, without its first two words.
fn one(sql: &[u8], verb: &[u8], rest: &[Part<'_>]) -> Option<DatabaseCommand> {
    let name = |part: &Part<'_>| -> Option<String> {
        let Part::Word(word) = part else { return None };
        // A word in quotes is a name as it stands.
        let at = (word.as_ptr() as usize).checked_sub(sql.as_ptr() as usize)?;
        let is_quoted = at > 0 && sql.get(at - 1) == Some(&b'"');
        let text = std::str::from_utf8(word).ok()?;
        Some(if is_quoted { text.to_owned() } else { text.to_ascii_lowercase() })
    };
    let word = |part: Option<&Part<'_>>, w: &str| matches!(part, Some(Part::Word(word)) if is(word, w));
    if is(verb, "drop") {
        let conditional = word(rest.first(), "if") && word(rest.get(1), "exists");
        return name(rest.get(if conditional { 2 } else { 0 })?).map(DatabaseCommand::Drop);
    }
    let first = name(rest.first()?)?;
    if is(verb, "alter") {
        if word(rest.get(1), "rename") {
            let to = rest.get(3).filter(|_| word(rest.get(2), "to"))?;
            return Some(DatabaseCommand::Rename { name: first, to: name(to)? });
        }
        return Some(DatabaseCommand::Alter(first));
    }
    // Options, each a word or two, perhaps an equals sign, and a value.
    let mut options = &rest[1..];
    if word(options.first(), "with") {
        options = &options[1..];
    }
    let mut template = None;
    while let Some((option, after)) = options.split_first() {
        let Part::Word(option) = option else { return None };
        let mut after = after;
        if is(option, "connection") {
            after = after.strip_prefix(&after[..1]).filter(|_| word(after.first(), "limit"))?;
        }
        if after.first() == Some(&Part::Symbol(b'=')) {
            after = &after[1..];
        }
        let (value, mut next) = after.split_first()?;
        match value {
            Part::Word(_) if is(option, "template") => template = Some(name(value)?),
            // A string, which may be a name.
            Part::Symbol(_) if is(option, "template") => return None,
            Part::Word(_) | Part::Symbol(b'\'') => {}
            Part::Symbol(c) if c.is_ascii_digit() || *c == b'-' => {
                while let Some((Part::Symbol(c), rest)) = next.split_first()
                    && c.is_ascii_digit()
                {
                    next = rest;
                }
            }
            Part::Symbol(_) => return None,
        }
        options = next;
    }
    Some(DatabaseCommand::Create { name: first, template })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_databases_of_a_command_are_found_however_it_is_written() {
        let create = |name: &str, template: Option<&str>| DatabaseCommand::Create {
            name: name.into(),
            template: template.map(str::to_owned),
        };
        let rename = |name: &str, to: &str| DatabaseCommand::Rename { name: name.into(), to: to.into() };
        for (sql, expected) in [
            (
                "CREATE DATABASE \"Acme\" ENCODING 'unicode' LC_COLLATE 'C' TEMPLATE \"template0\"",
                create("Acme", Some("template0")),
            ),
            ("create database ACME template = Other owner odoo", create("acme", Some("other"))),
            ("CREATE DATABASE a", create("a", None)),
            ("-- x\nDROP /* y */ DATABASE IF EXISTS \"a b\" WITH (FORCE)", DatabaseCommand::Drop("a b".into())),
            ("DROP DATABASE Acme;", DatabaseCommand::Drop("acme".into())),
            ("SELECT 1; DROP DATABASE acme", DatabaseCommand::Drop("acme".into())),
            (
                "CREATE DATABASE a COLLATION_VERSION template TEMPLATE b CONNECTION LIMIT = -12 OWNER c",
                create("a", Some("b")),
            ),
            ("CREATE DATABASE a TEMPLATE 'b'", DatabaseCommand::Unreadable),
            ("CREATE DATABASE a (TEMPLATE b)", DatabaseCommand::Unreadable),
            ("DO $$ BEGIN EXECUTE 'DROP DATABASE a'; END $$", DatabaseCommand::Unreadable),
            ("SELECT 'a\\''; DROP DATABASE a; SELECT 'x'", DatabaseCommand::Unreadable),
            ("ALTER DATABASE a RENAME TO \"B\"", rename("a", "B")),
            ("ALTER DATABASE a OWNER TO b", DatabaseCommand::Alter("a".into())),
            ("DROP DATABASE", DatabaseCommand::Unreadable),
            ("DROP DATABASE U&\"a\"", DatabaseCommand::Unreadable),
            ("ALTER DATABASE a RENAME TO", DatabaseCommand::Unreadable),
            ("DROP DATABASE a; DROP DATABASE b", DatabaseCommand::Drop("b".into())),
        ] {
            assert_eq!(database_commands(sql.as_bytes()).last(), Some(&expected), "{sql}");
            assert!(crate::sql::effect(sql.as_bytes()).databases, "{sql}");
        }
        for sql in [
            "",
            "SELECT 'DROP DATABASE a'",
            "DROP TABLE database",
            "CREATE TABLE database (n int)",
            "-- DROP DATABASE a",
        ] {
            assert_eq!(database_commands(sql.as_bytes()), [], "{sql}");
            assert!(!crate::sql::effect(sql.as_bytes()).databases, "{sql}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(sql in "(?i)((create|drop|alter) database)?[ 'a-z$\"/*;\\\\\n&]{0,60}") {
            let commands = database_commands(sql.as_bytes());
            // The cheap look never misses what the full reader finds.
            prop_assert!(commands.is_empty() || crate::sql::effect(sql.as_bytes()).databases, "{sql}: {commands:?}");
        }
    }
}
