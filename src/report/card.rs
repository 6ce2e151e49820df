//! The model card.

use serde_yaml_ng::{Mapping, Value};

use super::details::{Details, Quality};
use super::text::{markdown, percent};
use super::{facts, front};
use crate::pipeline::{CalibrationReport, ExpertOutcome, LayerReport, Report};

/// Around what a run has written, so that it can be renewed without touching other text.
const BEGIN: &str = "<!-- mcsmoe: begin -->\n";
const END: &str = "<!-- mcsmoe: end -->\n";
/// Keys of the original's card that tell of the original only: its scores.
const ITS_OWN: [&str; 2] = ["model-index", "eval_results"];

/// A run as a model card: YAML that hubs read (`library_name`, `pipeline_tag`, `tags`, and
/// `base_model` if it is known), then sizes, quality, layers, recipe, hashes and limits.
///
/// The same run gives the same bytes wherever its target lies. To a card that exists already it is
/// added by [`with_text`] or [`with_original`].
pub fn model_card(report: &Report, details: &Details) -> String {
    let mut out = format!("{BEGIN}# {}\n\n", markdown(&facts::title(report)));
    out += &introduction(report, details);
    out += "\n## Sizes and operations\n\n| | before | after | saved |\n|---|--:|--:|--:|\n";
    for row in facts::sizes(report) {
        out += &format!("| {} | {} | {} | {} |\n", row.what, row.before, row.after, row.saved);
    }
    out += &quality(details);
    out += &format!(
        "\n## Layers\n\nExperts of the original: {}. A group is in brackets, the expert \
         that stands for it first.\n\n| layer | experts | output error | experts that stay |\n\
         |---|--:|--:|---|\n",
        facts::outcomes(report)
    );
    report.layers.iter().for_each(|l| out += &layer(report, l));
    out += "\n## Recipe\n\n";
    for (i, stage) in report.stages.iter().enumerate() {
        out += &format!("{}. {}\n", i + 1, markdown(stage));
    }
    if let Some(recipe) = facts::recipe(report) {
        out += &format!("\nAs a file for `--recipe`:\n\n```json\n{recipe}\n```\n");
    }
    out += &calibration(report);
    if !details.files.is_empty() {
        out += "\n## Files\n\n| file | bytes | SHA-256 |\n|---|--:|---|\n";
        for file in &details.files {
            let (name, hash) = (markdown(&file.name), markdown(&file.sha256));
            out += &format!("| {name} | {} | {hash} |\n", file.bytes);
        }
    }
    out += "\n## Limits\n\n";
    for limit in facts::limits(report, details) {
        out += &format!("- {}\n", markdown(&limit));
    }
    out += END;
    front::write(&own(report, details), &out)
}

/// `card` in a text that exists: what an earlier card wrote there is replaced, all else stays. A
/// text without an earlier card follows behind. Keys of its YAML win over those of `card`, lists
/// are joined.
pub fn with_text(card: &str, existing: &str) -> String {
    let existing = existing.replace("\r\n", "\n");
    let ((own, card), (kept, text)) = (front::split(card), front::split(&existing));
    let front = front::join(kept, own);
    let place = text.find(BEGIN).and_then(|begin| {
        let end = begin + text[begin..].find(END)? + END.len();
        Some((&text[..begin], &text[end..]))
    });
    let text = match place {
        Some((before, after)) => format!("{before}{card}{after}"),
        None if text.trim().is_empty() => card.to_owned(),
        None => format!("{card}\n{}", text.trim_start_matches('\n')),
    };
    front::write(&front, &text)
}

/// `card` above the text of the original's card, whose YAML is kept too, but for the original's
/// scores (`model-index`, `eval_results`), which are not this model's.
pub fn with_original(card: &str, original: &str) -> String {
    // The original may itself be the result of a run; its card is not this one's to replace.
    let original = original.replace("\r\n", "\n").replace(BEGIN, "").replace(END, "");
    let (mut kept, text) = front::split(&original);
    ITS_OWN.iter().for_each(|key| drop(kept.shift_remove(*key)));
    if front::split(card).0.contains_key("base_model") {
        // Of this model the original is the base, not what the original itself was made from.
        ["base_model", "base_model_relation"].iter().for_each(|key| drop(kept.shift_remove(*key)));
    }
    let text = format!("## Card of the original\n\n{}", text.trim_start_matches('\n'));
    with_text(card, &front::write(&kept, &text))
}

fn own(report: &Report, details: &Details) -> Mapping {
    let counts = report.outcome_counts();
    let merged = counts.contains_key(&ExpertOutcome::Merged);
    let mut front = Mapping::new();
    let mut add = |key: &str, value: Value| drop(front.insert(key.into(), value));
    add("library_name", "transformers".into());
    let encoder = |l: &LayerReport| l.layer.stack != crate::model::Stack::Causal;
    let task = match report.layers.iter().any(encoder) {
        true => "text2text-generation",
        false => "text-generation",
    };
    add("pipeline_tag", task.into());
    if let Some(name) = &details.base_model {
        add("base_model", name.as_str().into());
        if merged {
            add("base_model_relation", "merge".into());
        }
    }
    let mut tags = vec!["mcsmoe", "mixture-of-experts"];
    tags.extend(merged.then_some("expert-merging"));
    let gone = [ExpertOutcome::Dropped, ExpertOutcome::Redirected];
    tags.extend(gone.iter().any(|o| counts.contains_key(o)).then_some("expert-pruning"));
    tags.extend(report.method("compress").map(|_| "expert-compression"));
    add("tags", Value::Sequence(tags.into_iter().map(Value::from).collect()));
    front
}

fn introduction(report: &Report, details: &Details) -> String {
    let experts = report.experts;
    let of = match (&details.base_model, &report.family) {
        (Some(name), _) => markdown(name),
        (None, Some(family)) => format!("a {} model", markdown(family)),
        (None, None) => "a model".into(),
    };
    let preset = facts::preset(report)
        .map_or(String::new(), |name| format!(" by the preset {}", markdown(&name)));
    let export = report
        .written
        .as_ref()
        .map_or(String::new(), |written| format!(" It is a {} export.", markdown(&written.export)));
    let version = markdown(&report.mcsmoe_version);
    format!(
        "Made from {of} with mcsmoe {version}{preset}: {} experts became {} ({}).{export}\n",
        experts.before,
        experts.after,
        facts::outcomes(report)
    )
}

/// The text and statistics that the run rests on.
fn calibration(report: &Report) -> String {
    let Some(CalibrationReport { statistics, text }) = &report.calibration else {
        return String::new();
    };
    let mut out = String::from("\n## Calibration\n\n");
    if let Some(file) = statistics {
        out += &format!(
            "Statistics {}, SHA-256 {}.\n\n",
            markdown(&file.name),
            markdown(&file.sha256)
        );
    }
    let Some(text) = text else { return out };
    let options = &text.options;
    let window = options.window.unwrap_or_default();
    let (tokens, windows, seed) = (text.tokens, text.windows, options.seed);
    out += &format!("{tokens} tokens in {windows} windows of {window}, drawn by seed {seed}");
    if !text.prefix.is_empty() {
        out += &format!("; special tokens {:?} begin each", text.prefix);
    }
    if let Some(id) = text.separator {
        out += &format!("; token {id} between documents");
    }
    if let Some(template) = &text.template {
        let (file, hash) = (markdown(&template.file), markdown(&template.sha256));
        out += &format!("; chat template {file} (SHA-256 {hash})");
    }
    out += ".\n\n| text | tokens | windows used | SHA-256 |\n|---|--:|--:|---|\n";
    for file in &text.files {
        let (name, hash) = (markdown(&file.name), markdown(&file.sha256));
        out += &format!("| {name} | {} | {} | {hash} |\n", file.tokens, file.windows);
    }
    out
}

fn quality(details: &Details) -> String {
    let Some(quality) = &details.quality else { return String::new() };
    let head = "\n## Quality\n\n";
    match quality {
        Quality::Score(found) => format!(
            "{head}Perplexity {:.3} on {} tokens.\n",
            found.score.perplexity, found.score.tokens
        ),
        Quality::Comparison(found) => format!(
            "{head}| | original | this model |\n|---|--:|--:|\n| perplexity | {:.3} | {:.3} |\n\n\
             KL divergence from the original {:.4} nats, same most likely token at {} of the \
             positions; {} tokens.\n",
            found.original.score.perplexity,
            found.other.score.perplexity,
            found.kl,
            percent(found.agreement),
            found.other.score.tokens
        ),
    }
}

fn layer(report: &Report, layer: &LayerReport) -> String {
    let error = layer.output_error.map(|e| percent(e.narrowed.unwrap_or(e.mapped)));
    format!(
        "| {} | {} → {} | {} | {} |\n",
        layer.layer,
        layer.experts.before,
        layer.experts.after,
        error.unwrap_or_else(|| "–".into()),
        markdown(&facts::layer_outcomes(report, layer, usize::MAX))
    )
}
