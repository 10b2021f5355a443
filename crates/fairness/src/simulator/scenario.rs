//! Who asks for what, and when.

use cofferdam_tenant::Class;

use super::nanos;

/// How much a piece of work takes, in seconds of computing and of waiting.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// Seconds on a core.
    pub compute: f64,
    /// Seconds that cost nobody anything.
    pub wait: f64,
    /// Whether the cost varies like an exponential distribution around its mean, or is always the same.
    pub varies: bool,
}

/// Where work comes from.
#[derive(Debug, Clone)]
pub struct Source {
    /// The tenants it comes from: one at random each time.
    pub tenants: std::ops::Range<u32>,
    /// The kind of work.
    pub class: Class,
    /// What one piece takes.
    pub cost: Cost,
    /// How it arrives.
    pub load: Load,
    /// When it begins, in seconds.
    pub from: f64,
    /// Whether it is an aggressor: left out when the victims are measured alone.
    pub aggressor: bool,
}

/// How work arrives.
#[derive(Debug, Clone, Copy)]
pub enum Load {
    /// At random, so many per second, whatever happens to them.
    Poisson(f64),
    /// So many clients, each asking again as soon as it is answered.
    Closed(u32),
}

/// A server, and everything that asks something of it.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Its name in tables.
    pub name: &'static str,
    /// What it is about, in a sentence.
    pub about: &'static str,
    /// Slots.
    pub slots: u32,
    /// Fewest slots of the adaptive policy.
    pub least_slots: u32,
    /// Slots open to expensive work.
    pub expensive_slots: u32,
    /// Slots of each tenant where every tenant has a pool of its own.
    pub pool_per_tenant: u32,
    /// Cores that compute.
    pub cores: f64,
    /// Tenants registered.
    pub tenants: u32,
    /// Seconds simulated.
    pub seconds: f64,
    /// Seconds at the beginning that are not measured.
    pub warm_up: f64,
    /// Who asks.
    pub sources: Vec<Source>,
}

impl Source {
    pub(super) fn is_aggressor(&self) -> bool {
        self.aggressor
    }

    pub(super) fn tenant(&self, rng: &mut fastrand::Rng) -> u32 {
        rng.u32(self.tenants.clone())
    }

    pub(super) fn cost(&self, rng: &mut fastrand::Rng) -> (f64, f64) {
        let factor = if self.cost.varies { exponential(rng) } else { 1.0 };
        (self.cost.compute * factor, self.cost.wait * factor)
    }

    pub(super) fn first_arrivals(&self, rng: &mut fastrand::Rng) -> Vec<u64> {
        match self.load {
            Load::Poisson(rate) => vec![nanos(self.from + exponential(rng) / rate)],
            // Not all in the same instant.
            Load::Closed(clients) => (0..clients).map(|_| nanos(self.from + 0.05 * rng.f64())).collect(),
        }
    }

    pub(super) fn next_arrival(&self, rng: &mut fastrand::Rng) -> Option<u64> {
        match self.load {
            Load::Poisson(rate) => Some(nanos(exponential(rng) / rate)),
            Load::Closed(_) => None,
        }
    }

    /// After an answer: the time until the client asks again.
    pub(super) fn again(&self, rng: &mut fastrand::Rng) -> Option<u64> {
        match self.load {
            Load::Poisson(_) => None,
            Load::Closed(_) => Some(nanos(0.0002 * exponential(rng))),
        }
    }
}

fn exponential(rng: &mut fastrand::Rng) -> f64 {
    -(1.0 - rng.f64()).ln()
}

const VICTIMS: u32 = 8;

/// Eight tenants with 20 transactions a second each.
fn victims(cost: Cost) -> Vec<Source> {
    (0..VICTIMS)
        .map(|t| Source {
            tenants: t..t + 1,
            class: Class::Rpc,
            cost,
            load: Load::Poisson(20.0),
            from: 0.0,
            aggressor: false,
        })
        .collect()
}

fn aggressors(n: u32, clients: u32, cost: Cost, from: f64) -> impl Iterator<Item = Source> {
    (VICTIMS..VICTIMS + n).map(move |t| Source {
        tenants: t..t + 1,
        class: Class::Rpc,
        cost,
        load: Load::Closed(clients),
        from,
        aggressor: true,
    })
}

impl Scenario {
    pub(super) fn has_both(&self) -> bool {
        self.sources.iter().any(|s| s.aggressor) && self.sources.iter().any(|s| !s.aggressor)
    }

    fn neighbours(name: &'static str, about: &'static str, n: u32, victim: Cost, cost: Cost) -> Self {
        let clients = if n == 1 { 60 } else { 20 };
        let mut sources = victims(victim);
        sources.extend(aggressors(n, clients, cost, 0.5));
        Self {
            name,
            about,
            slots: 40,
            least_slots: 4,
            expensive_slots: 38,
            pool_per_tenant: 20,
            cores: 2.0,
            tenants: VICTIMS + n,
            seconds: 40.0,
            warm_up: 10.0,
            sources,
        }
    }

    /// All scenarios but the largest.
    pub fn all() -> Vec<Self> {
        let waits = |ms: f64| Cost { compute: 0.0, wait: ms / 1e3, varies: false };
        let computes = |ms: f64| Cost { compute: ms / 1e3, wait: 0.0, varies: true };
        let short = Cost { compute: 0.001, wait: 0.002, varies: false };
        let mut morning = Self::neighbours(
            "quiet-morning",
            "ten-second transactions take what they can before the victims wake up, five seconds later",
            1,
            short,
            waits(10_000.0),
        );
        morning.sources.iter_mut().filter(|s| !s.aggressor).for_each(|s| s.from = 5.0);
        morning.sources.iter_mut().filter(|s| s.aggressor).for_each(|s| s.from = 0.0);
        morning.warm_up = 5.0;
        let mut report = Self::neighbours(
            "ten-minute-reports",
            "one tenant starts 60 reports of ten minutes each",
            1,
            short,
            waits(600_000.0),
        );
        report.seconds = 120.0;
        vec![
            Self::neighbours("sleep-1x60", "one tenant, 60 clients, 2 s that only wait", 1, short, waits(2_000.0)),
            Self::neighbours(
                "sleep-4x20",
                "four tenants, 20 clients each, 2 s that only wait",
                4,
                short,
                waits(2_000.0),
            ),
            Self::neighbours(
                "burn-1x60",
                "one tenant, 60 clients, half a second of computing",
                1,
                short,
                computes(500.0),
            ),
            Self::neighbours(
                "burn-4x20",
                "four tenants, 20 clients each, half a second of computing",
                4,
                short,
                computes(500.0),
            ),
            Self::neighbours(
                "storm-1x60",
                "one tenant, 60 clients, 3 ms of computing, without pause",
                1,
                short,
                computes(3.0),
            ),
            Self::neighbours(
                "storm-4x20",
                "four tenants, 20 clients each, 3 ms of computing, without pause",
                4,
                short,
                computes(3.0),
            ),
            morning,
            report,
            Self::month_end(),
        ]
    }

    /// Everybody has a peak at once: nobody is a victim and nobody an aggressor; what counts is who gets how much.
    fn month_end() -> Self {
        let cost = |tenant: u32| Cost {
            compute: [0.005, 0.02, 0.08, 0.32][tenant as usize % 4],
            wait: [0.005, 0.02, 0.08, 0.32][tenant as usize % 4],
            varies: true,
        };
        let sources = (0..64)
            .map(|t| Source {
                tenants: t..t + 1,
                class: if t % 8 == 7 { Class::Report } else { Class::Rpc },
                cost: cost(t),
                load: Load::Closed(4),
                from: 0.0,
                aggressor: true,
            })
            .collect();
        Self {
            name: "month-end",
            about: "64 tenants with 4 clients each, work from 10 to 640 ms, all at once",
            slots: 40,
            least_slots: 4,
            expensive_slots: 38,
            pool_per_tenant: 2,
            cores: 8.0,
            tenants: 64,
            seconds: 60.0,
            warm_up: 20.0,
            sources,
        }
    }

    /// 100,000 tenants on 1,000 slots, ten of them aggressors.
    pub fn large() -> Self {
        let tenants = 100_000;
        let quiet = Source {
            tenants: 0..tenants - 10,
            class: Class::Rpc,
            cost: Cost { compute: 0.002, wait: 0.008, varies: true },
            load: Load::Poisson(20_000.0),
            from: 0.0,
            aggressor: false,
        };
        let mut sources = vec![quiet];
        sources.extend((tenants - 10..tenants).map(|t| Source {
            tenants: t..t + 1,
            class: Class::Rpc,
            cost: Cost { compute: 0.0, wait: 1.0, varies: true },
            load: Load::Closed(400),
            from: 0.5,
            aggressor: true,
        }));
        Self {
            name: "100k-tenants",
            about: "100,000 tenants on 1,000 slots, ten of them with 400 clients of one second each",
            slots: 1_000,
            least_slots: 250,
            expensive_slots: 750,
            pool_per_tenant: 20,
            cores: 64.0,
            tenants,
            seconds: 12.0,
            warm_up: 6.0,
            sources,
        }
    }
}
