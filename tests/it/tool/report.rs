//! The page and the model card of a run: complete, well-formed, self-contained, escaped.

use std::sync::OnceLock;

use crate::support::fixture;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::pipeline::{ExportChoice, Keep, Output, Recipe, Report, merge_then_compress};
use mcsmoe::report::{Details, FileRecord, Quality, html, model_card, with_original, with_text};
use mcsmoe::similarity::RouterWeights;
use serde_yaml_ng::Value;

/// A run of the paper's method on the bundled checkpoint.
fn run() -> &'static (Report, Details) {
    static RUN: OnceLock<(Report, Details)> = OnceLock::new();
    RUN.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        let recipe = Recipe::preset("mc-smoe", Keep::Fraction(0.5)).unwrap();
        let recipe = recipe.export(ExportChoice::Native);
        let stats = fixture("mixtral-8e.stats.safetensors");
        let report = merge_then_compress(fixture("mixtral-8e"), &*stats, &target, &recipe).unwrap();
        let details = Details::read(&target).unwrap();
        (report, Details { quality: Some(comparison()), ..details })
    })
}

/// As `mcsmoe evaluate --against` prints it.
fn comparison() -> Quality {
    let text = r#"{"files": [], "tokenizer_sha256": null, "options": {"window": 9},
        "windows": 1, "tokens": 9}"#;
    let score = |name: &str, perplexity: f64| {
        format!(
            r#"{{"family": "mixtral", "task": "causal_lm", "parameters": 1, "bytes": 4,
            "nll": 1.0, "perplexity": {perplexity}, "tokens": 8, "text": {text},
            "files": [{{"name": "{name}", "nll": 1.0, "perplexity": {perplexity}, "tokens": 8}}]}}"#
        )
    };
    let (a, b) = (score("a<b>", 46.75), score("a<b>", 137.25));
    let layers = r#"[{"layer": "layers.0", "error": 0.25}]"#;
    let json = format!(
        r#"{{"original": {a}, "other": {b}, "kl": 0.9214, "agreement": 0.259, "layers": {layers}}}"#
    );
    Quality::from_json(&json).unwrap()
}

/// Elements in order, after checking that they close, that attributes are quoted and unique, and
/// that every `&` begins an entity.
fn elements(page: &str) -> Vec<String> {
    let text = page.strip_prefix("<!DOCTYPE html>\n").unwrap();
    let (mut open, mut found): (Vec<String>, Vec<String>) = Default::default();
    let mut parts = text.split('<');
    assert_eq!(parts.next(), Some(""));
    for part in parts {
        let (tag, after) = part.split_once('>').unwrap_or_else(|| panic!("open tag {part:.80}"));
        for at in [tag, after] {
            for rest in at.split('&').skip(1) {
                let name = rest.split(';').next().unwrap();
                let known = ["amp", "lt", "gt", "quot", "apos", "#39"].contains(&name);
                assert!(known, "entity &{rest:.20}");
            }
        }
        assert!(open.len() > 1 || after.trim().is_empty(), "text outside the body: {after}");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name));
            continue;
        }
        let closed = tag.ends_with('/');
        let tag = tag.trim_end_matches('/');
        let (name, mut attributes) = tag.split_once(' ').unwrap_or((tag, ""));
        let mut names = Vec::new();
        while let Some((attribute, rest)) = attributes.trim_start().split_once("=\"") {
            let (_, rest) = rest.split_once('"').expect("a closing quote");
            assert!(attribute.chars().all(|c| c.is_alphanumeric() || c == '-'), "{attribute}");
            assert!(!names.contains(&attribute), "{attribute} twice in {tag}");
            names.push(attribute);
            attributes = rest;
        }
        assert_eq!(attributes.trim(), "", "in {tag}");
        found.push(name.to_owned());
        if !closed {
            open.push(name.to_owned());
        }
    }
    assert!(open.is_empty(), "never closed: {open:?}");
    found
}

fn loads_nothing(page: &str) {
    let own = page.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for way in ["<script", "<link", "<img", "<iframe", " src=", " href=", "url(", "@import", "://"]
    {
        assert!(!own.contains(way), "{way}");
    }
    assert!(page.contains("default-src 'none'"));
}

#[test]
fn the_page_is_whole_well_formed_and_loads_nothing() {
    let (report, details) = run();
    let page = html(report, details).unwrap();
    let found = elements(&page);
    loads_nothing(&page);
    // Experts, two errors, stable rank, the scale, and three for each of four layers.
    assert_eq!(found.iter().filter(|name| *name == "svg").count(), 4 + 1 + 3 * 4);
    for layer in &report.layers {
        let start =
            page.find(&format!("<section class=\"layer\" id=\"{}\">", layer.layer)).unwrap();
        let section = &page[start..start + page[start..].find("</section>").unwrap()];
        let frames = section.matches("stroke=\"#F02050\"").count();
        assert_eq!(frames, 2 * layer.groups.len());
        // Gate, up and down: original, merged, compressed, which has fewer directions.
        for colour in ["#4C78A8", "#F58518", "#54A24B"] {
            let curve = format!("<polyline fill=\"none\" opacity=\"1\" stroke=\"{colour}\"");
            assert_eq!(section.matches(&curve).count(), 3, "{colour}");
        }
        for (g, group) in layer.groups.iter().enumerate() {
            let member = |&i: &usize| match i == group.dominant {
                true => format!("<b>{i}</b>"),
                false => i.to_string(),
            };
            let members: Vec<String> = group.members.iter().map(member).collect();
            let row = format!("<td>{g}</td><td>{}</td>", members.join(", "));
            assert!(section.contains(&row), "{row}");
        }
    }
    let digest = &details.files[0].sha256;
    for text in ["46.75 → 137.25", "0.9214", "<h2>Limits", digest, "weight-matching"] {
        assert!(page.contains(text), "{text}");
    }
    assert_eq!(page, html(report, details).unwrap());
}

#[test]
fn spectra_tell_what_merging_and_compression_did() {
    let (report, _) = run();
    for layer in &report.layers {
        let roles: Vec<String> = layer.spectra.iter().map(|s| s.role.to_string()).collect();
        assert_eq!(roles, ["gate", "up", "down"]);
        for found in &layer.spectra {
            let compressed = found.compressed.as_ref().unwrap();
            for values in [&found.original, &found.merged, compressed] {
                assert_eq!((found.index[0], values[0], values.len()), (1, 1.0, found.index.len()));
                assert!(values.windows(2).all(|w| w[0] >= w[1] && w[1] >= 0.0), "{values:?}");
            }
            // Rank 32 and a tenth of the rows of 128 × 256 leave nothing beyond 32 + 26.
            let beyond = found.index.iter().position(|&i| i > 58).unwrap();
            assert!(compressed[beyond] < 1e-4 && found.merged[beyond] > 1e-2, "{found:?}");
        }
    }
    // At 32 points a spectrum, small beside a layer's similarities.
    let json = serde_json::to_string(&report.layers[0].spectra).unwrap();
    assert!(json.len() < 4096, "{}", json.len());
}

#[test]
fn what_is_not_known_is_left_out() {
    let (report, _) = run();
    let mut report = report.clone();
    (report.written, report.recipe, report.family, report.compression) = (None, None, None, None);
    for layer in &mut report.layers {
        (layer.compression, layer.output_error) = (None, None);
        layer.similarity.clear();
        layer.groups.clear();
        layer.spectra.clear();
    }
    let page = html(&report, &Details::default()).unwrap();
    assert!(!page.contains("Stable rank") && !page.contains("Quality"));
    assert!(page.contains("no evaluation was given"));
    elements(&page);
    report.layers.clear();
    elements(&html(&report, &Details::default()).unwrap());
    assert!(!model_card(&report, &Details::default()).contains("NaN"));
}

#[test]
fn names_cannot_smuggle_markup() {
    let (report, details) = run();
    let evil = "</pre></td><script>alert(1)</script>\"'><img src=x onerror=y>&\u{1b}|`#\n---\n";
    let mut report = report.clone();
    report.family = Some(evil.into());
    report.stages[0] = format!("similarity {evil}");
    report.recipe = Some(serde_json::json!({ "preset": evil, evil: "```\n<b>" }));
    report.device = evil.into();
    report.mcsmoe_version = evil.into();
    let written = report.written.as_mut().unwrap();
    written.export = evil.into();
    written.dropped.push((evil.into(), evil.into()));
    let file = FileRecord { name: evil.into(), bytes: 1, sha256: evil.into() };
    let (name, base_model) = (Some(evil.to_owned()), Some(evil.to_owned()));
    let details = Details { name, base_model, files: vec![file], ..details.clone() };
    let page = html(&report, &details).unwrap();
    let found = elements(&page);
    assert!(!found.iter().any(|name| name == "script" || name == "img"));
    assert!(!page.contains('\u{1b}'));
    assert!(page.contains("&lt;script&gt;"));

    let card = model_card(&report, &details);
    let (front, text) = front(&card);
    assert_eq!(front["base_model"], evil);
    let fence = text.find("```json").unwrap();
    let end = fence + text[fence..].find("\n```\n").unwrap();
    let outside = format!("{}{}", &text[..fence], &text[end..]);
    assert!(!outside.replace("<!-- mcsmoe", "").contains('<'), "{outside}");
    let rows = outside.lines().filter(|line| line.contains("onerror") && line.starts_with("| "));
    assert!(rows.clone().count() == 1 && rows.into_iter().all(|row| row.ends_with('|')));
}

#[test]
fn pages_of_large_models_stay_small() {
    let (report, details) = run();
    let mut report = report.clone();
    let mut layer = report.layers[0].clone();
    let n = 256;
    layer.usage = vec![1.0 / n as f64; n];
    layer.similarity = (0..n).map(|i| (0..n).map(|j| (i * j) as f32).collect()).collect();
    layer.groups[0].members = (8..n).chain(layer.groups[0].members.clone()).collect();
    report.layers = (0..58)
        .map(|index| {
            let mut layer = layer.clone();
            layer.layer.index = index;
            layer
        })
        .collect();
    let page = html(&report, details).unwrap();
    assert!(page.len() < 12_000_000, "{}", page.len());
    assert!(page.contains("mean over neighbouring experts"));
    elements(&page);
}

/// The YAML of a card, and the rest.
fn front(card: &str) -> (Value, &str) {
    let (yaml, text) = card.strip_prefix("---\n").unwrap().split_once("\n---\n").unwrap();
    (serde_yaml_ng::from_str(yaml).unwrap(), text)
}

#[test]
fn the_card_tells_hubs_and_people() {
    let (report, details) = run();
    let card = model_card(report, details);
    let (yaml, text) = front(&card);
    assert_eq!(yaml["library_name"], "transformers");
    assert_eq!(yaml["pipeline_tag"], "text-generation");
    assert!(yaml["tags"].as_sequence().unwrap().contains(&"mcsmoe".into()));
    assert!(yaml.get("base_model").is_none());
    for layer in &report.layers {
        assert!(text.contains(&format!("\n| {} | 8 → ", layer.layer)));
    }
    for text in ["46.750 | 137.250", "0.9214", &*details.files[0].sha256, "- Usage and"] {
        assert!(card.contains(text), "{text}");
    }
    // The recipe in it is one.
    let recipe = text.split("```json\n").nth(1).unwrap().split("```").next().unwrap();
    let recipe: Recipe = serde_json::from_str(recipe).unwrap();
    assert_eq!(serde_json::to_value(recipe).unwrap(), *report.recipe.as_ref().unwrap());
}

#[test]
fn text_of_others_stays() {
    let (report, details) = run();
    let card = model_card(report, &Details { quality: None, ..details.clone() });
    let original = "---\nlicense: apache-2.0\ntags:\n- moe\nbase_model: older\nmodel-index:\n\
                    - name: x\n---\n\n# The original\nIts text.\n";
    let original = &*original.replace('\n', "\r\n");
    let both = with_original(&card, original);
    let (yaml, text) = front(&both);
    assert_eq!((&yaml["license"], &yaml["base_model"]), (&"apache-2.0".into(), &"older".into()));
    let tags = yaml["tags"].as_sequence().unwrap();
    assert_eq!(tags.len(), 5, "moe, ours, merged and compressed: {tags:?}");
    assert!(yaml.get("model-index").is_none(), "scores of another model");
    assert!(text.ends_with("# The original\nIts text.\n"));
    let named = Details { base_model: Some("o/m".into()), ..Details::default() };
    let named = with_original(&model_card(report, &named), original);
    assert_eq!(front(&named).0["base_model"], "o/m");

    // Renewed with an evaluation, between notes of the owner.
    let edited = format!("{}\nMy notes.\n", both);
    let edited = edited.replacen("<!-- mcsmoe: begin", "Mine too.\n<!-- mcsmoe: begin", 1);
    let renewed = with_text(&model_card(report, details), &edited);
    assert!(renewed.contains("0.9214") && renewed.contains("Mine too.\n<!-- mcsmoe"));
    assert!(renewed.ends_with("Its text.\n\nMy notes.\n"));
    assert_eq!(renewed.matches("## Recipe").count(), 1);
    assert_eq!(with_text(&model_card(report, details), &renewed), renewed);
    assert_eq!(with_text(&card, &edited), edited);
    assert_eq!(with_text(&card, ""), card);

    // Merged again: the card of the first run is text of the original now.
    let again = with_original(&card, &both);
    assert_eq!(again.matches("## Recipe").count(), 2);
    assert_eq!(again.matches("mcsmoe: begin").count(), 1);
    assert!(with_text(&card, &again).matches("## Recipe").count() == 2);
}

#[test]
fn a_stage_that_is_not_the_recipes_is_named_and_no_recipe_is_claimed() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = Recipe::preset("reap", Keep::Fraction(0.5)).unwrap();
    let source = Checkpoint::open(fixture("mixtral-8e")).unwrap();
    let stats = fixture("mixtral-8e.stats.safetensors");
    let builder = recipe.builder().unwrap().similarity(RouterWeights::default());
    let pipeline = builder.build().unwrap();
    let output = Output::new(recipe.export);
    let run = pipeline.run().calibration(stats).output(output);
    let report = run.write(&source, dir.path().join("target")).unwrap();
    assert_eq!(report.recipe.as_ref().unwrap()["similarity"]["custom"], "router-weights");
    let (card, page) =
        (model_card(&report, &Details::default()), html(&report, &Details::default()));
    for text in [card, page.unwrap()] {
        assert!(text.contains("custom similarity"), "{text}");
        assert!(!text.contains("As a file for"), "no file names a custom stage");
    }
}
