//! Stages put together.

use std::sync::Arc;

use crate::align::Reference;
use crate::error::{Error, ErrorKind, Result};
use crate::linalg::{Compute, Cpu, LinalgBackend};
use crate::model::LayerId;
use crate::pipeline::options::{
    AlignWhen, Alignment, Constraints, Keep, RecoverOn, RoutingGroupPolicy,
};
use crate::stage::{
    Aligner, Compressor, Context, Grouper, Merger, Recoverer, RouterMerger, Similarity, SizeBudget,
};

/// A merge, ready to run: one stage of each kind, the budget and its constraints.
///
/// Built by [`Pipeline::builder`] or from a recipe. Running it never changes it.
#[derive(Debug)]
pub struct Pipeline {
    pub(crate) similarity: Box<dyn Similarity>,
    pub(crate) alignment: Option<Alignment>,
    pub(crate) grouper: Box<dyn Grouper>,
    pub(crate) merger: Box<dyn Merger>,
    pub(crate) router: Option<Box<dyn RouterMerger>>,
    pub(crate) recoverer: Option<Box<dyn Recoverer>>,
    pub(crate) recover_tokens: Option<usize>,
    pub(crate) recover_on: RecoverOn,
    pub(crate) compressor: Option<Box<dyn Compressor>>,
    pub(crate) keep: Keep,
    pub(crate) constraints: Constraints,
    pub(crate) routing_groups: RoutingGroupPolicy,
    pub(crate) top_k: Option<usize>,
    pub(crate) measure_error: bool,
    pub(crate) measure_spectra: Option<bool>,
    pub(crate) cx: Context,
    pub(crate) recipe: Option<serde_json::Value>,
}

/// Collects the stages of a [`Pipeline`]. Similarity, grouper, merger and budget are required.
#[derive(Debug, Default)]
#[must_use]
pub struct PipelineBuilder {
    similarity: Option<Box<dyn Similarity>>,
    alignment: Option<Alignment>,
    grouper: Option<Box<dyn Grouper>>,
    merger: Option<Box<dyn Merger>>,
    router: Option<Box<dyn RouterMerger>>,
    recoverer: Option<Box<dyn Recoverer>>,
    recover_tokens: Option<usize>,
    recover_on: RecoverOn,
    compressor: Option<Box<dyn Compressor>>,
    keep: Option<Keep>,
    constraints: Constraints,
    routing_groups: RoutingGroupPolicy,
    top_k: Option<usize>,
    skip_error: bool,
    measure_spectra: Option<bool>,
    compute: Option<Arc<dyn Compute>>,
    factorise: Option<Arc<dyn LinalgBackend>>,
    seed: u64,
    recipe: Option<serde_json::Value>,
}

impl PipelineBuilder {
    /// The metric; required.
    pub fn similarity(mut self, similarity: impl Similarity + 'static) -> Self {
        self.replaced("similarity", similarity.name());
        self.similarity = Some(Box::new(similarity));
        self
    }

    /// Lines experts up before they are merged. Without it, hidden units are merged as they lie.
    pub fn align(
        mut self,
        aligner: impl Aligner + 'static,
        reference: Reference,
        when: AlignWhen,
    ) -> Self {
        self.replaced("align", aligner.name());
        self.alignment = Some(Alignment { aligner: Box::new(aligner), reference, when });
        self
    }

    /// The grouper; required.
    pub fn grouper(mut self, grouper: impl Grouper + 'static) -> Self {
        self.replaced("group", grouper.name());
        self.grouper = Some(Box::new(grouper));
        self
    }

    /// The merger; required.
    pub fn merger(mut self, merger: impl Merger + 'static) -> Self {
        self.replaced("merge", merger.name());
        self.merger = Some(Box::new(merger));
        self
    }

    /// Narrows the router to one row per group, as a stock export needs. Without it the router is
    /// kept and tokens are redirected by the expert map (the paper).
    pub fn router(mut self, router: impl RouterMerger + 'static) -> Self {
        self.replaced("router", router.name());
        self.router = Some(Box::new(router));
        self
    }

    /// Brings each merged layer back towards the original layer's output. Calibrated on text, a
    /// layer is recovered on what [`recover_on`](Self::recover_on) says; with a statistics file, on
    /// the samples in it, which come from the original model.
    pub fn recoverer(mut self, recoverer: impl Recoverer + 'static) -> Self {
        self.replaced("recover", recoverer.name());
        self.recoverer = Some(Box::new(recoverer));
        self
    }

    /// Most tokens of a text that the recoverer and the compressor see, in whole windows spread
    /// evenly over it; all unless given. Routing statistics are always those of the whole text.
    pub fn recover_tokens(mut self, most: Option<usize>) -> Self {
        self.recover_tokens = most;
        self
    }

    /// What the recoverer is fitted on, in a run on text; [`RecoverOn::SameInput`] unless given.
    pub fn recover_on(mut self, on: RecoverOn) -> Self {
        self.recover_on = on;
        self
    }

    /// Makes every merged and recovered expert smaller: in factors in a native folder, else
    /// multiplied out. See [`crate::decompose`] for those of this crate.
    pub fn compressor(mut self, compressor: impl Compressor + 'static) -> Self {
        self.replaced("compress", compressor.name());
        self.compressor = Some(Box::new(compressor));
        self
    }

    /// How many experts stay; required.
    pub fn keep(mut self, keep: Keep) -> Self {
        self.keep = Some(keep);
        self
    }

    /// Protected layers and experts, group capacity, least number per layer.
    pub fn constraints(mut self, constraints: Constraints) -> Self {
        self.constraints = constraints;
        self
    }

    /// What happens to group-limited routing when the router is narrowed.
    pub fn routing_groups(mut self, policy: RoutingGroupPolicy) -> Self {
        self.routing_groups = policy;
        self
    }

    /// Lowers the number of experts per token of a narrowed router.
    pub fn top_k(mut self, top_k: Option<usize>) -> Self {
        self.top_k = top_k;
        self
    }

    /// Whether each layer's output error on the samples is measured, which costs a forward pass of
    /// the layer before and after; `true` unless given. Without samples nothing is measured.
    pub fn measure_error(mut self, measure: bool) -> Self {
        self.skip_error = !measure;
        self
    }

    /// Whether the singular values of each layer's matrices are measured, before and after; unless
    /// given, where they have a side of at most 256 and the layer is held as a whole.
    pub fn measure_spectra(mut self, measure: Option<bool>) -> Self {
        self.measure_spectra = measure;
        self
    }

    /// The device; the CPU unless given.
    pub fn compute(mut self, compute: Arc<dyn Compute>) -> Self {
        self.compute = Some(compute);
        self
    }

    /// Who factorises; [`PureRust`](crate::linalg::PureRust) unless given.
    pub fn factorise(mut self, factorise: Arc<dyn LinalgBackend>) -> Self {
        self.factorise = Some(factorise);
        self
    }

    /// Seed of every random choice; 0 unless given.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The recipe that everything so far comes from. A stage that replaces one of it is noted in
    /// it, by its name: `{ "custom": NAME }`.
    pub(crate) fn recipe(mut self, recipe: serde_json::Value) -> Self {
        self.recipe = Some(recipe);
        self
    }

    fn replaced(&mut self, stage: &str, name: &str) {
        if let Some(serde_json::Value::Object(recipe)) = &mut self.recipe {
            recipe.insert(stage.into(), serde_json::json!({ "custom": name }));
        }
    }

    /// The pipeline.
    ///
    /// # Errors
    /// [`ErrorKind::Recipe`] when a required part is missing.
    pub fn build(self) -> Result<Pipeline> {
        let missing = |part: &str| -> Error {
            ErrorKind::Recipe { reason: format!("a pipeline needs a {part}") }.into()
        };
        let compute = self.compute.unwrap_or_else(|| Arc::new(Cpu::new()));
        let mut cx = Context::on(compute, self.seed);
        if let Some(factorise) = self.factorise {
            cx = cx.with_backend(factorise);
        }
        Ok(Pipeline {
            similarity: self.similarity.ok_or_else(|| missing("similarity"))?,
            alignment: self.alignment,
            grouper: self.grouper.ok_or_else(|| missing("grouper"))?,
            merger: self.merger.ok_or_else(|| missing("merger"))?,
            router: self.router,
            recoverer: self.recoverer,
            recover_tokens: self.recover_tokens,
            recover_on: self.recover_on,
            compressor: self.compressor,
            keep: self.keep.ok_or_else(|| missing("number of experts to keep"))?,
            constraints: self.constraints,
            routing_groups: self.routing_groups,
            top_k: self.top_k,
            measure_error: !self.skip_error,
            measure_spectra: self.measure_spectra,
            cx,
            recipe: self.recipe,
        })
    }
}

impl Pipeline {
    /// Starts from nothing.
    pub fn builder() -> PipelineBuilder {
        PipelineBuilder::default()
    }

    /// The size budget, if the compressor has one.
    pub(crate) fn size_budget(&self) -> Option<&SizeBudget> {
        self.compressor.as_ref()?.size_budget()
    }

    /// Whether a layer keeps all its experts.
    pub(crate) fn is_protected(&self, id: LayerId) -> bool {
        self.constraints.protect_layers.contains(&id)
    }
}
