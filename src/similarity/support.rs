//! Helpers of several metrics: pairs in parallel, Gram matrices of vectors that are never laid out,
//! and the tokens that visited each expert.

use std::ops::Range;

use ndarray::{Array2, ArrayView1, ArrayView2, Axis};

use crate::error::{Error, ErrorKind, Result};
use crate::model::{ExpertView, Finite, LinearView, Measure, Role, Samples, SimilarityMatrix};
use crate::par;
use crate::stage::{Context, LayerView};

/// Evaluates `f` on the pairs `i < j` in parallel; it returns similarity and distance.
pub(super) fn over_pairs(
    n: usize,
    f: impl Fn(usize, usize) -> Result<(f64, f64)> + Sync,
) -> Result<SimilarityMatrix> {
    let pairs: Vec<_> = (0..n).flat_map(|i| (i + 1..n).map(move |j| (i, j))).collect();
    let mut table = Array2::from_elem((n, n), (0.0, 0.0));
    let values = par::map(pairs.len(), |p| f(pairs[p].0, pairs[p].1))?;
    pairs.iter().zip(values).for_each(|(&pair, value)| table[pair] = value);
    SimilarityMatrix::from_pairs(n, |i, j| Ok(table[[i, j]]))
}

/// Values per vector that are copied at a time while a Gram matrix is summed.
const BLOCK: usize = 8192;

/// Gram matrix `(n, n)` of `n` vectors in `f64`, each the concatenated rows of a `(rows, cols)`
/// matrix that `copy(vector, row, out)` writes one row at a time.
///
/// The vectors are never laid out as a whole: a block holds `n × 8192` values, and eight blocks at
/// most are in flight. Cost: `n² · rows · cols` multiply-adds in `f64`.
pub(super) fn gram_of_rows(
    n: usize,
    (rows, cols): (usize, usize),
    copy: impl Fn(usize, usize, &mut [f32]) + Sync,
    cx: &Context,
) -> Result<Array2<f64>> {
    let task = cx.per_task();
    let one_block = |range: Range<usize>| {
        let mut x = vec![0.0; n * range.len() * cols];
        let width = range.len() * cols;
        for (i, vector) in x.chunks_mut(width.max(1)).enumerate() {
            for (row, out) in range.clone().zip(vector.chunks_mut(cols.max(1))) {
                copy(i, row, out);
            }
        }
        let x = ArrayView2::from_shape((n, width), &x)
            .map_err(|_| Error::shape("block of vectors", (n, width), x.len()))?;
        let mut gram = Array2::zeros((n, n));
        task.compute().add_gram(x.t(), &mut gram)?;
        Ok(gram)
    };
    let block = (BLOCK / cols.max(1)).max(1);
    let sum = par::sum_blocks(rows, block, one_block, |total, part| *total += &part)?;
    Ok(sum.unwrap_or_else(|| Array2::zeros((n, n))))
}

/// Compares the rows of a small `(n, p)` matrix.
pub(super) fn compare_rows(
    rows: ArrayView2<'_, f32>,
    measure: Measure,
    cx: &Context,
) -> Result<SimilarityMatrix> {
    let mut gram = Array2::zeros((rows.nrows(), rows.nrows()));
    cx.compute().add_gram(rows.t(), &mut gram)?;
    SimilarityMatrix::from_gram(gram.view(), measure)
}

/// Compares the vectors that hold an entry for every parameter of an expert, in the order gate, up,
/// down, each with its bias behind it. `value(expert, role, row, out)` writes row `row` of one
/// projection; a bias is one row more than the matrix has.
pub(super) fn compare_parameters(
    like: &ExpertView<'_>,
    n: usize,
    measure: Measure,
    value: impl Fn(usize, Role, Option<usize>, &mut [f32]) + Sync,
    cx: &Context,
) -> Result<SimilarityMatrix> {
    let mut gram = Array2::zeros((n, n));
    for (role, linear) in like.linears() {
        let weights = |i: usize, row: usize, out: &mut [f32]| value(i, role, Some(row), out);
        gram += &gram_of_rows(n, linear.weight.dim(), weights, cx)?;
        if let Some(bias) = linear.bias {
            let biases = |i: usize, _: usize, out: &mut [f32]| value(i, role, None, out);
            gram += &gram_of_rows(n, (1, bias.len()), biases, cx)?;
        }
    }
    SimilarityMatrix::from_gram(gram.view(), measure)
}

/// Row `row` of a projection, or its bias; empty when the projection has none.
pub(super) fn row_of<'a>(linear: &LinearView<'a>, row: Option<usize>) -> ArrayView1<'a, f32> {
    match row {
        Some(row) => linear.weight.index_axis_move(Axis(0), row),
        None => linear.bias.unwrap_or_else(|| ArrayView1::from(&[])),
    }
}

/// Fails when `others` is not `n` experts shaped like `like`.
pub(super) fn check_kind<'a>(
    what: &'static str,
    like: &ExpertView<'_>,
    n: usize,
    others: impl ExactSizeIterator<Item = ExpertView<'a>>,
) -> Result<()> {
    if others.len() != n {
        return Err(Error::shape(what, n, others.len()));
    }
    let shapes = |e: &ExpertView<'_>| -> Vec<_> {
        e.linears().map(|(role, l)| (role, l.weight.dim(), l.bias.is_some())).collect()
    };
    for other in others {
        if shapes(&other) != shapes(like) {
            return Err(Error::shape(what, shapes(like), shapes(&other)));
        }
    }
    Ok(())
}

/// The samples of a layer and the tokens that visited each expert, ascending.
pub(super) struct Visits<'a> {
    pub(super) samples: &'a Samples,
    pub(super) tokens: Vec<Vec<usize>>,
}

impl<'a> Visits<'a> {
    /// Sorts the tokens by expert, after checking that routing, inputs and layer fit each other.
    pub(super) fn of(layer: &LayerView<'a>, stage: &str) -> Result<Self> {
        let samples = layer.stats.need_samples(stage)?;
        let (t, d) = samples.inputs.dim();
        let (n, width) = layer.router.weight().dim();
        let chosen = &samples.routing.experts;
        if d != width || chosen.nrows() != t {
            return Err(Error::shape("layer inputs", (chosen.nrows(), width), (t, d)));
        }
        let mut tokens: Vec<Vec<usize>> = vec![Vec::new(); n];
        for (token, row) in chosen.rows().into_iter().enumerate() {
            for &e in row {
                let Some(visits) = tokens.get_mut(e as usize) else {
                    let reason = format!("a token was routed to expert {e} of {n}");
                    return Err(ErrorKind::Statistics { reason }.into());
                };
                if visits.last() != Some(&token) {
                    visits.push(token);
                }
            }
        }
        Ok(Self { samples, tokens })
    }

    /// `(t_i, d_model)` inputs routed to expert `i`.
    pub(super) fn inputs(&self, i: usize) -> Array2<f32> {
        self.samples.inputs.select(Axis(0), &self.tokens[i])
    }

    /// `(n, p)`: for every expert, `f` of its tokens' inputs, summed per feature in `f64` and
    /// finished with `last(sum, number of tokens)`. Zero for an expert without tokens.
    pub(super) fn per_feature(
        &self,
        f: impl Fn(f64) -> f64 + Sync,
        last: impl Fn(f64, f64) -> f64 + Sync,
    ) -> Result<Array2<f32>> {
        let inputs = self.samples.inputs.view();
        let rows = par::map(self.tokens.len(), |i| {
            let mut sum = vec![0.0f64; inputs.ncols()];
            for &t in &self.tokens[i] {
                sum.iter_mut().zip(inputs.row(t)).for_each(|(s, &x)| *s += f(f64::from(x)));
            }
            let count = self.tokens[i].len() as f64;
            let finish = |s: f64| if count > 0.0 { last(s, count) as f32 } else { 0.0 };
            Ok(sum.into_iter().map(finish).collect::<Vec<f32>>())
        })?;
        stack(rows, inputs.ncols(), "features")
    }
}

/// `(n, p)` from `n` rows, checked to be finite.
pub(super) fn stack(rows: Vec<Vec<f32>>, p: usize, what: &'static str) -> Result<Array2<f32>> {
    let n = rows.len();
    let table = Array2::from_shape_vec((n, p), rows.concat())
        .map_err(|_| Error::shape(what, (n, p), "rows of other lengths"))?;
    table.check_finite(what)?;
    Ok(table)
}
