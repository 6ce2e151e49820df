//! What the matrices of a merged layer have to offer a size budget.

use ndarray::ArrayView2;

use super::layer_inputs::{by_expert, matrices, matrix, moments, visiting};
use crate::error::{Error, Locate, Result};
use crate::model::{Expert, MergedLayer, Role};
use crate::par;
use crate::stage::{Compression, Context, Spectrum};

/// Damping of the moments behind whitened spectra.
const DAMPING: f64 = 1e-6;

/// The spectra of all matrices of a merged layer, expert by expert: gate (if any), up, down.
///
/// With samples `σ` are the singular values of `W S`, whose tail is the mean squared error of the
/// matrix's own output, and the weight is `Σ g² · s`: the squared router weights of the tokens that
/// visit the expert, and how much of an error reaches the layer's output, to first order; `s` is 1
/// for down, and for gate and up the mean over hidden units `a` of
/// `‖W_down[:, a]‖² · E[(∂h_a/∂z_a)²]`. Without samples `σ` are those of `W` and the weight is
/// `usage / ‖W‖²`: relative errors count alike.
///
/// Source: ours.
pub(super) fn survey(
    layer: &MergedLayer,
    task: &Compression<'_>,
    cx: &Context,
) -> Result<Vec<Vec<Spectrum>>> {
    let spectra = match task.inputs.filter(|x| x.nrows() > 0) {
        None => by_usage(layer, task.usage, cx)?,
        Some(x) => by_samples(layer, task.narrowed, x, cx)?,
    };
    Ok(by_expert(spectra, layer.experts.len()))
}

fn by_usage(layer: &MergedLayer, usage: &[f64], cx: &Context) -> Result<Vec<Spectrum>> {
    let (jobs, inner) = (matrices(&layer.experts), cx.per_task());
    if usage.len() != layer.experts.len() {
        return Err(Error::shape("usage of merged experts", layer.experts.len(), usage.len()));
    }
    par::map(jobs.len(), |i| {
        let (e, role) = jobs[i];
        let weight = matrix(layer.experts[e].view(), role);
        let square: f64 = weight.iter().map(|&x| f64::from(x).powi(2)).sum();
        let count = if square > 0.0 { usage[e] / square } else { 0.0 };
        Spectrum::of(weight, None, DAMPING, count, &inner).in_expert(e)
    })
}

fn by_samples(
    layer: &MergedLayer,
    narrowed: bool,
    x: ArrayView2<'_, f32>,
    cx: &Context,
) -> Result<Vec<Spectrum>> {
    let (jobs, inner) = (matrices(&layer.experts), cx.per_task());
    let visits = layer.visits(narrowed, x, cx.compute())?;
    let mass: Vec<f64> = visits
        .iter()
        .map(|visits| visits.iter().map(|(_, w)| f64::from(*w).powi(2)).sum())
        .collect();
    // An expert that no sample visits is not worth nothing.
    let floor = 0.01 * mass.iter().sum::<f64>() / mass.len().max(1) as f64;
    par::map(jobs.len(), |i| {
        let (e, role) = jobs[i];
        let expert = &layer.experts[e];
        let of_one = || {
            let moments = moments(expert, role, x, &visits[e], &inner)?;
            let reach = reach(expert, role, x, &visits[e], &inner)?;
            let weight = mass[e].max(floor) * reach;
            let matrix = matrix(expert.view(), role);
            Spectrum::of(matrix, Some(&moments), DAMPING, weight, &inner)
        };
        of_one().in_expert(e)
    })
}

/// How much of a unit squared error in a matrix's output reaches the expert's: 1 for down, else
/// the mean over hidden units `a` of `‖W_down[:, a]‖² · E[(∂h_a/∂z_a)²]` over the visiting tokens.
fn reach(
    expert: &Expert,
    role: Role,
    x: ArrayView2<'_, f32>,
    visits: &[(usize, f32)],
    cx: &Context,
) -> Result<f64> {
    let view = expert.view();
    if role == Role::Down {
        return Ok(1.0);
    }
    let x = visiting(x, visits);
    let up = view.up.forward(x.view(), cx.compute())?;
    let gate = view.gate.map(|gate| gate.forward(x.view(), cx.compute())).transpose()?;
    let slope = |t: usize, a: usize| match &gate {
        None => view.activation.derivative(up[[t, a]]),
        Some(gate) => {
            let (by_gate, by_up) = view.activation.gate_derivatives(gate[[t, a]], up[[t, a]]);
            if role == Role::Gate { by_gate } else { by_up }
        }
    };
    let (t, f) = up.dim();
    let mut squares = vec![0.0; f];
    for row in 0..t {
        for (a, square) in squares.iter_mut().enumerate() {
            *square += f64::from(slope(row, a)).powi(2);
        }
    }
    let columns = view.down.weight.columns().into_iter();
    let norms = columns.map(|c| c.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>());
    let total: f64 = norms.zip(&squares).map(|(norm, square)| norm * square).sum();
    Ok(total / (t * f).max(1) as f64)
}
