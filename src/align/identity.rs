//! The identity: no alignment.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::model::Permutation;
use crate::stage::{AlignPair, Aligner, Context, Stage};

/// The permutation that changes nothing: for checkpoints that are aligned already, and as the
/// baseline of the other methods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Identity {}

impl Stage for Identity {
    fn name(&self) -> &str {
        "identity"
    }
}

impl Aligner for Identity {
    fn align(&self, pair: &AlignPair<'_>, _cx: &Context) -> Result<Permutation> {
        super::reference::check_pair(pair)?;
        Ok(Permutation::identity(pair.target.d_ff()))
    }
}
