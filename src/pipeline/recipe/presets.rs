//! The named recipes.

use crate::align::Reference;
use crate::error::{ErrorKind, Result};
use crate::group::{Absorb, LayerScale, Linkage, Representative, Spread};
use crate::merge::router::DominantRow;
use crate::merge::{DominantOnly, Weighted, Weighting};
use crate::model::Importance;
use crate::pipeline::options::{AlignWhen, Constraints, Keep, RecoverOn, RoutingGroupPolicy};
use crate::pipeline::recipe::choices::{AlignChoice, FactoriseChoice, GroupChoice, RecoverChoice};
use crate::pipeline::recipe::compress_choice::CompressChoice;
use crate::pipeline::recipe::{ExportChoice, Recipe};
use crate::recover::{Distill, LeastSquares};
use crate::similarity::{ExpertOutputs, RouterLogits, TokenOutputs};

pub(crate) const NAMES: &[&str] =
    &["m-smoe", "hc-smoe", "reap", "ream", "fast", "balanced", "best", "mc-smoe", "mc-smoe-budget"];

pub(crate) fn preset(name: &str, keep: Keep) -> Result<Recipe> {
    let base = m_smoe(name, keep);
    let by_saliency = Weighted { by: Weighting::Saliency(Importance::Reap), compat: None };
    let in_groups = AlignChoice::WeightMatching {
        reference: Reference::Dominant,
        when: AlignWhen::InGroups,
        tolerance: 0.0,
    };
    let salient = GroupChoice::Dominant {
        importance: Importance::Reap,
        spread: Some(Spread::Uniform),
        scale: LayerScale::default(),
    };
    let closed_form = RecoverChoice::LeastSquares(LeastSquares::default());
    let distilled = |epochs| RecoverChoice::Distill(Distill { epochs, ..Distill::default() });
    let recovered = |recover| Recipe {
        align: AlignChoice::Identity,
        group: salient,
        merge: DominantOnly.into(),
        recover,
        ..base.clone()
    };
    Ok(match name {
        "m-smoe" => base.clone(),
        // The same, and rank 32 with a tenth of the rows dense: §3, "merge, then compress".
        "mc-smoe" => Recipe { compress: Some(CompressChoice::paper()), ..base },
        // Ours: the same merge, and ranks that spend a fifth of the expert bytes where they pay.
        "mc-smoe-budget" => Recipe { compress: Some(CompressChoice::fifth()), ..base },
        // Chen et al., arXiv 2410.08589: mean expert outputs, average linkage, no alignment.
        "hc-smoe" => Recipe {
            similarity: ExpertOutputs::default().into(),
            align: AlignChoice::Identity,
            group: GroupChoice::Agglomerative {
                linkage: Linkage::Average,
                representative: Representative::default(),
                spread: Some(Spread::Uniform),
            },
            ..base
        },
        // arXiv 2510.13999: the experts of largest saliency stay, the others are dropped.
        "reap" => Recipe {
            align: AlignChoice::Identity,
            group: GroupChoice::Prune {
                importance: Importance::Reap,
                absorb: Absorb::Drop,
                spread: Some(Spread::Uniform),
                scale: LayerScale::default(),
            },
            merge: DominantOnly.into(),
            ..base
        },
        // After arXiv 2604.04356: salient experts stay dominant, the others join the one whose
        // outputs are most alike, averaged by saliency after alignment.
        "ream" => Recipe {
            similarity: TokenOutputs::default().into(),
            align: in_groups,
            group: salient,
            merge: by_saliency.into(),
            ..base
        },
        // Ours: salient experts stay as they are, the router's view of the others decides whose
        // tokens go where (native), and the layer is fitted to what it gave before.
        // On part of what calibration sees anyway, and on less of it where experts are large, so
        // that it costs half as much again.
        "fast" => {
            let few = LeastSquares {
                ridges: vec![1e-2, 1e-1, 1.0],
                most_tokens: Some(2048),
                ..LeastSquares::default()
            };
            Recipe {
                recover_tokens: Some(8192),
                recover_on: RecoverOn::Original,
                // Nothing is compressed, and they cost a tenth of a small layer's recovery.
                measure_spectra: Some(false),
                ..recovered(vec![RecoverChoice::LeastSquares(few)])
            }
        }
        "balanced" => recovered(vec![closed_form.clone(), distilled(10), closed_form]),
        "best" => recovered(vec![closed_form.clone(), distilled(40), closed_form]),
        other => {
            let reason = format!("no preset `{other}`; there are {}", NAMES.join(", "));
            return Err(ErrorKind::Recipe { reason }.into());
        }
    })
}

/// Li et al., arXiv 2310.01334, §3: alignment to expert 0 of the layer, router-logit similarity,
/// dominant experts by activation frequency under a global budget, usage-weighted average, the
/// router kept. In a stock export, which the paper does not have, the dominant's row is kept.
fn m_smoe(name: &str, keep: Keep) -> Recipe {
    Recipe {
        preset: Some(name.into()),
        keep,
        export: ExportChoice::Native,
        similarity: RouterLogits::default().into(),
        align: AlignChoice::WeightMatching {
            reference: Reference::FirstExpert,
            when: AlignWhen::BeforeGrouping,
            tolerance: 0.0,
        },
        group: GroupChoice::Dominant {
            importance: Importance::Frequency,
            spread: None,
            scale: LayerScale::default(),
        },
        merge: Weighted::default().into(),
        router: DominantRow.into(),
        recover: Vec::new(),
        recover_tokens: None,
        recover_on: RecoverOn::default(),
        compress: None,
        constraints: Constraints::default(),
        routing_groups: RoutingGroupPolicy::Keep,
        top_k: None,
        measure_error: true,
        measure_spectra: None,
        factorise: FactoriseChoice::default(),
        seed: 0,
        shard_bytes: 5_000_000_000,
    }
}
