//! The page.

use super::details::{Details, Quality};
use super::text::{bytes, count, escape, percent};
use super::{facts, layers};
use crate::error::Result;
use crate::pipeline::{Evaluation, Report};

const STYLE: &str = include_str!("style.css");
/// The page may load nothing at all.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// A run as one self-contained HTML page: sizes and operations, perplexity and divergence if they
/// are known, experts, output errors and stable ranks over the layers, and for every layer the
/// similarities of its experts as a heat map with the groups framed, how often each was used, and
/// the groups; then recipe, hashes of the files, and limits.
///
/// The page loads nothing and runs no script; it is well-formed XML too, but for its first line.
/// Where layers hold many experts, cells of a heat map are means over neighbours, so that all heat
/// maps together hold about 60,000 cells (6 MB).
///
/// # Errors
/// [`Format`](crate::ErrorKind::Format) if a picture cannot be drawn.
pub fn html(report: &Report, details: &Details) -> Result<String> {
    let title = facts::title(report);
    let name = escape(details.name.as_deref().unwrap_or(&title));
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\"/>\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\
         <title>{name}</title><style>\n{STYLE}</style></head>\n<body>\n<h1>{name}</h1>\n"
    );
    out += &introduction(report, &title);
    out += &tiles(report, details);
    out += "<h2>Sizes and operations</h2>\n";
    out += &sizes(report);
    if let Some(quality) = &details.quality {
        out += "<h2>Quality</h2>\n";
        out += &self::quality(quality);
    }
    out += "<h2>Over the layers</h2>\n";
    out += &layers::overview(report, details)?;
    out += "<h2>Similarity, usage and groups</h2>\n";
    out += &layers::sections(report)?;
    out += &recipe(report);
    out += &files(report, details);
    out += "<h2>Limits</h2>\n<ul>\n";
    for limit in facts::limits(report, details) {
        out += &format!("<li>{}</li>\n", escape(&limit));
    }
    out += "</ul>\n</body></html>\n";
    Ok(out)
}

fn introduction(report: &Report, title: &str) -> String {
    let mut parts = vec![title.to_owned()];
    parts.extend(facts::preset(report).map(|name| format!("preset {name}")));
    parts.push(format!("experts: {}", facts::outcomes(report)));
    parts.extend(report.written.as_ref().map(|w| format!("{} export", w.export)));
    parts.push(format!("{} calibration tokens", count(report.tokens)));
    parts.push(format!("seed {}", report.seed));
    parts.push(format!("mcsmoe {} on {}", report.mcsmoe_version, report.device));
    format!("<p class=\"soft\">{}</p>\n", escape(&parts.join(" · ")))
}

fn tiles(report: &Report, details: &Details) -> String {
    let mut tiles = Vec::new();
    let experts = report.experts;
    tiles.push(("experts", format!("{} → {}", count(experts.before), count(experts.after))));
    if let Some(written) = &report.written {
        let (expert, tensor) = (written.expert_bytes, written.tensor_bytes);
        tiles.push(("expert bytes saved", percent(expert.saved())));
        let change = format!("{} → {}", bytes(tensor.before), bytes(tensor.after));
        tiles.push(("tensor bytes", change));
    }
    match &details.quality {
        Some(Quality::Comparison(found)) => {
            let (before, after) = (&found.original.score, &found.other.score);
            let change = format!("{:.2} → {:.2}", before.perplexity, after.perplexity);
            tiles.push(("perplexity", change));
            tiles.push(("KL divergence, nats", format!("{:.4}", found.kl)));
        }
        Some(Quality::Score(found)) => {
            tiles.push(("perplexity", format!("{:.2}", found.score.perplexity)));
        }
        None => {}
    }
    let tile = |(what, value): &(&str, String)| {
        format!(
            "<div class=\"tile\"><b>{}</b><span class=\"soft\">{what}</span></div>",
            escape(value)
        )
    };
    format!("<div class=\"tiles\">{}</div>\n", tiles.iter().map(tile).collect::<String>())
}

fn sizes(report: &Report) -> String {
    let rows = facts::sizes(report).into_iter().map(|row| {
        let cells = [row.before, row.after, row.saved].map(|c| format!("<td class=\"n\">{c}</td>"));
        format!("<tr><td>{}</td>{}</tr>", escape(row.what), cells.concat())
    });
    table(&["", "!before", "!after", "!saved"], &rows.collect::<String>())
}

/// Columns of numbers begin with `!`.
fn table(heads: &[&str], rows: &str) -> String {
    let head = |name: &&str| match name.strip_prefix('!') {
        Some(name) => format!("<th class=\"n\">{name}</th>"),
        None => format!("<th>{name}</th>"),
    };
    let heads: String = heads.iter().map(head).collect();
    format!("<div class=\"scroll\"><table><tr>{heads}</tr>{rows}</table></div>\n")
}

fn quality(quality: &Quality) -> String {
    let number = |x: f64| format!("<td class=\"n\">{x:.3}</td>");
    match quality {
        Quality::Score(found) => {
            let row = |name: &str, score: f64, tokens: u64| {
                let (name, tokens) = (escape(name), count(tokens));
                format!("<tr><td>{name}</td>{}<td class=\"n\">{tokens}</td></tr>", number(score))
            };
            let mut rows = row("all", found.score.perplexity, found.score.tokens);
            for file in &found.files {
                rows += &row(&file.name, file.score.perplexity, file.score.tokens);
            }
            table(&["text", "!perplexity", "!tokens"], &rows)
        }
        Quality::Comparison(found) => {
            let row = |name: &str, one: f64, two: f64, tokens: u64| {
                let (name, tokens) = (escape(name), count(tokens));
                let both = number(one) + &number(two);
                format!("<tr><td>{name}</td>{both}<td class=\"n\">{tokens}</td></tr>")
            };
            let perplexity = |e: &Evaluation| e.score.perplexity;
            let (one, two) = (&found.original, &found.other);
            let mut rows = row("all", perplexity(one), perplexity(two), two.score.tokens);
            for (a, b) in one.files.iter().zip(&two.files) {
                rows += &row(&a.name, a.score.perplexity, b.score.perplexity, b.score.tokens);
            }
            let heads = ["text", "!perplexity before", "!after", "!tokens"];
            let words = format!(
                "<p>KL divergence from the original {:.4} nats; both find the same token most \
                 likely at {} of the positions.</p>\n",
                found.kl,
                percent(found.agreement)
            );
            table(&heads, &rows) + &words
        }
    }
}

fn recipe(report: &Report) -> String {
    let stages: String =
        report.stages.iter().map(|stage| format!("<li>{}</li>", escape(stage))).collect();
    let mut out = format!("<h2>Recipe</h2>\n<ol>{stages}</ol>\n");
    if let Some(recipe) = facts::recipe(report) {
        out += &format!("<pre>{}</pre>\n", escape(&recipe));
    }
    out
}

fn files(report: &Report, details: &Details) -> String {
    let mut out = String::new();
    if !details.files.is_empty() {
        let rows = details.files.iter().map(|file| {
            let (name, size, hash) = (escape(&file.name), bytes(file.bytes), escape(&file.sha256));
            format!(
                "<tr><td>{name}</td><td class=\"n\">{size}</td><td><code>{hash}</code></td></tr>"
            )
        });
        out += "<h2>Files</h2>\n";
        out += &table(&["name", "!bytes", "SHA-256"], &rows.collect::<String>());
    }
    let dropped = report.written.iter().flat_map(|w| &w.dropped);
    let rows: String = dropped
        .map(|(name, why)| {
            format!("<tr><td><code>{}</code></td><td>{}</td></tr>", escape(name), escape(why))
        })
        .collect();
    if !rows.is_empty() {
        out += "<h2>Tensors left out</h2>\n";
        out += &table(&["tensor", "why"], &rows);
    }
    out
}
