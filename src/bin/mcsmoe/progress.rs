//! Progress on standard error: one line that moves on a terminal, a line per layer elsewhere.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mcsmoe::calibrate::text::TextRecord;
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

/// How progress is shown: `Bars` on a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Quiet,
    Lines,
    Bars,
}

impl Style {
    fn of(global: &Global) -> Self {
        match (global.quiet || global.json, std::io::stderr().is_terminal()) {
            (true, _) => Self::Quiet,
            (false, true) => Self::Bars,
            (false, false) => Self::Lines,
        }
    }
}

/// How often a line on a terminal moves, also while one layer takes long.
const TICK: Duration = Duration::from_millis(200);

/// An observer that shows phase, layer, time left and peak memory.
pub(crate) struct Progress {
    style: Style,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bar: Option<ProgressBar>,
    pass: Option<Pass>,
}

/// One way through the layers. Phases that take turns in every layer are one pass.
#[derive(Debug, Clone, Copy)]
struct Pass {
    since: Instant,
    /// Layers done when it began, now, and in all.
    first: usize,
    done: usize,
    total: usize,
}

impl Pass {
    fn begin(done: usize, total: usize) -> Self {
        Self { since: Instant::now(), first: done, done, total }
    }

    /// The same pass one step on, or the next one.
    fn step(old: Option<Self>, done: usize, total: usize) -> Self {
        match old {
            Some(pass) if pass.total == total && (pass.done..=pass.done + 1).contains(&done) => {
                Self { done, ..pass }
            }
            _ => Self::begin(done, total),
        }
    }

    /// Seconds that are left if the layers to come take as long as those of this pass.
    fn left(&self) -> Option<f64> {
        let finished = self.done - self.first;
        let each = self.since.elapsed().as_secs_f64() / finished as f64;
        (finished > 0).then(|| each * (self.total - self.done) as f64)
    }

    fn status(&self) -> String {
        let mut status = String::new();
        if let Some(left) = self.left() {
            let _ = write!(status, ", {} left", show::time(left));
        }
        if let Some(peak) = peak_memory() {
            let _ = write!(status, ", peak memory {}", show::bytes(peak));
        }
        status
    }
}

impl Progress {
    pub(crate) fn new(global: &Global) -> Self {
        Self { style: Style::of(global), state: Mutex::default() }
    }

    /// Ends the line.
    pub(crate) fn done(&self) {
        if let Ok(mut state) = self.state.lock()
            && let Some(bar) = state.bar.take()
        {
            bar.finish_and_clear();
        }
    }
}

impl Observer for Progress {
    fn layer_started(&self, layer: LayerId, phase: Phase, done: usize, total: usize) {
        let Ok(mut state) = self.state.lock() else { return };
        let pass = Pass::step(state.pass, done, total);
        state.pass = Some(pass);
        let what = format!("{phase} {layer} ({} of {total})", done + 1);
        match self.style {
            Style::Quiet => {}
            Style::Lines => {
                let _ = writeln!(std::io::stderr(), "{what}{}", pass.status());
            }
            Style::Bars => {
                let bar = state.bar.get_or_insert_with(|| line(true));
                bar.set_length(total as u64);
                bar.set_position(done as u64);
                bar.set_message(what + &pass.status());
            }
        }
    }

    fn finished(&self, _: &Report) {
        self.done();
    }
}

/// Does something that has no layers to count, and says so while it lasts.
pub(crate) fn during<T>(global: &Global, what: &str, work: impl FnOnce() -> T) -> T {
    let shown = match Style::of(global) {
        Style::Quiet => None,
        Style::Lines => {
            let _ = writeln!(std::io::stderr(), "{what}");
            None
        }
        Style::Bars => {
            let bar = line(false);
            bar.set_message(what.to_owned());
            Some(bar)
        }
    };
    let result = work();
    shown.inspect(ProgressBar::finish_and_clear);
    result
}

/// One line on a terminal, as wide as that: what has no room is cut off, not wrapped.
fn line(counts: bool) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr());
    let template = match counts {
        true => "{spinner} [{bar:12}] {elapsed:>4}  {wide_msg}",
        false => "{spinner} {elapsed:>4}  {wide_msg}",
    };
    // The template is ours; were it wrong, the plain bar would do.
    let style = ProgressStyle::with_template(template);
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style.progress_chars("=> "));
    bar.enable_steady_tick(TICK);
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_that_take_turns_are_one_pass() {
        let one = Pass::step(None, 0, 4);
        let same = Pass::step(Some(one), 0, 4);
        assert_eq!((same.since, same.left()), (one.since, None), "the next phase of that layer");
        let next = Pass::step(Some(same), 1, 4);
        assert!(next.since == one.since && next.left().is_some());
        let again = Pass::step(Some(Pass { done: 3, ..next }), 0, 4);
        assert_eq!((again.first, again.done, again.left()), (0, 0, None), "another pass");
        assert_eq!(Pass::step(Some(next), 0, 2).total, 2);
    }
}
