//! Stages of a run: object-safe traits with one required method each.
//!
//! Stages share the statistics they need ([`Needs`]), the layer they read ([`LayerView`]) and the
//! device they run on ([`Context`]). Every trait is implemented for `&T` and `Box<T>`, so stages
//! compose and can be boxed by the pipeline's builder. A stage does not know which stage ran before
//! it.
//!
//! A merger of one's own, which keeps the first member:
//!
//! ```
//! use mcsmoe::prelude::*;
//!
//! #[derive(Debug)]
//! struct FirstMember;
//!
//! impl Stage for FirstMember {
//!     fn name(&self) -> &str {
//!         "first-member"
//!     }
//! }
//!
//! impl Merger for FirstMember {
//!     fn merge(&self, members: &Members<'_>, cx: &Context) -> Result<Expert> {
//!         members.aligned(0, cx)
//!     }
//! }
//! ```

mod compress;
mod context;
mod decompose;
mod needs;
mod recovery;
mod size_budget;
mod view;

use std::fmt::Debug;

use ndarray::ArrayView2;

use crate::error::Result;
use crate::model::{
    Budget, Expert, Factored, Grouping, LayerId, MergedLayer, Permutation, Router, SimilarityMatrix,
};

pub use compress::{Compressed, Compression, ExpertStorage};
pub use context::Context;
pub use decompose::{Kept, Moments, RankBudget};
pub use needs::Needs;
pub use recovery::Recovery;
pub(crate) use recovery::relative_error;
pub use size_budget::{Portion, Size, SizeBudget, Spectrum};
pub use view::{AlignPair, Candidate, LayerSummary, LayerView, Members};

/// The name and the needs of a stage.
pub trait Stage: Debug + Send + Sync {
    /// The stage's name in recipes and reports, e.g. `router-logits`.
    fn name(&self) -> &str;

    /// The statistics it reads. Override it when the stage reads more than activation counts; a
    /// stage that asks for less than it reads fails at run time with
    /// [`ErrorKind::Missing`](crate::ErrorKind::Missing).
    fn needs(&self) -> Needs {
        Needs::NONE
    }
}

/// A similarity metric between the experts of a layer.
pub trait Similarity: Stage {
    /// A symmetric `(n, n)` table.
    ///
    /// # Errors
    /// Those of the metric; see each implementation.
    fn similarity(&self, layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix>;
}

/// A grouping method. Sees all layers at once, because the number of experts per layer may
/// follow from a budget over all of them.
pub trait Grouper: Stage {
    /// One grouping per layer, in order, that meets the budget exactly.
    ///
    /// # Errors
    /// [`ErrorKind::Budget`](crate::ErrorKind::Budget) when the budget cannot be met; else those of
    /// the method.
    fn group(
        &self,
        layers: &[LayerSummary],
        budget: &Budget,
        cx: &Context,
    ) -> Result<Vec<Grouping>>;

    /// How many experts each layer, given with its number of experts, keeps under `budget`, where
    /// that is known before anything is measured. A layer must then get the same groups by itself,
    /// with its count as [`Target::PerLayer`](crate::model::Target::PerLayer), as among the others:
    /// a run on text decides, merges and writes it before it reads the next. `None`, the default,
    /// when layers have to be compared first.
    ///
    /// # Errors
    /// Those of [`Grouper::group`] that do not depend on what is measured.
    fn counts(&self, _layers: &[(LayerId, usize)], _budget: &Budget) -> Result<Option<Vec<usize>>> {
        Ok(None)
    }

    /// Whether it measures layers by [`Grouper::survey`], which costs a reading of each.
    fn surveys(&self) -> bool {
        false
    }

    /// Groupings of one layer with the errors that were measured for them, while its experts and
    /// the statistics of [`Stage::needs`] are in memory; [`Grouper::group`] finds them in the
    /// layer's summary. Called only if it [`surveys`](Grouper::surveys).
    ///
    /// # Errors
    /// Those of the method.
    fn survey(
        &self,
        layer: &LayerView<'_>,
        similarity: &SimilarityMatrix,
        budget: &Budget,
        cx: &Context,
    ) -> Result<Vec<Candidate>> {
        let _ = (layer, similarity, budget, cx);
        Ok(Vec::new())
    }
}

/// An alignment method: the order of a target's hidden units that fits a reference's.
pub trait Aligner: Stage {
    /// The permutation that makes the target most like the reference.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the experts differ in kind; else those of
    /// the method.
    fn align(&self, pair: &AlignPair<'_>, cx: &Context) -> Result<Permutation>;
}

/// A merging method: one expert from a group.
pub trait Merger: Stage {
    /// The merged expert, in the common order of hidden units.
    ///
    /// # Errors
    /// Those of the method; see each implementation.
    fn merge(&self, members: &Members<'_>, cx: &Context) -> Result<Expert>;
}

/// A method that narrows a router to one row per group, for runtimes without an expert map.
pub trait RouterMerger: Stage {
    /// The `m`-row router, its policy included.
    ///
    /// # Errors
    /// Those of the method; [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) when top-k
    /// exceeds the number of groups.
    fn merge_router(
        &self,
        layer: &LayerView<'_>,
        grouping: &Grouping,
        cx: &Context,
    ) -> Result<Router>;
}

/// A recovery method: brings a merged layer back towards the output of the original one.
pub trait Recoverer: Stage {
    /// The recovered layer: the same grouping, other weights. Never worse than `merged` on the rows
    /// of [`Recovery::held_out_rows`]: what does not improve is returned as it came.
    ///
    /// # Errors
    /// Those of [`Recovery::check`]; else those of the method.
    fn recover(
        &self,
        task: &Recovery<'_>,
        merged: MergedLayer,
        cx: &Context,
    ) -> Result<MergedLayer>;
}

/// A compression method: makes the experts of a merged and recovered layer smaller.
pub trait Compressor: Stage {
    /// The compressed experts, as many as the layer has, of what [`Compressor::storage`] promises.
    /// The layer's router and grouping stay as they are.
    ///
    /// # Errors
    /// Those of the method; see each implementation.
    fn compress(
        &self,
        layer: &MergedLayer,
        task: &Compression<'_>,
        cx: &Context,
    ) -> Result<Compressed>;

    /// What is stored of every merged expert whose up matrix is `(d_ff, d_model)`; asked before any
    /// weight is read, because the headers of a folder are written first. Dense matrices of the
    /// same shapes unless overridden.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) when such matrices cannot be kept to
    /// what the compressor was told.
    fn storage(&self, _up: (usize, usize)) -> Result<ExpertStorage> {
        Ok(ExpertStorage::Dense)
    }

    /// Whether [`Compression::inputs`] make a difference where there are samples. A compressor that
    /// cannot do without has [`Needs::SAMPLES`].
    fn uses_inputs(&self) -> bool {
        true
    }

    /// A target size that all layers share, of a compressor whose storage is
    /// [`ExpertStorage::Allocated`]: every merged layer is then [surveyed](Compressor::survey)
    /// before the first is compressed.
    fn size_budget(&self) -> Option<&SizeBudget> {
        None
    }

    /// What the matrices of a layer have to offer the size budget: expert by expert gate (if any),
    /// up, down. Called only if there is such a budget.
    ///
    /// # Errors
    /// Those of the method.
    fn survey(
        &self,
        _layer: &MergedLayer,
        _task: &Compression<'_>,
        _cx: &Context,
    ) -> Result<Vec<Vec<Spectrum>>> {
        Ok(Vec::new())
    }
}

/// A decomposition method: a weight matrix as a product of two thin ones, plus a few dense rows or
/// columns.
pub trait Decomposer: Stage {
    /// `W: (m, n) ≈ L R + S` within the budget. `moments` are those of the inputs of `W`; methods
    /// that weigh errors by them say what they do without.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) for a budget that does not fit the
    /// shape, [`ErrorKind::Shape`](crate::ErrorKind::Shape) for moments of another width,
    /// [`ErrorKind::NotFinite`](crate::ErrorKind::NotFinite) for a NaN or infinity in `W`; else
    /// those of the method.
    fn decompose(
        &self,
        weight: ArrayView2<'_, f32>,
        moments: Option<&Moments>,
        budget: &RankBudget,
        cx: &Context,
    ) -> Result<Factored>;

    /// Whether moments make a difference; gathering them costs `2 t n²` operations a matrix.
    fn uses_moments(&self) -> bool {
        true
    }
}

macro_rules! forward {
    ($stage:ident, $($method:ident($($arg:ident: $type:ty),*) -> $out:ty);+) => {
        forward!(@one $stage, &T, $($method($($arg: $type),*) -> $out);+);
        forward!(@one $stage, Box<T>, $($method($($arg: $type),*) -> $out);+);
    };
    (@one $stage:ident, $ptr:ty, $($method:ident($($arg:ident: $type:ty),*) -> $out:ty);+) => {
        impl<T: $stage + ?Sized> $stage for $ptr {
            $(fn $method(&self, $($arg: $type),*) -> $out {
                (**self).$method($($arg),*)
            })+
        }
    };
}

forward!(Stage, name() -> &str; needs() -> Needs);
forward!(Similarity,
    similarity(layer: &LayerView<'_>, cx: &Context) -> Result<SimilarityMatrix>);
forward!(Grouper,
    group(layers: &[LayerSummary], budget: &Budget, cx: &Context) -> Result<Vec<Grouping>>;
    surveys() -> bool;
    survey(layer: &LayerView<'_>, similarity: &SimilarityMatrix, budget: &Budget, cx: &Context)
        -> Result<Vec<Candidate>>;
    counts(layers: &[(LayerId, usize)], budget: &Budget) -> Result<Option<Vec<usize>>>);
forward!(Aligner, align(pair: &AlignPair<'_>, cx: &Context) -> Result<Permutation>);
forward!(Merger, merge(members: &Members<'_>, cx: &Context) -> Result<Expert>);
forward!(RouterMerger,
    merge_router(layer: &LayerView<'_>, grouping: &Grouping, cx: &Context) -> Result<Router>);
forward!(Recoverer,
    recover(task: &Recovery<'_>, merged: MergedLayer, cx: &Context) -> Result<MergedLayer>);
forward!(Compressor,
    compress(layer: &MergedLayer, task: &Compression<'_>, cx: &Context) -> Result<Compressed>;
    storage(up: (usize, usize)) -> Result<ExpertStorage>;
    uses_inputs() -> bool;
    size_budget() -> Option<&SizeBudget>;
    survey(layer: &MergedLayer, task: &Compression<'_>, cx: &Context)
        -> Result<Vec<Vec<Spectrum>>>);
forward!(Decomposer,
    decompose(weight: ArrayView2<'_, f32>, moments: Option<&Moments>, budget: &RankBudget,
        cx: &Context) -> Result<Factored>;
    uses_moments() -> bool);

#[cfg(test)]
mod tests {
    use super::*;

    fn thread_safe<T: Send + Sync + ?Sized>() {}

    #[test]
    fn stages_are_objects_that_cross_threads() {
        thread_safe::<dyn Similarity>();
        thread_safe::<dyn Grouper>();
        thread_safe::<dyn Aligner>();
        thread_safe::<dyn Merger>();
        thread_safe::<dyn RouterMerger>();
        thread_safe::<dyn Recoverer>();
        thread_safe::<dyn Compressor>();
        thread_safe::<dyn Decomposer>();
        thread_safe::<Context>();
    }
}
