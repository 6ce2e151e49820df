//! The roof: recipe, checked plan, streamed run, report; the only place that knows the order of the
//! stages.
//!
//! A [`Pipeline`] is built from stages ([`Pipeline::builder`]) or from a [`Recipe`]. A [`Run`] of
//! it goes over layers in memory ([`Run::in_memory`]) or a checkpoint ([`Run::write`], or in one
//! call [`merge_then_compress`]). Statistics come from a file or from text ([`Calibration`]), which
//! [`calibrate()`] runs through the model a layer at a time.
//!
//! What a checkpoint is worth, before and after: [`evaluate`] (perplexity), [`compare`] (with the
//! original, by token and by layer), [`repetition`] (repetition in what it writes).

mod activations;
mod builder;
mod evaluate;
mod layer;
mod options;
mod plan;
mod progress;
mod provenance;
mod recipe;
mod report;
mod run;
mod verify;

pub use crate::calibrate::text::OwnTextOptions;
pub use activations::calibration::Calibration;
pub use activations::collect::{Collection, calibrate};
pub use activations::own_text::own_text;
pub use activations::tokens::{CalibrateOptions, TextTokens, Tokens};
pub use builder::{Pipeline, PipelineBuilder};
pub use evaluate::compare::{Comparison, LayerError, compare};
pub use evaluate::generation::{Repetition, RepetitionOptions, generate, repetition};
pub use evaluate::perplexity::{EvaluateOptions, Evaluation, FileScore, Score, Task, evaluate};
pub use options::{AlignWhen, Alignment, Constraints, Keep, RecoverOn, RoutingGroupPolicy};
pub use plan::{Answer, CostPlan, MemoryPlan, PlanOptions, RunPlan, Runtime, RuntimePlan, plan};
pub use progress::{Observer, Phase, Silent};
pub use provenance::{CalibrationReport, HashedFile};
pub use recipe::choices::{
    AlignChoice, FactoriseChoice, GroupChoice, MergeChoice, RecoverChoice, RouterChoice,
    SimilarityChoice,
};
pub use recipe::compress_choice::CompressChoice;
pub use recipe::{ExportChoice, Recipe};
pub use report::{
    Change, CompressionReport, ExpertOutcome, GroupReport, LayerReport, OutputError, Report,
    SpectrumReport, StableRanks, WrittenReport,
};
pub use run::distributed::PartReport;
pub use run::in_memory::Merged;
pub use run::output::Output;
pub use run::{Run, merge_then_compress};
pub use verify::{
    Check, CheckName, EVALUATION, TensorAction, TensorRecord, Verdict, Verification, verify,
};

/// Indented JSON.
fn json(format: &'static str, value: &impl serde::Serialize) -> crate::Result<String> {
    serde_json::to_string_pretty(value)
        .map_err(|e| crate::ErrorKind::Format { format, reason: e.to_string() }.into())
}
