//! Second pass along a text: the text runs through the original model, through the layers merged so
//! far, or both ([`RecoverOn`](crate::pipeline::options::RecoverOn)), and each layer is recovered
//! on what it is seen to get and give there.

use crate::calibrate::StatsFile;
use crate::checkpoint::Writer;
use crate::error::{Error, Result};
use crate::model::LayerId;
use crate::pipeline::activations::streams::Streams;
use crate::pipeline::activations::tokens::Tokens;
use crate::pipeline::layer::process::{Decision, Experts, LayerInput, process_layer};
use crate::pipeline::layer::stages::{LayerStages, SampleOrigin};
use crate::pipeline::progress::LayerProgress;
use crate::pipeline::report::LayerReport;
use crate::pipeline::run::CheckpointRun;
use crate::pipeline::run::decisions::Decisions;
use crate::pipeline::run::resume::hidden_states::SavedStates;
use crate::pipeline::run::write::{RecordLayer, process_layers, write_layer};

/// The second pass along a text.
pub(crate) struct AlongText<'a> {
    pub(crate) run: &'a CheckpointRun<'a>,
    pub(crate) stats: &'a StatsFile,
    pub(crate) tokens: &'a Tokens,
    /// The layer behind which an interrupted run has left the hidden states.
    pub(crate) resume_after: Option<LayerId>,
}

impl AlongText<'_> {
    /// Processes and writes the decided layers, in order. Hidden states are saved in the folder of
    /// `writer`.
    ///
    /// # Memory
    /// The layer, its merged experts and what the recoverer holds; the hidden states; and of the
    /// layer at hand inputs and targets of all tokens, `16 t d_model` bytes.
    pub(crate) fn run(
        &self,
        decisions: &Decisions,
        writer: &mut Writer<'_>,
        record: &mut RecordLayer<'_>,
    ) -> Result<Vec<LayerReport>> {
        let CheckpointRun { pipeline, source, observer, output, .. } = *self.run;
        let ids = decisions.ids();
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let folder = writer.folder().to_owned();
        let options = self.run.text_options(&folder, output.memory);
        let on = pipeline.recover_on;
        let mut streams = Streams::to_recover(source, on, self.tokens, &ids, &options)?;
        let mut saved = SavedStates::new(&folder);
        if let Some(id) = self.resume_after {
            saved.restore(&mut streams, id)?;
        }
        let stages = LayerStages::of(pipeline, SampleOrigin::Text);
        let stages = stages.with_ranks(decisions.ranks.as_ref());
        let (cx, narrowed) = (&pipeline.cx, pipeline.router.is_some());
        let mut consume = |layer, report: &LayerReport| write_layer(writer, &layer, report, record);
        process_layers(&ids, observer, &mut consume, &mut |at| {
            let id = ids[at];
            let mut block = streams.advance_to(id, cx, &mut |_| {})?;
            let captured = streams.capture_original(&block, cx)?;
            let samples = streams.capture_merged(&block, captured, cx)?;
            let missing = || Error::range("layer", "one of the model's, in order", id);
            let samples = samples.ok_or_else(missing)?;
            let input = LayerInput {
                experts: Experts::InMemory(block.take_experts()?),
                stats: self.stats.layer(&id, stages.merge_needs())?,
                samples: Some(&samples),
                progress: LayerProgress { observer, layer: id, done: at, total: ids.len() },
            };
            let decision = Decision::Made(decisions.at(at)?);
            let (merged, report) = process_layer(input, decision, &stages, cx)?.in_memory()?;
            streams.leave(&block, samples, (&merged, narrowed), cx)?;
            saved.save(&mut streams, id)?;
            Ok((merged, report))
        })
    }
}
