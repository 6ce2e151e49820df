//! Text for people or one JSON value for programs, on standard output; nothing else goes there.

use std::io::{self, Write};
use std::process::ExitCode;

use mcsmoe::pipeline::Change;
pub(crate) use mcsmoe::report::{bytes, count};
use serde::Serialize;
use serde_json::json;

use crate::exit::{Failure, Outcome};

/// Where results go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Show {
    json: bool,
}

impl Show {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Writes `value` as JSON, or lets `text` write it for people.
    pub(crate) fn result(
        &self,
        value: &impl Serialize,
        text: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Outcome {
        let mut out = io::stdout().lock();
        let written = if self.json {
            serde_json::to_writer_pretty(&mut out, value)
                .map_err(io::Error::from)
                .and_then(|()| writeln!(out))
        } else {
            text(&mut out)
        };
        whole(written.and_then(|()| out.flush()))
    }

    /// Writes a failure and returns its exit code: text to standard error, JSON to standard output.
    pub(crate) fn failure(&self, failure: &Failure) -> ExitCode {
        let (code, kind) = failure.code();
        // Findings have been printed with all that was found.
        if self.json && !matches!(failure, Failure::Verification(_)) {
            let error = json!({ "kind": kind, "exit_code": code, "message": failure.to_string() });
            let _ = writeln!(io::stdout(), "{:#}", json!({ "error": error }));
        }
        let _ = writeln!(io::stderr(), "error: {failure}");
        ExitCode::from(code)
    }
}

/// A reader that has seen enough is no failure.
fn whole(written: io::Result<()>) -> Outcome {
    match written {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

/// A figure before and after, and what was saved.
pub(crate) fn change(
    out: &mut dyn Write,
    what: &str,
    found: Change<u64>,
    show: fn(u64) -> String,
) -> io::Result<()> {
    let (Change { before, after }, saved) = (found, 100.0 * found.saved());
    writeln!(out, "{what}: {} → {} ({saved:.1}% saved)", show(before), show(after))
}

/// Seconds in the two largest units that matter.
pub(crate) fn time(seconds: f64) -> String {
    if seconds < 60.0 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_readable() {
        assert_eq!(time(59.94), "59.9 s");
        assert_eq!(time(61.0), "1 min 1 s");
        assert_eq!(time(7260.0), "2 h 1 min");
    }
}
