//! The gate-weighted hidden activations of a merged layer: the features of a linear fit of its
//! down projections.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, Axis, s};

use crate::error::{Locate, Result};
use crate::linalg::{Kernel, Rows, add_cross, add_own};
use crate::model::{MergedLayer, common};
use crate::par;
use crate::stage::{Context, Recovery};

/// Tokens that one task works on.
const BLOCK: usize = 512;

/// One merged expert's tokens.
#[derive(Debug)]
pub(super) struct Part {
    /// Rows of the inputs, ascending.
    pub(super) tokens: Vec<usize>,
    /// The applied weight of each.
    pub(super) weights: Vec<f32>,
    /// `(visits, d_ff)` hidden activations, times the weight.
    pub(super) hidden: Array2<f32>,
}

impl Part {
    fn rows(&self) -> Rows<'_> {
        Rows { at: &self.tokens, values: self.hidden.view() }
    }
}

/// `Σ x²`.
pub(super) fn squares(x: ArrayView2<'_, f32>) -> f64 {
    x.iter().map(|&x| f64::from(x) * f64::from(x)).sum()
}

/// The block-sparse matrix `Φ: (t, m · d_ff)` of weighted hidden activations, an expert a block: a
/// token has entries only in the blocks of the experts it visits. `4 t k d_ff` bytes.
#[derive(Debug)]
pub(super) struct Features {
    pub(super) parts: Vec<Part>,
    tokens: usize,
}

impl Features {
    /// Runs the layer up to its down projections.
    pub(super) fn new(
        merged: &MergedLayer,
        narrowed: bool,
        x: ArrayView2<'_, f32>,
        cx: &Context,
    ) -> Result<Self> {
        let visits = merged.visits(narrowed, x, cx.compute())?;
        let single = cx.per_task();
        let parts = par::map(visits.len(), |e| {
            let (tokens, weights): (Vec<_>, Vec<_>) = visits[e].iter().copied().unzip();
            let expert = merged.experts[e].view();
            let mut hidden = Array2::zeros((tokens.len(), expert.d_ff()));
            for (tokens, mut out) in
                tokens.chunks(BLOCK).zip(hidden.axis_chunks_iter_mut(Axis(0), BLOCK))
            {
                let x = x.select(Axis(0), tokens);
                out.assign(&expert.hidden(x.view(), single.compute()).in_expert(e)?);
            }
            hidden.rows_mut().into_iter().zip(&weights).for_each(|(mut row, w)| row *= *w);
            Ok(Part { tokens, weights, hidden })
        })?;
        Ok(Self { parts, tokens: x.nrows() })
    }

    /// Of some rows of a task, and what the layer misses there.
    pub(super) fn of_rows(
        task: &Recovery<'_>,
        rows: Range<usize>,
        merged: &MergedLayer,
        cx: &Context,
    ) -> Result<(Self, Array2<f32>)> {
        let rows = s![rows, ..];
        let features = Self::new(merged, task.narrowed, task.inputs.slice(rows), cx)?;
        let residual = features.residual(merged, task.targets.slice(rows), cx)?;
        Ok((features, residual))
    }

    /// `T − Φ Wᵀ − Σ w b`: what the merged layer misses, `(t, d_model)`.
    pub(super) fn residual(
        &self,
        merged: &MergedLayer,
        targets: ArrayView2<'_, f32>,
        cx: &Context,
    ) -> Result<Array2<f32>> {
        let down: Vec<_> = merged.experts.iter().map(|e| e.view().down.weight).collect();
        let mut residual = targets.to_owned();
        self.subtract(&down, &mut residual, cx)?;
        for (part, expert) in self.parts.iter().zip(&merged.experts) {
            let Some(bias) = expert.view().down.bias else { continue };
            for (&t, &w) in part.tokens.iter().zip(&part.weights) {
                residual.row_mut(t).scaled_add(-w, &bias);
            }
        }
        Ok(residual)
    }

    /// `out ← out − Φ Wᵀ` for one `W: (d_model, d_ff)` an expert, in parallel over blocks of
    /// tokens; within a block in expert order.
    pub(super) fn subtract(
        &self,
        down: &[ArrayView2<'_, f32>],
        out: &mut Array2<f32>,
        cx: &Context,
    ) -> Result<()> {
        let (single, d) = (cx.per_task(), out.ncols());
        let blocks = self.tokens.div_ceil(BLOCK);
        let misses = par::map(blocks, |b| {
            let (first, end) = (b * BLOCK, ((b + 1) * BLOCK).min(self.tokens));
            let mut block = out.slice(s![first..end, ..]).to_owned();
            let mut product = Array2::<f32>::zeros((end - first, d));
            for (part, down) in self.parts.iter().zip(down) {
                let from = part.tokens.partition_point(|&t| t < first);
                let to = part.tokens.partition_point(|&t| t < end);
                let mut y = product.slice_mut(s![..to - from, ..]);
                let hidden = part.hidden.slice(s![from..to, ..]);
                single.compute().gemm(1.0, hidden, down.t(), 0.0, y.view_mut())?;
                for (&t, y) in part.tokens[from..to].iter().zip(y.rows()) {
                    block.row_mut(t - first).scaled_add(-1.0, &y);
                }
            }
            Ok(block)
        })?;
        for (mut rows, block) in out.axis_chunks_iter_mut(Axis(0), BLOCK).zip(misses) {
            rows.assign(&block);
        }
        Ok(())
    }

    /// `Vᵀ Φ` for `V: (t, d_model)`: one `(d_model, d_ff)` an expert, in `f32`.
    pub(super) fn moments(&self, v: &Array2<f32>, cx: &Context) -> Result<Vec<Array2<f32>>> {
        let single = cx.per_task();
        par::map(self.parts.len(), |e| {
            let part = &self.parts[e];
            let mut sum = Array2::zeros((v.ncols(), part.hidden.ncols()));
            for (tokens, hidden) in
                part.tokens.chunks(BLOCK).zip(part.hidden.axis_chunks_iter(Axis(0), BLOCK))
            {
                let v = v.select(Axis(0), tokens);
                single.compute().gemm(1.0, v.t(), hidden, 1.0, sum.view_mut())?;
            }
            Ok(sum)
        })
    }

    /// The lower triangle of `Φᵀ Φ` in `f64`, block by block: only pairs of experts that some token
    /// visits together have one. `t k (k + 1) d_ff²` operations.
    pub(super) fn gram(&self) -> Result<Array2<f64>> {
        let m = self.parts.len();
        let pairs: Vec<_> = (0..m).flat_map(|i| (0..=i).map(move |j| (i, j))).collect();
        let blocks = par::map(pairs.len(), |p| self.pair(pairs[p].0, pairs[p].1))?;
        let mut gram = Array2::zeros((self.width(), self.width()));
        let f = self.width() / m.max(1);
        for ((i, j), block) in pairs.into_iter().zip(blocks) {
            let Some(block) = block else { continue };
            gram.slice_mut(s![i * f..(i + 1) * f, j * f..(j + 1) * f]).assign(&block);
        }
        Ok(gram)
    }

    /// The block of two experts, of which the lower triangle counts where they are the same; `None`
    /// when no token visits both.
    fn pair(&self, i: usize, j: usize) -> Result<Option<Array2<f64>>> {
        let (left, right) = (&self.parts[i], &self.parts[j]);
        let common = common(&left.tokens, &right.tokens);
        if common.is_empty() {
            return Ok(None);
        }
        let mut block = Array2::zeros((left.hidden.ncols(), right.hidden.ncols()));
        if i == j {
            add_own(left.hidden.view(), block.view_mut())?;
            return Ok(Some(block));
        }
        for rows in common.chunks(BLOCK) {
            let (a, b): (Vec<_>, Vec<_>) = rows.iter().copied().unzip();
            let a = left.hidden.select(Axis(0), &a);
            let b = right.hidden.select(Axis(0), &b);
            add_cross(a.view(), b.view(), block.view_mut())?;
        }
        Ok(Some(block))
    }

    /// `Σ ‖R − Φ Δᵀ‖²`: what a layer that misses `R: (t, d_model)` does with `Δ: (d_model, d_ff)`
    /// added to the down projection of each expert. A down pass.
    pub(super) fn missed(
        &self,
        residual: &Array2<f32>,
        deltas: &[Array2<f32>],
        cx: &Context,
    ) -> Result<f64> {
        let mut left = residual.clone();
        let deltas: Vec<_> = deltas.iter().map(|delta| delta.view()).collect();
        self.subtract(&deltas, &mut left, cx)?;
        Ok(squares(left.view()))
    }

    /// `Φ Φᵀ: (t, t)` in `f64`.
    pub(super) fn kernel(&self) -> Result<Kernel> {
        Kernel::new(self.tokens, &self.parts.iter().map(Part::rows).collect::<Vec<_>>())
    }

    /// A copy of what is there for some tokens in a row.
    pub(super) fn of(&self, tokens: Range<usize>) -> Self {
        let of = |part: &Part| {
            let [from, to] = [tokens.start, tokens.end]
                .map(|end| part.tokens.partition_point(|&token| token < end));
            Part {
                tokens: part.tokens[from..to].iter().map(|token| token - tokens.start).collect(),
                weights: part.weights[from..to].to_vec(),
                hidden: part.hidden.slice(s![from..to, ..]).to_owned(),
            }
        };
        Self { parts: self.parts.iter().map(of).collect(), tokens: tokens.len() }
    }

    /// Number of tokens.
    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    /// `m · d_ff`.
    pub(super) fn width(&self) -> usize {
        self.parts.iter().map(|part| part.hidden.ncols()).sum()
    }
}
