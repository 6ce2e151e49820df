//! The importance of experts, from routing statistics.

use serde::{Deserialize, Serialize};

use super::stats::RoutingStats;
use crate::error::Result;

/// A per-expert score; larger is more important.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Importance {
    /// Activation frequency `c_i / Σ c` (M-SMoE).
    Frequency,
    /// Sum of the applied router weights (soft counting).
    RouterMass,
    /// Mean output norm over the expert's tokens (EAN).
    OutputNorm,
    /// Mean of applied weight × output norm over the expert's tokens (REAP, arXiv 2510.13999).
    Reap,
}

impl Importance {
    /// The score of every expert: `(n)`, none negative.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`](crate::ErrorKind::Missing) when the statistics lack it.
    pub fn of(self, stats: &RoutingStats) -> Result<Vec<f64>> {
        let need = |part, what| RoutingStats::need(part, "importance", what).cloned();
        match self {
            Self::Frequency => Ok(stats.usage()),
            Self::RouterMass => need(&stats.router_mass, "router mass"),
            Self::OutputNorm => need(&stats.output_norm, "expert output norms"),
            Self::Reap => need(&stats.reap, "REAP saliency"),
        }
    }
}
