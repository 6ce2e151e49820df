//! Which rank? Of one matrix by a ratio or by kept energy, of all matrices by one budget.

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use super::Whitening;
use crate::error::{Error, ErrorKind, Result};
use crate::model::Finite;
use crate::stage::{Context, Moments};

pub use crate::stage::Spectrum;

/// `r = ⌈ρ m n / (m + n)⌉`: the low rank holds the share `ρ` of the matrix's parameters.
///
/// Source: the paper's code, which derives `ρ = r₀ (m + n)/(m n)` from a wanted rank `r₀`; a
/// rounding error above a whole number does not round up.
///
/// # Errors
/// [`ErrorKind::OutOfRange`] for a ratio outside `(0, 1]`.
pub fn by_ratio((m, n): (usize, usize), ratio: f64) -> Result<usize> {
    in_unit("ratio of low-rank parameters", ratio)?;
    let most = m as f64 * n as f64 / (m + n).max(1) as f64;
    Ok((ratio * most - 1e-9).ceil().max(0.0) as usize)
}

/// The least rank that keeps the share of the energy: `Σ_{i ≤ r} σ_i² ≥ share · Σ σ_i²`, of all
/// singular values, largest first. 0 for a zero matrix.
///
/// # Errors
/// [`ErrorKind::OutOfRange`] for a share outside `(0, 1]`.
pub fn by_energy(sigma: &[f64], share: f64) -> Result<usize> {
    in_unit("share of kept energy", share)?;
    let total: f64 = sigma.iter().map(|s| s * s).sum();
    let mut kept = 0.0;
    // The same additions in the same order, so that a share of 1 is reached exactly.
    let reached = |s: &f64| {
        kept += s * s;
        kept >= share * total
    };
    match total > 0.0 {
        true => Ok(sigma.iter().position(reached).map_or(sigma.len(), |i| i + 1)),
        false => Ok(0),
    }
}

fn in_unit(what: &str, x: f64) -> Result<()> {
    match x > 0.0 && x <= 1.0 {
        true => Ok(()),
        false => Err(Error::range(what, "a number in (0, 1]", x)),
    }
}

impl Spectrum {
    /// The spectrum of `W: (m, n)`, of `W S` with moments, from the eigenvalues of the Gram matrix
    /// of the short side in `f64`. Cost: `2 m n min(m, n)` and `4/3 min(m, n)³`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFinite`] for a NaN or infinity, [`ErrorKind::Shape`] for moments of another
    /// width.
    pub fn of(
        matrix: ArrayView2<'_, f32>,
        moments: Option<&Moments>,
        damping: f64,
        weight: f64,
        cx: &Context,
    ) -> Result<Self> {
        matrix.check_finite("matrix of a spectrum")?;
        let white = match moments {
            Some(moments) => {
                moments.check_width(matrix.ncols())?;
                Some(Whitening::new(moments, damping, cx)?.apply(matrix, cx)?)
            }
            None => None,
        };
        let a = white.as_ref().map_or(matrix, |white| white.view());
        let tall = if a.nrows() < a.ncols() { a.reversed_axes() } else { a };
        let mut gram = Array2::zeros((tall.ncols(), tall.ncols()));
        cx.compute().add_gram(tall, &mut gram)?;
        let sigma =
            cx.backend().eigenvalues(gram.view())?.iter().map(|x| x.max(0.0).sqrt()).collect();
        Ok(Self { shape: matrix.dim(), sigma, weight, unit: 1 })
    }

    /// Of rank `r`.
    fn cost(&self, r: usize) -> usize {
        self.unit * r * (self.shape.0 + self.shape.1)
    }

    /// Of the dense matrix.
    fn dense(&self) -> usize {
        self.unit * self.shape.0 * self.shape.1
    }

    /// The largest rank that costs less than the matrix.
    fn most(&self) -> usize {
        let each = self.cost(1).max(1);
        (self.dense().saturating_sub(1) / each).min(self.sigma.len())
    }
}

/// What a matrix is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Allocation {
    /// This rank.
    Rank(usize),
    /// It is left as it is, since factors would take no less.
    Dense,
}

impl Allocation {
    /// Parameters of an `(m, n)` matrix so allocated.
    pub fn parameters(self, (m, n): (usize, usize)) -> usize {
        match self {
            Self::Rank(r) => r * (m + n),
            Self::Dense => m * n,
        }
    }
}

/// One more rank for a matrix, or the dense matrix instead of its last rank.
struct Step {
    /// Gain in weighted squared error for a parameter.
    density: f64,
    matrix: usize,
    to: Allocation,
    cost: usize,
}

/// Spends a budget over all matrices where it saves most error: parameters, or bytes with the
/// [unit](Spectrum::unit) of each.
///
/// From rank `least` everywhere, the step with the largest gain per cost is taken as long as it
/// fits: one more rank gains `w σ_{r+1}²` for `m + n` numbers. Gains of a matrix fall, so that
/// the greedy choice is optimal up to the last steps. A matrix whose next rank would not pay
/// becomes dense. What is left of the budget is less than the largest rank costs, unless all
/// is dense. Ties go to the earlier matrix.
///
/// # Errors
/// [`ErrorKind::Budget`] when rank `least` is already too much: the message has the least
/// reachable size. [`ErrorKind::OutOfRange`] for a weight that is negative or not finite or
/// singular values that do not fall or are too few.
pub fn allocate(spectra: &[Spectrum], budget: usize, least: usize) -> Result<Vec<Allocation>> {
    spectra.iter().try_for_each(check)?;
    let floor = |s: &Spectrum| match least <= s.most() {
        true => Allocation::Rank(least),
        false => Allocation::Dense,
    };
    let mut chosen: Vec<_> = spectra.iter().map(floor).collect();
    let cost = |(a, s): (&Allocation, &Spectrum)| s.unit * a.parameters(s.shape);
    let start: usize = chosen.iter().zip(spectra).map(cost).sum();
    let Some(mut left) = budget.checked_sub(start) else {
        let reason = format!(
            "the least reachable size is {start}, at rank {least} in every matrix; {budget} were \
             asked for"
        );
        return Err(ErrorKind::Budget { reason }.into());
    };
    let mut steps: Vec<Step> = Vec::new();
    for (matrix, (spectrum, start)) in spectra.iter().zip(&chosen).enumerate() {
        push_steps(&mut steps, matrix, spectrum, *start);
    }
    // Stable, so that the ranks of a matrix stay in order among equal densities.
    steps.sort_by(|a, b| b.density.total_cmp(&a.density));
    let mut closed = vec![false; spectra.len()];
    for step in steps {
        if closed[step.matrix] {
            continue;
        }
        match left.checked_sub(step.cost) {
            Some(rest) => (left, chosen[step.matrix]) = (rest, step.to),
            None => closed[step.matrix] = true,
        }
    }
    Ok(chosen)
}

fn push_steps(steps: &mut Vec<Step>, matrix: usize, spectrum: &Spectrum, start: Allocation) {
    let Allocation::Rank(least) = start else { return };
    let (each, most) = (spectrum.cost(1), spectrum.most());
    let gain = |s: f64| spectrum.weight * s * s;
    let mut last = f64::INFINITY;
    for r in least..most {
        last = gain(spectrum.sigma[r]) / each as f64;
        steps.push(Step { density: last, matrix, to: Allocation::Rank(r + 1), cost: each });
    }
    let cost = spectrum.dense() - spectrum.cost(most);
    let tail: f64 = spectrum.sigma[most..].iter().map(|&s| gain(s)).sum();
    // Never before the ranks that it replaces.
    let density = (tail / cost.max(1) as f64).min(last);
    steps.push(Step { density, matrix, to: Allocation::Dense, cost });
}

fn check(spectrum: &Spectrum) -> Result<()> {
    let (m, n) = spectrum.shape;
    if spectrum.sigma.len() != m.min(n) {
        return Err(Error::shape("singular values", m.min(n), spectrum.sigma.len()));
    }
    let falling = spectrum.sigma.windows(2).all(|w| w[0] >= w[1]);
    let finite = spectrum.sigma.iter().all(|s| s.is_finite() && *s >= 0.0);
    if !falling || !finite {
        return Err(Error::range("singular values", "finite and falling to 0 or more", "others"));
    }
    match spectrum.weight.is_finite() && spectrum.weight >= 0.0 {
        true => Ok(()),
        false => Err(Error::range("weight of a matrix", "0 or more", spectrum.weight)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    fn spectrum(shape: (usize, usize), sigma: &[f64], weight: f64) -> Spectrum {
        Spectrum { shape, sigma: sigma.to_vec(), weight, unit: 1 }
    }

    fn error(spectra: &[Spectrum], chosen: &[Allocation]) -> f64 {
        let tail = |(s, a): (&Spectrum, &Allocation)| match a {
            Allocation::Dense => 0.0,
            Allocation::Rank(r) => s.weight * s.sigma[*r..].iter().map(|x| x * x).sum::<f64>(),
        };
        spectra.iter().zip(chosen).map(tail).sum()
    }

    #[test]
    fn ratio_and_energy_by_hand() {
        // The paper's settings: rank 32 through a ratio, at both orientations.
        let ratio = 32.0 * (768.0 + 3072.0) / (768.0 * 3072.0);
        assert_eq!(by_ratio((3072, 768), ratio).unwrap(), 32);
        assert_eq!(by_ratio((768, 3072), ratio + 1e-6).unwrap(), 33);
        assert_eq!(by_ratio((4, 4), 1.0).unwrap(), 2);
        assert_eq!(by_energy(&[3.0, 2.0, 1.0], 9.0 / 14.0).unwrap(), 1);
        assert_eq!(by_energy(&[3.0, 2.0, 1.0], 0.93).unwrap(), 3);
        assert_eq!(by_energy(&[0.1, 0.07, 0.03], 1.0).unwrap(), 3);
        assert_eq!(by_energy(&[0.0, 0.0], 0.9).unwrap(), 0);
        for bad in [0.0, -1.0, 1.1, f64::NAN] {
            assert!(by_ratio((4, 4), bad).is_err() && by_energy(&[1.0], bad).is_err());
        }
    }

    #[test]
    fn the_spectrum_is_that_of_the_matrix_and_of_its_outputs() {
        let cx = Context::cpu(0);
        let w = array![[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]];
        let plain = Spectrum::of(w.view(), None, 0.0, 1.0, &cx).unwrap();
        approx::assert_abs_diff_eq!(plain.sigma[..], [3.0, 1.0], epsilon = 1e-6);
        let scale = Array2::from_diag(&array![1.0, 100.0, 1.0]);
        let moments = Moments::new(scale, 1).unwrap();
        let white = Spectrum::of(w.view(), Some(&moments), 0.0, 1.0, &cx).unwrap();
        approx::assert_abs_diff_eq!(white.sigma[..], [10.0, 3.0], epsilon = 1e-5);
        let wide = Moments::new(Array2::eye(4), 1).unwrap();
        assert!(Spectrum::of(w.view(), Some(&wide), 0.0, 1.0, &cx).is_err());
    }

    #[test]
    fn the_greedy_split_is_the_best_of_all_splits() {
        let sigma = |top: f64, decay: f64| (0..6).map(|i| top * decay.powi(i)).collect::<Vec<_>>();
        let spectra = [
            spectrum((20, 6), &sigma(3.0, 0.9), 1.0),
            spectrum((20, 6), &sigma(5.0, 0.4), 1.0),
            spectrum((20, 6), &sigma(1.0, 0.95), 2.0),
        ];
        for budget in 3..=12 {
            let chosen = allocate(&spectra, budget * 26, 1).unwrap();
            let size: usize = chosen.iter().map(|a| a.parameters((20, 6))).sum();
            assert!(size <= budget * 26 && size > (budget - 1) * 26);
            let found = error(&spectra, &chosen);
            // Equal costs: every split of the ranks can be tried.
            for a in 1..=4 {
                for b in 1..=4 {
                    let Some(c @ 1..=4) = budget.checked_sub(a + b) else { continue };
                    let other = [a, b, c].map(Allocation::Rank);
                    assert!(found <= error(&spectra, &other) + 1e-12, "{budget}: {chosen:?}");
                }
            }
        }
    }

    #[test]
    fn plentiful_budgets_leave_matrices_dense_and_scarce_ones_say_what_is_least() {
        let spectra = vec![spectrum((4, 4), &[4.0, 3.0, 2.0, 1.0], 1.0); 2];
        assert_eq!(allocate(&spectra, 32, 1).unwrap(), [Allocation::Dense; 2]);
        assert_eq!(allocate(&spectra, 24, 1).unwrap()[0], Allocation::Dense);
        let scarce = allocate(&spectra, 15, 1).unwrap_err();
        assert!(matches!(scarce.kind(), ErrorKind::Budget { .. }), "{scarce}");
        assert!(scarce.to_string().contains("least reachable size is 16, at rank 1"), "{scarce}");
        assert_eq!(allocate(&spectra, 0, 0).unwrap(), [Allocation::Rank(0); 2]);
        // In bytes: one matrix of halves, one of floats; the same gain costs half in the first.
        let (mut half, mut float) = (spectra[0].clone(), spectra[1].clone());
        (half.unit, float.unit) = (2, 4);
        let chosen = allocate(&[float, half], 32 + 16 + 16, 1).unwrap();
        assert_eq!(chosen, [Allocation::Rank(1), Allocation::Dense]);
    }

    #[test]
    fn spectra_that_are_none_are_refused() {
        let bad = [
            spectrum((2, 2), &[1.0], 1.0),
            spectrum((2, 2), &[1.0, 2.0], 1.0),
            spectrum((2, 2), &[f64::NAN, 0.0], 1.0),
            spectrum((2, 2), &[1.0, 0.0], -1.0),
        ];
        assert!(bad.iter().all(|s| allocate(std::slice::from_ref(s), 100, 0).is_err()));
    }
}
