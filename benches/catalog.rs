//! Building the catalog of ten thousand tenants, and looking a host up in it.
#![allow(missing_docs)]

use std::hint::black_box;

use cofferdam_tenant::{Catalog, NoSecrets, Source, SourceSet};
use criterion::{Criterion, criterion_group, criterion_main};

fn sources(tenants: usize) -> SourceSet {
    let main = "http: { listen: ['127.0.0.1:0'] }\npools: { odoo: { servers: [{ address: '127.0.0.1:8069' }], slots: 64, login: { role: odoo, password: x } } }\n\
                clusters: { pg: { address: '127.0.0.1:5432', slots: 16 } }\nplans: { standard: {} }\n";
    let tenant = |n: usize| {
        let text = format!(
            "tenant: tenant-{n}\nhosts: [tenant-{n}.example.com]\ndatabase: tenant_{n}\nplacement: {{ pool: odoo, cluster: pg }}\nplan: standard\n"
        );
        Source::new(format!("tenants/tenant-{n}.yaml"), text)
    };
    SourceSet { main: Source::new("cofferdam.yaml", main), tenants: (0..tenants).map(tenant).collect() }
}

fn load(c: &mut Criterion) {
    let sources = sources(10_000);
    let mut group = c.benchmark_group("catalog");
    group.sample_size(10);
    group.bench_function("build of 10,000 tenants from text", |b| {
        b.iter(|| black_box(Catalog::build(&sources, &NoSecrets, None).is_ok()));
    });
    group.finish();
    let catalog = Catalog::build(&sources, &NoSecrets, None).ok();
    c.bench_function("look-up of a host among 10,000", |b| {
        b.iter(|| black_box(catalog.as_ref().and_then(|c| c.by_host("tenant-7777.example.com"))));
    });
}

criterion_group!(benches, load);
criterion_main!(benches);
