//! Recovery: a merged layer is refitted to what the original layer gave, on calibration tokens.
//!
//! | recoverer | what it fits | how |
//! |---|---|---|
//! | [`Scale`] | one factor per expert | in closed form |
//! | [`UnitScale`] | one factor per hidden unit, or per output of an expert | in closed form |
//! | [`LeastSquares`] | all down projections of the layer together | in closed form |
//! | [`Distill`] | gate, up and down projections, router rows | by gradient descent |
//! | [`KnowledgeDistillation`] | gate, up and down, on the paper's losses | by gradient descent |
//! | [`Sequence`] | several of them in a row | – |
//!
//! No recoverer makes a layer worse on the held-out rows
//! ([`Recovery::held_out_rows`](crate::stage::Recovery::held_out_rows)): what does not improve is
//! returned as it came.

mod best_so_far;
mod closed_form;
mod gradient;
mod sequence;

pub(crate) use closed_form::{CHOICE_TOKENS, MAX_BLOCK, Solver};
pub use closed_form::{LeastSquares, Per, Scale, UnitScale};
pub use gradient::{Distill, HiddenLoss, KnowledgeDistillation};
pub use sequence::Sequence;

/// A [`Recoverer`](crate::stage::Recoverer) by the method `fit`, whose errors name the layer.
macro_rules! recoverer {
    ($type:ty) => {
        impl crate::stage::Recoverer for $type {
            fn recover(
                &self,
                task: &crate::stage::Recovery<'_>,
                merged: crate::model::MergedLayer,
                cx: &crate::stage::Context,
            ) -> crate::error::Result<crate::model::MergedLayer> {
                let id = merged.id;
                crate::error::Locate::in_layer(self.fit(task, merged, cx), id)
            }
        }
    };
}
use recoverer;
