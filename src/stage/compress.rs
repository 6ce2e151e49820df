//! Input and output of a compressor, and its storage, known before a weight is read.

use ndarray::{Array2, ArrayView2};

use super::context::Context;
use super::decompose::Kept;
use crate::error::{Error, Locate, Result};
use crate::model::{Expert, ExpertTensors, Factored, MergedLayer};
use crate::par;

/// What a compressor may use besides the weights of a layer.
#[derive(Debug, Clone, Copy, Default)]
pub struct Compression<'a> {
    /// `(t, d_model)` inputs of the layer; `None` without samples, or for a compressor that says it
    /// does not [use](super::Compressor::uses_inputs) them.
    pub inputs: Option<ArrayView2<'a, f32>>,
    /// Whether the narrowed router chooses the experts of these inputs (stock exports).
    pub narrowed: bool,
    /// For each merged expert the share of the calibration tokens' (token, slot) pairs that went to
    /// its members.
    pub usage: &'a [f64],
    /// Gradients of the loss by the merged experts' weights, summed over the members of a group in
    /// their common order of hidden units; given to those who
    /// [need](super::Needs::GRADIENTS) them.
    pub gradients: Option<&'a ExpertTensors>,
    /// Of every expert gate (if any), up and down: what a
    /// [size budget](super::Compressor::size_budget) over all layers leaves.
    pub allocated: Option<&'a [Vec<Kept>]>,
}

/// What is stored of every merged expert of a layer, known from the shape of its matrices alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ExpertStorage {
    /// Dense matrices of the same shapes.
    Dense,
    /// Dense matrices of this many hidden units.
    HiddenUnits(usize),
    /// `L R + S`.
    Factors {
        /// Of gate and up.
        hidden: Kept,
        /// Of down.
        down: Kept,
    },
    /// Parts that the experts of a layer share. No folder holds them: the matrices are written
    /// multiplied out, and a native export is refused.
    Shared,
    /// What a [size budget](super::Compressor::size_budget) over all layers leaves of each matrix.
    Allocated,
}

impl ExpertStorage {
    /// What is kept of gate (if any), up and down, where matrices lie in factors.
    pub fn matrices(&self, gated: bool) -> Option<Vec<Kept>> {
        match *self {
            Self::Factors { hidden, down } => {
                let mut matrices = vec![hidden; 1 + usize::from(gated)];
                matrices.push(down);
                Some(matrices)
            }
            _ => None,
        }
    }
}

/// The compressed experts of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Compressed {
    /// One for each of the layer's, in its order, factors multiplied out.
    pub experts: Vec<Expert>,
    /// For each expert the factors of gate (if any), up and down, `None` for a matrix that stayed
    /// dense; `None` when nothing lies in factors.
    pub factors: Option<Vec<Vec<Option<Factored>>>>,
    /// Numbers that a runtime which holds the parts stores for all experts, biases included.
    pub parameters: u64,
}

impl Compressed {
    /// Experts without factors.
    pub fn dense(experts: Vec<Expert>) -> Self {
        let parameters = experts.iter().map(|e| e.parameters() as u64).sum();
        Self { experts, factors: None, parameters }
    }

    /// The experts of `layer` with their matrices replaced: for each expert gate (if any), up and
    /// down, `None` for a matrix that stays. Biases are kept.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape), with the expert, when matrices are missing or
    /// of another shape; [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for a NaN or
    /// infinity.
    pub fn from_matrices(
        layer: &MergedLayer,
        matrices: Vec<Vec<Option<Array2<f32>>>>,
    ) -> Result<Self> {
        if matrices.len() != layer.experts.len() {
            return Err(Error::shape("compressed experts", layer.experts.len(), matrices.len()));
        }
        let replaced = layer
            .experts
            .iter()
            .zip(matrices)
            .enumerate()
            .map(|(e, (expert, new))| replaced(expert, new).in_expert(e));
        Ok(Self::dense(replaced.collect::<Result<_>>()?))
    }

    /// [`Compressed::from_matrices`] of the products of factors.
    ///
    /// # Errors
    /// Those of [`Compressed::from_matrices`].
    pub fn from_factors(
        layer: &MergedLayer,
        factors: Vec<Vec<Option<Factored>>>,
        cx: &Context,
    ) -> Result<Self> {
        let inner = cx.per_task();
        let product = |f: &Option<Factored>| {
            f.as_ref().map(|factored| factored.to_dense(inner.compute())).transpose()
        };
        let products = par::map(factors.len(), |e| {
            factors[e].iter().map(product).collect::<Result<Vec<_>>>().in_expert(e)
        })?;
        let dense = Self::from_matrices(layer, products)?;
        let (mut multiplied, mut stored) = (0, 0);
        for factored in factors.iter().flatten().flatten() {
            let (m, n) = factored.dim();
            multiplied += (m * n) as u64;
            stored += factored.parameters() as u64;
        }
        let parameters = dense.parameters - multiplied + stored;
        Ok(Self { factors: Some(factors), parameters, ..dense })
    }
}

/// The expert with its matrices, gate (if any), up, down, replaced where there is another.
fn replaced(expert: &Expert, matrices: Vec<Option<Array2<f32>>>) -> Result<Expert> {
    let activation = expert.view().activation;
    let expected = expert.view().linears().count();
    if matrices.len() != expected {
        return Err(Error::shape("compressed matrices of an expert", expected, matrices.len()));
    }
    let (mut gate, mut up, mut down) = expert.clone().into_parts();
    for (linear, matrix) in gate.iter_mut().chain([&mut up, &mut down]).zip(matrices) {
        let Some(matrix) = matrix else { continue };
        if matrix.dim() != linear.weight.dim() {
            return Err(Error::shape("compressed matrix", linear.weight.dim(), matrix.dim()));
        }
        linear.weight = matrix;
    }
    Expert::new(gate, up, down, activation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Grouping, LayerId, Router, RoutingRule};
    use ndarray::Array2;

    fn layer() -> MergedLayer {
        let expert = Expert::relu(Array2::ones((4, 2)), Array2::ones((2, 4))).unwrap();
        let router = Router::new(Array2::eye(2), None, None, RoutingRule::softmax(1, false));
        let (id, grouping) = (LayerId::causal(0), Grouping::identity(2));
        let experts = vec![expert.clone(), expert];
        MergedLayer::new(id, experts, grouping, router.unwrap(), None).unwrap()
    }

    #[test]
    fn factors_are_multiplied_out_and_counted() {
        let layer = layer();
        let up = Factored::low_rank(Array2::ones((4, 1)), Array2::from_elem((1, 2), 3.0)).unwrap();
        let factors = vec![vec![Some(up), None], vec![None, None]];
        let done = Compressed::from_factors(&layer, factors, &Context::cpu(0)).unwrap();
        // 4 + 2 numbers in the place of 8, once.
        assert_eq!(done.parameters, 4 * 8 - 8 + 6);
        assert_eq!(done.experts[0].view().up.weight, Array2::from_elem((4, 2), 3.0));
        assert_eq!(done.experts[1], layer.experts[1]);
    }

    #[test]
    fn factors_that_do_not_fit_are_refused() {
        let (layer, cx) = (layer(), Context::cpu(0));
        let wide = Factored::low_rank(Array2::ones((5, 1)), Array2::ones((1, 2))).unwrap();
        for (factors, names) in [
            (vec![vec![None, None]], "compressed experts"),
            (vec![vec![None], vec![None, None]], "expert 0: compressed matrices of an expert"),
            (vec![vec![None, None], vec![Some(wide), None]], "expert 1: compressed matrix"),
        ] {
            let error = Compressed::from_factors(&layer, factors, &cx).unwrap_err();
            assert!(error.to_string().starts_with(names), "{error}");
        }
    }
}
