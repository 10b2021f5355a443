//! What a statement does to the session, read from its text: just enough to know whether a server connection may serve
//! somebody else afterwards.
//!
//! This is no parser. It finds where statements begin, skips comments, strings and dollar quotes, and looks at words.
//! Where it cannot be sure, it says [`Effect::opaque`]: the connection is reset before anybody else gets it.

mod database;
mod lexer;
mod named;
mod read_only;
mod setting;

pub use database::{DatabaseCommand, database_commands};
pub use named::{Named, Use, named};
pub use read_only::begins_read_only;
pub use setting::{Setting, resets_name, setting};

use crate::session::PREFIX;
use lexer::{Lexer, Token, is_word};

/// What a text of one or more statements does to the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Effect {
    /// It may leave state that the client expects to find again: the server connection stays with the client.
    pub pins: bool,
    /// It may have done anything: the server connection is reset before it serves somebody else.
    pub opaque: bool,
    /// One of its statements is `UNLISTEN *`.
    pub unlistens_all: bool,
    /// It takes prepared statements away.
    pub deallocates: bool,
    /// It may change tables, views or types that others see.
    pub alters: bool,
    /// It may make, take away or rename a database.
    pub databases: bool,
    /// It is this one statement and nothing else.
    pub only: Option<Only>,
}

/// A statement that on a clean session changes nothing, so that the gateway can answer it (rule 13).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Only {
    /// `DISCARD ALL`
    DiscardAll,
    /// `RESET ALL`
    ResetAll,
    /// `UNLISTEN *`
    UnlistenAll,
    /// `DEALLOCATE ALL`
    DeallocateAll,
}

impl Only {
    /// The tag of its CommandComplete.
    pub fn tag(self) -> &'static str {
        match self {
            Self::DiscardAll => "DISCARD ALL",
            Self::ResetAll => "RESET",
            Self::UnlistenAll => "UNLISTEN",
            Self::DeallocateAll => "DEALLOCATE ALL",
        }
    }
}

/// A statement that is nothing but a wish to hear of a channel, or not any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// `LISTEN channel`
    To(String),
    /// `UNLISTEN channel`
    Not(String),
    /// `UNLISTEN *`
    ToNothing,
}

impl Listen {
    /// The tag of its CommandComplete.
    pub fn tag(&self) -> &'static str {
        if matches!(self, Self::To(_)) { "LISTEN" } else { "UNLISTEN" }
    }
}

/// Reads a text that is one `LISTEN` or `UNLISTEN` and nothing else. With comments, escapes or more statements it is none.
pub fn listen(sql: &[u8]) -> Option<Listen> {
    let text = sql.trim_ascii_start();
    // Cheap for everything else.
    let listens = match text.first()?.to_ascii_lowercase() {
        b'l' => true,
        b'u' => false,
        _ => return None,
    };
    let keyword = if listens { "listen" } else { "unlisten" };
    let (first, rest) = text.split_at_checked(keyword.len())?;
    if !is(first, keyword) || rest.first().is_none_or(|c| is_word(*c) || *c == b'$') {
        return None;
    }
    let mut rest = std::str::from_utf8(rest).ok()?.trim_end_matches('\0').trim_ascii();
    if let Some(before) = rest.strip_suffix(';') {
        rest = before.trim_ascii_end();
    }
    if rest == "*" {
        return (!listens).then_some(Listen::ToNothing);
    }
    let name = if let Some(quoted) = rest.strip_prefix('"') {
        let inner = quoted.strip_suffix('"')?;
        (!inner.contains('"')).then(|| inner.to_owned())?
    } else {
        // Beyond ASCII the server's locale decides what a small letter is.
        let plain = rest.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_');
        (plain && !rest.as_bytes().first()?.is_ascii_digit()).then(|| rest.to_ascii_lowercase())?
    };
    if name.is_empty() || name.len() > 63 {
        return None;
    }
    Some(if listens { Listen::To(name) } else { Listen::Not(name) })
}

/// Reads a text of statements.
pub fn effect(sql: &[u8]) -> Effect {
    let mut out = Effect::default();
    let mut lexer = Lexer { rest: sql, ambiguous: false };
    let mut statements = 0usize;
    let mut runs_strings = false;
    let mut statement = Statement::default();
    loop {
        match lexer.next() {
            Some(Token::Word(word)) => statement.word(word),
            Some(Token::Other(symbol)) => statement.symbol(symbol),
            end @ (Some(Token::Semicolon) | None) => {
                if statement.tokens > 0 {
                    statements += 1;
                    out.pins |= statement.pins();
                    out.opaque |= statement.is_opaque();
                    runs_strings |= statement.opaque;
                    out.deallocates |= statement.deallocates();
                    out.databases |= statement.is_about_databases();
                    out.alters |= statement.alters();
                    out.unlistens_all |= is(statement.first, "unlisten") && statement.star;
                    out.only = statement.only();
                }
                statement = Statement::default();
                if end.is_none() {
                    break;
                }
            }
        }
    }
    if statements != 1 {
        out.only = None;
    }
    if out.only.is_some() {
        out.pins = false;
    }
    out.opaque |= lexer.ambiguous;
    // What cannot be read for certain, and what is said inside a string that is executed.
    if (lexer.ambiguous || runs_strings) && !out.databases {
        out.databases = mentions_databases(sql);
    }
    out
}

/// Whether a single statement is worth a closer look: cheap, and true for whatever could be about databases.
pub fn may_be_about_databases(sql: &[u8]) -> bool {
    match sql.iter().find(|c| !c.is_ascii_whitespace() && **c != 0x0b).map(u8::to_ascii_lowercase) {
        Some(b's' | b'i' | b'u' | b'w' | b'b' | b'r' | b'f') | None => false,
        Some(_) => mentions_databases(sql),
    }
}

fn mentions_databases(sql: &[u8]) -> bool {
    sql.windows(8).any(|w| w.eq_ignore_ascii_case(b"database"))
}

/// The words of one statement that matter.
#[derive(Default)]
struct Statement<'a> {
    tokens: usize,
    first: &'a [u8],
    second: &'a [u8],
    third: &'a [u8],
    star: bool,
    qualified: bool,
    temporary: bool,
    hold: bool,
    function: bool,
    opaque: bool,
}

impl<'a> Statement<'a> {
    fn word(&mut self, word: &'a [u8]) {
        self.tokens += 1;
        match self.tokens {
            1 => {
                self.first = word;
                self.opaque |= is(word, "do") || is(word, "call");
            }
            2 => self.second = word,
            3 => self.third = word,
            _ => {}
        }
        match word.first().map(u8::to_ascii_lowercase) {
            Some(b't') => self.temporary |= is(word, "temp") || is(word, "temporary"),
            Some(b'h') => self.hold |= is(word, "hold"),
            Some(b's') => self.function |= is(word, "set_config") || is(word, "setseed"),
            Some(b'd') => self.function |= is(word, "dblink_connect") || is(word, "dblink_connect_u"),
            Some(b'p') => {
                self.temporary |= is(word, "pg_temp");
                self.function |= is(word, "pg_advisory_lock")
                    || is(word, "pg_advisory_lock_shared")
                    || is(word, "pg_try_advisory_lock")
                    || is(word, "pg_try_advisory_lock_shared");
            }
            _ => {}
        }
    }

    fn symbol(&mut self, symbol: u8) {
        self.tokens += 1;
        self.star |= symbol == b'*' && self.tokens == 2;
        // `SET local.x`: a setting with a class, however the class is called.
        self.qualified |= symbol == b'.' && self.tokens == 3;
    }

    fn pins(&self) -> bool {
        let first = |w| is(self.first, w);
        let second = |w| is(self.second, w);
        self.function
            || self.temporary
            || match self.first.first().map(u8::to_ascii_lowercase) {
                Some(b's') => {
                    let ends = second("local") || second("transaction") || second("constraints");
                    first("set") && (self.qualified || !ends)
                }
                Some(b'r') => first("reset"),
                Some(b'l') => first("listen") || first("load"),
                Some(b'p') => first("prepare") && !second("transaction"),
                Some(b'd') => first("declare") && self.hold,
                _ => false,
            }
    }

    fn alters(&self) -> bool {
        let first = |w| is(self.first, w);
        (first("create") || first("alter") || first("drop") || self.opaque) && !self.temporary
    }

    fn is_about_databases(&self) -> bool {
        let first = |w| is(self.first, w);
        is(self.second, "database") && (first("create") || first("drop") || first("alter"))
    }

    fn deallocates(&self) -> bool {
        is(self.first, "discard") || is(self.first, "deallocate")
    }

    fn is_opaque(&self) -> bool {
        // A name of the gateway's own belongs to others too: `DEALLOCATE [PREPARE] name`.
        let is_ours = |name: &[u8]| name.get(..PREFIX.len()).is_some_and(|s| s.eq_ignore_ascii_case(PREFIX));
        self.opaque || self.deallocates() && (is_ours(self.second) || is_ours(self.third))
    }

    fn only(&self) -> Option<Only> {
        if self.tokens != 2 {
            return None;
        }
        let both = |a, b| is(self.first, a) && is(self.second, b);
        if both("discard", "all") {
            Some(Only::DiscardAll)
        } else if both("reset", "all") {
            Some(Only::ResetAll)
        } else if both("deallocate", "all") {
            Some(Only::DeallocateAll)
        } else if is(self.first, "unlisten") && self.star {
            Some(Only::UnlistenAll)
        } else {
            None
        }
    }
}

fn is(word: &[u8], lower: &str) -> bool {
    word.eq_ignore_ascii_case(lower.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pins(sql: &str) -> bool {
        effect(sql.as_bytes()).pins
    }

    /// Rule 10: what outlives a transaction pins the server connection.
    #[test]
    fn session_state_pins() {
        for sql in [
            "SET statement_timeout = 0",
            "set session lock_timeout='15s'",
            "/* a /* nested */ comment */ SET x TO 1",
            "SELECT 1; SET x TO 1",
            "RESET x",
            "LISTEN imbus",
            "PREPARE q AS SELECT 1",
            "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
            "CREATE TEMP TABLE t (a int)",
            "create temporary view v as select 1",
            "CREATE TABLE pg_temp.t (a int)",
            "SELECT 1 INTO TEMPORARY t",
            "SELECT set_config('a.b', 'c', false)",
            "SELECT pg_try_advisory_lock(1)",
            "SELECT \"pg_advisory_lock\"(1)",
            "LOAD 'x'",
            "SET ROLE other",
            "SET local.x = '1'",
            "SET \"transaction\".y TO 2",
            "SELECT setseed(0.5)",
            "-- comment\nSET x = 1",
        ] {
            assert!(pins(sql), "{sql}");
        }
    }

    #[test]
    fn what_ends_with_the_transaction_does_not_pin() {
        for sql in [
            "SELECT 1",
            "BEGIN ISOLATION LEVEL REPEATABLE READ",
            "SET LOCAL statement_timeout = 0",
            "SET TRANSACTION READ ONLY",
            "UPDATE t SET a = 1",
            "SELECT 'SET x = 1; LISTEN y'",
            "SELECT $$; SET x = 1$$, $a$ ; LISTEN y $a$, $1",
            "SELECT E'it\\'s; SET x = 1'",
            "DECLARE c CURSOR FOR SELECT 1",
            "SELECT pg_advisory_xact_lock(1)",
            "NOTIFY imbus, 'x'",
            "COPY t FROM STDIN",
            "PREPARE TRANSACTION 'x'",
            "",
        ] {
            assert!(!effect(sql.as_bytes()).pins, "{sql}");
            assert!(!effect(sql.as_bytes()).opaque, "{sql}");
        }
    }

    #[test]
    fn what_cannot_be_seen_through_is_opaque() {
        for sql in [
            "DO $$ BEGIN PERFORM set_config('a.b','c',false); END $$",
            "CALL p()",
            "SELECT U&\"\\0061\"()",
            "SELECT 'a\\'; SET x=1 --'",
        ] {
            assert!(effect(sql.as_bytes()).opaque, "{sql}");
        }
    }

    /// Rule 13.
    #[test]
    fn statements_that_mean_nothing_on_a_clean_session_are_recognised_alone() {
        for (sql, only) in [
            ("DISCARD ALL", Only::DiscardAll),
            (" discard\tall ; ", Only::DiscardAll),
            ("RESET ALL;", Only::ResetAll),
            ("UNLISTEN *", Only::UnlistenAll),
            ("DEALLOCATE ALL", Only::DeallocateAll),
        ] {
            let e = effect(sql.as_bytes());
            assert_eq!((e.only, e.pins), (Some(only), false), "{sql}");
        }
        for sql in ["DISCARD ALL; SELECT 1", "DISCARD TEMP", "RESET allx", "UNLISTEN x", "DISCARD ALL x"] {
            assert_eq!(effect(sql.as_bytes()).only, None, "{sql}");
        }
    }

    #[test]
    fn listen_is_recognised_alone_with_its_channel() {
        let to = |c: &str| Some(Listen::To(c.into()));
        for (sql, expected) in [
            ("LISTEN imbus", to("imbus")),
            ("listen  ImBus ;", to("imbus")),
            ("LISTEN \"ImBus\"", to("ImBus")),
            ("listen\"x\"", to("x")),
            ("UNLISTEN a", Some(Listen::Not("a".into()))),
            ("unlisten *;", Some(Listen::ToNothing)),
            ("LISTEN a; LISTEN b", None),
            ("LISTEN a -- b", None),
            ("LISTEN \"a\"\"b\"", None),
            ("LISTEN *", None),
            ("LISTEN 1a", None),
            ("listening", None),
            ("LISTEN", None),
            ("SELECT 1", None),
            ("LISTEN h\u{e9}", None),
            ("", None),
        ] {
            assert_eq!(listen(sql.as_bytes()), expected, "{sql}");
        }
        assert_eq!(listen(format!("LISTEN {}", "a".repeat(64)).as_bytes()), None);
    }

    proptest! {
        #[test]
        fn what_is_read_as_one_listen_is_seen_as_one_by_the_full_reader(sql in "(?i)(un)?listen[ a-z\"*;\\-]{0,12}") {
            if let Some(Listen::To(_)) = listen(sql.as_bytes()) {
                let e = effect(sql.as_bytes());
                prop_assert!(e.pins && !e.opaque, "{sql}");
            }
        }

        #[test]
        fn no_text_makes_the_reader_panic(sql in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = (effect(&sql), listen(&sql));
        }

        #[test]
        fn no_sql_like_text_makes_the_reader_panic(sql in "[ 'a-zA-Z$\"/*\\-;\\\\\\n0-9&]{0,60}") {
            let _ = effect(sql.as_bytes());
        }
    }
}
