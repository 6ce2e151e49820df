//! One expert: two matrices (Switch) or three (SwiGLU, GeGLU), and its own forward pass.

use ndarray::{Array1, Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::linalg::{Activation, Compute, LinearView, Mlp, Term};
use crate::model::check::Finite;
use crate::model::permutation::Permutation;

/// Which of an expert's matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// `W_gate: (d_ff, d_model)`, of gated experts only.
    Gate,
    /// `W_up: (d_ff, d_model)`; the `wi` of two-matrix experts.
    Up,
    /// `W_down: (d_model, d_ff)`; the `wo` of two-matrix experts.
    Down,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Gate => "gate",
            Self::Up => "up",
            Self::Down => "down",
        })
    }
}

/// `y = W x + b` with `W: (out, in)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Linear {
    /// `W: (out, in)`.
    pub weight: Array2<f32>,
    /// `b: (out)`.
    pub bias: Option<Array1<f32>>,
}

impl Linear {
    /// A projection without bias.
    pub fn new(weight: Array2<f32>) -> Self {
        Self { weight, bias: None }
    }

    /// Borrows it.
    pub fn view(&self) -> LinearView<'_> {
        LinearView { weight: self.weight.view(), bias: self.bias.as_ref().map(|b| b.view()) }
    }
}

impl From<Array2<f32>> for Linear {
    fn from(weight: Array2<f32>) -> Self {
        Self::new(weight)
    }
}

/// One expert, finite and of consistent shapes.
///
/// Gated (three matrices): `E(x) = W_down (act(W_gate x) ⊙ (W_up x))`; see [`Activation::gate`].
/// Two matrices: `E(x) = W_down act(W_up x)`. Each projection may have a bias.
#[derive(Debug, Clone, PartialEq)]
pub struct Expert {
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
    activation: Activation,
}

impl Expert {
    /// Checks shapes and finiteness. `gate = None` is a two-matrix expert.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the matrices or biases do not fit each
    /// other, [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for a NaN or infinite weight.
    pub fn new(
        gate: Option<Linear>,
        up: Linear,
        down: Linear,
        activation: Activation,
    ) -> Result<Self> {
        let (f, d) = up.weight.dim();
        let parts = [(Role::Gate, gate.as_ref()), (Role::Up, Some(&up)), (Role::Down, Some(&down))];
        for (role, linear) in parts {
            let Some(Linear { weight, bias }) = linear else { continue };
            let expected = if role == Role::Down { (d, f) } else { (f, d) };
            if weight.dim() != expected {
                return Err(Error::shape("expert projection", expected, weight.dim()));
            }
            weight.check_finite(&format!("{role} projection"))?;
            if let Some(bias) = bias {
                if bias.len() != expected.0 {
                    return Err(Error::shape("expert bias", expected.0, bias.len()));
                }
                bias.check_finite(&format!("{role} bias"))?;
            }
        }
        Ok(Self { gate, up, down, activation })
    }

    /// A SwiGLU expert without biases: `gate`, `up`: `(d_ff, d_model)`, `down`: `(d_model, d_ff)`.
    ///
    /// # Errors
    /// As [`Expert::new`].
    pub fn swiglu(gate: Array2<f32>, up: Array2<f32>, down: Array2<f32>) -> Result<Self> {
        Self::new(Some(gate.into()), up.into(), down.into(), Activation::Silu)
    }

    /// A ReLU expert without biases: `wi: (d_ff, d_model)`, `wo: (d_model, d_ff)`.
    ///
    /// # Errors
    /// As [`Expert::new`].
    pub fn relu(wi: Array2<f32>, wo: Array2<f32>) -> Result<Self> {
        Self::new(None, wi.into(), wo.into(), Activation::Relu)
    }

    /// Borrows it.
    pub fn view(&self) -> ExpertView<'_> {
        ExpertView {
            gate: self.gate.as_ref().map(Linear::view),
            up: self.up.view(),
            down: self.down.view(),
            activation: self.activation,
        }
    }

    /// Takes it apart: gate, up, down.
    pub fn into_parts(self) -> (Option<Linear>, Linear, Linear) {
        (self.gate, self.up, self.down)
    }

    /// `Σ_i w_i · P_i(E_i)`: the weighted sum of experts whose hidden units were permuted.
    ///
    /// Each term is a weight, an expert and the permutation (gather indices) that brings its hidden
    /// units into the common order. A weight vector that sums to 1 gives a weighted average.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the experts differ in kind or a
    /// permutation in length.
    pub fn weighted_sum(
        terms: &[(f32, ExpertView<'_>, &Permutation)],
        compute: &dyn Compute,
    ) -> Result<Expert> {
        let Some((_, first, _)) = terms.first() else {
            return Err(Error::range("weighted sum of experts", "an expert", "none"));
        };
        if let Some((_, other, _)) = terms.iter().find(|(_, e, _)| !e.same_kind(first)) {
            let shapes = (first.up.weight.dim(), other.up.weight.dim());
            return Err(Error::shape("weighted sum of experts", shapes.0, shapes.1));
        }
        let pick = |role: Role| -> Result<Option<Linear>> {
            let Some(like) = first.linear(role) else { return Ok(None) };
            let mut matrices = Vec::with_capacity(terms.len());
            let mut bias = like.bias.map(|b| Array1::<f32>::zeros(b.len()));
            for (weight, expert, permutation) in terms {
                let Some(linear) = expert.linear(role) else { continue };
                let gather = (!permutation.is_identity()).then(|| permutation.as_slice());
                let (rows, cols) = if role == Role::Down { (None, gather) } else { (gather, None) };
                matrices.push(Term { weight: *weight, matrix: linear.weight, rows, cols });
                if let (Some(sum), Some(b)) = (&mut bias, linear.bias) {
                    let at = |a: usize| rows.map_or(a, |rows| rows[a] as usize);
                    sum.iter_mut().enumerate().for_each(|(a, s)| *s += weight * b[at(a)]);
                }
            }
            Ok(Some(Linear { weight: compute.weighted_sum(&matrices)?, bias }))
        };
        if let Some((_, _, p)) = terms.iter().find(|(_, e, p)| p.len() != e.d_ff()) {
            return Err(Error::shape("permutation of hidden units", first.d_ff(), p.len()));
        }
        let missing = || Error::range("expert", "an up and a down projection", "none");
        let (up, down) = (pick(Role::Up)?, pick(Role::Down)?);
        Expert::new(
            pick(Role::Gate)?,
            up.ok_or_else(missing)?,
            down.ok_or_else(missing)?,
            first.activation,
        )
    }

    /// Number of parameters, biases included.
    pub fn parameters(&self) -> usize {
        self.view().linears().map(|(_, l)| l.weight.len() + l.bias.map_or(0, |b| b.len())).sum()
    }
}

/// A borrowed [`Expert`].
#[derive(Debug, Clone, Copy)]
pub struct ExpertView<'a> {
    /// `W_gate: (d_ff, d_model)`; `None` for two-matrix experts.
    pub gate: Option<LinearView<'a>>,
    /// `W_up: (d_ff, d_model)`.
    pub up: LinearView<'a>,
    /// `W_down: (d_model, d_ff)`.
    pub down: LinearView<'a>,
    /// The non-linearity.
    pub activation: Activation,
}

impl<'a> ExpertView<'a> {
    /// Width of the residual stream.
    pub fn d_model(&self) -> usize {
        self.up.weight.ncols()
    }

    /// Number of hidden units.
    pub fn d_ff(&self) -> usize {
        self.up.weight.nrows()
    }

    /// The projections with their roles, gate (if any) first.
    pub fn linears(&self) -> impl Iterator<Item = (Role, LinearView<'a>)> + use<'a> {
        let gate = self.gate.map(|gate| (Role::Gate, gate));
        gate.into_iter().chain([(Role::Up, self.up), (Role::Down, self.down)])
    }

    /// The same expert under a shorter borrow: array views are invariant in their lifetime, so a
    /// value that joins experts with something short-lived needs this.
    pub fn reborrow<'b>(&self) -> ExpertView<'b>
    where
        'a: 'b,
    {
        let linear = |l: LinearView<'a>| LinearView {
            weight: l.weight.reborrow(),
            bias: l.bias.map(|b| b.reborrow()),
        };
        ExpertView {
            gate: self.gate.map(linear),
            up: linear(self.up),
            down: linear(self.down),
            activation: self.activation,
        }
    }

    /// One projection; `None` for the gate of a two-matrix expert.
    pub fn linear(&self, role: Role) -> Option<LinearView<'a>> {
        match role {
            Role::Gate => self.gate,
            Role::Up => Some(self.up),
            Role::Down => Some(self.down),
        }
    }

    /// Whether the two experts have the same shapes, biases and activation.
    pub fn same_kind(&self, other: &ExpertView<'_>) -> bool {
        let kind = |e: &ExpertView<'_>| {
            let shape =
                |(role, l): (Role, LinearView<'_>)| (role, l.weight.dim(), l.bias.is_some());
            (e.linears().map(shape).collect::<Vec<_>>(), e.activation)
        };
        kind(self) == kind(other)
    }

    /// Hidden activations, the input of the down projection, for `X: (t, d_model)`: `(t, d_ff)`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when `X` has another width.
    pub fn hidden(&self, x: ArrayView2<'_, f32>, compute: &dyn Compute) -> Result<Array2<f32>> {
        compute.hidden(&self.mlp(), x)
    }

    /// `E(x)` for every row of `X: (t, d_model)`: `(t, d_model)`. Not weighted by the router.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when `X` has another width.
    pub fn forward(&self, x: ArrayView2<'_, f32>, compute: &dyn Compute) -> Result<Array2<f32>> {
        let mut out = Array2::zeros((x.nrows(), self.d_model()));
        compute.mlp(&self.mlp(), x, None, out.view_mut())?;
        Ok(out)
    }

    /// The projections as a device takes them.
    pub fn mlp(&self) -> Mlp<'a> {
        Mlp { gate: self.gate, up: self.up, down: self.down, activation: self.activation }
    }

    /// A copy with permuted hidden units: the same function.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the permutation has another length.
    pub fn permuted(&self, p: &Permutation, compute: &dyn Compute) -> Result<Expert> {
        Expert::weighted_sum(&[(1.0, *self, p)], compute)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Cpu;
    use ndarray::array;

    #[test]
    fn gated_forward_follows_the_definition() {
        let expert = Expert::swiglu(array![[1.0, 0.0]], array![[0.0, 2.0]], array![[1.0], [-1.0]]);
        let out = expert.unwrap().view().forward(array![[1.0, 3.0]].view(), &Cpu::new()).unwrap();
        let y = 0.731_058_6 * 6.0;
        approx::assert_abs_diff_eq!(out, array![[y, -y]], epsilon = 1e-5);
    }

    #[test]
    fn biases_are_applied_and_follow_the_permutation() {
        let up = Linear { weight: array![[1.0], [2.0]], bias: Some(array![0.5, -10.0]) };
        let down = Linear { weight: array![[1.0, 1.0]], bias: Some(array![7.0]) };
        let expert = Expert::new(None, up, down, Activation::Relu).unwrap();
        let swap = Permutation::new(vec![1, 0]).unwrap();
        let swapped = expert.view().permuted(&swap, &Cpu::new()).unwrap();
        assert_eq!(swapped.view().up.bias.unwrap(), array![-10.0, 0.5]);
        for e in [&expert, &swapped] {
            let y = e.view().forward(array![[2.0]].view(), &Cpu::new()).unwrap();
            assert_eq!(y, array![[9.5]]);
        }
    }

    #[test]
    fn misfits_and_non_finite_weights_are_refused() {
        let bad = Expert::relu(array![[1.0, 2.0]], array![[1.0, 2.0]]).unwrap_err();
        assert_eq!(
            bad.to_string(),
            "expert projection: expected shape (2, 1), found (1, 2)".to_string()
        );
        let nan = Expert::relu(array![[1.0], [f32::NAN]], array![[1.0, 2.0]]).unwrap_err();
        assert!(nan.to_string().starts_with("up projection holds NaN at flat index 1"), "{nan}");
        let inf = Expert::relu(array![[1.0]], array![[f32::INFINITY]]).unwrap_err();
        assert!(inf.to_string().starts_with("down projection holds inf"), "{inf}");
    }
}
