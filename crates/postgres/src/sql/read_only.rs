//! Transactions that say of themselves that they only read.

use super::is;
use super::lexer::{Lexer, Token};

/// Whether a text begins with a transaction that says of itself that it only reads: `BEGIN … READ ONLY` or
/// `START TRANSACTION … READ ONLY`, and nothing that takes it back in the same statement.
pub fn begins_read_only(sql: &[u8]) -> bool {
    // Cheap for everything else.
    let text = sql.trim_ascii_start();
    if !text.first().is_some_and(|c| matches!(c, b'b' | b'B' | b's' | b'S' | b'/' | b'-')) {
        return false;
    }
    let mut lexer = Lexer { rest: text, ambiguous: false };
    let Some(Token::Word(first)) = lexer.next() else { return false };
    if !is(first, "begin") && !is(first, "start") {
        return false;
    }
    let (mut reads, mut before) = (false, &b""[..]);
    // A modern Odoo sends `BEGIN …;` and its first statement in one text.
    loop {
        let word = match lexer.next() {
            Some(Token::Word(word)) => word,
            Some(Token::Other(b',')) => b",",
            _ => break,
        };
        if is(before, "read") {
            reads = is(word, "only") || reads && !is(word, "write");
        }
        before = word;
    }
    reads && !lexer.ambiguous
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_reads_only_when_it_says_so_last() {
        for sql in [
            "BEGIN READ ONLY",
            "begin isolation level repeatable read read only;SELECT 1",
            "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY, DEFERRABLE",
            " START TRANSACTION READ ONLY",
            "/* hint */ BEGIN READ WRITE, READ ONLY",
        ] {
            assert!(begins_read_only(sql.as_bytes()), "{sql}");
        }
        for sql in [
            "",
            "BEGIN",
            "BEGIN ISOLATION LEVEL REPEATABLE READ",
            "BEGIN; SET TRANSACTION READ ONLY",
            "BEGIN READ ONLY, READ WRITE",
            "SELECT 1; BEGIN READ ONLY",
            "BEGIN /* READ ONLY */",
            "BEGIN 'READ ONLY'",
            "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
        ] {
            assert!(!begins_read_only(sql.as_bytes()), "{sql}");
        }
    }
}
