//! Compression of a merged layer around one base for all its experts.

use ndarray::Array2;

use super::layer_inputs::{LayerInputs, matrix};
use crate::decompose::SharedBasis;
use crate::error::{Locate, Result};
use crate::model::{MergedLayer, Role};
use crate::par;
use crate::stage::{
    Compressed, Compression, Compressor, Context, ExpertStorage, Moments, RankBudget, Stage,
};

/// A base for each projection of a layer, and a delta of low rank for every merged expert
/// ([`SharedBasis`]): `m n + N r (m + n)` parameters. All merged experts count alike in the base.
///
/// No export holds the base: stock and expanded ones hold the matrices multiplied out, and the
/// report has the figures of a runtime that would hold the parts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SharedDeltas {
    /// `r`: the rank of each delta.
    pub rank: usize,
    /// How it is split.
    pub how: SharedBasis,
}

impl SharedDeltas {
    /// The products of one projection of all experts, and the numbers of its parts.
    fn projection(
        &self,
        layer: &MergedLayer,
        role: Role,
        inputs: &LayerInputs<'_>,
        cx: &Context,
    ) -> Result<(Vec<Array2<f32>>, usize)> {
        let (experts, inner) = (&layer.experts, cx.per_task());
        let moments: Vec<Option<Moments>> =
            par::map(experts.len(), |e| inputs.moments(e, &experts[e], role, &inner).in_expert(e))?;
        let moments: Vec<Option<&Moments>> = moments.iter().map(Option::as_ref).collect();
        let dense: Vec<_> = experts.iter().map(|expert| matrix(expert.view(), role)).collect();
        let split = self.how.split(&dense, &vec![1.0; experts.len()], &moments, self.rank, cx)?;
        let products = par::map(experts.len(), |e| split.to_dense(e, &inner).in_expert(e))?;
        Ok((products, split.parameters()))
    }
}

impl Stage for SharedDeltas {
    fn name(&self) -> &str {
        "shared-basis"
    }
}

impl Compressor for SharedDeltas {
    fn compress(
        &self,
        layer: &MergedLayer,
        task: &Compression<'_>,
        cx: &Context,
    ) -> Result<Compressed> {
        let inputs = LayerInputs::of(layer, task, cx)?;
        let mut matrices = vec![Vec::new(); layer.experts.len()];
        let mut parameters = 0;
        for (role, linear) in layer.experts[0].view().linears() {
            let (products, stored) = self.projection(layer, role, &inputs, cx)?;
            for (expert, product) in matrices.iter_mut().zip(products) {
                expert.push(Some(product));
            }
            parameters += stored;
            parameters += layer.experts.len() * linear.bias.map_or(0, |bias| bias.len());
        }
        let dense = Compressed::from_matrices(layer, matrices)?;
        Ok(Compressed { parameters: parameters as u64, ..dense })
    }

    fn storage(&self, up: (usize, usize)) -> Result<ExpertStorage> {
        RankBudget::rank(self.rank).check(up, up.0)?;
        Ok(ExpertStorage::Shared)
    }
}
