//! The error that a layer keeps after all its down projections have been refitted together.

use ndarray::{Array2, ArrayView2, Axis};

use super::probe::{Probe, Visits};
use crate::error::Result;
use crate::linalg::add_cross;
use crate::stage::Context;

/// Relative error on the judging tokens after a ridge fit of the down projections to the others.
///
/// In its dual form, `R_J − K_JF (K_FF + λ I)⁻¹ R_F`: `R = T − Y: (t, width)` is what the layer
/// misses, `K = Σ_e w_e(x) w_e(y) ⟨h_e(x), h_e(y)⟩: (t, t)` the inner products of the weighted
/// hidden activations. Its size is that of the tokens, whatever the experts' is:
/// `t_F³ / 3 + 2 t² (k d_ff + width)` operations at most, `16 t²` bytes.
pub(super) fn refit_error(
    probe: &Probe<'_>,
    visits: &[Visits],
    kept: usize,
    ridge: f64,
    cx: &Context,
) -> Result<f64> {
    let Some(hidden) = &probe.hidden else { return Ok(0.0) };
    let missed = missed(probe, visits);
    let kernel = kernel(hidden, visits)?;
    let (fitted, judges) = probe.split();
    let energy = probe.energy(judges.iter().copied());
    let rows = |of: &[usize]| missed.select(Axis(0), of).mapv(f64::from);
    let mut left = rows(&judges);
    let mut gram = kernel.select(Axis(0), &fitted).select(Axis(1), &fitted);
    let features = kept * hidden.first().map_or(0, Array2::ncols);
    let mean = gram.diag().sum() / features.min(fitted.len()).max(1) as f64;
    if mean > 0.0 {
        gram.diag_mut().mapv_inplace(|x| x + ridge * mean);
        let solved = cx.factorise().solve_spd(gram.view(), rows(&fitted).view())?;
        let cross = kernel.select(Axis(0), &judges).select(Axis(1), &fitted);
        left -= &cross.dot(&solved);
    }
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

/// `K: (t, t)`, expert by expert in `f64`.
fn kernel(hidden: &[Array2<f32>], visits: &[Visits]) -> Result<Array2<f64>> {
    let t = visits.len();
    let mut kernel = Array2::zeros((t, t));
    for (e, hidden) in hidden.iter().enumerate() {
        let weight = |v: &Visits| v.iter().find(|(known, _)| *known == e).map(|(_, w)| *w);
        let own: Vec<(usize, f32)> =
            visits.iter().enumerate().filter_map(|(t, v)| Some((t, weight(v)?))).collect();
        if own.is_empty() {
            continue;
        }
        let tokens: Vec<usize> = own.iter().map(|(t, _)| *t).collect();
        let mut rows = hidden.select(Axis(0), &tokens);
        rows.rows_mut().into_iter().zip(&own).for_each(|(mut row, (_, w))| row *= *w);
        add_block(&mut kernel, &tokens, rows.view())?;
    }
    Ok(kernel)
}

/// Adds `Φ Φᵀ` at the rows and columns of some tokens.
fn add_block(kernel: &mut Array2<f64>, tokens: &[usize], phi: ArrayView2<'_, f32>) -> Result<()> {
    let mut block = Array2::zeros((tokens.len(), tokens.len()));
    add_cross(phi.t(), phi.t(), block.view_mut())?;
    for (row, &a) in block.rows().into_iter().zip(tokens) {
        row.iter().zip(tokens).for_each(|(&x, &b)| kernel[[a, b]] += x);
    }
    Ok(())
}
