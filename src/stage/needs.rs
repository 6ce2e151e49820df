//! Which statistics a stage reads.

use std::ops::BitOr;

/// What a stage reads besides the weights it is handed. A plan unites the needs of its stages and
/// refuses before any weight is read when the statistics cannot serve them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs(u16);

impl Needs {
    /// Activation counts only, which are always there.
    pub const NONE: Self = Self(0);
    /// The experts' weights, before grouping.
    pub const EXPERTS: Self = Self(1);
    /// The Gram matrix of the router logits.
    pub const LOGIT_GRAM: Self = Self(1 << 1);
    /// The sum of the applied router weights.
    pub const ROUTER_MASS: Self = Self(1 << 2);
    /// Mean output norms.
    pub const OUTPUT_NORM: Self = Self(1 << 3);
    /// REAP saliency.
    pub const REAP: Self = Self(1 << 4);
    /// Mean expert outputs.
    pub const MEAN_OUTPUT: Self = Self(1 << 5);
    /// Per-token inputs, logits and routing.
    pub const SAMPLES: Self = Self(1 << 6);
    /// Gradients of the experts' weights.
    pub const GRADIENTS: Self = Self(1 << 7);
    /// Diagonal Fisher information of the experts' weights.
    pub const FISHER: Self = Self(1 << 8);

    /// All statistics that a forward pass gives: no weights, and nothing that needs a gradient.
    pub const OBSERVABLE: Self = Self(
        Self::LOGIT_GRAM.0
            | Self::ROUTER_MASS.0
            | Self::OUTPUT_NORM.0
            | Self::REAP.0
            | Self::MEAN_OUTPUT.0
            | Self::SAMPLES.0,
    );

    const NAMES: [(Self, &'static str); 9] = [
        (Self::EXPERTS, "expert weights"),
        (Self::LOGIT_GRAM, "the router-logit Gram matrix (or router logits)"),
        (Self::ROUTER_MASS, "router mass (or applied weights)"),
        (Self::OUTPUT_NORM, "expert output norms"),
        (Self::REAP, "REAP saliency"),
        (Self::MEAN_OUTPUT, "mean expert outputs"),
        (Self::SAMPLES, "per-token inputs, logits and routing"),
        (Self::GRADIENTS, "gradients"),
        (Self::FISHER, "Fisher information"),
    ];

    /// Whether all of `other` is needed.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What is needed here but not in `given`.
    pub const fn without(self, given: Self) -> Self {
        Self(self.0 & !given.0)
    }

    /// The parts, in words.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES.into_iter().filter(move |(n, _)| self.contains(*n)).map(|(_, name)| name)
    }
}

impl BitOr for Needs {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needs_unite_and_name_what_is_missing() {
        let needs = Needs::REAP | Needs::SAMPLES;
        assert!(needs.contains(Needs::REAP) && !needs.contains(Needs::FISHER));
        let missing: Vec<_> = needs.without(Needs::SAMPLES).names().collect();
        assert_eq!(missing, ["REAP saliency"]);
    }
}
