//! A tenant's file and a main file, as text.

use cofferdam_tenant::{Catalog, NoSecrets, Source, SourceSet};

/// Panics when something is wrong.
pub fn run(data: &[u8]) {
    let Ok(data) = std::str::from_utf8(data) else { return };
    let (main, tenant) = data.split_once('\0').unwrap_or((data, data));
    let set = SourceSet { main: Source::new("main", main), tenants: vec![Source::new("tenant", tenant)] };
    if let Err(faults) = Catalog::build(&set, &NoSecrets, None) {
        assert!(!faults.0.is_empty(), "refused without a reason");
        assert!(faults.0.iter().all(|f| f.line >= 1 && f.column >= 1 && !f.expected.is_empty()));
    }
}
