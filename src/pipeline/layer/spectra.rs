//! Singular values of a layer's matrices before and after, for the report.

use ndarray::ArrayView2;

use crate::decompose::analysis::spectrum;
use crate::error::{Locate, Result};
use crate::model::{Expert, Role};
use crate::par;
use crate::pipeline::report::SpectrumReport;
use crate::stage::Context;

/// Points of a spectrum, evenly apart in the logarithm of the index.
const POINTS: usize = 32;
/// Experts of a layer that are looked at, evenly apart.
const EXPERTS: usize = 4;
/// Short sides up to this are looked at unless a recipe says otherwise.
const CHEAP: usize = 256;

/// The spectra of the experts of a layer before merging. `wanted` is
/// [`Recipe::measure_spectra`](crate::pipeline::Recipe::measure_spectra).
pub(crate) fn original(
    experts: &[Expert],
    wanted: Option<bool>,
    cx: &Context,
) -> Result<Vec<SpectrumReport>> {
    let Some(view) = experts.first().map(Expert::view) else { return Ok(Vec::new()) };
    let short = view.d_ff().min(view.d_model());
    if !wanted.unwrap_or(short <= CHEAP) {
        return Ok(Vec::new());
    }
    let index = indexes(short);
    let report = |role| -> Result<SpectrumReport> {
        let original = mean(experts, role, &index, cx)?;
        let merged = Vec::new();
        Ok(SpectrumReport { role, index: index.clone(), original, merged, compressed: None })
    };
    view.linears().map(|(role, _)| report(role)).collect()
}

/// Adds those of the merged experts, or renews them.
pub(crate) fn merged(
    spectra: &mut [SpectrumReport],
    experts: &[Expert],
    cx: &Context,
) -> Result<()> {
    spectra.iter_mut().try_for_each(|found| {
        found.merged = mean(experts, found.role, &found.index, cx)?;
        Ok(())
    })
}

/// Adds those of the compressed experts.
pub(crate) fn compressed(
    spectra: &mut [SpectrumReport],
    experts: &[Expert],
    cx: &Context,
) -> Result<()> {
    spectra.iter_mut().try_for_each(|found| {
        found.compressed = Some(mean(experts, found.role, &found.index, cx)?);
        Ok(())
    })
}

/// From 1 to `n`.
fn indexes(n: usize) -> Vec<u32> {
    let step = (n.max(1) as f64).ln() / (POINTS - 1) as f64;
    let mut found: Vec<u32> = (0..POINTS).map(|i| (i as f64 * step).exp().round() as u32).collect();
    found.dedup();
    found
}

fn mean(experts: &[Expert], role: Role, index: &[u32], cx: &Context) -> Result<Vec<f32>> {
    let looked = experts.len().min(EXPERTS);
    let inner = cx.per_task();
    let all = par::map(looked, |i| {
        let e = i * experts.len() / looked;
        let view = experts[e].view();
        relative(view.linear(role).unwrap_or(view.up).weight, index, &inner).in_expert(e)
    })?;
    let shortest = all.iter().map(Vec::len).min().unwrap_or(0);
    let mean = |at: usize| all.iter().map(|values| values[at]).sum::<f64>() / looked as f64;
    // Four digits are what a picture can use.
    let rounded = |x: f64| format!("{x:.3e}").parse().unwrap_or(x as f32);
    Ok((0..shortest).map(|at| rounded(mean(at))).collect())
}

/// The singular values with these numbers, as far as there are any, over the largest.
fn relative(weight: ArrayView2<'_, f32>, index: &[u32], cx: &Context) -> Result<Vec<f64>> {
    let values = spectrum(weight, cx)?;
    let largest = values.first().copied().unwrap_or(0.0);
    let share = |s: &f64| if largest > 0.0 { s / largest } else { 0.0 };
    Ok(index.iter().map_while(|&i| values.get(i as usize - 1)).map(share).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Activation;
    use crate::model::Linear;
    use ndarray::Array2;

    /// Gate, up and down are diagonal, with `scale · 2^-i`.
    fn expert(n: usize, scale: f32) -> Expert {
        let matrix = || {
            let diagonal = (0..n).map(|i| scale * 0.5f32.powi(i as i32)).collect::<Vec<_>>();
            Linear { weight: Array2::from_diag(&ndarray::Array1::from(diagonal)), bias: None }
        };
        Expert::new(Some(matrix()), matrix(), matrix(), Activation::Silu).unwrap()
    }

    #[test]
    fn spectra_are_relative_and_short() {
        let cx = Context::cpu(0);
        let experts: Vec<Expert> = (1..40).map(|i| expert(8, i as f32)).collect();
        let mut found = original(&experts, None, &cx).unwrap();
        assert_eq!(found.len(), 3);
        assert_eq!(found[0].index, [1, 2, 3, 4, 5, 6, 7, 8]);
        merged(&mut found, &experts[..1], &cx).unwrap();
        compressed(&mut found, &[expert(4, 3.0)], &cx).unwrap();
        let expected: Vec<f32> = (0..8).map(|i| 0.5f32.powi(i)).collect();
        for one in &found {
            assert_eq!(one.compressed.as_ref().map(Vec::len), Some(4));
            for of in [&one.original, &one.merged] {
                for (found, expected) in of.iter().zip(&expected) {
                    approx::assert_relative_eq!(found, expected, max_relative = 1e-3);
                }
            }
        }
        assert!(original(&experts, Some(false), &cx).unwrap().is_empty());
        assert!(original(&[expert(257, 1.0)], None, &cx).unwrap().is_empty());
    }

    #[test]
    fn indexes_reach_from_the_first_to_the_last() {
        for n in [1, 2, 31, 32, 768, 14_336] {
            let found = indexes(n);
            assert!(found.windows(2).all(|w| w[0] < w[1]) && found.len() <= POINTS);
            assert_eq!((found[0], *found.last().unwrap()), (1, n as u32));
        }
    }
}
