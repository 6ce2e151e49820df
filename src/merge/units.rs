//! Hidden units as vectors, for mergers that work unit by unit.

use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::linalg::Compute;
use crate::model::{Activation, Expert, ExpertView, Linear};

/// How the output weights of hidden units that become one are combined.
///
/// A set `s` of units with expert weights `α` (which sum to 1 over the experts) acts as one unit
/// with the mean input weights. To reproduce `Σ_k α_k E_k` its output column must be
/// `Σ_{u ∈ s} α_k(u) w_u`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Coefficients {
    /// `Σ α w`: right for sets of any size.
    #[default]
    Exact,
    /// `Σ α w / Σ α`, as in the published codes: too strong for sets with fewer units than there
    /// are experts, too weak for larger ones.
    Reference,
}

/// What two hidden units are compared by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ingredient {
    /// Their activations on the group's tokens. Weights where there are fewer than two tokens.
    #[default]
    Activations,
    /// Their input and output weights.
    Weights,
}

/// What a row of [`Units`] holds: gate row, up row, down column, gate bias, up bias.
#[derive(Debug, Clone, Copy)]
struct Layout {
    d: usize,
    gated: bool,
    biases: (bool, bool),
    activation: Activation,
}

impl Layout {
    fn of(expert: &ExpertView<'_>) -> Self {
        let biases =
            (expert.gate.is_some_and(|gate| gate.bias.is_some()), expert.up.bias.is_some());
        let (d, gated) = (expert.d_model(), expert.gate.is_some());
        Self { d, gated, biases, activation: expert.activation }
    }

    /// Columns of the weights, without the biases.
    fn weights(&self) -> usize {
        self.d * if self.gated { 3 } else { 2 }
    }
}

/// The hidden units of some experts, one row each: `(K·f, p)`.
#[derive(Debug)]
pub(super) struct Units {
    pub(super) rows: Array2<f32>,
    layout: Layout,
}

impl Units {
    /// The units of `experts`, which are of one kind, expert by expert.
    pub(super) fn of(experts: &[Expert]) -> Result<Self> {
        let Some(first) = experts.first() else {
            return Err(Error::range("hidden units", "an expert", "none"));
        };
        let layout = Layout::of(&first.view());
        let each: Vec<Array2<f32>> =
            experts.iter().map(|e| rows_of(&e.view())).collect::<Result<_>>()?;
        let views: Vec<_> = each.iter().map(|a| a.view()).collect();
        Ok(Self { rows: stack(Axis(0), &views)?, layout })
    }

    /// The columns that hold weights.
    pub(super) fn weights(&self) -> ArrayView2<'_, f32> {
        self.rows.slice(s![.., ..self.layout.weights()])
    }

    /// Multiplies the output weights of unit `u`.
    pub(super) fn scale_output(&mut self, u: usize, by: f32) {
        let end = self.layout.weights();
        self.rows.slice_mut(s![u, end - self.layout.d..end]).mapv_inplace(|w| w * by);
    }

    /// The same kind of units with other rows.
    pub(super) fn with_rows(&self, rows: Array2<f32>) -> Self {
        Self { rows, layout: self.layout }
    }

    /// The expert made of these units and a bias of the output.
    pub(super) fn into_expert(self, down_bias: Option<Array1<f32>>) -> Result<Expert> {
        let Layout { d, gated, biases, activation } = self.layout;
        let weights = self.layout.weights();
        let block = |start: usize| self.rows.slice(s![.., start..start + d]);
        let column = |at: usize| self.rows.column(weights + at).to_owned();
        let gate = gated
            .then(|| Linear { weight: block(0).to_owned(), bias: biases.0.then(|| column(0)) });
        let up = Linear {
            weight: block(weights - 2 * d).to_owned(),
            bias: biases.1.then(|| column(usize::from(biases.0))),
        };
        let down = block(weights - d).t().as_standard_layout().into_owned();
        Expert::new(gate, up, Linear { weight: down, bias: down_bias }, activation)
    }
}

fn rows_of(expert: &ExpertView<'_>) -> Result<Array2<f32>> {
    let mut blocks = Vec::new();
    blocks.extend(expert.gate.map(|gate| gate.weight));
    blocks.extend([expert.up.weight, expert.down.weight.reversed_axes()]);
    let biases = [expert.gate.and_then(|gate| gate.bias), expert.up.bias];
    blocks.extend(biases.into_iter().flatten().map(|bias| bias.insert_axis(Axis(1))));
    stack(Axis(1), &blocks)
}

/// Hidden activations of all experts side by side, for `X: (t, d)`: `(t, K·f)`.
pub(super) fn activations(
    experts: &[Expert],
    x: ArrayView2<'_, f32>,
    compute: &dyn Compute,
) -> Result<Array2<f32>> {
    let hidden = |e: &Expert| e.view().hidden(x, compute);
    let each: Vec<Array2<f32>> = experts.iter().map(hidden).collect::<Result<_>>()?;
    stack(Axis(1), &each.iter().map(|a| a.view()).collect::<Vec<_>>())
}

fn stack(axis: Axis, blocks: &[ArrayView2<'_, f32>]) -> Result<Array2<f32>> {
    let shapes = || blocks.iter().map(|b| b.dim()).collect::<Vec<_>>();
    concatenate(axis, blocks).map_err(|_| Error::shape("hidden units", "equal sides", shapes()))
}

/// `Σ_k α_k b_k` over the biases of the output; `None` when there are none.
pub(super) fn down_bias(experts: &[Expert], shares: &[f64]) -> Option<Array1<f32>> {
    let width = experts.first()?.view().down.bias?.len();
    let mut sum = Array1::<f64>::zeros(width);
    for (expert, share) in experts.iter().zip(shares) {
        let bias = expert.view().down.bias?;
        sum.zip_mut_with(&bias, |s, &b| *s += share * f64::from(b));
    }
    Some(sum.mapv(|s| s as f32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn units_round_trip_with_every_kind_of_bias() {
        let bias = |on: bool, b: Array1<f32>| on.then_some(b);
        for (gated, gb, ub) in [(false, false, false), (true, true, false), (true, true, true)] {
            let gate = Linear { weight: array![[1., 2.], [3., 4.], [5., 6.]], bias: None };
            let gate = Linear { bias: bias(gb, array![0.1, 0.2, 0.3]), ..gate };
            let up = array![[7., 8.], [9., 10.], [11., 12.]];
            let up = Linear { weight: up, bias: bias(ub, array![0.4, 0.5, 0.6]) };
            let down = Linear { weight: array![[1., 0., -1.], [2., 1., 0.]], bias: None };
            let gate = gated.then_some(gate);
            let expert = Expert::new(gate, up, down, Activation::Silu).unwrap();
            let units = Units::of(std::slice::from_ref(&expert)).unwrap();
            assert_eq!(units.into_expert(None).unwrap(), expert);
        }
    }
}
