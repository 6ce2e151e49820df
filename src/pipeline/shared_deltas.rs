//! Compression of a merged layer around one base for all its experts.

use super::compress::{Ranked, Tokens, describe, matrices, with_all_weights};
use super::report::CompressionReport;
use crate::decompose::SharedBasis;
use crate::decompose::analysis::stable_rank;
use crate::error::{Locate, Result};
use crate::model::{MergedLayer, Role};
use crate::par;
use crate::stage::{Context, Moments, RankBudget};

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
    pub(super) fn check(&self, dim: (usize, usize)) -> Result<()> {
        RankBudget::rank(self.rank).check(dim, dim.0)
    }

    pub(super) fn compress(
        &self,
        mut layer: MergedLayer,
        original: &[f64],
        tokens: &Tokens<'_>,
        cx: &Context,
    ) -> Result<(MergedLayer, CompressionReport)> {
        let (inner, jobs) = (cx.per_task(), matrices(&layer.experts));
        let groups = layer.experts.len();
        let roles: Vec<Role> = jobs.iter().take(jobs.len() / groups).map(|(_, r)| *r).collect();
        let mut weights = vec![None; jobs.len()];
        let mut told = vec![None; jobs.len()];
        for (at, &role) in roles.iter().enumerate() {
            let moments: Vec<Option<Moments>> = par::map(groups, |e| {
                tokens.moments(e, &layer.experts[e], role, &inner).in_expert(e)
            })?;
            let moments: Vec<Option<&Moments>> = moments.iter().map(Option::as_ref).collect();
            let whole: Vec<_> = layer
                .experts
                .iter()
                .map(|expert| expert.view().linear(role).unwrap_or(expert.view().up).weight)
                .collect();
            let split = self.how.split(&whole, &vec![1.0; groups], &moments, self.rank, cx)?;
            // The parts that experts share are counted with the first.
            let rest = split.parameters() / groups;
            let first = split.parameters() - rest * (groups - 1);
            let done = par::map(groups, |e| {
                let product = split.to_dense(e, &inner)?;
                let ranks = Ranked {
                    dense: whole[e].len(),
                    parameters: if e == 0 { first } else { rest },
                    merged: stable_rank(whole[e], &inner)?,
                    compressed: stable_rank(product.view(), &inner)?,
                };
                Ok((product, ranks))
            })?;
            for (e, (product, ranks)) in done.into_iter().enumerate() {
                weights[e * roles.len() + at] = Some(product);
                told[e * roles.len() + at] = Some(ranks);
            }
        }
        let told: Vec<Ranked> = told.into_iter().flatten().collect();
        let report = describe(&layer, original, &told);
        layer.experts = with_all_weights(std::mem::take(&mut layer.experts), weights)?;
        Ok((layer, report))
    }
}
