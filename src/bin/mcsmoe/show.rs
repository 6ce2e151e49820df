//! Text for people or one JSON value for programs, on standard output; nothing else goes there.

use std::io::{self, Write};
use std::process::ExitCode;

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
        // A doubt has been printed with all that was found.
        if self.json && !matches!(failure, Failure::Doubt(_)) {
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

/// Bytes in units of 1000, as disks are sold and shards are counted.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let (mut value, mut unit) = (n as f64, 0);
    while value >= 999.95 && unit + 1 < UNITS.len() {
        (value, unit) = (value / 1000.0, unit + 1);
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A number with its thousands apart.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
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
    fn numbers_are_readable() {
        assert_eq!(["0 B", "999 B"], [bytes(0), bytes(999)].map(|s| s).each_ref().map(|s| &**s));
        assert_eq!(bytes(1000), "1.0 kB");
        assert_eq!(bytes(999_960_000), "1.0 GB");
        assert_eq!(
            (count(7), count(1234), count(1_000_000)),
            ("7".into(), "1,234".into(), "1,000,000".into())
        );
        assert_eq!(time(59.94), "59.9 s");
        assert_eq!(time(61.0), "1 min 1 s");
        assert_eq!(time(7260.0), "2 h 1 min");
    }
}
