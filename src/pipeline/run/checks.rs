//! What a run refuses before any weight is read.

use crate::calibrate::{Collector, StatsFile};
use crate::checkpoint::{Checkpoint, LayerInfo};
use crate::error::{ErrorKind, Locate, Result};
use crate::model::{LayerId, Target};
use crate::pipeline::activations::calibration::CalibrationData;
use crate::pipeline::builder::Pipeline;
use crate::pipeline::layer::stages::{LayerStages, SampleOrigin};
use crate::pipeline::options::{LayerShape, check_narrowed};
use crate::pipeline::recipe::ExportChoice;
use crate::stage::{ExpertStorage, Needs};

/// A source that a pipeline can work on.
pub(crate) struct Checked {
    /// Of all MoE layers.
    pub(crate) shapes: Vec<LayerShape>,
    /// Of those that take part.
    pub(crate) active: Vec<LayerShape>,
    /// What the budget asks of them.
    pub(crate) target: Target,
}

/// The layers that take part, and what the budget asks of them.
pub(crate) struct Active {
    pub(crate) layers: Vec<LayerShape>,
    pub(crate) target: Target,
}

impl Checked {
    /// The layers that take part.
    pub(crate) fn ids(&self) -> Vec<LayerId> {
        self.active.iter().map(|shape| shape.id).collect()
    }
}

fn shape(info: &LayerInfo) -> LayerShape {
    LayerShape { id: info.id, experts: info.experts, rule: info.rule }
}

/// Checks everything that can be refused before a weight is read.
pub(crate) fn check_run(
    pipeline: &Pipeline,
    source: &Checkpoint,
    calibration: CalibrationData<'_>,
    export: ExportChoice,
) -> Result<Checked> {
    let checked = check_source(pipeline, source, export)?;
    match calibration {
        CalibrationData::Statistics(stats) => {
            check_stats(pipeline, source, stats, &checked.ids())?;
        }
        CalibrationData::Tokens(_) => drop(Collector::new(pipeline.needs())?),
    }
    Ok(checked)
}

/// Checks what does not depend on the calibration.
pub(crate) fn check_source(
    pipeline: &Pipeline,
    source: &Checkpoint,
    export: ExportChoice,
) -> Result<Checked> {
    check_export(pipeline, export)?;
    check_layout(pipeline, source, export)?;
    let shapes: Vec<LayerShape> = source.layers().iter().map(shape).collect();
    let Active { layers: active, target } = check_shapes(pipeline, &shapes)?;
    let matrices = |l: &LayerInfo| (l.id, (l.d_ff, l.d_model));
    check_compression(pipeline, source.layers().iter().map(matrices))?;
    if export == ExportChoice::Native {
        check_native(pipeline, source)?;
    }
    Ok(Checked { shapes, active, target })
}

/// Checks constraints and budget against the layers.
pub(crate) fn check_shapes(pipeline: &Pipeline, shapes: &[LayerShape]) -> Result<Active> {
    pipeline.constraints.check(shapes)?;
    let narrow = pipeline.router.is_some();
    let stages = LayerStages::of(pipeline, SampleOrigin::Nowhere);
    let mut active: Vec<LayerShape> =
        shapes.iter().filter(|s| !pipeline.is_protected(s.id)).copied().collect();
    if active.is_empty() {
        let reason = "every MoE layer is protected, or there is none".into();
        return Err(ErrorKind::Budget { reason }.into());
    }
    let target = pipeline.keep.target(&active, narrow)?;
    if narrow {
        if active.len() != shapes.len() {
            let reason = "a protected layer keeps all its experts, but a stock export needs \
                          the same number in every layer: protect experts instead, or export \
                          native"
                .into();
            return Err(ErrorKind::Budget { reason }.into());
        }
        active.iter_mut().for_each(|s| s.rule = stages.narrowed_rule(&s.rule));
        check_narrowed(&active, target)?;
    }
    Ok(Active { layers: active, target })
}

fn check_export(pipeline: &Pipeline, export: ExportChoice) -> Result<()> {
    if pipeline.size_budget().is_some() && export != ExportChoice::Native {
        let reason = "a size budget is met by the factors of a native export; the others hold \
                      matrices multiplied out";
        return Err(ErrorKind::Recipe { reason: reason.into() }.into());
    }
    let reason = match (export, pipeline.router.is_some()) {
        (ExportChoice::Stock, false) => "a stock export needs a router stage",
        (ExportChoice::Native | ExportChoice::Expanded, true) => {
            "native and expanded exports keep the router: leave the router stage out"
        }
        _ => return Ok(()),
    };
    Err(ErrorKind::Recipe { reason: reason.into() }.into())
}

/// Factors in a native folder need tensors of their own.
fn check_layout(pipeline: &Pipeline, source: &Checkpoint, export: ExportChoice) -> Result<()> {
    let compresses = pipeline.compressor.is_some() && export == ExportChoice::Native;
    if !compresses || source.can_hold_factors() {
        return Ok(());
    }
    let kind = ErrorKind::Unsupported {
        what: "layout for factors in a native folder",
        found: source.layout().into(),
        supported: "layouts with a tensor for every projection; of this one, stock and \
                    expanded exports, which hold the factors multiplied out"
            .into(),
    };
    Err(kind.into())
}

/// Refuses a compression that the matrices `(d_ff, d_model)` of a merged layer do not allow.
pub(crate) fn check_compression(
    pipeline: &Pipeline,
    layers: impl Iterator<Item = (LayerId, (usize, usize))>,
) -> Result<()> {
    let Some(compressor) = &pipeline.compressor else { return Ok(()) };
    let mut active = layers.filter(|(id, _)| !pipeline.is_protected(*id));
    active.try_for_each(|(id, dim)| compressor.storage(dim).map(drop).in_layer(id))
}

/// Every stage's needs against what the file holds, before any weight is read.
fn check_stats(
    pipeline: &Pipeline,
    source: &Checkpoint,
    stats: &StatsFile,
    ids: &[LayerId],
) -> Result<()> {
    for id in ids {
        if !stats.layers().contains(id) {
            let known: Vec<String> = stats.layers().iter().map(ToString::to_string).collect();
            let reason = format!("no statistics of {id}; the file has {}", known.join(", "));
            return Err(ErrorKind::Statistics { reason }.into());
        }
        let expected = source.layer(*id)?.experts;
        let found = stats.experts(id).unwrap_or(expected);
        if found != expected {
            let reason = format!("{found} experts where the model has {expected}");
            return Err(ErrorKind::Statistics { reason }.into()).in_layer(id);
        }
        let given = stats.available(id) | Needs::EXPERTS;
        let missing: Vec<_> = pipeline.needs().without(given).names().collect();
        if !missing.is_empty() {
            let remedy = "collect them, or choose stages that need less".into();
            let kind = ErrorKind::Missing {
                stage: "the recipe".into(),
                needs: missing.join(", "),
                remedy,
            };
            return Err(kind.into()).in_layer(id);
        }
    }
    Ok(())
}

/// Refuses parts that no native folder can hold.
fn check_native(pipeline: &Pipeline, source: &Checkpoint) -> Result<()> {
    let Some(compressor) = &pipeline.compressor else { return Ok(()) };
    for layer in source.layers() {
        if compressor.storage((layer.d_ff, layer.d_model))? == ExpertStorage::Shared {
            let reason = format!(
                "native folders hold no base that experts share, as compressor `{}` makes: \
                 export stock or expanded",
                compressor.name()
            );
            return Err(ErrorKind::Recipe { reason }.into());
        }
    }
    Ok(())
}
