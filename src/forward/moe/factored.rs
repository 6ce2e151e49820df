//! One MLP in factors on a block of tokens: `y = L (R x)`, plus the kept rows or from the kept
//! columns of `S`. Nothing is multiplied out, so that a token costs `2 r (m + n) + 2 k n`
//! operations a matrix, and a layer takes the memory of its factors.

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2};

use super::mlp::{Parts, Projection};
use super::scratch::{Pool, Scratch};
use super::sum::Kernel;
use crate::error::{Error, Result};
use crate::linalg::Compute;
use crate::model::{Factored, FactoredExpert, FactoredLinear, Role, Structure, Weight};

impl Kernel for FactoredExpert {
    fn weighted<'a>(
        &self,
        x: ArrayView2<'_, f32>,
        weights: &[f32],
        pool: &'a Pool,
        compute: &dyn Compute,
    ) -> Result<Scratch<'a>> {
        let of = |role: Role| {
            let linear = self.linear(role);
            linear.ok_or_else(|| Error::shape("expert", format!("a {role} projection"), "none"))
        };
        let (gate, up, down) = (self.linear(Role::Gate), of(Role::Up)?, of(Role::Down)?);
        let parts = Parts { gate, up, down, activation: self.activation() };
        parts.weighted(x, Some(weights), pool, compute)
    }
}

impl Projection for FactoredLinear {
    fn multiply<'a>(
        &self,
        x: ArrayView2<'_, f32>,
        pool: &'a Pool,
        compute: &dyn Compute,
    ) -> Result<Scratch<'a>> {
        let mut out = pool.take(x.nrows(), self.weight.dim().0);
        match &self.weight {
            Weight::Dense(w) => compute.gemm(1.0, x, w.t(), 0.0, out.view_mut())?,
            Weight::Factored(f) => {
                if f.rank() > 0 {
                    let mut inner = pool.take(x.nrows(), f.rank());
                    compute.gemm(1.0, x, f.right().t(), 0.0, inner.view_mut())?;
                    compute.gemm(1.0, inner.view(), f.left().t(), 0.0, out.view_mut())?;
                } else {
                    out.values().fill(0.0);
                }
                add_lines(f, x, out.view_mut(), pool, compute)?;
            }
        }
        Ok(out)
    }

    fn bias(&self) -> Option<ArrayView1<'_, f32>> {
        self.bias.as_ref().map(|bias| bias.view())
    }
}

/// `out ← out + X Sᵀ`.
fn add_lines(
    f: &Factored,
    x: ArrayView2<'_, f32>,
    mut out: ArrayViewMut2<'_, f32>,
    pool: &Pool,
    compute: &dyn Compute,
) -> Result<()> {
    let at = f.indices();
    if at.is_empty() {
        return Ok(());
    }
    let mut part = pool.take(x.nrows(), at.len());
    match f.structure() {
        Structure::Rows => {
            compute.gemm(1.0, x, f.kept().t(), 0.0, part.view_mut())?;
            for (mut row, part) in out.rows_mut().into_iter().zip(part.view().rows()) {
                at.iter().zip(part).for_each(|(&i, y)| row[i as usize] += y);
            }
        }
        Structure::Columns => {
            for (mut part, row) in part.view_mut().rows_mut().into_iter().zip(x.rows()) {
                part.iter_mut().zip(at).for_each(|(x, &i)| *x = row[i as usize]);
            }
            compute.gemm(1.0, part.view(), f.kept().t(), 1.0, out)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::sum::sum_of;
    use super::*;
    use crate::linalg::Cpu;
    use crate::model::Activation;
    use crate::stage::Context;
    use ndarray::{Array1, Array2};

    fn values(rows: usize, cols: usize, seed: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            ((i * 131 + j * 71 + seed * 37) as f32 * 0.61).sin()
        })
    }

    fn factors((m, n): (usize, usize), rank: usize, by: Structure, seed: usize) -> Weight {
        let kept = vec![0, 3, 7];
        let lines = match by {
            Structure::Rows => values(3, n, seed + 2),
            Structure::Columns => values(m, 3, seed + 2),
        };
        let (left, right) = (values(m, rank, seed), values(rank, n, seed + 1));
        Weight::Factored(Factored::new(left, right, by, kept, lines).unwrap())
    }

    #[test]
    fn factors_give_what_they_multiply_to() {
        let (d, f) = (24, 17);
        let x = values(1300, d, 5);
        let cx = Context::cpu(0);
        for (gated, biased) in [(true, true), (false, false)] {
            let bias = |n: usize| biased.then(|| Array1::from_elem(n, 0.1));
            let expert = |e: usize| {
                let gate = FactoredLinear { weight: Weight::Dense(values(f, d, e)), bias: bias(f) };
                let up = factors((f, d), 2 * e, Structure::Rows, 10 + e);
                let down = factors((d, f), 3, Structure::Columns, 20 + e);
                let act = if gated { Activation::Silu } else { Activation::Relu };
                let up = FactoredLinear { weight: up, bias: bias(f) };
                let down = FactoredLinear { weight: down, bias: bias(d) };
                FactoredExpert::new(gated.then_some(gate), up, down, act).unwrap()
            };
            // The first expert has rows only in its up projection.
            let experts = [expert(0), expert(1)];
            let dense: Vec<_> = experts.iter().map(|e| e.to_expert(&Cpu::new()).unwrap()).collect();
            let visits = [
                (0..1300).map(|t| (t, 0.5)).collect::<Vec<_>>(),
                (0..1300).step_by(3).map(|t| (t, 1.5)).collect(),
            ];
            let ours = sum_of(&experts, &visits, x.view(), false, &cx).unwrap().0;
            let expected = sum_of(&dense, &visits, x.view(), false, &cx).unwrap().0;
            let scale = expected.iter().fold(1.0f32, |m, y| m.max(y.abs()));
            approx::assert_abs_diff_eq!(ours, expected, epsilon = 1e-5 * scale);
        }
    }
}
