//! The loops over dense rows, compiled for the vector registers of the machine that runs them.
//!
//! Every loop is plain Rust over fixed lanes; [`pulp::Arch`] only chooses for which instruction
//! set it was compiled. Lanes are the same for all, so all choices give the same bits.

use pulp::{Arch, Simd, WithSimd};

/// Runs a body compiled for `arch`. A closure would do, but the standard library's shim around
/// closures is not always inlined, and then the body is compiled for the baseline: half as fast.
macro_rules! vectorised {
    ($arch:expr, ($($name:ident: $type:ty),*) -> $output:ty $body:block) => {{
        struct Kernel<'a> {
            $($name: $type),*
        }
        impl<'a> WithSimd for Kernel<'a> {
            type Output = $output;
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) -> $output {
                let Self { $($name),* } = self;
                $body
            }
        }
        $arch.dispatch(Kernel { $($name),* })
    }};
}

/// Values that are compared at once.
const LANES: usize = 8;

/// Columns of a group, whose maxima are taken lane by lane: a *cell* is one lane of one group.
const GROUP: usize = 8 * LANES;

/// Lanes into which the cells are folded to find a floor for the best `k`.
const BUCKETS: usize = 128;

/// A column and its reduced gain `gain − price`.
pub(super) type Scored = (f64, u32);

/// The largest bit pattern without its sign: at least `0x7f80_0000` if a value is not finite.
pub(super) fn largest_magnitude(arch: Arch, values: &[f32]) -> u32 {
    vectorised!(arch, (values: &'a [f32]) -> u32 {
            let mut lanes = [0_u32; 32];
            let (chunks, rest) = values.as_chunks::<32>();
            for chunk in chunks {
                for (lane, x) in lanes.iter_mut().zip(chunk) {
                    *lane = (*lane).max(x.to_bits() & 0x7fff_ffff);
                }
            }
            let rest = rest.iter().map(|x| x.to_bits() & 0x7fff_ffff);
            lanes.into_iter().chain(rest).max().unwrap_or(0)
    })
}

/// `max_j gain_j − price_j`.
pub(super) fn best(arch: Arch, gain: &[f32], price: &[f64]) -> f64 {
    vectorised!(arch, (gain: &'a [f32], price: &'a [f64]) -> f64 {
            let mut lanes = [f64::NEG_INFINITY; 4 * LANES];
            let (gains, gain_rest) = gain.as_chunks::<{ 4 * LANES }>();
            let (prices, price_rest) = price.as_chunks::<{ 4 * LANES }>();
            for (g, p) in gains.iter().zip(prices) {
                raise(&mut lanes, g, p);
            }
            let rest = gain_rest.iter().zip(price_rest).map(|(&g, &p)| f64::from(g) - p);
            lanes.into_iter().chain(rest).fold(f64::NEG_INFINITY, f64::max)
    })
}

/// Collects the columns `j` with `base − (gain_j − price_j) < min(nearest, distance_j)`, and their
/// reduced gains.
pub(super) fn nearer(
    arch: Arch,
    gain: &[f32],
    price: &[f64],
    base: f64,
    nearest: f64,
    distance: &[f64],
    found: &mut Vec<Scored>,
) {
    found.clear();
    vectorised!(arch, (
        gain: &'a [f32],
        price: &'a [f64],
        base: f64,
        nearest: f64,
        distance: &'a [f64],
        found: &'a mut Vec<Scored>
    ) -> () {
        let rows = gain.chunks(LANES).zip(price.chunks(LANES)).zip(distance.chunks(LANES));
        for (b, ((g, p), d)) in rows.enumerate() {
            let mut any = g.len() < LANES;
            if let (Some(g), Some(p), Some(d)) =
                (g.first_chunk::<LANES>(), p.first_chunk::<LANES>(), d.first_chunk::<LANES>())
            {
                for l in 0..LANES {
                    let at = base - (f64::from(g[l]) - p[l]);
                    any |= (at < nearest) & (at < d[l]);
                }
            }
            if any {
                for (l, ((&g, &p), &d)) in g.iter().zip(p).zip(d).enumerate() {
                    let value = f64::from(g) - p;
                    if base - value < nearest.min(d) {
                        found.push((value, (b * LANES + l) as u32));
                    }
                }
            }
        }
    });
}

#[inline(always)]
fn raise<const N: usize>(lanes: &mut [f64; N], gain: &[f32; N], price: &[f64; N]) {
    for l in 0..N {
        let r = f64::from(gain[l]) - price[l];
        lanes[l] = if r > lanes[l] { r } else { lanes[l] };
    }
}

#[inline(always)]
fn larger(a: f64, b: f64) -> f64 {
    if a > b { a } else { b }
}

/// Buffers of [`Sieve::top`].
pub(super) struct Sieve {
    arch: Arch,
    cells: Vec<[f64; LANES]>,
    /// The columns found, in no particular order.
    pub(super) top: Vec<Scored>,
}

impl Sieve {
    pub(super) fn new(arch: Arch, n: usize) -> Self {
        Self { arch, cells: vec![[0.0; LANES]; n / GROUP], top: Vec::with_capacity(n) }
    }

    /// Finds the `k` columns of largest reduced gain, `1 ≤ k ≤ n`, and returns an upper bound on
    /// the reduced gain of all others.
    ///
    /// `floor` is a value that at least `k` columns are known to reach (−∞ if nothing is known).
    /// Among equals the first after column `start`, cyclically, wins: rows of equal gains then
    /// keep different columns, which is what makes a constant matrix easy.
    pub(super) fn top(
        &mut self,
        gain: &[f32],
        price: &[f64],
        k: usize,
        floor: f64,
        start: usize,
    ) -> f64 {
        self.top.clear();
        let (arch, cells, found) = (self.arch, self.cells.as_mut_slice(), &mut self.top);
        let dropped = vectorised!(arch, (
            cells: &'a mut [[f64; LANES]],
            gain: &'a [f32],
            price: &'a [f64],
            k: usize,
            floor: f64,
            found: &'a mut Vec<Scored>
        ) -> f64 {
            let buckets = fill(cells, gain, price);
            let floor = larger(floor, kth(buckets, k));
            collect(cells, gain, price, floor, found)
        });
        cut(&mut self.top, k, start as u32, dropped)
    }
}

/// Writes the maximum of each cell and returns the maxima of the buckets of cells.
#[inline(always)]
fn fill(cells: &mut [[f64; LANES]], gain: &[f32], price: &[f64]) -> [f64; BUCKETS] {
    const BUCKETS_PER_LANE: usize = BUCKETS / LANES;
    let mut buckets = [[f64::NEG_INFINITY; LANES]; BUCKETS_PER_LANE];
    let groups = gain.as_chunks::<GROUP>().0.iter().zip(price.as_chunks::<GROUP>().0);
    for (b, ((g, p), cell)) in groups.zip(cells).enumerate() {
        let mut lanes = [f64::NEG_INFINITY; LANES];
        for (g, p) in g.as_chunks::<LANES>().0.iter().zip(p.as_chunks::<LANES>().0) {
            raise(&mut lanes, g, p);
        }
        *cell = lanes;
        let bucket = &mut buckets[b % BUCKETS_PER_LANE];
        for l in 0..LANES {
            bucket[l] = larger(lanes[l], bucket[l]);
        }
    }
    let mut flat = [f64::NEG_INFINITY; BUCKETS];
    flat.iter_mut().zip(buckets.as_flattened()).for_each(|(f, &b)| *f = b);
    flat
}

/// The `k`th largest bucket: at least `k` columns reach it, one in each bucket above it.
#[inline(always)]
fn kth(mut buckets: [f64; BUCKETS], k: usize) -> f64 {
    if k > BUCKETS {
        return f64::NEG_INFINITY;
    }
    *buckets.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

/// Collects the columns that reach `floor`; returns the largest reduced gain of the others.
#[inline(always)]
fn collect(
    cells: &[[f64; LANES]],
    gain: &[f32],
    price: &[f64],
    floor: f64,
    top: &mut Vec<Scored>,
) -> f64 {
    let mut below = [f64::NEG_INFINITY; LANES];
    for (b, cell) in cells.iter().enumerate() {
        let mut any = false;
        for l in 0..LANES {
            any |= cell[l] >= floor;
            let low = if cell[l] >= floor { f64::NEG_INFINITY } else { cell[l] };
            below[l] = larger(low, below[l]);
        }
        if any {
            for l in (0..LANES).filter(|&l| cell[l] >= floor) {
                let columns = (b * GROUP + l..(b + 1) * GROUP).step_by(LANES);
                below[l] = admit(columns, gain, price, floor, top, below[l]);
            }
        }
    }
    let below = below.into_iter().fold(f64::NEG_INFINITY, f64::max);
    admit(cells.len() * GROUP..gain.len(), gain, price, floor, top, below)
}

#[inline(always)]
fn admit(
    columns: impl Iterator<Item = usize>,
    gain: &[f32],
    price: &[f64],
    floor: f64,
    top: &mut Vec<Scored>,
    mut below: f64,
) -> f64 {
    for j in columns {
        let r = f64::from(gain[j]) - price[j];
        if r >= floor {
            top.push((r, j as u32));
        } else {
            below = larger(r, below);
        }
    }
    below
}

/// Keeps the best `k`; returns the larger of `dropped` and the best that went.
fn cut(top: &mut Vec<Scored>, k: usize, start: u32, dropped: f64) -> f64 {
    if top.len() <= k {
        return dropped;
    }
    // Columns before `start` wrap to the end of the order.
    let turn = |j: u32| j.wrapping_sub(start);
    top.select_nth_unstable_by(k - 1, |a, b| {
        b.0.total_cmp(&a.0).then_with(|| turn(a.1).cmp(&turn(b.1)))
    });
    let best = top[k..].iter().map(|x| x.0).fold(dropped, f64::max);
    top.truncate(k);
    best
}

/// `Σ_j a_j b_j` in `f64`, over fixed lanes.
pub(super) fn dot(arch: Arch, a: &[f32], b: &[f64]) -> f64 {
    const WIDTH: usize = 2 * LANES;
    vectorised!(arch, (a: &'a [f32], b: &'a [f64]) -> f64 {
            let mut lanes = [0.0; WIDTH];
            let (a, a_rest) = a.as_chunks::<WIDTH>();
            let (b, b_rest) = b.as_chunks::<WIDTH>();
            for (a, b) in a.iter().zip(b) {
                for l in 0..WIDTH {
                    lanes[l] += f64::from(a[l]) * b[l];
                }
            }
            let rest: f64 = a_rest.iter().zip(b_rest).map(|(&a, &b)| f64::from(a) * b).sum();
            lanes.into_iter().sum::<f64>() + rest
    })
}
