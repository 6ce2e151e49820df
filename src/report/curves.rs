//! Singular values of a layer, as curves over their number; both axes are logarithms.

use plotters::chart::ChartBuilder;
use plotters::element::{PathElement, Text};
use plotters::style::Color;
use plotters::style::text_anchor::{HPos, VPos};

use super::chart::{Area, Drawn, GREY, SERIES, faint, svg, words};
use crate::error::Result;
use crate::pipeline::{LayerReport, SpectrumReport};

/// Pixels of a layer's picture.
const SIZE: (u32, u32) = (1000, 220);
/// The least share of the largest singular value that is drawn, as a power of ten.
const DEEPEST: f64 = -4.0;

/// Gate, up and down side by side; nothing where no singular values were measured.
pub(super) fn of_layer(layer: &LayerReport) -> Result<String> {
    let drawn: Vec<&SpectrumReport> =
        layer.spectra.iter().filter(|s| s.index.len() > 1 && !s.original.is_empty()).collect();
    if drawn.is_empty() {
        return Ok(String::new());
    }
    let label = format!("singular values of the matrices of {}", layer.layer);
    let low = depth(&drawn);
    let picture = svg(SIZE, "curves", &label, |root| {
        let panels = root.split_evenly((1, drawn.len()));
        panels.iter().zip(&drawn).try_for_each(|(panel, spectrum)| one(panel, spectrum, low))
    })?;
    Ok(format!("<figure class=\"spectra\">{picture}</figure>"))
}

/// Original, merged and, if there is one, compressed.
fn curves(spectrum: &SpectrumReport) -> impl Iterator<Item = &[f32]> {
    let first = [&spectrum.original, &spectrum.merged].into_iter();
    first.chain(&spectrum.compressed).map(Vec::as_slice)
}

/// The same lower end for all panels of a layer: the lowest value that no compression has cut off,
/// but no more than four decades.
fn depth(drawn: &[&SpectrumReport]) -> f64 {
    let whole = drawn.iter().flat_map(|s| s.original.iter().chain(&s.merged));
    let values = whole.filter(|v| **v > 0.0);
    let lowest = values.fold(1.0f64, |least, &v| least.min(f64::from(v)));
    (lowest.log10() - 0.05).clamp(DEEPEST, -0.1)
}

fn one(panel: &Area<'_>, spectrum: &SpectrumReport, low: f64) -> Drawn {
    let last = f64::from(spectrum.index.last().copied().unwrap_or(1).max(2)).log10();
    let mut chart = ChartBuilder::on(panel)
        .margin(8)
        .margin_top(24)
        .x_label_area_size(24)
        .y_label_area_size(44)
        .build_cartesian_2d(0.0..last, low..0.0)?;
    // Lines and numbers at 1, 2, 5, 10, 20, 50, … of both axes.
    let text = |s: String, at: (f64, f64), side, end| Text::new(s, at, words(13, side, end));
    for tick in ticks(last) {
        let line = vec![(tick.log10(), low), (tick.log10(), 0.0)];
        chart.draw_series([PathElement::new(line, faint())])?;
    }
    let labels: Vec<f64> = ticks(last).filter(|t| t.log10().fract() == 0.0).collect();
    let labels = if labels.len() > 1 { labels } else { ticks(last).collect() };
    chart.draw_series(labels.iter().map(|t| {
        let number = format!("\u{a0}{t}\u{a0}");
        text(number, (t.log10(), 1.03 * low), HPos::Center, VPos::Top)
    }))?;
    for tick in ticks(-low) {
        let y = -tick.log10();
        let line = vec![(0.0, y), (last, y)];
        chart.draw_series([PathElement::new(line, faint())])?;
    }
    let deep = low < -1.0;
    let marked = ticks(-low).filter(|t| !deep || t.log10().fract() == 0.0);
    chart.draw_series(marked.map(|t| {
        let number = format!("{}\u{a0}", 1.0 / t);
        text(number, (0.0, -t.log10()), HPos::Right, VPos::Center)
    }))?;
    for (values, colour) in curves(spectrum).zip(SERIES) {
        let points = spectrum.index.iter().zip(values);
        let all = points.map(|(&i, &v)| (f64::from(i).log10(), f64::from(v).max(1e-30).log10()));
        // What falls out of the picture ends at its lower edge.
        let mut inside = true;
        let visible = all.take_while(|(_, y)| std::mem::replace(&mut inside, *y >= low));
        let line: Vec<(f64, f64)> = visible.map(|(x, y)| (x, y.max(low))).collect();
        chart.draw_series([PathElement::new(line, colour.stroke_width(2))])?;
    }
    let (width, _) = panel.dim_in_pixel();
    let title = words(14, HPos::Center, VPos::Top);
    panel.draw(&Text::new(spectrum.role.to_string(), (width as i32 / 2 + 22, 4), title))?;
    let axes = vec![(0.0, 0.0), (0.0, low), (last, low)];
    chart.draw_series([PathElement::new(axes, GREY.mix(0.7).stroke_width(1))])?;
    Ok(())
}

/// 1, 2, 5, 10, … up to ten to the power of `end`.
fn ticks(end: f64) -> impl Iterator<Item = f64> {
    let steps = (0..12).flat_map(|power| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(power)));
    steps.take_while(move |tick| tick.log10() <= end + 1e-9)
}
