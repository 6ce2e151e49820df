//! Block Gauss–Seidel on the normal equations of the joint fit, `(Φᵀ Φ + λ I) Δᵀ = Φᵀ R`.

use std::ops::Range;

use ndarray::{Array2, ArrayView1, ArrayView2, Axis, concatenate, s};

use super::features::{ExpertFeatures, Features};
use super::normal_equations::Deltas;
use crate::error::{Error, Locate, Result};
use crate::linalg::add_own;
use crate::par;
use crate::recover::best_so_far::squares;
use crate::stage::Context;

/// The most features of one expert that are solved for at a time: a Cholesky factorisation costs
/// the cube of them.
pub(crate) const MAX_BLOCK: usize = 2048;

/// Output features that one task works on. Each output feature is a system of its own, so that
/// tasks share nothing.
const OUTPUTS: usize = 128;

/// Features of one expert, and the inverse of their own ridged Gram matrix.
struct Block {
    expert: usize,
    features: Range<usize>,
    /// `(Φ_bᵀ Φ_b + λ I)⁻¹`, symmetric.
    inverse: Array2<f32>,
}

/// The blocks of a ridge fit, each inverted once.
///
/// A pass goes over the blocks in order. For block `b` it solves the ridge problem of its features
/// alone, all others held: `δ_b = (Φ_bᵀ Φ_b + λ I)⁻¹ (Φ_bᵀ R − λ Δ_b)`, and takes `Φ_b δ_b` off the
/// residual `R`. The inverse is rounded to `f32`; the step along `δ_b` is therefore the one that
/// lowers the loss `‖R‖² + λ ‖Δ‖²` most, for each output feature by itself. At its end the pass is
/// combined with the one before, as conjugate gradients combine their directions: the lengths of
/// both that lower the loss most. So no pass raises it, and the limit is the exact solution.
///
/// Cost: once `t k b` operations in `f64` for the Gram blocks of `b` features and `b³` for each
/// inverse; a pass `4 t k d_ff d_model + 2 m d_ff b d_model`. Memory: `4 m d_ff b` bytes of
/// inverses, `b` being `d_ff` up to [`MAX_BLOCK`], and the residual, `4 t d_model`.
pub(super) struct BlockGaussSeidel<'a> {
    features: &'a Features,
    blocks: Vec<Block>,
    lambda: f64,
}

impl<'a> BlockGaussSeidel<'a> {
    /// Inverts the blocks of all experts that a token visits.
    pub(super) fn new(features: &'a Features, lambda: f64, cx: &Context) -> Result<Self> {
        Self::of_at_most(MAX_BLOCK, features, lambda, cx)
    }

    fn of_at_most(most: usize, features: &'a Features, lambda: f64, cx: &Context) -> Result<Self> {
        let ranges: Vec<_> = features
            .parts
            .iter()
            .enumerate()
            .filter(|(_, part)| !part.tokens.is_empty())
            .flat_map(|(e, part)| blocks(part.hidden.ncols(), most).map(move |range| (e, range)))
            .collect();
        let blocks = par::map(ranges.len(), |i| {
            let (expert, range) = ranges[i].clone();
            let hidden = features.parts[expert].hidden.slice(s![.., range.clone()]);
            let inverse = ridged_inverse(hidden, lambda, cx).in_expert(expert)?;
            Ok(Block { expert, features: range, inverse })
        })?;
        Ok(Self { features, blocks, lambda })
    }

    /// What is added to each expert's down projection, after the first pass that lowers the loss by
    /// no more than the share `tolerance` of what is left, at most `passes`.
    pub(super) fn solve(
        &self,
        residual: &Array2<f32>,
        passes: usize,
        tolerance: f64,
        cx: &Context,
    ) -> Result<Deltas> {
        let single = cx.per_task();
        let strips: Vec<_> = residual.axis_chunks_iter(Axis(1), OUTPUTS).collect();
        let solved = par::map(strips.len(), |i| {
            let mut strip = Strip::new(self.features, strips[i]);
            let mut loss = squares(strips[i]);
            for _ in 0..passes {
                let gained = strip.pass(self, &single)?;
                loss -= gained;
                if gained <= tolerance * loss {
                    break;
                }
            }
            Ok(strip.deltas)
        })?;
        let of_expert = |e: usize| {
            let rows: Vec<_> = solved.iter().map(|deltas| deltas[e].view()).collect();
            let misfit = |error| Error::shape("strips of a down projection", "one width", error);
            concatenate(Axis(0), &rows).map_err(misfit)
        };
        (0..self.features.parts.len()).map(of_expert).collect()
    }
}

/// Ranges of at most `most` of `n` features, of nearly equal lengths.
fn blocks(n: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let count = n.div_ceil(most);
    (0..count).map(move |i| i * n / count..(i + 1) * n / count)
}

/// `(Φᵀ Φ + λ I)⁻¹` of `Φ: (visits, b)`, by Cholesky in `f64`.
fn ridged_inverse(hidden: ArrayView2<'_, f32>, lambda: f64, cx: &Context) -> Result<Array2<f32>> {
    let width = hidden.ncols();
    let mut gram = Array2::zeros((width, width));
    add_own(hidden, gram.view_mut().reversed_axes())?;
    let identity = Array2::eye(width);
    let inverse = cx.backend().solve_ridged(&mut gram.reversed_axes(), lambda, identity.view())?;
    Ok(inverse.mapv(|x| x as f32))
}

/// Some output features: the layer's residual in them, and what is added to their rows.
struct Strip {
    /// `(t, outputs)`.
    residual: Array2<f32>,
    /// `(outputs, d_ff)` an expert.
    deltas: Deltas,
    /// The way of the pass before.
    last: Option<Direction>,
}

/// A way to go: what it adds to the rows, and what that takes off the residual.
struct Direction {
    deltas: Deltas,
    image: Array2<f32>,
}

impl Strip {
    fn new(features: &Features, residual: ArrayView2<'_, f32>) -> Self {
        let zeros = |part: &ExpertFeatures| Array2::zeros((residual.ncols(), part.hidden.ncols()));
        let deltas = features.parts.iter().map(zeros).collect();
        Self { deltas, residual: residual.to_owned(), last: None }
    }

    /// A step for every block, then the combination of all of them with the way of the pass before
    /// that lowers the loss most; returns by how much it fell.
    fn pass(&mut self, fit: &BlockGaussSeidel<'_>, cx: &Context) -> Result<f64> {
        let (residual, deltas) = (self.residual.clone(), self.deltas.clone());
        for block in &fit.blocks {
            self.step(&fit.features.parts[block.expert], block, fit.lambda, cx)?;
        }
        let moved = self.deltas.iter().zip(&deltas).map(|(now, before)| now - before).collect();
        let mut way = Direction { deltas: moved, image: &residual - &self.residual };
        let descent = inner((&residual, &deltas), (&way.image, &way.deltas), -fit.lambda);
        let by_last = self
            .last
            .as_ref()
            .map(|last| inner((&residual, &deltas), (&last.image, &last.deltas), -fit.lambda));
        let last = self.last.as_ref().zip(by_last.as_deref());
        let (lengths, gained) = best_combination(&way, &descent, last, fit.lambda);
        way.combine(&lengths, self.last.as_ref());
        self.residual = residual - &way.image;
        self.deltas = deltas.into_iter().zip(&way.deltas).map(|(d, way)| d + way).collect();
        self.last = Some(way);
        Ok(gained)
    }

    /// The step of one block.
    fn step(
        &mut self,
        part: &ExpertFeatures,
        block: &Block,
        lambda: f64,
        cx: &Context,
    ) -> Result<()> {
        let hidden = part.hidden.slice(s![.., block.features.clone()]);
        let missed = self.residual.select(Axis(0), &part.tokens);
        let mut delta = self.deltas[block.expert].slice_mut(s![.., block.features.clone()]);
        let mut gradient = delta.mapv(|x| -(lambda as f32) * x);
        cx.compute().gemm(1.0, missed.t(), hidden, 1.0, gradient.view_mut())?;
        let mut step = Array2::zeros(gradient.dim());
        cx.compute().gemm(1.0, gradient.view(), block.inverse.view(), 0.0, step.view_mut())?;
        let mut change = Array2::zeros(missed.dim());
        cx.compute().gemm(1.0, hidden, step.t(), 0.0, change.view_mut())?;

        let lengths = best_lengths(&step, &gradient, &change, lambda);
        for ((mut row, step), length) in delta.rows_mut().into_iter().zip(step.rows()).zip(&lengths)
        {
            row.scaled_add(*length, &step);
        }
        for (&token, change) in part.tokens.iter().zip(change.rows()) {
            let pairs = change.iter().zip(&lengths);
            self.residual.row_mut(token).iter_mut().zip(pairs).for_each(|(r, (c, a))| *r -= a * c);
        }
        Ok(())
    }
}

impl Direction {
    /// `first · self + second · last`, with two lengths for every output feature.
    fn combine(&mut self, lengths: &[(f64, f64)], last: Option<&Self>) {
        let Some(last) = last else {
            return self.scale(lengths);
        };
        self.scale(lengths);
        for (deltas, last) in self.deltas.iter_mut().zip(&last.deltas) {
            let rows = deltas.rows_mut().into_iter().zip(last.rows());
            rows.zip(lengths)
                .for_each(|((mut row, last), (_, b))| row.scaled_add(*b as f32, &last));
        }
        let columns = self.image.columns_mut().into_iter().zip(last.image.columns());
        columns.zip(lengths).for_each(|((mut column, last), (_, b))| {
            column.scaled_add(*b as f32, &last);
        });
    }

    fn scale(&mut self, lengths: &[(f64, f64)]) {
        for deltas in &mut self.deltas {
            let rows = deltas.rows_mut().into_iter().zip(lengths);
            rows.for_each(|(mut row, (a, _))| row *= *a as f32);
        }
        let columns = self.image.columns_mut().into_iter().zip(lengths);
        columns.for_each(|(mut column, (a, _))| column *= *a as f32);
    }
}

/// For every output feature `⟨a, b⟩ + λ ⟨a', b'⟩` of columns of `(t, outputs)` and of the rows of
/// all experts.
fn inner(a: (&Array2<f32>, &Deltas), b: (&Array2<f32>, &Deltas), lambda: f64) -> Vec<f64> {
    let mut sums = vec![0.0; a.0.ncols()];
    for (a, b) in a.0.rows().into_iter().zip(b.0.rows()) {
        let pairs = a.into_iter().zip(b);
        sums.iter_mut().zip(pairs).for_each(|(s, (&a, &b))| *s += f64::from(a) * f64::from(b));
    }
    for (a, b) in a.1.iter().zip(b.1) {
        for ((sum, a), b) in sums.iter_mut().zip(a.rows()).zip(b.rows()) {
            *sum += lambda * dot(a, b);
        }
    }
    sums
}

fn dot(a: ArrayView1<'_, f32>, b: ArrayView1<'_, f32>) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// The longest that a way is taken. Longer ones are asked for only where the way is the rounding
/// of a residual that falls no more, and a residual and its rows then no longer fit each other.
const LONGEST: f64 = 4.0;

/// For every output feature the lengths along the way of a pass and that of the pass before which
/// lower the loss most, the minimum of a quadratic of two unknowns; 1 and 0 where the two ways are
/// nearly the same or that is too far. And by how much all of them lower it. `descent` is half of
/// how fast the loss falls along each.
fn best_combination(
    way: &Direction,
    descent: &[f64],
    last: Option<(&Direction, &[f64])>,
    lambda: f64,
) -> (Vec<(f64, f64)>, f64) {
    let of =
        |a: &Direction, b: &Direction| inner((&a.image, &a.deltas), (&b.image, &b.deltas), lambda);
    let own = of(way, way);
    let Some((last, by_last)) = last else {
        let gained = descent.iter().zip(&own).map(|(along, own)| 2.0 * along - own).sum();
        return (vec![(1.0, 0.0); own.len()], gained);
    };
    let (mixed, other) = (of(way, last), of(last, last));
    let mut gained = 0.0;
    let lengths = (0..own.len()).map(|j| {
        let determinant = own[j] * other[j] - mixed[j] * mixed[j];
        let first = (descent[j] * other[j] - by_last[j] * mixed[j]) / determinant;
        let second = (by_last[j] * own[j] - descent[j] * mixed[j]) / determinant;
        let apart = determinant > 1e-6 * own[j] * other[j];
        let near = first > 0.0 && first < LONGEST && second.abs() < LONGEST;
        let (a, b) = if apart && near { (first, second) } else { (1.0, 0.0) };
        let curvature = a * a * own[j] + 2.0 * a * b * mixed[j] + b * b * other[j];
        gained += 2.0 * (a * descent[j] + b * by_last[j]) - curvature;
        (a, b)
    });
    (lengths.collect(), gained)
}

/// For every output feature (row of `δ`) the length of the step along `δ` that lowers `‖R‖² + λ
/// ‖Δ‖²` most, `⟨δ, g⟩ / (‖Φ δ‖² + λ ‖δ‖²)` with `g = Φᵀ R − λ Δ`; 0 where there is nothing to
/// gain.
fn best_lengths(
    step: &Array2<f32>,
    gradient: &Array2<f32>,
    change: &Array2<f32>,
    lambda: f64,
) -> Vec<f32> {
    let mut curvature = vec![0.0f64; step.nrows()];
    for row in change.rows() {
        curvature.iter_mut().zip(row).for_each(|(sum, &c)| *sum += f64::from(c) * f64::from(c));
    }
    let rows = step.rows().into_iter().zip(gradient.rows()).zip(&curvature);
    let length = |((step, gradient), change): ((Row<'_>, Row<'_>), &f64)| {
        let (along, curvature) = (dot(step, gradient), change + lambda * dot(step, step));
        if along > 0.0 && curvature > 0.0 { (along / curvature) as f32 } else { 0.0 }
    };
    rows.map(length).collect()
}

type Row<'a> = ArrayView1<'a, f32>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Expert, Grouping, LayerId, MergedLayer, Router, RoutingRule};
    use crate::recover::closed_form::normal_equations::NormalEquations;
    use rand::{RngExt, SeedableRng};

    fn values(rows: usize, cols: usize, seed: u64) -> Array2<f32> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        Array2::from_shape_simple_fn((rows, cols), || rng.random_range(-1.0f32..1.0))
    }

    /// Features of three experts of ten hidden units, and what is to be fitted.
    fn problem() -> (Features, Array2<f32>) {
        let expert = |e: u64| {
            let [gate, up] = [0, 1].map(|i| values(10, 6, 5 * e + i));
            Expert::swiglu(gate, up, values(6, 10, 5 * e + 2)).unwrap()
        };
        let router = Router::new(values(3, 6, 91), None, None, RoutingRule::softmax(2, true));
        let (id, grouping) = (LayerId::causal(0), Grouping::identity(3));
        let experts = (0..3).map(expert).collect();
        let layer = MergedLayer::new(id, experts, grouping, router.unwrap(), None).unwrap();
        let x = values(300, 6, 92) * 1.5;
        let features = Features::new(&layer, false, x.view(), &Context::cpu(0)).unwrap();
        (features, values(300, 200, 93))
    }

    /// `‖R − Φ Δᵀ‖² + λ ‖Δ‖²`.
    fn loss(features: &Features, residual: &Array2<f32>, deltas: &Deltas, lambda: f64) -> f64 {
        let left = features.remaining(residual, deltas, &Context::cpu(0)).unwrap();
        left + lambda * deltas.iter().map(|delta| squares(delta.view())).sum::<f64>()
    }

    #[test]
    fn passes_converge_to_the_solution_of_the_normal_equations() {
        let cx = Context::cpu(0);
        let (features, residual) = problem();
        for ridge in [1e-2, 1e-1, 1.0] {
            let mut exact = NormalEquations::new(&features, &residual, &cx).unwrap().unwrap();
            let (lambda, expected) = (exact.lambda(ridge), exact.solve(ridge, &cx).unwrap());
            let least = loss(&features, &residual, &expected, lambda);
            assert!(least < 0.99 * squares(residual.view()));
            // A whole expert at a time, and parts of it, which need more passes.
            for (most, tolerance) in [(10, 1e-5), (4, 1e-3)] {
                let blocks = BlockGaussSeidel::of_at_most(most, &features, lambda, &cx).unwrap();
                let found = blocks.solve(&residual, 100, 0.0, &cx).unwrap();
                let above = loss(&features, &residual, &found, lambda) / least - 1.0;
                assert!(above < tolerance, "ridge {ridge}, blocks of {most}: {above}");
            }
        }
    }

    #[test]
    fn no_pass_raises_the_loss_and_threads_change_no_bit() {
        let cx = Context::cpu(0);
        let (features, residual) = problem();
        let fit = BlockGaussSeidel::of_at_most(4, &features, 0.5, &cx).unwrap();
        let mut strip = Strip::new(&features, residual.view());
        let mut before = squares(residual.view());
        for _ in 0..6 {
            let gained = strip.pass(&fit, &cx).unwrap();
            let after = loss(&features, &residual, &strip.deltas, 0.5);
            assert!(gained > 0.0);
            approx::assert_relative_eq!(before - gained, after, max_relative = 1e-5);
            before = after;
        }
        let of = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let fit = BlockGaussSeidel::of_at_most(4, &features, 0.5, &cx).unwrap();
                fit.solve(&residual, 3, 0.0, &cx).unwrap()
            })
        };
        assert_eq!(of(1), of(3));
    }
}
