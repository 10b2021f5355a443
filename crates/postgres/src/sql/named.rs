//! Statements that name a prepared statement.

use std::ops::Range;

use super::is;
use super::lexer::{Lexer, Token};

/// What a text does with the prepared statement that it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// `DEALLOCATE name`, and nothing else.
    Deallocate,
    /// `EXECUTE name` or `EXPLAIN EXECUTE name`; other statements may follow.
    Execute,
}

/// A prepared statement's name in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// What is done with it.
    pub what: Use,
    /// The name.
    pub name: Vec<u8>,
    /// Where it stands, its quotes included.
    pub at: Range<usize>,
}

/// Reads a text that begins with `DEALLOCATE`, `EXECUTE` or `EXPLAIN`.
pub fn named(sql: &[u8]) -> Option<Named> {
    // Cheap for everything else, but for what begins with a comment.
    let first = sql.iter().find(|c| !c.is_ascii_whitespace())?;
    if !matches!(first, b'd' | b'D' | b'e' | b'E' | b'/' | b'-') {
        return None;
    }
    let mut reader = Reader { sql, lexer: Lexer { rest: sql, ambiguous: false } };
    let (word, _) = reader.word()?;
    let found = if is(word, "deallocate") {
        let mut found = reader.word()?;
        if is(found.0, "prepare")
            && let Some(after) = reader.word()
        {
            found = after;
        }
        if !reader.is_at_end() || is(found.0, "all") && !is_quoted(sql, &found.1) {
            return None;
        }
        (Use::Deallocate, found)
    } else if is(word, "execute") || is(word, "explain") && reader.executes() {
        (Use::Execute, reader.word()?)
    } else {
        return None;
    };
    let (what, (word, at)) = found;
    let quoted = is_quoted(sql, &at);
    // A quote inside of a name is written twice.
    let is_whole = !quoted || sql.get(at.end) != Some(&b'"');
    let name = if quoted { word.to_vec() } else { word.to_ascii_lowercase() };
    (is_whole && !reader.lexer.ambiguous && !name.is_empty()).then_some(Named { what, name, at })
}

fn is_quoted(sql: &[u8], at: &Range<usize>) -> bool {
    sql.get(at.start) == Some(&b'"')
}

fn is_option(word: &[u8]) -> bool {
    is(word, "analyze") || is(word, "analyse") || is(word, "verbose")
}

struct Reader<'a> {
    sql: &'a [u8],
    lexer: Lexer<'a>,
}

impl<'a> Reader<'a> {
    fn at(&self) -> usize {
        self.sql.len() - self.lexer.rest.len()
    }

    /// The next token, if it is a word, and where it stands.
    fn word(&mut self) -> Option<(&'a [u8], Range<usize>)> {
        let Some(Token::Word(word)) = self.lexer.next() else { return None };
        let end = self.at();
        let quotes = 2 * usize::from(self.sql.get(end.checked_sub(1)?) == Some(&b'"'));
        Some((word, end.checked_sub(word.len() + quotes)?..end))
    }

    /// Whether what is explained is an `EXECUTE`; what stands before it has been read then.
    fn executes(&mut self) -> bool {
        let mut depth = 0;
        loop {
            match self.lexer.next() {
                Some(Token::Other(b'(')) => depth += 1,
                Some(Token::Other(b')')) => depth -= 1,
                Some(Token::Word(word)) if depth == 0 && is(word, "execute") => return true,
                Some(Token::Word(word)) if depth == 0 && is_option(word) => {}
                Some(Token::Word(_) | Token::Other(_)) if depth > 0 => {}
                _ => return false,
            }
        }
    }

    fn is_at_end(&mut self) -> bool {
        loop {
            match self.lexer.next() {
                Some(Token::Semicolon) => {}
                other => return other.is_none(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_statement_is_found_by_its_name_and_place() {
        for (sql, what, name, written) in [
            ("DEALLOCATE a1", Use::Deallocate, "a1", "a1"),
            ("deallocate prepare \"Pdo_1\" ;\0", Use::Deallocate, "Pdo_1", "\"Pdo_1\""),
            ("DEALLOCATE prepare", Use::Deallocate, "prepare", "prepare"),
            ("DEALLOCATE \"all\"", Use::Deallocate, "all", "\"all\""),
            ("EXECUTE Sqlx_S_1(1, 'x;y')", Use::Execute, "sqlx_s_1", "Sqlx_S_1"),
            ("/* c */ EXECUTE \"x y\"; SELECT 1", Use::Execute, "x y", "\"x y\""),
            ("EXPLAIN (VERBOSE, FORMAT JSON) EXECUTE s(NULL)", Use::Execute, "s", "s"),
            ("explain analyze verbose execute s", Use::Execute, "s", "s"),
        ] {
            let found = named(sql.as_bytes()).unwrap_or_else(|| panic!("{sql}"));
            assert_eq!((found.what, found.name.as_slice()), (what, name.as_bytes()), "{sql}");
            assert_eq!(&sql[found.at], written, "{sql}");
        }
        for sql in [
            "DEALLOCATE ALL",
            "DEALLOCATE PREPARE all",
            "DEALLOCATE a; SELECT 1",
            "DEALLOCATE",
            "DEALLOCATE \"a\"\"b\"",
            "EXECUTE",
            "EXECUTE U&\"\\0061\"",
            "EXECUTE \"\"",
            "EXPLAIN SELECT 1",
            "EXPLAIN (ANALYZE EXECUTE x",
            "SELECT 1; EXECUTE x",
            "END",
            "",
        ] {
            assert_eq!(named(sql.as_bytes()), None, "{sql}");
        }
    }

    proptest! {
        #[test]
        fn the_name_stands_where_it_is_said_to(sql in "(?i)(deallocate|execute|explain)[ a-z\"();/*\\-\\\\'$&]{0,30}") {
            if let Some(found) = named(sql.as_bytes()) {
                let written = sql[found.at].trim_matches('"').as_bytes();
                prop_assert!(written.eq_ignore_ascii_case(&found.name));
            }
        }
    }
}
