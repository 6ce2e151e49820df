//! The gate-weighted hidden activations of a merged layer: the features of a linear fit of its
//! down projections.

use std::cmp::Reverse;
use std::ops::Range;

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};

use crate::error::{Locate, Result};
use crate::linalg::{Kernel, Rows, add_own, add_pairs};
use crate::model::{MergedLayer, common};
use crate::par;
use crate::recover::best_so_far::squares;
use crate::stage::{Context, Recovery};

/// Tokens that one task works on.
const BLOCK: usize = 512;

/// Output features that one task works on: few tokens of few experts are else few tasks.
const OUTPUTS: usize = 256;

/// One merged expert's tokens.
#[derive(Debug)]
pub(super) struct ExpertFeatures {
    /// Rows of the inputs, ascending.
    pub(super) tokens: Vec<usize>,
    /// The applied weight of each.
    pub(super) weights: Vec<f32>,
    /// `(visits, d_ff)` hidden activations, times the weight.
    pub(super) hidden: Array2<f32>,
}

/// An expert, tokens that visit it with their weights, and the place of their hidden activations.
type Block<'a> = (usize, &'a [usize], &'a [f32], ArrayViewMut2<'a, f32>);

impl ExpertFeatures {
    /// Of the visits of an expert, the hidden activations still 0.
    fn of(visits: &[(usize, f32)], d_ff: usize) -> Self {
        let (tokens, weights) = visits.iter().copied().unzip();
        Self { tokens, weights, hidden: Array2::zeros((visits.len(), d_ff)) }
    }

    /// In blocks of tokens, as expert `e`.
    fn blocks(&mut self, e: usize) -> impl Iterator<Item = Block<'_>> {
        let visits = self.tokens.chunks(BLOCK).zip(self.weights.chunks(BLOCK));
        let hidden = self.hidden.axis_chunks_iter_mut(Axis(0), BLOCK);
        visits.zip(hidden).map(move |((tokens, weights), out)| (e, tokens, weights, out))
    }

    fn rows(&self) -> Rows<'_> {
        Rows { at: &self.tokens, values: self.hidden.view() }
    }
}

/// Blocks of tokens and of output features, with the first token and the features of each.
fn tiles(out: ArrayViewMut2<'_, f32>) -> Vec<(usize, Range<usize>, ArrayViewMut2<'_, f32>)> {
    let mut tiles = Vec::new();
    let (mut rest, mut first) = (out, 0);
    while rest.nrows() > 0 {
        let rows = BLOCK.min(rest.nrows());
        let (mut strip, below) = rest.split_at(Axis(0), rows);
        let mut at = 0;
        while strip.ncols() > 0 {
            let width = OUTPUTS.min(strip.ncols());
            let (tile, right) = strip.split_at(Axis(1), width);
            tiles.push((first, at..at + width, tile));
            (strip, at) = (right, at + width);
        }
        (rest, first) = (below, first + rows);
    }
    tiles
}

/// The block-sparse matrix `Φ: (t, m · d_ff)` of weighted hidden activations, an expert a block: a
/// token has entries only in the blocks of the experts it visits. `4 t k d_ff` bytes.
#[derive(Debug)]
pub(super) struct Features {
    pub(super) parts: Vec<ExpertFeatures>,
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
        let mut parts: Vec<_> = visits
            .iter()
            .zip(&merged.experts)
            .map(|(v, e)| ExpertFeatures::of(v, e.view().d_ff()))
            .collect();
        let mut blocks: Vec<_> =
            parts.iter_mut().enumerate().flat_map(|(e, part)| part.blocks(e)).collect();
        par::map_mut(&mut blocks, |_, (e, tokens, weights, out)| {
            let expert = merged.experts[*e].view();
            let x = x.select(Axis(0), tokens);
            out.assign(&expert.hidden(x.view(), single.compute()).in_expert(*e)?);
            out.rows_mut().into_iter().zip(*weights).for_each(|(mut row, w)| row *= *w);
            Ok(())
        })?;
        Ok(Self { parts, tokens: x.nrows() })
    }

    /// Of some rows of a task, and the layer's residual there.
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

    /// `T − Φ Wᵀ − Σ w b`: the residual of the merged layer, `(t, d_model)`.
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

    /// `out ← out − Φ Wᵀ` for one `W: (d_model, d_ff)` an expert, in parallel over blocks of tokens
    /// and of output features; within a block in expert order.
    pub(super) fn subtract(
        &self,
        down: &[ArrayView2<'_, f32>],
        out: &mut Array2<f32>,
        cx: &Context,
    ) -> Result<()> {
        let single = cx.per_task();
        par::map_mut(&mut tiles(out.view_mut()), |_, (first, outputs, tile)| {
            let (first, end) = (*first, *first + tile.nrows());
            let mut product = Array2::<f32>::zeros(tile.dim());
            for (part, down) in self.parts.iter().zip(down) {
                let from = part.tokens.partition_point(|&t| t < first);
                let to = part.tokens.partition_point(|&t| t < end);
                let mut y = product.slice_mut(s![..to - from, ..]);
                let hidden = part.hidden.slice(s![from..to, ..]);
                let down = down.slice(s![outputs.clone(), ..]);
                single.compute().gemm(1.0, hidden, down.t(), 0.0, y.view_mut())?;
                for (&t, y) in part.tokens[from..to].iter().zip(y.rows()) {
                    tile.row_mut(t - first).scaled_add(-1.0, &y);
                }
            }
            Ok(())
        })?;
        Ok(())
    }

    /// `Vᵀ Φ` for `V: (t, d_model)`: one `(d_model, d_ff)` an expert, in `f32`, in parallel over
    /// experts and blocks of output features.
    pub(super) fn moments(&self, v: &Array2<f32>, cx: &Context) -> Result<Vec<Array2<f32>>> {
        let single = cx.per_task();
        let zeros = |part: &ExpertFeatures| Array2::zeros((v.ncols(), part.hidden.ncols()));
        let mut sums: Vec<_> = self.parts.iter().map(zeros).collect();
        let parts = self.parts.iter().zip(&mut sums);
        let mut tasks: Vec<_> = parts
            .flat_map(|(part, sum)| {
                let blocks = sum.axis_chunks_iter_mut(Axis(0), OUTPUTS).enumerate();
                blocks.map(move |(i, sum)| (part, i * OUTPUTS, sum))
            })
            .collect();
        par::map_mut(&mut tasks, |_, (part, first, sum)| {
            let v = v.slice(s![.., *first..*first + sum.nrows()]);
            let hidden = part.hidden.axis_chunks_iter(Axis(0), BLOCK);
            for (tokens, hidden) in part.tokens.chunks(BLOCK).zip(hidden) {
                let v = v.select(Axis(0), tokens);
                single.compute().gemm(1.0, v.t(), hidden, 1.0, sum.view_mut())?;
            }
            Ok(())
        })?;
        Ok(sums)
    }

    /// The lower triangle of `Φᵀ Φ` in `f64` and in column order, block by block: only pairs of
    /// experts that some token visits together have one. `t k (k + 1) d_ff²` operations.
    pub(super) fn gram(&self) -> Result<Array2<f64>> {
        let f = self.width() / self.parts.len().max(1);
        let mut upper = Array2::zeros((self.width(), self.width()));
        let blocks = self.blocks()?;
        let mut strips: Vec<_> = upper.axis_chunks_iter_mut(Axis(0), f.max(1)).collect();
        par::map_mut(&mut strips, |j, strip| {
            for (i, _, block) in blocks.iter().filter(|(_, of, _)| *of == j) {
                strip.slice_mut(s![.., i * f..(i + 1) * f]).assign(block);
            }
            Ok(())
        })?;
        Ok(upper.reversed_axes())
    }

    /// `Φ_jᵀ Φ_i` for experts `i ≥ j` that some token visits both; of an expert with itself the
    /// upper triangle.
    fn blocks(&self) -> Result<Vec<(usize, usize, Array2<f64>)>> {
        let m = self.parts.len();
        let all: Vec<_> = (0..m).flat_map(|i| (0..=i).map(move |j| (i, j))).collect();
        let mut pairs = par::map(all.len(), |p| {
            let (i, j) = all[p];
            Ok((i, j, common(&self.parts[j].tokens, &self.parts[i].tokens)))
        })?;
        pairs.retain(|(_, _, common)| !common.is_empty());
        // Few experts are few tasks: the longest first, so that none is left when all others are
        // done.
        pairs.sort_by_key(|(i, j, common)| Reverse(common.len() * if i == j { 1 } else { 2 }));
        par::in_turn(pairs.len(), |p| {
            let (i, j, ref common) = pairs[p];
            let (left, right) = (self.parts[j].hidden.view(), self.parts[i].hidden.view());
            let mut block = Array2::zeros((left.ncols(), right.ncols()));
            match i == j {
                true => add_own(left, block.view_mut().reversed_axes())?,
                false => add_pairs(left, right, common, block.view_mut())?,
            }
            Ok((i, j, block))
        })
    }

    /// `Σ ‖R − Φ Δᵀ‖²`: what is left of the residual `R: (t, d_model)` with `Δ: (d_model, d_ff)`
    /// added to the down projection of each expert. A down pass.
    pub(super) fn remaining(
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
        Kernel::new(self.tokens, &self.parts.iter().map(ExpertFeatures::rows).collect::<Vec<_>>())
    }

    /// A copy of what is there for some tokens in a row.
    pub(super) fn of(&self, tokens: Range<usize>) -> Self {
        let of = |part: &ExpertFeatures| {
            let [from, to] = [tokens.start, tokens.end]
                .map(|end| part.tokens.partition_point(|&token| token < end));
            ExpertFeatures {
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
