//! What page and card both tell.

use super::details::Details;
use super::text::{bytes, count, percent};
use crate::pipeline::{Change, ExpertOutcome, LayerReport, Report};

/// A figure before and after, as text.
pub(super) struct Row {
    pub(super) what: &'static str,
    pub(super) before: String,
    pub(super) after: String,
    pub(super) saved: String,
}

fn row(what: &'static str, change: Change<u64>, show: fn(u64) -> String) -> Row {
    let Change { before, after } = change;
    Row { what, before: show(before), after: show(after), saved: percent(change.saved()) }
}

/// Experts, parameters, bytes, operations.
pub(super) fn sizes(report: &Report) -> Vec<Row> {
    let mut rows = vec![row("experts", report.experts, count)];
    if let Some(written) = &report.written {
        rows.push(row("parameters", written.parameters, count));
    }
    rows.push(row("expert parameters", report.expert_parameters, count));
    rows.push(row("MoE FLOPs per token", report.flops_per_token, count));
    if let Some(found) = &report.compression {
        rows.push(row("expert parameters, dense and factored", found.parameters, count));
        rows.push(row("MoE FLOPs per token, dense and factored", found.flops_per_token, count));
    }
    if let Some(written) = &report.written {
        rows.push(row("expert bytes", written.expert_bytes, bytes));
        rows.push(row("tensor bytes", written.tensor_bytes, bytes));
    }
    rows
}

/// `mixtral, 16 of 32 experts`: the same wherever the target lies.
pub(super) fn title(report: &Report) -> String {
    let Change { before, after } = report.experts;
    let family = report.family.as_deref().unwrap_or("a model");
    format!("{family} with {after} of {before} experts")
}

/// `16 refitted, 16 dropped`.
pub fn outcomes(report: &Report) -> String {
    let counts = report.outcome_counts();
    let parts = counts.iter().map(|(outcome, n)| format!("{} {outcome}", count(*n)));
    parts.collect::<Vec<_>>().join(", ")
}

/// What happened to the experts of a layer, short enough for a line: groups where experts were
/// merged or redirected, else the experts that stay. At most `most` characters.
pub fn layer_outcomes(report: &Report, layer: &LayerReport, most: usize) -> String {
    let outcomes = report.outcomes(layer);
    let gone = |i: usize| outcomes.get(i) == Some(&ExpertOutcome::Dropped);
    let list = |all: &mut dyn Iterator<Item = usize>| {
        all.map(|i| i.to_string()).collect::<Vec<_>>().join(" ")
    };
    let mut groups = layer.groups.iter().map(|group| {
        let dominant = group.dominant;
        let others = &mut group.members.iter().copied().filter(|&i| i != dominant && !gone(i));
        match list(others) {
            others if others.is_empty() => dominant.to_string(),
            others => format!("[{dominant} {others}]"),
        }
    });
    let mut text = String::new();
    for (shown, group) in groups.by_ref().enumerate() {
        if text.len() + group.len() > most {
            let rest = layer.groups.len() - shown;
            return format!("{text}… {rest} more");
        }
        text += &group;
        text.push(' ');
    }
    let dropped = outcomes.iter().filter(|&&outcome| outcome == ExpertOutcome::Dropped).count();
    match dropped {
        0 => text.trim_end().to_owned(),
        n => format!("{}; {n} dropped", text.trim_end()),
    }
}

/// The recipe's preset, if it had one, and the stages that are not the recipe's.
pub(super) fn preset(report: &Report) -> Option<String> {
    let preset = report.recipe.as_ref()?.get("preset")?.as_str()?;
    match custom(report) {
        custom if custom.is_empty() => Some(preset.to_owned()),
        custom => Some(format!("{preset} with a custom {}", custom.join(", "))),
    }
}

/// The recipe as indented JSON, which `--recipe` reads; none where a stage is not the recipe's,
/// which no file can name.
pub(super) fn recipe(report: &Report) -> Option<String> {
    let recipe = report.recipe.as_ref().filter(|_| custom(report).is_empty())?;
    serde_json::to_string_pretty(recipe).ok()
}

/// The stages that were put in the place of the recipe's own, with their names.
fn custom(report: &Report) -> Vec<String> {
    let recipe = report.recipe.iter().filter_map(|recipe| recipe.as_object()).flatten();
    let stage = |(key, value): (&String, &serde_json::Value)| {
        Some(format!("{key} ({})", value.get("custom")?.as_str()?))
    };
    recipe.filter_map(stage).collect()
}

/// What the figures do not tell.
pub(super) fn limits(report: &Report, details: &Details) -> Vec<String> {
    let mut limits = vec![format!(
        "Usage and similarity come from {} calibration tokens. What that text does not use was \
         weighed least, and may be what is missing now.",
        count(report.tokens)
    )];
    if report.layers.iter().any(|l| l.output_error.is_some()) {
        limits.push(
            "Output errors compare one layer's routed experts with the original's on the same \
             inputs: how errors add up over layers they do not tell."
                .into(),
        );
    }
    let export = report.written.as_ref().map(|w| &*w.export);
    match export {
        Some("native") => limits.push(
            "A native folder keeps the original's router and an expert map; it runs in mcsmoe, and \
             in transformers with the code that lies in the folder, if there is any."
                .into(),
        ),
        Some("expanded") => limits.push(
            "An expanded folder repeats the merged experts: it is for checking and saves no bytes."
                .into(),
        ),
        Some("stock") => limits.push(
            "A stock folder has a narrowed router, which chooses otherwise than the original's \
             with an expert map."
                .into(),
        ),
        _ => {}
    }
    if report.compression.is_some() && export != Some("native") {
        limits.push(
            "The matrices lie multiplied out: figures that say dense and factored are those of a \
             runtime that would hold the factors."
                .into(),
        );
    }
    limits.push(match &details.quality {
        Some(found) => format!(
            "Perplexity on {} tokens is no benchmark: measure the tasks that the model is for.",
            count(found.target().score.tokens)
        ),
        None => {
            "Nothing here tells how well the model predicts text: no evaluation was given.".into()
        }
    });
    if report.compression.is_some() && report.layers.iter().all(|l| l.spectra.is_empty()) {
        limits.push(
            "Of the spectra of the matrices only stable ranks are recorded; `measure_spectra = \
             true` in a recipe records singular values."
                .into(),
        );
    }
    limits
}
