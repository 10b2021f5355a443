//! Transactions that say of themselves that they only read.

use super::is;
use super::lexer::{Lexer, Token};

/// The first words of statements that read.
const READS: [&str; 7] = ["select", "with", "values", "table", "show", "explain", "fetch"];

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
    let mut end = loop {
        let word = match lexer.next() {
            Some(Token::Word(word)) => word,
            Some(Token::Other(b',')) => b",",
            end => break end,
        };
        if is(before, "read") {
            reads = is(word, "only") || reads && !is(word, "write");
        }
        before = word;
    };
    // What follows in the same text must read too, and not end the transaction: behind it may be anything.
    let mut begins = true;
    while let Some(token) = end {
        begins = match token {
            Token::Semicolon => true,
            Token::Word(word) if begins => {
                if !READS.iter().any(|w| is(word, w)) {
                    return false;
                }
                false
            }
            // A parenthesis, say: what begins so is left to the primary.
            Token::Other(_) if begins => return false,
            _ => false,
        };
        end = lexer.next();
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
            "BEGIN READ ONLY; SELECT 1; SHOW work_mem;",
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
            "BEGIN READ ONLY; COMMIT; INSERT INTO t VALUES (1)",
            "BEGIN READ ONLY; SELECT 1; COMMIT",
            "BEGIN READ ONLY; SET search_path = a",
            "BEGIN READ ONLY (",
        ] {
            assert!(!begins_read_only(sql.as_bytes()), "{sql}");
        }
    }
}
