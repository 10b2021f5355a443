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

/// Reads the first statement of a text that makes, takes away or renames a database.
pub fn database_command(sql: &[u8]) -> Option<DatabaseCommand> {
    let mut lexer = Lexer { rest: sql, ambiguous: false };
    let mut statement: Vec<&[u8]> = Vec::new();
    loop {
        match lexer.next() {
            // A long statement is none; what matters stands at the beginning.
            Some(Token::Word(word)) if statement.len() < 40 => statement.push(word),
            Some(Token::Word(_) | Token::Other(_)) => {}
            end @ (Some(Token::Semicolon) | None) => {
                let words = std::mem::take(&mut statement);
                if words.len() >= 2 && is(words[1], "database") && words[0].len() <= 6 {
                    let command = one_database_command(sql, &words);
                    if command.is_some() {
                        return if lexer.ambiguous { Some(DatabaseCommand::Unreadable) } else { command };
                    }
                }
                end?;
            }
        }
    }
}

fn one_database_command(sql: &[u8], words: &[&[u8]]) -> Option<DatabaseCommand> {
    let name = |n: usize| -> Option<String> {
        let word = words.get(n)?;
        // A word in quotes is a name as it stands.
        let at = (word.as_ptr() as usize).checked_sub(sql.as_ptr() as usize)?;
        let is_quoted = at > 0 && sql.get(at - 1) == Some(&b'"');
        let text = std::str::from_utf8(word).ok()?;
        Some(if is_quoted { text.to_owned() } else { text.to_ascii_lowercase() })
    };
    let or_unreadable = |command: Option<DatabaseCommand>| Some(command.unwrap_or(DatabaseCommand::Unreadable));
    if is(words[0], "create") {
        let template = words.iter().position(|w| is(w, "template")).filter(|at| *at > 2);
        or_unreadable((|| {
            let template = match template {
                Some(at) => Some(name(at + 1)?),
                None => None,
            };
            Some(DatabaseCommand::Create { name: name(2)?, template })
        })())
    } else if is(words[0], "drop") {
        let conditional = words.get(2).is_some_and(|w| is(w, "if")) && words.get(3).is_some_and(|w| is(w, "exists"));
        or_unreadable(name(if conditional { 4 } else { 2 }).map(DatabaseCommand::Drop))
    } else if is(words[0], "alter") {
        let renames = words.get(3).is_some_and(|w| is(w, "rename")) && words.get(4).is_some_and(|w| is(w, "to"));
        or_unreadable((|| {
            let name_now = name(2)?;
            Some(if renames {
                DatabaseCommand::Rename { name: name_now, to: name(5)? }
            } else {
                DatabaseCommand::Alter(name_now)
            })
        })())
    } else {
        None
    }
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
            ("ALTER DATABASE a RENAME TO \"B\"", rename("a", "B")),
            ("ALTER DATABASE a OWNER TO b", DatabaseCommand::Alter("a".into())),
            ("DROP DATABASE", DatabaseCommand::Unreadable),
            ("DROP DATABASE U&\"a\"", DatabaseCommand::Unreadable),
            ("ALTER DATABASE a RENAME TO", DatabaseCommand::Unreadable),
        ] {
            assert_eq!(database_command(sql.as_bytes()), Some(expected), "{sql}");
        }
        for sql in [
            "",
            "SELECT 'DROP DATABASE a'",
            "DROP TABLE database",
            "CREATE TABLE database (n int)",
            "-- DROP DATABASE a",
        ] {
            assert_eq!(database_command(sql.as_bytes()), None, "{sql}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(sql in "(?i)((create|drop|alter) database)?[ 'a-z$\"/*;\\\\\n&]{0,60}") {
            let _ = database_command(sql.as_bytes());
        }
    }
}
