//! The error of a layer after a joint refit of all its down projections.

use ndarray::{Array2, Axis, s};

use super::probe::{Probe, Visits};
use crate::error::Result;
use crate::linalg::{Kernel, Rows, add_cross, add_own, add_pairs, mean_eigenvalue};
use crate::model::common;
use crate::stage::Context;

/// Relative error on the judging tokens after a ridge fit of the down projections to the others.
///
/// `R = T − Y: (t, width)` is what the layer misses, `Φ: (t, m d_ff)` its weighted hidden
/// activations. Of the two forms of the fit the one with the smaller system is solved:
/// `R_J − Φ_J (Φ_Fᵀ Φ_F + λ I)⁻¹ Φ_Fᵀ R_F` or `R_J − K_JF (K_FF + λ I)⁻¹ R_F`, `K = Φ Φᵀ`. Cost:
/// `n³/3` for `n = min(t, m d_ff)`, and `t k² d_ff²` or `2 t² k d_ff` operations for the system;
/// memory `16 n²` or `16 t²` bytes.
pub(super) fn refit_error(
    probe: &Probe<'_>,
    visits: &[Visits],
    kept: usize,
    ridge: f64,
    cx: &Context,
) -> Result<f64> {
    let Some(hidden) = &probe.hidden else { return Ok(0.0) };
    let missed = missed(probe, visits);
    let (fitted, judges) = probe.split();
    let energy = probe.energy(judges.iter().copied());
    let fit = Fit { parts: parts(hidden, visits), tokens: visits.len(), fitted, judges, missed };
    let features = kept * hidden.first().map_or(0, Array2::ncols);
    let left = match features < fit.fitted.len() {
        true => fit.by_features(features, ridge, cx)?,
        false => fit.by_tokens(features, ridge, cx)?,
    };
    Ok(left.iter().map(|m| m * m).sum::<f64>() / energy)
}

/// `T − Y: (t, width)`.
fn missed(probe: &Probe<'_>, visits: &[Visits]) -> Array2<f32> {
    let mut missed = probe.target.clone();
    for (t, visits) in visits.iter().enumerate() {
        for &(e, w) in visits {
            missed.row_mut(t).scaled_add(-w, &probe.outputs[e].row(t));
        }
    }
    missed
}

/// The tokens of one expert, ascending, and their weighted hidden activations, a row each.
struct Part {
    tokens: Vec<usize>,
    hidden: Array2<f32>,
}

impl Part {
    fn rows(&self) -> Rows<'_> {
        Rows { at: &self.tokens, values: self.hidden.view() }
    }
}

/// The parts of the experts that any token visits.
fn parts(hidden: &[Array2<f32>], visits: &[Visits]) -> Vec<Part> {
    let mut own: Vec<Vec<(usize, f32)>> = vec![Vec::new(); hidden.len()];
    for (t, visits) in visits.iter().enumerate() {
        visits.iter().for_each(|&(e, w)| own[e].push((t, w)));
    }
    let of = |(own, hidden): (&Vec<(usize, f32)>, &Array2<f32>)| {
        let tokens: Vec<usize> = own.iter().map(|(t, _)| *t).collect();
        let mut hidden = hidden.select(Axis(0), &tokens);
        hidden.rows_mut().into_iter().zip(own).for_each(|(mut row, (_, w))| row *= *w);
        Part { tokens, hidden }
    };
    own.iter().zip(hidden).map(of).filter(|part| !part.tokens.is_empty()).collect()
}

/// A layer and the tokens on which it is refitted and judged.
struct Fit {
    parts: Vec<Part>,
    tokens: usize,
    fitted: Vec<usize>,
    judges: Vec<usize>,
    missed: Array2<f32>,
}

impl Fit {
    fn rows(&self, of: &[usize]) -> Array2<f64> {
        self.missed.select(Axis(0), of).mapv(f64::from)
    }

    /// What the judges miss after a fit of `m d_ff` features.
    fn by_features(&self, features: usize, ridge: f64, cx: &Context) -> Result<Array2<f64>> {
        let (fit, judge) = (self.restricted(&self.fitted), self.restricted(&self.judges));
        let f = self.parts.first().map_or(0, |p| p.hidden.ncols());
        let (width, n) = (self.missed.ncols(), f * self.parts.len());
        let (mut gram, mut rhs) = (Array2::zeros((n, n)), Array2::zeros((n, width)));
        for (i, a) in fit.iter().enumerate() {
            let block = i * f..(i + 1) * f;
            let missed = self.missed.select(Axis(0), &a.tokens);
            add_cross(a.hidden.view(), missed.view(), rhs.slice_mut(s![block.clone(), ..]))?;
            add_own(a.hidden.view(), gram.slice_mut(s![block.clone(), block.clone()]))?;
            for (j, b) in fit[..i].iter().enumerate() {
                let pairs = common(&a.tokens, &b.tokens);
                let out = gram.slice_mut(s![block.clone(), j * f..(j + 1) * f]);
                add_pairs(a.hidden.view(), b.hidden.view(), &pairs, out)?;
            }
        }
        let mut left = self.rows(&self.judges);
        let mean = mean_eigenvalue(&gram, features);
        if mean <= 0.0 {
            return Ok(left);
        }
        let solved = cx.backend().solve_ridged(&mut gram, ridge * mean, rhs.view())?;
        for (i, part) in judge.iter().enumerate() {
            let given = part.hidden.mapv(f64::from).dot(&solved.slice(s![i * f..(i + 1) * f, ..]));
            for (given, t) in given.rows().into_iter().zip(&part.tokens) {
                if let Ok(at) = self.judges.binary_search(t) {
                    left.row_mut(at).scaled_add(-1.0, &given);
                }
            }
        }
        Ok(left)
    }

    /// The parts on some ascending tokens only.
    fn restricted(&self, tokens: &[usize]) -> Vec<Part> {
        let of = |part: &Part| {
            let rows: Vec<usize> =
                common(&part.tokens, tokens).into_iter().map(|(row, _)| row).collect();
            let own = rows.iter().map(|&r| part.tokens[r]).collect();
            Part { tokens: own, hidden: part.hidden.select(Axis(0), &rows) }
        };
        self.parts.iter().map(of).collect()
    }

    /// The same in dual form, of the size of the tokens.
    fn by_tokens(&self, features: usize, ridge: f64, cx: &Context) -> Result<Array2<f64>> {
        let blocks: Vec<_> = self.parts.iter().map(Part::rows).collect();
        let kernel = Kernel::new(self.tokens, &blocks)?;
        let mut left = self.rows(&self.judges);
        let mut gram = kernel.own(&self.fitted);
        let mean = mean_eigenvalue(&gram, features.min(self.fitted.len()));
        if mean > 0.0 {
            let missed = self.rows(&self.fitted);
            let solved = cx.backend().solve_ridged(&mut gram, ridge * mean, missed.view())?;
            left -= &kernel.between(&self.judges, &self.fitted).dot(&solved);
        }
        Ok(left)
    }
}
