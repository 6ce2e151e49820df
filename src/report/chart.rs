//! Bars, as SVG. Text takes the page's colour, so that one picture serves light and dark.

use plotters::backend::SVGBackend;
use plotters::chart::ChartBuilder;
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, DrawingAreaErrorKind, IntoDrawingArea};
use plotters::element::{PathElement, Rectangle};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, IntoFont, RGBColor, ShapeStyle, TextStyle};

use super::text::escape;
use crate::error::{ErrorKind, Result};

/// Colours that can be told apart on white and on black, also by most who see few colours.
pub(super) const SERIES: [RGBColor; 3] =
    [RGBColor(76, 120, 168), RGBColor(245, 133, 24), RGBColor(84, 162, 75)];
/// Axes, and what was dropped.
pub(super) const GREY: RGBColor = RGBColor(128, 128, 128);

/// Where everything is drawn.
pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// What drawing may end with.
pub(super) type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// An SVG element of this size with a description for those who cannot see it.
pub(super) fn svg(
    size: (u32, u32),
    class: &str,
    label: &str,
    draw: impl FnOnce(&Area<'_>) -> Drawn,
) -> Result<String> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        let drawn = draw(&root).and_then(|()| root.present());
        let failed = |e: DrawingAreaErrorKind<_>| e.to_string();
        drawn.map_err(|e| ErrorKind::Format { format: "SVG", reason: failed(e) })?;
    }
    let label = escape(label);
    Ok(text.replacen(
        "<svg ",
        &format!("<svg class=\"{class}\" role=\"img\" aria-label=\"{label}\" "),
        1,
    ))
}

/// Centred text of `size` pixels.
pub(super) fn words(size: u32, horizontal: HPos, vertical: VPos) -> TextStyle<'static> {
    let font = ("sans-serif", size).into_font().color(&GREY);
    font.pos(Pos::new(horizontal, vertical))
}

/// Thin lines that are seen on any ground.
pub(super) fn faint() -> ShapeStyle {
    GREY.mix(0.3).stroke_width(1)
}

/// Bars side by side: for every name one of each series.
pub(super) struct Bars<'a> {
    /// What is shown, for those who cannot see it.
    pub(super) label: &'a str,
    pub(super) size: (u32, u32),
    /// Below the bars.
    pub(super) names: &'a [String],
    pub(super) series: &'a [Vec<f64>],
    /// Colour of a bar: series, position.
    pub(super) colour: &'a dyn Fn(usize, usize) -> RGBColor,
    /// How a value is written.
    pub(super) value: fn(f64) -> String,
    /// A dashed line at this value.
    pub(super) line: Option<f64>,
    /// Lines between groups of bars, in bars from the left.
    pub(super) borders: &'a [usize],
}

impl Bars<'_> {
    pub(super) fn draw(&self) -> Result<String> {
        svg(self.size, "bars", self.label, |root| self.draw_on(root))
    }

    /// From 0, or the lowest value below it, to a little above the highest.
    fn range(&self) -> (f64, f64) {
        let values = || self.series.iter().flatten().chain(&self.line).filter(|v| v.is_finite());
        let low = values().fold(0.0f64, |a, &b| a.min(b));
        let high = values().fold(0.0f64, |a, &b| a.max(b));
        let room = 0.06 * (high - low);
        match high > low {
            true => (if low < 0.0 { low - room } else { 0.0 }, high + room),
            false => (0.0, 1.0),
        }
    }

    fn draw_on(&self, root: &Area<'_>) -> Drawn {
        let (n, (low, high)) = (self.names.len(), self.range());
        let mut chart = ChartBuilder::on(root)
            .margin(8)
            .x_label_area_size(28)
            .y_label_area_size(52)
            .build_cartesian_2d(-0.5..n as f64 - 0.5, low..high)?;
        let name = |x: &f64| match (x.round() as usize, (x - x.round()).abs() < 1e-6) {
            (i, true) if *x > -0.25 => self.names.get(i).cloned().unwrap_or_default(),
            _ => String::new(),
        };
        let widest = self.names.iter().map(String::len).max().unwrap_or(1) as u32;
        let fit = (self.size.0 - 60) / (8 * widest + 12);
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(GREY.mix(0.0))
            .bold_line_style(GREY.mix(0.25))
            .axis_style(GREY.mix(0.7))
            .label_style(words(14, HPos::Center, VPos::Center))
            .x_labels(n.min(fit.max(2) as usize))
            .x_label_formatter(&name)
            .y_labels(5)
            .y_label_formatter(&|y| (self.value)(*y))
            .draw()?;
        let width = 0.8 / self.series.len().max(1) as f64;
        for (s, values) in self.series.iter().enumerate() {
            chart.draw_series(values.iter().enumerate().filter(|(_, v)| v.is_finite()).map(
                |(i, &value)| {
                    let left = i as f64 - 0.4 + s as f64 * width;
                    let corners = [(left, 0.0), (left + width, value)];
                    Rectangle::new(corners, (self.colour)(s, i).filled())
                },
            ))?;
        }
        chart.draw_series(self.borders.iter().map(|&at| {
            let x = at as f64 - 0.5;
            PathElement::new(vec![(x, low), (x, high)], faint())
        }))?;
        let dashes = 40;
        let step = n as f64 / f64::from(dashes);
        let line = self.line.into_iter().flat_map(|y| (0..dashes).map(move |i| (f64::from(i), y)));
        chart.draw_series(line.map(|(i, y)| {
            let x = i * step - 0.5;
            PathElement::new(vec![(x, y), (x + 0.5 * step, y)], GREY.stroke_width(1))
        }))?;
        Ok(())
    }
}
