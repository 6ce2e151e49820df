//! The roof: recipe, checked plan, streamed run, report; the only place that knows the order of the
//! stages.
//!
//! A [`Pipeline`] is built from stages ([`Pipeline::builder`]) or from a [`Recipe`]. It runs on
//! layers in memory ([`Pipeline::run`]) or on a checkpoint ([`Pipeline::run_checkpoint`], or in one
//! call [`merge_then_compress`]). Statistics come from a file or from text ([`Calibration`]), which
//! [`calibrate()`] runs through the model a layer at a time.
//!
//! What a checkpoint is worth, before and after: [`evaluate`] (perplexity), [`compare`] (with the
//! original, by token and by layer), [`loops`] (repetition in what it writes).

mod bookmark;
mod builder;
mod calibrate;
mod calibration;
mod choice;
mod compare;
mod compress;
mod compress_choice;
mod decide;
mod engine;
mod evaluate;
mod fingerprint;
mod greedy;
mod job;
mod journal;
mod observe;
mod once;
mod part;
mod pass;
mod passes;
mod plan;
mod policy;
mod presets;
mod recipe;
mod recovery;
mod report;
mod run;
mod seen;
mod singular;
mod size;
mod states;
mod stream;
mod streams;
mod subject;
mod survey;
mod tokens;
mod verify;

pub use builder::{Pipeline, PipelineBuilder};
pub use calibrate::{calibrate, calibrate_to_file, calibrate_to_file_observed};
pub use calibration::Calibration;
pub use choice::{
    AlignChoice, FactoriseChoice, GroupChoice, MergeChoice, RecoverChoice, RouterChoice,
    SimilarityChoice,
};
pub use compare::{Comparison, LayerError, compare};
pub use compress_choice::CompressChoice;
pub use evaluate::{EvaluateOptions, Evaluation, FileScore, Score, Task, evaluate};
pub use greedy::{LoopOptions, Loops, generate, loops};
pub use observe::{Observer, Phase, Silent};
pub use part::PartReport;
pub use passes::Merged;
pub use plan::{Answer, MemoryPlan, PlanOptions, Rates, RunPlan, RuntimePlan, TimePlan, plan};
pub use policy::{AlignWhen, Alignment, Constraints, Keep, RecoverOn, RoutingGroupPolicy};
pub use recipe::{ExportChoice, Recipe};
pub use report::{
    Change, CompressionReport, GroupReport, LayerReport, OutputError, Report, StableRanks,
    WrittenReport,
};
pub use run::{Output, merge_then_compress};
pub use singular::SpectrumReport;
pub use tokens::{CalibrateOptions, Tokens};
pub use verify::{Check, TensorFate, Verdict, Verification, verify};

/// Indented JSON.
fn json(format: &'static str, value: &impl serde::Serialize) -> crate::Result<String> {
    serde_json::to_string_pretty(value)
        .map_err(|e| crate::ErrorKind::Format { format, reason: e.to_string() }.into())
}
