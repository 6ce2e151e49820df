//! Why a command ended, as a stable exit code.

use mcsmoe::report::bytes;
use mcsmoe::{Error, ErrorKind};

/// What every command returns.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

/// The table of exit codes, below every `--help`.
pub(crate) const HELP: &str = "\
Exit codes:
  0  done
  1  the system refused (disk, permission) or the arithmetic failed
  2  the command line or the recipe is wrong
  3  an input is wrong: missing, damaged, unsupported, or not of this model
  4  the number of experts that was asked for cannot be reached
  5  the target is in the way, or was left by another run
  6  verification failed
  7  more memory is needed than --max-memory allows";

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The library's error.
    Library(Error),
    /// A wrong command line.
    Usage(String),
    /// Something that verification found; it has been printed.
    Verification(usize),
    /// Predicted and allowed bytes.
    Memory { needed: u64, allowed: u64 },
    /// The output cannot be written.
    Output(std::io::Error),
}

impl Failure {
    /// Its exit code and a stable word for it.
    pub(crate) fn code(&self) -> (u8, &'static str) {
        match self {
            Self::Library(error) => of_kind(error.kind()),
            Self::Usage(_) => (2, "usage"),
            Self::Verification(_) => (6, "verification"),
            Self::Memory { .. } => (7, "memory"),
            Self::Output(_) => (1, "io"),
        }
    }
}

fn of_kind(kind: &ErrorKind) -> (u8, &'static str) {
    match kind {
        ErrorKind::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            (3, "not-found")
        }
        ErrorKind::Io { .. } => (1, "io"),
        ErrorKind::Numerical { .. } => (1, "numerical"),
        ErrorKind::Recipe { .. } => (2, "recipe"),
        ErrorKind::Budget { .. } => (4, "budget"),
        ErrorKind::Target { .. } => (5, "target"),
        ErrorKind::NotFinite { .. } => (3, "not-finite"),
        ErrorKind::Missing { .. } => (3, "missing"),
        ErrorKind::Format { .. } => (3, "format"),
        ErrorKind::Changed { .. } => (3, "changed"),
        ErrorKind::Config { .. } => (3, "config"),
        ErrorKind::Unsupported { .. } => (3, "unsupported"),
        ErrorKind::Statistics { .. } => (3, "statistics"),
        ErrorKind::Shape { .. } => (3, "shape"),
        ErrorKind::OutOfRange { .. } => (3, "out-of-range"),
        _ => (1, "other"),
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Library(error) => error.fmt(f),
            Self::Usage(reason) => f.write_str(reason),
            Self::Verification(1) => f.write_str("verification failed: 1 finding"),
            Self::Verification(n) => write!(f, "verification failed: {n} findings"),
            Self::Memory { needed, allowed } => {
                let (needed, allowed) = (bytes(*needed), bytes(*allowed));
                write!(f, "needs about {needed} of memory, --max-memory allows {allowed}")
            }
            Self::Output(error) => write!(f, "output: {error}"),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Library(error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Output(error)
    }
}
