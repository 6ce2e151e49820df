//! The layers on the page: charts over all of them, then one section each.

use plotters::style::RGBColor;

use super::chart::{Bars, GREY, SERIES};
use super::curves;
use super::details::Details;
use super::heat;
use super::text::{escape, percent};
use crate::error::Result;
use crate::model::{LayerId, Stack};
use crate::pipeline::{CompressionReport, LayerReport, Report};

/// A series of a chart: its name, and a value for every layer.
type Named<'a> = (&'a str, Vec<f64>);

/// Short names below bars: the index, with the first letter of the stack where there are two.
fn short(id: LayerId) -> String {
    match id.stack {
        Stack::Causal => id.index.to_string(),
        Stack::Encoder => format!("e{}", id.index),
        Stack::Decoder => format!("d{}", id.index),
    }
}

fn key(colour: RGBColor, name: &str, first: bool) -> String {
    let RGBColor(r, g, b) = colour;
    let class = if first { "key first" } else { "key" };
    let style = format!("background:rgb({r},{g},{b})");
    format!("<span class=\"{class}\" style=\"{style}\"></span>{}", escape(name))
}

/// Bars over the layers, with what their colours mean.
fn chart(
    title: &str,
    about: &str,
    ids: &[LayerId],
    series: &[Named<'_>],
    value: fn(f64) -> String,
) -> Result<String> {
    let names: Vec<String> = ids.iter().map(|id| short(*id)).collect();
    let values: Vec<Vec<f64>> = series.iter().map(|(_, values)| values.clone()).collect();
    let bars = Bars {
        label: title,
        size: (1000, 240),
        names: &names,
        series: &values,
        colour: &|s, _| SERIES[s % SERIES.len()],
        value,
        line: None,
        borders: &[],
    };
    let keys = series.iter().enumerate().map(|(s, (name, _))| key(SERIES[s % 3], name, s == 0));
    let keys: String = keys.collect();
    let (picture, title) = (bars.draw()?, escape(title));
    Ok(format!(
        "<figure class=\"wide\"><h3>{title}</h3>{picture}\
         <figcaption>{keys}<br/>{}</figcaption></figure>\n",
        escape(about)
    ))
}

fn plain(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Experts, output errors and stable ranks over the layers.
pub(super) fn overview(report: &Report, details: &Details) -> Result<String> {
    let layers = &report.layers;
    let ids: Vec<LayerId> = layers.iter().map(|l| l.layer).collect();
    let each = |of: fn(&LayerReport) -> f64| layers.iter().map(of).collect::<Vec<f64>>();
    let experts = [
        ("before", each(|l| l.experts.before as f64)),
        ("after", each(|l| l.experts.after as f64)),
    ];
    let about = "MoE layers from left to right.";
    let mut out = chart("Experts per layer", about, &ids, &experts, plain)?;
    if layers.iter().any(|l| l.output_error.is_some()) {
        let mapped = each(|l| l.output_error.map_or(f64::NAN, |e| e.mapped));
        let mut series = vec![("with the original's router and an expert map", mapped)];
        if layers.iter().any(|l| l.output_error.is_some_and(|e| e.narrowed.is_some())) {
            let narrowed = |l: &LayerReport| l.output_error.and_then(|e| e.narrowed);
            let narrowed = layers.iter().map(|l| narrowed(l).unwrap_or(f64::NAN)).collect();
            series.push(("with the narrowed router", narrowed));
        }
        let about = "Σ‖y − y'‖² / Σ‖y‖² of the routed experts on calibration samples.";
        out += &chart("Output error on calibration samples", about, &ids, &series, percent)?;
    }
    if let Some(found) = details.quality.as_ref().and_then(|q| q.comparison()) {
        let ids: Vec<LayerId> = found.layers.iter().map(|l| l.layer).collect();
        let errors = found.layers.iter().map(|l| l.error).collect();
        let about = "Σ‖y − y'‖² / Σ‖y‖² of the routed experts, both on the original's inputs.";
        let series = [("beside the original", errors)];
        out += &chart("Output error on the evaluated text", about, &ids, &series, percent)?;
    }
    if layers.iter().any(|l| l.compression.is_some()) {
        let rank = |of: fn(&CompressionReport) -> f64| {
            layers.iter().map(|l| l.compression.as_ref().map_or(f64::NAN, of)).collect()
        };
        let series = [
            ("original", rank(|c| c.stable_rank.original)),
            ("merged", rank(|c| c.stable_rank.merged)),
            ("compressed", rank(|c| c.stable_rank.compressed)),
        ];
        let about = "Mean of ‖W‖²_F / ‖W‖²_2 over the matrices of a layer's experts: the lower, \
                     the better a low rank holds them.";
        out += &chart("Stable rank", about, &ids, &series, plain)?;
    }
    Ok(out)
}

/// Similarity, usage and groups, layer by layer.
pub(super) fn sections(report: &Report) -> Result<String> {
    let layers = &report.layers;
    let range = heat::range(layers);
    let metric = report.method("similarity");
    let metric = metric.map_or(String::new(), |name| format!(" by {name}"));
    let mut out = format!(
        "<figure class=\"wide\">{}<figcaption>Similarity of two experts{}, the \
         same colours in all layers. Experts are in the order of their groups, which are framed; \
         dropped experts come last.</figcaption></figure>\n<p class=\"soft\">Usage: {}{}{}; the \
         dashed line is even use.</p>\n",
        heat::scale(range)?,
        escape(&metric),
        key(SERIES[0], "dominant expert of its group", true),
        key(SERIES[1], "another of its group", false),
        key(GREY, "dropped", false),
    );
    if layers.iter().any(|l| !l.spectra.is_empty()) {
        let compressed = layers.iter().flat_map(|l| &l.spectra).any(|s| s.compressed.is_some());
        out += &format!(
            "<p class=\"soft\">Singular values over the largest of their matrix, means over \
             experts: {}{}{}. A line that falls early is a matrix that a low rank holds.</p>\n",
            key(SERIES[0], "original", true),
            key(SERIES[1], "merged", false),
            if compressed { key(SERIES[2], "compressed", false) } else { String::new() },
        );
    }
    for layer in layers {
        out += &section(layer, heat::side(layer, layers.len()), range)?;
    }
    Ok(out)
}

fn section(layer: &LayerReport, cells: usize, range: (f64, f64)) -> Result<String> {
    let (before, after) = (layer.experts.before, layer.experts.after);
    let heat = heat::map(layer, cells, range)?;
    let fine = match cells < layer.similarity.len() {
        true => "<figcaption>Every cell is a mean over neighbouring experts.</figcaption>",
        false => "",
    };
    let (id, usage, groups) = (layer.layer, usage(layer)?, groups(layer));
    let curves = curves::of_layer(layer)?;
    Ok(format!(
        "<section class=\"layer\" id=\"{id}\"><h3>{id}: {before} → {after} experts</h3>\
         <div class=\"pictures\"><figure>{heat}{fine}</figure><figure>{usage}</figure></div>\
         {curves}{groups}</section>\n"
    ))
}

/// How often each expert was used, in the order of the heat map.
fn usage(layer: &LayerReport) -> Result<String> {
    let order = heat::order(layer);
    let dominants: Vec<usize> = layer.groups.iter().map(|g| g.dominant).collect();
    let colour = |_: usize, at: usize| match order.get(at) {
        Some(i) if dominants.contains(i) => SERIES[0],
        Some(i) if layer.dropped.contains(i) => GREY,
        _ => SERIES[1],
    };
    let ends = layer.groups.iter().scan(0, |end, g| {
        *end += g.members.len();
        Some(*end)
    });
    let borders: Vec<usize> = ends.filter(|&end| end < order.len()).collect();
    let names: Vec<String> = order.iter().map(usize::to_string).collect();
    let values = vec![order.iter().map(|&i| layer.usage[i]).collect()];
    let bars = Bars {
        label: &format!("usage of the experts of {}", layer.layer),
        size: (640, 316),
        names: &names,
        series: &values,
        colour: &colour,
        value: percent,
        line: Some(1.0 / layer.usage.len().max(1) as f64),
        borders: &borders,
    };
    bars.draw()
}

/// Every group with its members, the dominant in bold.
fn groups(layer: &LayerReport) -> String {
    let mut rows = String::new();
    for (g, group) in layer.groups.iter().enumerate() {
        let member = |&i: &usize| match i == group.dominant {
            true => format!("<b>{i}</b>"),
            false => i.to_string(),
        };
        let members: Vec<String> = group.members.iter().map(member).collect();
        let (members, usage) = (members.join(", "), percent(group.usage));
        rows += &format!("<tr><td>{g}</td><td>{members}</td><td class=\"n\">{usage}</td></tr>");
    }
    if !layer.dropped.is_empty() {
        let dropped: Vec<String> = layer.dropped.iter().map(usize::to_string).collect();
        rows += &format!("<tr><td>dropped</td><td>{}</td><td></td></tr>", dropped.join(", "));
    }
    format!(
        "<details><summary>{} groups</summary><div class=\"scroll\"><table><tr><th>group</th>\
         <th>experts, the dominant one in bold</th><th class=\"n\">usage</th></tr>{rows}</table>\
         </div></details>",
        layer.groups.len()
    )
}
