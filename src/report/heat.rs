//! Similarities of a layer as a picture, its groups framed.

use plotters::element::{Rectangle, Text};
use plotters::style::colors::colormaps::{ColorMap, ViridisRGB};
use plotters::style::text_anchor::{HPos, VPos};
use plotters::style::{Color, RGBColor};

use super::chart::{Drawn, svg, words};
use crate::error::Result;
use crate::pipeline::LayerReport;

/// Frames of groups: a colour that the map of values lacks.
const FRAME: RGBColor = RGBColor(240, 32, 80);
/// Pixels of a picture's side, without its labels.
const SIDE: i32 = 288;
/// Room for labels above and on the left.
const EDGE: i32 = 26;
/// Cells of all pictures of a page together, about 6 MB of text.
const CELLS: usize = 60_000;

/// The experts of a layer, groups together, dropped ones last.
pub(super) fn order(layer: &LayerReport) -> Vec<usize> {
    let members = layer.groups.iter().flat_map(|g| &g.members);
    let all = members.chain(&layer.dropped).copied();
    all.filter(|&i| i < layer.usage.len()).collect()
}

/// The lowest and highest similarity of two different experts, over all layers.
pub(super) fn range(layers: &[LayerReport]) -> (f64, f64) {
    let mut range = (f64::INFINITY, f64::NEG_INFINITY);
    for layer in layers {
        for (i, row) in layer.similarity.iter().enumerate() {
            for (_, &s) in row.iter().enumerate().filter(|(j, s)| *j != i && s.is_finite()) {
                range = (range.0.min(s.into()), range.1.max(s.into()));
            }
        }
    }
    if range.0 <= range.1 { range } else { (0.0, 1.0) }
}

/// Cells along a side: one an expert, unless the page would become too large.
pub(super) fn side(layer: &LayerReport, layers: usize) -> usize {
    let fair = (CELLS as f64 / layers.max(1) as f64).sqrt() as usize;
    layer.similarity.len().min(fair.max(8))
}

/// The colour of a similarity.
fn colour(value: f64, (low, high): (f64, f64)) -> RGBColor {
    let share = if high > low { (value - low) / (high - low) } else { 0.5 };
    ViridisRGB.get_color(share.clamp(0.0, 1.0) as f32)
}

/// The similarities of `layer` in `cells²` cells; where these are fewer than experts, each is the
/// mean over a block of neighbours.
pub(super) fn map(layer: &LayerReport, cells: usize, range: (f64, f64)) -> Result<String> {
    let size = (SIDE + EDGE + 2) as u32;
    let label = format!("similarity of the experts of {}, groups framed", layer.layer);
    svg((size, size), "heat", &label, |root| {
        let order = order(layer);
        let n = order.len();
        if n == 0 {
            return Ok(());
        }
        let cells = cells.clamp(1, n);
        let at = |part: usize, of: usize| EDGE + (part as i64 * i64::from(SIDE) / of as i64) as i32;
        let block = |c: usize| &order[c * n / cells..(c + 1) * n / cells];
        for (r, c) in (0..cells).flat_map(|r| (0..cells).map(move |c| (r, c))) {
            let Some(mean) = mean(layer, block(r), block(c)) else { continue };
            let corners = [(at(c, cells), at(r, cells)), (at(c + 1, cells), at(r + 1, cells))];
            root.draw(&Rectangle::new(corners, colour(mean, range).filled()))?;
        }
        let mut start = 0;
        for group in &layer.groups {
            let end = start + group.members.len();
            // Two lines, because one is all that the backend draws for any width.
            for inset in [0, 1] {
                let (from, to) = (at(start, n) + inset, at(end, n) - inset);
                root.draw(&Rectangle::new([(from, from), (to, to)], FRAME))?;
            }
            start = end;
        }
        labels(root, &order, &at)
    })
}

/// Numbers of experts along both edges, as many as have room.
fn labels(
    root: &super::chart::Area<'_>,
    order: &[usize],
    at: &dyn Fn(usize, usize) -> i32,
) -> Drawn {
    let n = order.len();
    let every = n.div_ceil(16);
    for (i, expert) in order.iter().enumerate().step_by(every) {
        let middle = (at(i, n) + at(i + 1, n)) / 2;
        let above = words(13, HPos::Center, VPos::Bottom);
        root.draw(&Text::new(expert.to_string(), (middle, EDGE - 5), above))?;
        let beside = words(13, HPos::Right, VPos::Center);
        root.draw(&Text::new(expert.to_string(), (EDGE - 5, middle), beside))?;
    }
    Ok(())
}

fn mean(layer: &LayerReport, rows: &[usize], columns: &[usize]) -> Option<f64> {
    let value = |r: usize, c: usize| layer.similarity.get(r)?.get(c).copied();
    let pairs = rows.iter().flat_map(|&r| columns.iter().map(move |&c| (r, c)));
    let (mut sum, mut count) = (0.0, 0.0f64);
    for s in pairs.filter_map(|(r, c)| value(r, c)).filter(|s| s.is_finite()) {
        (sum, count) = (sum + f64::from(s), count + 1.0);
    }
    (count > 0.0).then(|| sum / count)
}

/// What the colours mean.
pub(super) fn scale((low, high): (f64, f64)) -> Result<String> {
    const STEPS: i32 = 64;
    svg((320, 20), "heat", "colours from the least to the most similar", |root| {
        for i in 0..STEPS {
            let share = f64::from(i) / f64::from(STEPS - 1);
            let left = 50 + i * 220 / STEPS;
            let corners = [(left, 2), (50 + (i + 1) * 220 / STEPS, 18)];
            root.draw(&Rectangle::new(corners, colour(share, (0.0, 1.0)).filled()))?;
        }
        let style = |side| words(13, side, VPos::Center);
        root.draw(&Text::new(format!("{low:.2}"), (44, 10), style(HPos::Right)))?;
        root.draw(&Text::new(format!("{high:.2}"), (276, 10), style(HPos::Left)))
    })
}
