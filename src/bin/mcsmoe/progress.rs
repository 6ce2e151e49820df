//! Progress on standard error: a bar per phase on a terminal, a line per layer elsewhere.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::sync::Mutex;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use mcsmoe::calibrate::text::TextRecord;
use mcsmoe::checkpoint::Checkpoint;
use mcsmoe::model::LayerId;
use mcsmoe::pipeline::{Observer, Phase, Report};

use crate::args::Global;
use crate::show;

/// Largest resident memory of this process so far, in bytes; `None` where it cannot be known.
pub(crate) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// What a user should know of a text; with --json it is in the report.
pub(crate) fn warn(global: &Global, text: &TextRecord) {
    if !global.json {
        for warning in text.warnings() {
            let _ = writeln!(std::io::stderr(), "warning: {warning}");
        }
    }
}

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Quiet,
    Lines,
    Bars,
}

/// An observer that shows layer, phase, bytes, time left and peak memory.
pub(crate) struct Progress {
    style: Style,
    /// Bytes of experts on the disk.
    sizes: BTreeMap<LayerId, u64>,
    state: Mutex<State>,
}

struct State {
    phase: Option<Phase>,
    bar: Option<ProgressBar>,
    since: Instant,
}

impl Progress {
    pub(crate) fn new(global: &Global, source: &Checkpoint) -> Self {
        let style = match (global.quiet || global.json, std::io::stderr().is_terminal()) {
            (true, _) => Style::Quiet,
            (false, true) => Style::Bars,
            (false, false) => Style::Lines,
        };
        let sizes = source.layers().iter().map(|l| (l.id, l.expert_bytes)).collect();
        let state = State { phase: None, bar: None, since: Instant::now() };
        Self { style, sizes, state: Mutex::new(state) }
    }

    /// Ends the last phase.
    pub(crate) fn done(&self) {
        if let Ok(mut state) = self.state.lock() {
            let old = state.bar.take();
            old.inspect(ProgressBar::finish);
        }
    }

    /// Bytes behind and in all, when `done` of `total` layers are done. A resumed phase has fewer
    /// layers than the model, a calibration may have more.
    fn bytes(&self, done: usize, total: usize) -> (u64, u64) {
        let all: u64 = self.sizes.values().sum();
        let known = self.sizes.len().max(1) as u64;
        let all = if (total as u64) < known { all * total as u64 / known } else { all };
        (all * done as u64 / total.max(1) as u64, all)
    }
}

impl Observer for Progress {
    fn layer_started(&self, layer: LayerId, phase: Phase, done: usize, total: usize) {
        if self.style == Style::Quiet {
            return;
        }
        let Ok(mut state) = self.state.lock() else { return };
        let (behind, all) = self.bytes(done, total);
        if state.phase != Some(phase) {
            state.phase = Some(phase);
            state.since = Instant::now();
            let old = state.bar.take();
            old.inspect(ProgressBar::finish);
            if self.style == Style::Bars {
                state.bar = Some(bar(all));
            }
        }
        match &state.bar {
            Some(bar) => {
                bar.set_prefix(phase.to_string());
                bar.set_message(format!("{layer} ({} of {total})", done + 1));
                bar.set_position(behind);
            }
            None => {
                let line = line(&state, (layer, phase), (done, total), (behind, all));
                let _ = writeln!(std::io::stderr(), "{line}");
            }
        }
    }

    fn finished(&self, _: &Report) {
        self.done();
    }
}

/// One layer, where there is no terminal.
fn line(
    state: &State,
    (layer, phase): (LayerId, Phase),
    (done, total): (usize, usize),
    (behind, all): (u64, u64),
) -> String {
    let mut line = format!("{phase} {layer} ({} of {total})", done + 1);
    let _ = write!(line, ", {} of {}", show::bytes(behind), show::bytes(all));
    if done > 0 {
        let left = state.since.elapsed().as_secs_f64() * (total - done) as f64 / done as f64;
        let _ = write!(line, ", {} left", show::time(left));
    }
    if let Some(peak) = peak_memory() {
        let _ = write!(line, ", peak memory {}", show::bytes(peak));
    }
    line
}

fn bar(bytes: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr());
    let template = "{prefix:9} {msg:24} [{bar:24}] {decimal_bytes} of {decimal_total_bytes}, \
                    {eta} left, peak memory {peak}";
    let peak = |_: &ProgressState, w: &mut dyn std::fmt::Write| {
        let _ = w.write_str(&peak_memory().map_or("unknown".into(), show::bytes));
    };
    // The template is ours; were it wrong, the plain bar would do.
    let style = ProgressStyle::with_template(template);
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style.with_key("peak", peak).progress_chars("=> "));
    bar
}
