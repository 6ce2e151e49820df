//! Hidden units as the unit of sparsity: one index set for gate, up and down.
//!
//! A kept hidden unit is a row of gate and up and a column of down. Kept by all three, it stays
//! whole and dense; and an expert of nothing but its kept units is an ordinary, smaller expert,
//! which every runtime can load.

use ndarray::Axis;

use super::score::top;
use super::{Complement, check};
use crate::error::{Error, Result};
use crate::model::{Expert, ExpertView, Factored, Linear, LinearView, Role, Structure};
use crate::stage::{Context, Moments, RankBudget};

/// The score of every hidden unit `a`: `‖W_down[:, a]‖ · rms(h_a)`, what the output loses without
/// it on average, with `moments: (d_ff, d_ff)` of the hidden activations `h`. Without moments
/// `‖W_down[:, a]‖ · ‖W_up[a, :]‖ (· ‖W_gate[a, :]‖)`.
///
/// # Errors
/// [`ErrorKind::Shape`](crate::ErrorKind::Shape) for moments of another width.
pub fn neuron_scores(expert: &ExpertView<'_>, moments: Option<&Moments>) -> Result<Vec<f64>> {
    let norms = |linear: LinearView<'_>, axis| -> Vec<f64> {
        let square = |x: ndarray::ArrayView1<'_, f32>| {
            let x = x.mapv(f64::from);
            x.dot(&x).sqrt()
        };
        linear.weight.axis_iter(axis).map(square).collect()
    };
    let mut scores = norms(expert.down, Axis(1));
    let inputs = match moments {
        Some(moments) => {
            moments.check_width(expert.d_ff())?;
            vec![moments.rms()]
        }
        None => {
            let reading = [Some(expert.up), expert.gate];
            reading.into_iter().flatten().map(|linear| norms(linear, Axis(0))).collect()
        }
    };
    for factor in inputs {
        scores.iter_mut().zip(factor).for_each(|(score, x)| *score *= x);
    }
    Ok(scores)
}

/// The `keep` hidden units with the largest [`neuron_scores`], ascending; ties go to the smaller
/// index.
///
/// # Errors
/// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for `keep` of 0 or above `d_ff`.
pub fn kept_neurons(
    expert: &ExpertView<'_>,
    moments: Option<&Moments>,
    keep: usize,
) -> Result<Vec<u32>> {
    if keep == 0 || keep > expert.d_ff() {
        let expected = format!("1 to {}", expert.d_ff());
        return Err(Error::range("hidden units to keep", expected, keep));
    }
    Ok(top(&neuron_scores(expert, moments)?, keep))
}

/// The expert of the kept hidden units alone: `d_ff` becomes `kept.len()`, and `E(x)` loses exactly
/// the contributions of the others.
///
/// # Errors
/// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for indices that do not ascend, are
/// beyond `d_ff`, or none.
pub fn reduced(expert: &ExpertView<'_>, kept: &[u32]) -> Result<Expert> {
    let at = indices(kept, expert.d_ff())?;
    let rows = |linear: LinearView<'_>| Linear {
        weight: linear.weight.select(Axis(0), &at),
        bias: linear.bias.map(|bias| bias.select(Axis(0), &at)),
    };
    let down = Linear {
        weight: expert.down.weight.select(Axis(1), &at),
        bias: expert.down.bias.map(|bias| bias.to_owned()),
    };
    Expert::new(expert.gate.map(rows), rows(expert.up), down, expert.activation)
}

/// The projections in factors around shared kept hidden units: rows of gate and up, columns of
/// down, each with the low rank fitted to the other units ([`Complement`], whose `structure` and
/// `rounds` are not used). Gate, if any, first.
///
/// `inputs` are the moments of the expert's inputs `(d_model, d_model)`, `hidden` those of its
/// hidden activations `(d_ff, d_ff)`.
///
/// # Errors
/// As [`Complement`]'s, and [`reduced`]'s for the indices.
pub fn around_neurons(
    expert: &ExpertView<'_>,
    kept: &[u32],
    rank: usize,
    (inputs, hidden): (Option<&Moments>, Option<&Moments>),
    how: &Complement,
    cx: &Context,
) -> Result<Vec<(Role, Factored)>> {
    indices(kept, expert.d_ff())?;
    let budget = RankBudget { rank, rows: kept.len() };
    let factor = |(role, linear): (Role, LinearView<'_>)| {
        let (structure, moments) = match role {
            Role::Down => (Structure::Columns, hidden),
            Role::Gate | Role::Up => (Structure::Rows, inputs),
        };
        check(linear.weight, moments, &budget, structure)?;
        let how = Complement { structure, ..*how };
        Ok((role, how.around(linear.weight, moments, kept.to_vec(), rank, cx)?))
    };
    expert.linears().map(factor).collect()
}

fn indices(kept: &[u32], d_ff: usize) -> Result<Vec<usize>> {
    let at: Vec<usize> = kept.iter().map(|&i| i as usize).collect();
    let ascending = at.windows(2).all(|w| w[0] < w[1]);
    match ascending && at.last().is_some_and(|&last| last < d_ff) {
        true => Ok(at),
        false => {
            let expected = format!("ascending numbers below {d_ff}, one or more");
            Err(Error::range("kept hidden units", expected, format!("{kept:?}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Cpu;
    use ndarray::{Array2, array};

    fn expert() -> Expert {
        let value =
            |i: usize, j: usize, k: usize| ((i * 7 + j * 5 + k * 3) % 11) as f32 / 5.5 - 1.0;
        Expert::swiglu(
            Array2::from_shape_fn((6, 4), |(i, j)| value(i, j, 1)),
            Array2::from_shape_fn((6, 4), |(i, j)| value(i, j, 2)),
            Array2::from_shape_fn((4, 6), |(i, j)| value(i, j, 3)),
        )
        .unwrap()
    }

    #[test]
    fn scores_by_hand() {
        let e =
            Expert::relu(array![[3.0, 4.0], [1.0, 0.0]], array![[1.0, 2.0], [0.0, 0.0]]).unwrap();
        assert_eq!(neuron_scores(&e.view(), None).unwrap(), [5.0, 2.0]);
        let moments = Moments::new(array![[1.0, 0.0], [0.0, 36.0]], 1).unwrap();
        assert_eq!(neuron_scores(&e.view(), Some(&moments)).unwrap(), [1.0, 12.0]);
        assert_eq!(kept_neurons(&e.view(), Some(&moments), 1).unwrap(), [1]);
        for keep in [0, 3] {
            assert!(kept_neurons(&e.view(), None, keep).is_err());
        }
        let wide = Moments::new(Array2::eye(3), 1).unwrap();
        assert!(neuron_scores(&e.view(), Some(&wide)).is_err());
    }

    #[test]
    fn a_reduced_expert_loses_the_other_units_and_nothing_else() {
        let (e, kept) = (expert(), [1, 2, 5]);
        let small = reduced(&e.view(), &kept).unwrap();
        let x = array![[0.5, -1.0, 2.0, 0.25], [1.0, 1.0, -1.0, 0.0]];
        let mut hidden = e.view().hidden(x.view(), &Cpu::new()).unwrap();
        for a in [0, 3, 4] {
            hidden.column_mut(a).fill(0.0);
        }
        let expected = e.view().down.forward(hidden.view(), &Cpu::new()).unwrap();
        let found = small.view().forward(x.view(), &Cpu::new()).unwrap();
        approx::assert_abs_diff_eq!(found, expected, epsilon = 1e-5);
        assert_eq!(reduced(&e.view(), &[0, 1, 2, 3, 4, 5]).unwrap(), e);
        for bad in [&[][..], &[2, 1], &[1, 1], &[6]] {
            assert!(reduced(&e.view(), bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn kept_units_are_exact_in_all_three_projections() {
        let (e, kept) = (expert(), [0, 4]);
        let cx = Context::cpu(0);
        let how = Complement::default();
        let parts = around_neurons(&e.view(), &kept, 1, (None, None), &how, &cx).unwrap();
        assert_eq!(parts.len(), 3);
        for (role, factored) in parts {
            let (dense, exact) = (factored.to_dense(&Cpu::new()).unwrap(), e.view());
            let exact = exact.linear(role).unwrap().weight;
            let axis = factored.structure().axis();
            assert_eq!(factored.indices(), kept);
            for (a, (d, w)) in dense.axis_iter(axis).zip(exact.axis_iter(axis)).enumerate() {
                assert!(!kept.contains(&(a as u32)) || d == w, "{role} {a}");
            }
        }
    }
}
