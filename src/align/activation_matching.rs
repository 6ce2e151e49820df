//! Activation matching: aligns hidden units that are active on the same inputs.

use serde::{Deserialize, Serialize};

use super::reference::check_pair;
use crate::error::{ErrorKind, Result};
use crate::linalg::{assign, correlation};
use crate::model::Permutation;
use crate::stage::{AlignPair, Aligner, Context, Needs, Stage};

/// Maximises `Σ_a C[a, p(a)]` over permutations `p`, with `C: (d_ff, d_ff)` the Pearson
/// correlation of the two experts' hidden activations on the pair's inputs `(t, d_model)`:
/// the inputs of the down projection, `act(W_gate x) ⊙ (W_up x)` for gated experts.
///
/// Covariances are unbiased and 1e-7 is added to the product of the deviations, so a unit that
/// never fires matches nothing in particular. With at most one token: the identity. Cost: two
/// hidden passes, a `d_ff² t` product and one exact assignment. Memory: `d_ff²` `f32` and twice
/// `t × d_ff`.
///
/// Source: M-SMoE (arXiv 2310.01334), activation matching of the paper's code, after Git Re-Basin
/// (arXiv 2209.04836, §3.1). *Deviations*: gated experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ActivationMatching {}

impl Stage for ActivationMatching {
    fn name(&self) -> &str {
        "activation-matching"
    }

    fn needs(&self) -> Needs {
        Needs::SAMPLES
    }
}

impl Aligner for ActivationMatching {
    fn align(&self, pair: &AlignPair<'_>, cx: &Context) -> Result<Permutation> {
        check_pair(pair)?;
        let Some(x) = pair.inputs else {
            let (stage, needs) = (self.name().into(), "inputs routed to the pair".into());
            let remedy = "collect per-token inputs, or choose weight-matching".into();
            return Err(ErrorKind::Missing { stage, needs, remedy }.into());
        };
        if x.nrows() <= 1 {
            return Ok(Permutation::identity(pair.target.d_ff()));
        }
        let reference = pair.reference.hidden(x, cx.compute())?;
        let target = pair.target.hidden(x, cx.compute())?;
        let gain = correlation(reference.view(), target.view(), cx.compute())?;
        Permutation::new(assign(gain.view())?.columns)
    }
}
