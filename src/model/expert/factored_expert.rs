//! Experts whose weights are factors, as stored in a native folder.

use ndarray::{Array1, Array2};

use super::dense::{Expert, Linear, Role};
use super::factored::Factored;
use crate::error::{Error, Result};
use crate::linalg::{Activation, Compute};
use crate::model::grouping::Grouping;
use crate::model::layer::LayerId;
use crate::model::router::Router;

/// A weight `(m, n)`, whole or in factors.
#[derive(Debug, Clone, PartialEq)]
pub enum Weight {
    /// `W`.
    Dense(Array2<f32>),
    /// `L R + S`.
    Factored(Factored),
}

impl Weight {
    /// `(m, n)`.
    pub fn dim(&self) -> (usize, usize) {
        match self {
            Self::Dense(w) => w.dim(),
            Self::Factored(f) => f.dim(),
        }
    }

    /// Numbers stored.
    pub fn parameters(&self) -> usize {
        match self {
            Self::Dense(w) => w.len(),
            Self::Factored(f) => f.parameters(),
        }
    }

    /// `W: (m, n)`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn to_dense(&self, compute: &dyn Compute) -> Result<Array2<f32>> {
        match self {
            Self::Dense(w) => Ok(w.clone()),
            Self::Factored(f) => f.to_dense(compute),
        }
    }
}

/// A projection `y = W x + b`.
#[derive(Debug, Clone, PartialEq)]
pub struct FactoredLinear {
    /// `W: (out, in)`.
    pub weight: Weight,
    /// `b: (out)`.
    pub bias: Option<Array1<f32>>,
}

/// An [`Expert`] whose projections may be in factors; its shapes fit.
#[derive(Debug, Clone, PartialEq)]
pub struct FactoredExpert {
    gate: Option<FactoredLinear>,
    up: FactoredLinear,
    down: FactoredLinear,
    activation: Activation,
}

impl FactoredExpert {
    /// Gate and up are `(d_ff, d_model)`, down is `(d_model, d_ff)`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when they do not fit.
    pub fn new(
        gate: Option<FactoredLinear>,
        up: FactoredLinear,
        down: FactoredLinear,
        activation: Activation,
    ) -> Result<Self> {
        let (f, d) = up.weight.dim();
        let fits = |what: &'static str, linear: &FactoredLinear, expected: (usize, usize)| {
            let rows = linear.bias.as_ref().map_or(expected.0, |bias| bias.len());
            match (linear.weight.dim(), rows) == (expected, expected.0) {
                true => Ok(()),
                false => Err(Error::shape(what, expected, (linear.weight.dim(), rows))),
            }
        };
        fits("up projection", &up, (f, d))?;
        fits("down projection", &down, (d, f))?;
        gate.iter().try_for_each(|gate| fits("gate projection", gate, (f, d)))?;
        Ok(Self { gate, up, down, activation })
    }

    /// A projection; `None` for the gate of an expert without one.
    pub fn linear(&self, role: Role) -> Option<&FactoredLinear> {
        match role {
            Role::Gate => self.gate.as_ref(),
            Role::Up => Some(&self.up),
            Role::Down => Some(&self.down),
        }
    }

    /// The activation function.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// `(d_ff, d_model)`.
    pub fn dim(&self) -> (usize, usize) {
        self.up.weight.dim()
    }

    /// Numbers stored in weights.
    pub fn parameters(&self) -> usize {
        let all = [self.gate.as_ref(), Some(&self.up), Some(&self.down)];
        all.into_iter().flatten().map(|linear| linear.weight.parameters()).sum()
    }

    /// The expert with its factors multiplied out.
    ///
    /// # Errors
    /// Those of the device.
    pub fn to_expert(&self, compute: &dyn Compute) -> Result<Expert> {
        let dense = |linear: &FactoredLinear| {
            Ok::<_, Error>(Linear {
                weight: linear.weight.to_dense(compute)?,
                bias: linear.bias.clone(),
            })
        };
        let gate = self.gate.as_ref().map(dense).transpose()?;
        Expert::new(gate, dense(&self.up)?, dense(&self.down)?, self.activation)
    }
}

/// A [`MergedLayer`](crate::model::MergedLayer) whose experts are in factors.
#[derive(Debug, Clone, PartialEq)]
pub struct FactoredLayer {
    /// Which layer it is.
    pub id: LayerId,
    /// The merged experts, one per group.
    pub experts: Vec<FactoredExpert>,
    /// Which experts became which.
    pub grouping: Grouping,
    /// The original router, `n` rows.
    pub router: Router,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Cpu;
    use ndarray::array;

    #[test]
    fn projections_must_fit_and_multiply_out() {
        let low = Factored::low_rank(array![[1.0], [2.0]], array![[1.0, 0.0, 1.0]]).unwrap();
        let up = || FactoredLinear { weight: Weight::Factored(low.clone()), bias: None };
        let down = |rows| FactoredLinear {
            weight: Weight::Dense(Array2::ones((rows, 2))),
            bias: Some(Array1::zeros(rows)),
        };
        let new = |gate, down| FactoredExpert::new(gate, up(), down, Activation::Relu);
        let expert = new(None, down(3)).unwrap();
        assert_eq!((expert.dim(), expert.parameters()), ((2, 3), 5 + 6));
        let dense = expert.to_expert(&Cpu::new()).unwrap();
        assert_eq!(dense.view().up.weight, array![[1.0, 0.0, 1.0], [2.0, 0.0, 2.0]]);
        assert!(new(Some(up()), down(3)).is_ok());
        assert!(new(None, down(2)).is_err() && new(Some(down(3)), down(3)).is_err());
        let short = FactoredLinear { bias: Some(Array1::zeros(2)), ..down(3) };
        assert!(new(None, short).is_err());
    }
}
