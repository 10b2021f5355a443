//! A plain SQL dump as a sequence of statements and copied rows.
//!
//! `psql` would do, and would also run whatever commands for itself stand in a file that comes from somewhere else. So the
//! file is taken apart here, and the server sees the statements one by one.

use std::io::{self, BufRead, Read};

use bytes::Bytes;

/// What a dump is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// A statement with its semicolon.
    Statement(String),
    /// `COPY … FROM stdin;`, followed by rows and an end.
    Copy(String),
    /// Rows, some at a time.
    Rows(Bytes),
    /// The end of the rows.
    CopyEnd,
}

/// Why a dump cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum SqlError {
    /// The file cannot be read.
    #[error("line {line}: {error}")]
    Read { line: u64, error: io::Error },
    /// Something that only `psql` would understand.
    #[error("line {line}: `{found}` is a command for psql; only dumps made without --create are taken")]
    Command { line: u64, found: String },
    /// A line, or a statement of several, that nothing could be done with but fill the memory.
    #[error("line {line}: it is longer than {} MiB", LONGEST >> 20)]
    Long { line: u64 },
    /// Text in another encoding, of which nobody here knows what it says.
    #[error(
        "line {line}: found a statement that is not UTF-8; expected a dump in UTF-8, such as Odoo and `pg_dump -E UTF8` make"
    )]
    Encoding { line: u64 },
    /// It ends in the middle.
    #[error("line {line}: the dump ends inside {what} that began at line {began}")]
    Unfinished { line: u64, what: &'static str, began: u64 },
}

/// Rows are passed on in pieces of about this many bytes.
const ROWS: usize = 64 << 10;
/// PostgreSQL takes no row or statement that is longer.
const LONGEST: usize = 1 << 30;

/// Reads a dump piece by piece.
pub(super) struct Pieces<R> {
    input: R,
    line: u64,
    /// The line at which the rows began.
    copying: Option<u64>,
    /// The end of the rows has been read.
    ended: bool,
}

impl<R: BufRead> Pieces<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, line: 0, copying: None, ended: false }
    }

    /// The next piece; none at the end.
    pub(super) fn next(&mut self) -> Result<Option<Piece>, SqlError> {
        if let Some(began) = self.copying { self.rows(began).map(Some) } else { self.statement() }
    }

    fn read_line(&mut self, line: &mut Vec<u8>) -> Result<bool, SqlError> {
        line.clear();
        self.line += 1;
        let mut limited = (&mut self.input).take(LONGEST as u64);
        let read = limited.read_until(b'\n', line).map_err(|error| SqlError::Read { line: self.line, error })?;
        if read == LONGEST { Err(SqlError::Long { line: self.line }) } else { Ok(read > 0) }
    }

    fn rows(&mut self, began: u64) -> Result<Piece, SqlError> {
        let mut rows = Vec::new();
        let mut line = Vec::new();
        while rows.len() < ROWS {
            if std::mem::take(&mut self.ended) {
                self.copying = None;
                return Ok(Piece::CopyEnd);
            }
            if !self.read_line(&mut line)? {
                return Err(SqlError::Unfinished { line: self.line, what: "rows", began });
            }
            if line.trim_ascii_end() == b"\\." {
                self.ended = true;
                if !rows.is_empty() {
                    break;
                }
            } else {
                rows.extend_from_slice(&line);
            }
        }
        Ok(Piece::Rows(rows.into()))
    }

    fn statement(&mut self) -> Result<Option<Piece>, SqlError> {
        let mut text: Vec<u8> = Vec::new();
        let mut lexer = Lexer::default();
        let (mut line, mut began) = (Vec::new(), 0);
        while self.read_line(&mut line)? {
            let blank = text.is_empty();
            if blank {
                let start = line.trim_ascii_start();
                if start.is_empty() || start.starts_with(b"--") {
                    continue;
                }
                if start.starts_with(b"\\") {
                    let word = String::from_utf8_lossy(start.trim_ascii_end()).into_owned();
                    // Newer dumps ask psql to take no commands; that is what is done here anyway.
                    if word.starts_with("\\restrict ") || word.starts_with("\\unrestrict ") {
                        continue;
                    }
                    let found = word.chars().take(40).collect();
                    return Err(SqlError::Command { line: self.line, found });
                }
                began = self.line;
            }
            text.extend_from_slice(&line);
            if text.len() >= LONGEST {
                return Err(SqlError::Long { line: self.line });
            }
            if lexer.feed(&line) {
                // More than one statement on a line is one piece: the server takes them apart.
                let text =
                    str::from_utf8(text.trim_ascii()).map_err(|_| SqlError::Encoding { line: began })?.to_owned();
                let copy = text.len() > 5
                    && text.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("COPY "))
                    && text.trim_end_matches(';').trim_end().to_ascii_lowercase().ends_with("from stdin");
                if copy {
                    self.copying = Some(self.line);
                    return Ok(Some(Piece::Copy(text)));
                }
                return Ok(Some(Piece::Statement(text)));
            }
        }
        if text.is_empty() {
            return Ok(None);
        }
        Err(SqlError::Unfinished { line: self.line, what: "a statement", began })
    }
}

/// Finds where a statement ends: at a semicolon that is not inside quotes, comments, or the body of an SQL function.
#[derive(Debug, Default)]
struct Lexer {
    state: State,
    /// Words at the beginning, to know a function.
    words: Vec<String>,
    word: String,
    before: String,
    /// `BEGIN ATOMIC … END`, and `CASE … END` in it.
    depth: u32,
    /// Something came after an end.
    several: bool,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
enum State {
    #[default]
    Plain,
    /// In single quotes; with backslashes that escape?
    Single(bool),
    Double,
    /// In dollar quotes with this tag.
    Dollar(Vec<u8>),
    Block(u32),
}

impl Lexer {
    /// Takes a line; whether the statement is complete at its end.
    fn feed(&mut self, line: &[u8]) -> bool {
        let mut at = 0;
        let mut complete = false;
        while at < line.len() {
            let rest = &line[at..];
            let c = rest[0];
            match &mut self.state {
                State::Plain => {
                    if c.is_ascii_alphanumeric() || c == b'_' || c >= 0x80 {
                        self.word.push(char::from(c.to_ascii_lowercase()));
                        at += 1;
                        self.several |= std::mem::take(&mut complete);
                        continue;
                    }
                    let escapes = self.word == "e" && c == b'\'';
                    // A dollar sign inside a name begins no quote.
                    let in_name = !self.word.is_empty();
                    if c == b'$' && in_name {
                        self.word.push('$');
                        at += 1;
                        continue;
                    }
                    self.end_word();
                    match c {
                        b'\'' => self.state = State::Single(escapes),
                        b'"' => self.state = State::Double,
                        b'-' if rest.starts_with(b"--") => return complete,
                        b'/' if rest.starts_with(b"/*") => {
                            self.state = State::Block(1);
                            at += 1;
                        }
                        b'$' => {
                            if let Some(tag) = dollar_tag(rest) {
                                at += tag.len() - 1;
                                self.state = State::Dollar(tag.to_vec());
                            }
                        }
                        b';' if self.depth == 0 => complete = true,
                        _ => {}
                    }
                    if !c.is_ascii_whitespace() && c != b';' {
                        self.several |= std::mem::take(&mut complete);
                    }
                }
                State::Single(true) if c == b'\\' => at += 1,
                State::Single(_) => {
                    if c == b'\'' {
                        // Two of them are one inside.
                        if line.get(at + 1) == Some(&b'\'') {
                            at += 1;
                        } else {
                            self.state = State::Plain;
                        }
                    }
                }
                State::Double => {
                    if c == b'"' {
                        self.state = State::Plain;
                    }
                }
                State::Dollar(tag) => {
                    if rest.starts_with(tag) {
                        at += tag.len() - 1;
                        self.state = State::Plain;
                    }
                }
                State::Block(depth) => {
                    if rest.starts_with(b"*/") {
                        at += 1;
                        *depth -= 1;
                        if *depth == 0 {
                            self.state = State::Plain;
                        }
                    } else if rest.starts_with(b"/*") {
                        at += 1;
                        *depth += 1;
                    }
                }
            }
            at += 1;
        }
        complete && self.state == State::Plain
    }

    fn end_word(&mut self) {
        if self.word.is_empty() {
            return;
        }
        let word = std::mem::take(&mut self.word);
        let function = self.words.first().is_some_and(|w| w == "create")
            && self.words.iter().any(|w| w == "function" || w == "procedure");
        if function {
            match word.as_str() {
                "atomic" if self.before == "begin" => self.depth += 1,
                "case" if self.depth > 0 => self.depth += 1,
                "end" => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
        self.before.clone_from(&word);
        if self.words.len() < 4 {
            self.words.push(word);
        }
    }
}

/// Whether a piece is one statement, and not several.
pub(super) fn is_one(text: &str) -> bool {
    let mut lexer = Lexer::default();
    for line in text.split_inclusive('\n') {
        lexer.feed(line.as_bytes());
    }
    !lexer.several
}

fn dollar_tag(text: &[u8]) -> Option<&[u8]> {
    let end = text.iter().skip(1).position(|c| *c == b'$')? + 1;
    let name = &text[1..end];
    let good = name.iter().all(|c| c.is_ascii_alphanumeric() || *c == b'_' || *c >= 0x80);
    (good && !name.first().is_some_and(u8::is_ascii_digit)).then(|| &text[..=end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str) -> Result<Vec<Piece>, SqlError> {
        let mut pieces = Pieces::new(text.as_bytes());
        let mut found = Vec::new();
        while let Some(piece) = pieces.next()? {
            found.push(piece);
        }
        Ok(found)
    }

    fn statements(text: &str) -> Vec<String> {
        let only = |piece| match piece {
            Piece::Statement(text) => text,
            other => panic!("{other:?}"),
        };
        pieces(text).unwrap().into_iter().map(only).collect()
    }

    #[test]
    fn text_in_another_encoding_is_an_error_and_no_other_text() {
        let mut pieces = Pieces::new(&b"SELECT 1;\nCOMMENT ON TABLE t IS 'M\xfcll';\n"[..]);
        assert!(matches!(pieces.next(), Ok(Some(Piece::Statement(_)))));
        let error = pieces.next().unwrap_err().to_string();
        assert!(error.starts_with("line 2: found a statement that is not UTF-8"), "{error}");
    }

    #[test]
    fn a_semicolon_ends_a_statement_only_where_it_means_it() {
        for whole in [
            "SELECT 'a;b';",
            "SELECT 'it''s;\n';",
            r"SELECT E'\';', 1;",
            r"SELECT 'C:\';",
            r"SELECT E'it''s \';', 1;",
            "CREATE FUNCTION f(begin int) RETURNS int LANGUAGE sql AS 'SELECT 1';",
            "SELECT \"a;\"\"b\" FROM t;",
            "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $_$\nBEGIN\n  RETURN $1; -- ;\nEND;\n$_$;",
            "SELECT 1 /* ; /* nested ; */ ; */;",
            "SELECT a$b FROM t$1;",
            "CREATE FUNCTION f(a int) RETURNS int\n BEGIN ATOMIC\n  SELECT CASE WHEN a > 1 THEN 1 ELSE 2 END;\n  SELECT 2;\nEND;",
            "SELECT 1 -- not here ;\n;",
        ] {
            assert_eq!(statements(&format!("{whole}\n")), [whole], "{whole}");
            let two = format!("-- first\n\n{whole}\n-- second\n{whole}\n");
            assert_eq!(statements(&two), [whole, whole], "{whole}");
        }
    }

    #[test]
    fn several_statements_on_a_line_are_told_from_one() {
        for one in [
            "GRANT a TO b;",
            "ALTER TABLE t -- ; and\n OWNER TO x;",
            "COMMENT ON EXTENSION a IS 'b; c';",
            "GRANT a TO b;  \n",
        ] {
            assert!(is_one(one), "{one}");
        }
        for several in
            ["GRANT a TO b; SELECT 1;", "GRANT a TO b;;DROP TABLE t;", "GRANT a\nTO b; ALTER TABLE t OWNER TO x;"]
        {
            assert!(!is_one(several), "{several}");
        }
    }

    #[test]
    fn rows_are_passed_on_as_they_are_until_their_end() {
        let dump = "COPY public.t (a, b) FROM stdin;\n1\tx;y\n\\\\.\t\\N\n\\.\n\nSELECT 1;\nCOPY t FROM stdin;\n\\.\n";
        assert_eq!(
            pieces(dump).unwrap(),
            [
                Piece::Copy("COPY public.t (a, b) FROM stdin;".into()),
                Piece::Rows("1\tx;y\n\\\\.\t\\N\n".into()),
                Piece::CopyEnd,
                Piece::Statement("SELECT 1;".into()),
                Piece::Copy("COPY t FROM stdin;".into()),
                Piece::CopyEnd,
            ]
        );
    }

    #[test]
    fn commands_for_psql_are_refused_with_their_line() {
        let error = pieces("SELECT 1;\n\\! rm -rf /\n").unwrap_err().to_string();
        assert!(error.starts_with("line 2: `\\! rm -rf /` is a command for psql"), "{error}");
        assert!(pieces("\\connect other\n").is_err());
        assert_eq!(statements("\\restrict abc\nSELECT 1;\n\\unrestrict abc\n"), ["SELECT 1;"]);
    }

    #[test]
    fn an_end_in_the_middle_is_told() {
        let error = pieces("SELECT 1;\nSELECT 'a\n").unwrap_err().to_string();
        assert!(error.contains("ends inside a statement that began at line 2"), "{error}");
        let error = pieces("COPY t FROM stdin;\n1\n").map(drop).unwrap_err().to_string();
        assert!(error.contains("ends inside rows that began at line 1"), "{error}");
    }

    proptest::proptest! {
        /// Whatever comes, it ends, and nothing of a statement is lost.
        #[test]
        fn nothing_makes_it_panic(text in "[a-zA-Z0-9'\"$;\\\\\n/*. -]{0,200}") {
            let mut pieces = Pieces::new(text.as_bytes());
            while let Ok(Some(_)) = pieces.next() {}
        }
    }
}
