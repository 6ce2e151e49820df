//! The sum over experts: the tokens of each are gathered over all windows.

use ndarray::{Array2, ArrayView2, Axis};

use super::expert::BLOCK;
use super::scratch::{Pool, Scratch};
use crate::error::{Error, Locate, Result};
use crate::linalg::Compute;
use crate::model::{Expert, OutputSums};
use crate::par;
use crate::stage::Context;

/// `Σ_e w_e(x) E_e(x)` for every row of `X: (t, d_model)`: `(t, d_model)`. `visits` as in
/// `visits` of [`Routed`](super::Routed).
///
/// Tokens of one expert are multiplied in blocks, which run in parallel; their outputs are added in
/// expert order, so the result has the same bits for every number of threads.
///
/// # Errors
/// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when experts, visits and `X` do not fit.
pub fn routed_sum(
    experts: &[Expert],
    visits: &[Vec<(usize, f32)>],
    x: ArrayView2<'_, f32>,
    cx: &Context,
) -> Result<Array2<f32>> {
    Ok(sum_of(experts, visits, x, false, cx)?.0)
}

/// The sum, and what each expert gave before the weights.
pub(crate) type Watched = (Array2<f32>, Vec<OutputSums>);

/// What an expert does with a block of tokens.
pub(crate) trait Kernel: Sync {
    /// `w ⊙ E(X)` for a block `X: (t, d_model)` and one weight per token: `(t, d_model)`.
    fn weighted<'a>(
        &self,
        x: ArrayView2<'_, f32>,
        weights: &[f32],
        pool: &'a Pool,
        compute: &dyn Compute,
    ) -> Result<Scratch<'a>>;
}

/// [`routed_sum`] of experts of any kind and, if `watched`, for each expert norms and sum of its
/// outputs before the weights: what saliency is made of, without a second product. The weights are
/// divided out again, in `f64`, but for those so small that their outputs are computed anew.
pub(crate) fn sum_of<E: Kernel>(
    experts: &[E],
    visits: &[Vec<(usize, f32)>],
    x: ArrayView2<'_, f32>,
    watched: bool,
    cx: &Context,
) -> Result<Watched> {
    /// Values of expert outputs that are held at once: 32 MiB. Threads wait for each other
    /// at the end of a wave, so waves are long, and blocks are short.
    const HELD: usize = 1 << 23;
    if experts.len() != visits.len() {
        return Err(Error::shape("visits per expert", experts.len(), visits.len()));
    }
    let jobs: Vec<Job<'_, E>> = experts
        .iter()
        .zip(visits)
        .enumerate()
        .flat_map(|(index, (expert, visits))| {
            let block = visits.len().div_ceil(visits.len().div_ceil(BLOCK).max(1)).max(1);
            visits.chunks(block).map(move |visits| Job { index, expert, visits, watched })
        })
        .collect();
    let mut out = Array2::zeros(x.dim());
    let mut seen = vec![OutputSums::default(); if watched { experts.len() } else { 0 }];
    let single = cx.per_task();
    let pool = Pool::default();
    // Where a wave ends does not change the order of additions, so it may depend on the machine.
    let least = 2 * rayon::current_num_threads();
    let mut rest = &jobs[..];
    while !rest.is_empty() {
        let mut held = 0;
        let fits = rest.iter().enumerate().take_while(|(i, job)| {
            held += job.visits.len() * x.ncols();
            held <= HELD || *i < least
        });
        let (wave, later) = rest.split_at(fits.count());
        let run = |i: usize| wave[i].run(x, &pool, &single).in_expert(wave[i].index);
        let parts = par::map(wave.len(), run)?;
        scatter(wave, &parts, &mut out)?;
        for (job, (_, part)) in wave.iter().zip(parts) {
            if let Some(seen) = seen.get_mut(job.index) {
                seen.append(part);
            }
        }
        rest = later;
    }
    Ok((out, seen))
}

/// Weights below this may leave too little of an output to divide the weight out.
const MIN_GATE_WEIGHT: f32 = 1e-20;

/// A block of one expert's tokens.
struct Job<'a, E> {
    index: usize,
    expert: &'a E,
    visits: &'a [(usize, f32)],
    watched: bool,
}

impl<E: Kernel> Job<'_, E> {
    /// The weighted outputs and, if watched, what they were before.
    fn run<'p>(
        &self,
        x: ArrayView2<'_, f32>,
        pool: &'p Pool,
        cx: &Context,
    ) -> Result<(Scratch<'p>, OutputSums)> {
        if let Some((t, _)) = self.visits.iter().find(|(t, _)| *t >= x.nrows()) {
            return Err(Error::range("visiting token", format!("below {}", x.nrows()), t));
        }
        let mut gathered = pool.take(self.visits.len(), x.ncols());
        for (mut row, (t, _)) in gathered.view_mut().rows_mut().into_iter().zip(self.visits) {
            row.assign(&x.row(*t));
        }
        let weights: Vec<f32> = self.visits.iter().map(|(_, w)| *w).collect();
        let (gathered, compute) = (gathered.view(), cx.compute());
        let out = self.expert.weighted(gathered, &weights, pool, compute)?;
        if !self.watched {
            return Ok((out, OutputSums::default()));
        }
        let faint: Vec<usize> =
            (0..weights.len()).filter(|&i| weights[i] < MIN_GATE_WEIGHT).collect();
        let mut sums = OutputSums::of(out.view(), &weights, MIN_GATE_WEIGHT);
        if !faint.is_empty() {
            let (x, ones) = (gathered.select(Axis(0), &faint), vec![1.0; faint.len()]);
            let exact = self.expert.weighted(x.view(), &ones, pool, compute)?;
            sums.put(&faint, exact.view());
        }
        Ok((out, sums))
    }
}

/// Adds the outputs of jobs to their tokens: in parallel over tokens, in job order for each.
fn scatter<E: Sync>(
    jobs: &[Job<'_, E>],
    parts: &[(Scratch<'_>, OutputSums)],
    out: &mut Array2<f32>,
) -> Result<()> {
    const ROWS: usize = 128;
    let d = out.ncols();
    let Some(values) = out.as_slice_mut() else {
        return Err(Error::bug("outputs of a layer are not in memory order"));
    };
    par::for_each_chunk(values, ROWS * d, |chunk, rows| {
        let (first, end) = (chunk * ROWS, chunk * ROWS + rows.len() / d.max(1));
        for (job, (part, _)) in jobs.iter().zip(parts) {
            let start = job.visits.partition_point(|(t, _)| *t < first);
            let visits = job.visits[start..].iter().take_while(|(t, _)| *t < end);
            for (i, (t, _)) in visits.enumerate() {
                let row = &mut rows[(t - first) * d..(t - first + 1) * d];
                row.iter_mut().zip(part.row(start + i)).for_each(|(o, y)| *o += y);
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::route::{Choice, route};
    use super::*;
    use crate::linalg::Cpu;
    use crate::model::{Activation, Grouping, LayerId, Linear, MergedLayer, Router, RoutingRule};
    use ndarray::Array1;

    fn values(rows: usize, cols: usize, seed: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            ((i * 131 + j * 71 + seed * 37) as f32 * 0.61).sin()
        })
    }

    fn layer(grouping: Grouping, act: Activation, gated: bool) -> MergedLayer {
        let (d, f, n) = (24, 17, grouping.experts());
        let linear = |rows, cols, seed| Linear {
            weight: values(rows, cols, seed),
            bias: Some(Array1::from_elem(rows, 0.1)),
        };
        let expert = |i: usize| {
            let gate = gated.then(|| linear(f, d, 3 * i));
            Expert::new(gate, linear(f, d, 3 * i + 1), linear(d, f, 3 * i + 2), act).unwrap()
        };
        let experts = (0..grouping.groups()).map(expert).collect();
        let router =
            Router::new(values(n, d, 99), None, None, RoutingRule::softmax(3, true)).unwrap();
        MergedLayer::new(LayerId::causal(1), experts, grouping, router, None).unwrap()
    }

    #[test]
    fn the_sum_is_the_merged_layers_own_output() {
        let merged =
            Grouping::new(vec![Some(0), Some(1), Some(0), None, Some(2), Some(1)], vec![0, 1, 4]);
        let x = values(1300, 24, 5);
        for grouping in [Grouping::identity(6), merged.unwrap()] {
            for (act, gated) in [(Activation::Silu, true), (Activation::Relu, false)] {
                let layer = layer(grouping.clone(), act, gated);
                let cx = Context::cpu(0);
                let routed = route(
                    &layer,
                    Choice::Mapped,
                    x.view(),
                    std::slice::from_ref(&(0..1300)),
                    None,
                    &cx,
                )
                .unwrap();
                let sum = routed_sum(&layer.experts, &routed.visits, x.view(), &cx).unwrap();
                let expected = layer.mapped_output(x.view(), &Cpu::new()).unwrap();
                approx::assert_abs_diff_eq!(sum, expected, epsilon = 2e-4);
            }
        }
    }

    #[test]
    fn watching_gives_norms_and_sums_of_unweighted_outputs() {
        let (layer, x) = (layer(Grouping::identity(5), Activation::Silu, true), values(900, 24, 6));
        let cx = Context::cpu(0);
        let windows = std::slice::from_ref(&(0..900));
        let mut routed = route(&layer, Choice::Mapped, x.view(), windows, None, &cx).unwrap();
        for (expert, weight) in [(0, 0.0), (1, 1e-42), (2, 1e-30)] {
            routed.visits[expert][3].1 = weight;
        }
        let plain = routed_sum(&layer.experts, &routed.visits, x.view(), &cx).unwrap();
        let (sum, seen) = sum_of(&layer.experts, &routed.visits, x.view(), true, &cx).unwrap();
        assert_eq!(sum, plain, "watching changes no bit");
        for ((expert, visits), seen) in layer.experts.iter().zip(&routed.visits).zip(&seen) {
            let tokens: Vec<usize> = visits.iter().map(|(t, _)| *t).collect();
            let x = x.select(ndarray::Axis(0), &tokens);
            let outputs = expert.view().forward(x.view(), &Cpu::new()).unwrap();
            assert_eq!(seen.norms.len(), visits.len());
            for (y, norm) in outputs.rows().into_iter().zip(&seen.norms) {
                let expected = y.iter().map(|&y| f64::from(y).powi(2)).sum::<f64>().sqrt();
                approx::assert_relative_eq!(*norm, expected, max_relative = 1e-5);
            }
            let total = outputs.mapv(f64::from).sum_axis(ndarray::Axis(0));
            let seen = ndarray::ArrayView1::from(&seen.sum[..]);
            // Products of 17 terms and a weight in f32, of which the sum adds up every error.
            let size: f64 = outputs.iter().map(|&y| f64::from(y).abs()).sum();
            let epsilon = 2.0 * 18.0 * f64::from(f32::EPSILON) * size / 24.0;
            approx::assert_abs_diff_eq!(seen, total.view(), epsilon = epsilon);
        }
    }

    #[test]
    fn tokens_beyond_the_capacity_of_a_window_are_dropped() {
        let layer = layer(Grouping::identity(4), Activation::Relu, false);
        let x = Array2::from_elem((10, 24), 0.5);
        let cx = Context::cpu(0);
        let routed = route(&layer, Choice::Mapped, x.view(), &[0..6, 6..10], Some(2), &cx).unwrap();
        // All tokens are alike: the same three experts take the first two of each window.
        let visited: Vec<_> = routed.visits.iter().filter(|v| !v.is_empty()).collect();
        assert_eq!(visited.len(), 3);
        for visits in visited {
            assert_eq!(visits.iter().map(|(t, _)| *t).collect::<Vec<_>>(), [0, 1, 6, 7]);
        }
        let sum = routed_sum(&layer.experts, &routed.visits, x.view(), &cx).unwrap();
        assert!(sum.row(2).iter().all(|&y| y == 0.0) && sum.row(6).iter().any(|&y| y != 0.0));
    }

    #[test]
    fn the_bits_do_not_depend_on_the_number_of_threads() {
        let layer = layer(Grouping::identity(5), Activation::Silu, true);
        let x = values(2000, 24, 8);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let cx = Context::cpu(0);
                let routed = route(
                    &layer,
                    Choice::Mapped,
                    x.view(),
                    std::slice::from_ref(&(0..2000)),
                    None,
                    &cx,
                )
                .unwrap();
                routed_sum(&layer.experts, &routed.visits, x.view(), &cx).unwrap()
            })
        };
        let one = run(1).mapv(f32::to_bits);
        assert!([2, 5].iter().all(|&threads| run(threads).mapv(f32::to_bits) == one));
    }
}
