//! Answers of the console as rows.

use bytes::{BufMut, BytesMut};

use crate::wire::Reply;

/// The type of a column, as drivers see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Int4,
    Int8,
    Numeric,
    Bool,
}

impl Kind {
    /// Type OID and size.
    fn of_wire(self) -> (u32, i16) {
        match self {
            Self::Text => (25, -1),
            Self::Int4 => (23, 4),
            Self::Int8 => (20, 8),
            Self::Numeric => (1_700, -1),
            Self::Bool => (16, 1),
        }
    }
}

/// Columns and rows.
#[derive(Debug, Default)]
pub(super) struct Rows {
    columns: Vec<(String, Kind)>,
    rows: Vec<Vec<Option<String>>>,
}

/// What can stand in a row.
pub(super) trait Field {
    fn text(self) -> Option<String>;
}

macro_rules! number_fields {
    ($($number:ty)*) => {$(
        impl Field for $number {
            fn text(self) -> Option<String> {
                Some(self.to_string())
            }
        }
    )*};
}

number_fields!(u8 u16 u32 u64 usize);

impl Field for &str {
    fn text(self) -> Option<String> {
        Some(self.to_owned())
    }
}

impl Field for String {
    fn text(self) -> Option<String> {
        Some(self)
    }
}

impl<F: Field> Field for Option<F> {
    fn text(self) -> Option<String> {
        self.and_then(F::text)
    }
}

/// A row of fields of different types.
macro_rules! row {
    ($($field:expr),* $(,)?) => { vec![$($crate::console::table::Field::text($field)),*] };
}
pub(super) use row;

impl Rows {
    /// No rows yet; `columns` are `name` (text) or `name:i`, `:q`, `:n`, `:b` for int4, int8, numeric and bool.
    pub(super) fn new(columns: &str) -> Self {
        let column = |word: &str| {
            let (name, kind) = word.split_once(':').unwrap_or((word, ""));
            let kind = match kind {
                "i" => Kind::Int4,
                "q" => Kind::Int8,
                "n" => Kind::Numeric,
                "b" => Kind::Bool,
                _ => Kind::Text,
            };
            (name.to_owned(), kind)
        };
        Self { columns: columns.split_whitespace().map(column).collect(), rows: Vec::new() }
    }

    pub(super) fn push(&mut self, row: Vec<Option<String>>) {
        debug_assert_eq!(row.len(), self.columns.len());
        self.rows.push(row);
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn are_all_text(&self) -> bool {
        self.columns.iter().all(|(_, kind)| *kind == Kind::Text)
    }

    /// RowDescription.
    pub(super) fn describe(&self, out: &mut BytesMut) {
        out.message(b'T', |b| {
            b.put_u16(self.columns.len() as u16);
            for (name, kind) in &self.columns {
                let (oid, size) = kind.of_wire();
                b.put_slice(name.as_bytes());
                b.put_u8(0);
                b.put_u32(0); // of no table
                b.put_u16(0);
                b.put_u32(oid);
                b.put_i16(size);
                b.put_i32(-1);
                b.put_u16(0); // text
            }
        });
    }

    /// DataRows.
    pub(super) fn write(&self, out: &mut BytesMut) {
        for row in &self.rows {
            out.message(b'D', |b| {
                b.put_u16(row.len() as u16);
                for field in row {
                    match field {
                        Some(text) => {
                            b.put_u32(text.len() as u32);
                            b.put_slice(text.as_bytes());
                        }
                        None => b.put_i32(-1),
                    }
                }
            });
        }
    }
}
