//! What a run will cost and what will be able to load its result, from headers only.

mod cost;
mod fit;
mod memory;
mod runtimes;
mod shape;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use self::cost::CostPlan;
pub use self::memory::MemoryPlan;
pub use self::runtimes::{Answer, Runtime, RuntimePlan};

use self::shape::Shape;
use crate::calibrate::Collector;
use crate::checkpoint::{Checkpoint, FolderListing, WritePlan};
use crate::error::Result;
use crate::model::{Grouping, LayerId, Target};
use crate::pipeline::activations::tokens::SAMPLES;
use crate::pipeline::builder::Pipeline;
use crate::pipeline::recipe::{ExportChoice, Recipe};
use crate::pipeline::report::{self, Change, Kind};
use crate::pipeline::run::checks::{Checked, check_source};
use crate::pipeline::run::one_pass::KnownCounts;
use crate::pipeline::run::output::{Output, write_plan};

/// What a plan assumes of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlanOptions {
    /// Calibration tokens.
    pub tokens: u64,
    /// Tokens of a window.
    pub window: u64,
    /// Whether text runs through the model; otherwise statistics are given, with samples.
    pub text: bool,
    /// Threads that compute.
    pub threads: usize,
}

impl Default for PlanOptions {
    /// 16,384 tokens of text in windows of 512, rayon's threads.
    fn default() -> Self {
        let threads = rayon::current_num_threads();
        Self { tokens: 16_384, window: 512, text: true, threads }
    }
}

impl PlanOptions {
    /// Samples of a layer.
    fn samples(&self) -> u64 {
        self.tokens.min(SAMPLES as u64)
    }

    /// Whether recovery follows the text.
    fn follows(&self, recipe: &Recipe) -> bool {
        self.text && !recipe.recover.is_empty()
    }

    /// Tokens that recovery sees: of the text at most as many as the recipe allows, of statistics
    /// the samples.
    fn recovered_tokens(&self, recipe: &Recipe) -> u64 {
        match self.follows(recipe) {
            true => recipe.recover_tokens.map_or(self.tokens, |most| self.tokens.min(most as u64)),
            false => self.samples(),
        }
    }
}

/// What a run will write, need and take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunPlan {
    /// The model type.
    pub family: String,
    /// The tensor layout.
    pub layout: String,
    /// `stock`, `native` or `expanded`.
    pub export: ExportChoice,
    /// MoE layers.
    pub layers: usize,
    /// Experts over all MoE layers.
    pub experts: Change<u64>,
    /// Experts of every layer; where the grouper spreads a budget over layers, an even split.
    pub experts_per_layer: Vec<u64>,
    /// Whether the grouper may give layers other numbers than those.
    pub spread: bool,
    /// Parameters of the whole model. Exact where all layers have experts of one size.
    pub parameters: Change<u64>,
    /// Bytes of all tensors, exact likewise.
    pub tensor_bytes: Change<u64>,
    /// Bytes of the routed experts, exact likewise.
    pub expert_bytes: Change<u64>,
    /// Operations per token of routed experts and routers.
    pub flops_per_token: Change<u64>,
    /// Files of tensors in the target.
    pub shards: usize,
    /// Tensors of the source that are left out, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Bytes at every phase.
    pub memory: MemoryPlan,
    /// Operations of every phase, bytes read and written.
    pub cost: CostPlan,
    /// Who will load the target.
    pub runtimes: Vec<RuntimePlan>,
    /// Statistics that the stages read.
    pub needs: Vec<String>,
}

/// Plans a run; reads headers only.
///
/// Parameters and bytes are those of the writer's own layout of the target, for groups of the sizes
/// that the budget asks for: which experts join does not change them. Memory is a model
/// ([`MemoryPlan`]); the cost is counted ([`CostPlan`]).
///
/// # Errors
/// What [`Run::write`](crate::pipeline::Run::write) refuses before any weight is read, but for
/// statistics, which are not looked at: an invalid recipe, a budget or a compression that cannot be
/// met, a source that cannot be written.
///
/// # Example
/// ```no_run
/// use mcsmoe::checkpoint::Checkpoint;
/// use mcsmoe::pipeline::{ExportChoice, Keep, Output, PlanOptions, Recipe, plan};
///
/// let recipe = Recipe::preset("fast", Keep::Fraction(0.5))?.export(ExportChoice::Stock);
/// let (source, output) = (Checkpoint::open("mixtral")?, Output::new(recipe.export));
/// let plan = plan(&source, &recipe, &output, &PlanOptions::default())?;
/// println!("{} bytes of memory, {:?}", plan.memory.peak, plan.cost);
/// # Ok::<(), mcsmoe::Error>(())
/// ```
pub fn plan(
    source: &Checkpoint,
    recipe: &Recipe,
    output: &Output,
    options: &PlanOptions,
) -> Result<RunPlan> {
    let pipeline = recipe.builder()?.build()?;
    if options.text {
        // Refuses statistics that no text can give, such as Fisher information.
        Collector::new(pipeline.needs())?;
    }
    let checked = check_source(&pipeline, source, output.export)?;
    let counts = predicted(&checked);
    let write = pipeline.predicted_plan(source, output, &counts)?;
    let outline = source.outline(&write)?;
    let shape = Shape::of(source, &counts);
    let needs = if options.text { pipeline.needs_along_text() } else { pipeline.needs() };
    let once = options.text && KnownCounts::of(&pipeline, &checked.shapes)?.is_some();
    let memory = memory::plan(&shape, recipe, needs, options, (output.memory, once));
    let bytes = (source.total_bytes(), outline.bytes);
    let cost = cost::plan(&cost::Job { shape: &shape, recipe, options, needs, bytes, once });
    let spread = matches!(checked.target, Target::Total(_));
    Ok(RunPlan {
        family: source.family().into(),
        layout: source.layout().into(),
        export: output.export,
        layers: source.layers().len(),
        experts: Change {
            before: source.layers().iter().map(|l| l.experts as u64).sum(),
            after: counts.values().map(|&m| m as u64).sum(),
        },
        experts_per_layer: counts.values().map(|&m| m as u64).collect(),
        spread,
        parameters: Change { before: source.total_parameters(), after: outline.parameters },
        tensor_bytes: Change { before: source.total_bytes(), after: outline.bytes },
        expert_bytes: Change {
            before: source.layers().iter().map(|l| l.expert_bytes).sum(),
            after: outline.expert_bytes,
        },
        flops_per_token: flops(source, recipe, output.export, &counts),
        shards: outline.files.len(),
        dropped: dropped(&outline),
        memory,
        cost,
        runtimes: runtimes::plan(source, &write, &counts, spread),
        needs: needs.names().map(str::to_owned).collect(),
    })
}

/// The number of experts of every layer, split evenly where only their sum is known.
fn predicted(checked: &Checked) -> BTreeMap<LayerId, usize> {
    let Checked { shapes, active, target } = checked;
    let mut counts: BTreeMap<LayerId, usize> = shapes.iter().map(|s| (s.id, s.experts)).collect();
    match *target {
        Target::PerLayer(m) => {
            for layer in active {
                counts.insert(layer.id, m.min(layer.experts));
            }
        }
        Target::Total(total) => {
            let all: usize = active.iter().map(|l| l.experts).sum();
            let (mut seen, mut given) = (0, 0);
            for layer in active {
                seen += layer.experts;
                let until = (total * seen).div_ceil(all.max(1));
                let m = until.saturating_sub(given).clamp(1, layer.experts);
                given += m;
                counts.insert(layer.id, m);
            }
        }
    }
    counts
}

impl Pipeline {
    /// A write plan with groups of the predicted numbers.
    fn predicted_plan(
        &self,
        source: &Checkpoint,
        output: &Output,
        counts: &BTreeMap<LayerId, usize>,
    ) -> Result<WritePlan> {
        let mut groupings = BTreeMap::new();
        for layer in source.layers().iter().filter(|l| !self.is_protected(l.id)) {
            let m = counts.get(&layer.id).copied().unwrap_or(layer.experts);
            let labels = (0..layer.experts).map(|i| Some(i % m)).collect();
            groupings.insert(layer.id, Grouping::new(labels, (0..m).collect())?);
        }
        write_plan(self, source, output, groupings)
    }
}

fn flops(
    source: &Checkpoint,
    recipe: &Recipe,
    export: ExportChoice,
    counts: &BTreeMap<LayerId, usize>,
) -> Change<u64> {
    let stock = export == ExportChoice::Stock;
    let (mut before, mut after) = (0, 0);
    for layer in source.layers() {
        let parameters = layer.expert_parameters / layer.experts.max(1) as u64;
        let kind = Kind { parameters, d_model: layer.d_model as u64 };
        before += report::flops_per_token(kind, &layer.rule, layer.experts);
        let mut rule = layer.rule;
        rule.top_k = recipe.top_k.unwrap_or(rule.top_k).min(rule.top_k);
        let m = counts.get(&layer.id).copied().unwrap_or(layer.experts);
        let rows = if stock { m } else { layer.experts };
        after += report::flops_per_token(kind, &rule, rows);
    }
    Change { before, after }
}

/// How many tensors are left out for each reason; the name that a reason begins with is that of a
/// tensor, and is not told.
fn dropped(outline: &FolderListing) -> BTreeMap<String, u64> {
    let mut reasons = BTreeMap::new();
    for (_, fate) in &outline.sources {
        let crate::checkpoint::SourceTensorUse::Dropped(why) = fate else { continue };
        let why = if why.ends_with("is written dequantised") {
            "scales: what they belong to is written dequantised"
        } else {
            why
        };
        *reasons.entry(why.to_owned()).or_insert(0) += 1;
    }
    reasons
}
