//! Groupings measured layer by layer, for groupers that decide by measurement.

use crate::error::{Locate, Result};
use crate::model::Target;
use crate::pipeline::builder::Pipeline;
use crate::pipeline::layer::process::{Measured, Source};
use crate::pipeline::options::LayerShape;
use crate::stage::LayerView;

impl Pipeline {
    /// Lets the grouper measure every layer, one in memory at a time; most have nothing to measure,
    /// and no layer is read.
    pub(crate) fn survey(
        &self,
        source: &dyn Source,
        measured: &mut [Measured],
        (active, target): (&[LayerShape], Target),
        narrow: bool,
    ) -> Result<()> {
        if !self.grouper.surveys() {
            return Ok(());
        }
        let budget = self.constraints.budget(target, active, narrow);
        for Measured { summary, .. } in measured {
            let id = summary.id;
            let layer = source.layer(id)?;
            let stats = source.stats(id, self.grouper.needs())?;
            stats.validate(layer.experts().len(), layer.router().weight().ncols())?;
            let view = LayerView::of(&layer, &stats);
            let found = self.grouper.survey(&view, &summary.similarity, &budget, &self.cx);
            summary.candidates = Some(found.in_layer(id)?);
            source.release(id);
        }
        Ok(())
    }
}
