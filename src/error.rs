//! One error type for the whole crate: what went wrong ([`ErrorKind`]) and where ([`Place`]).
//!
//! A stage returns a kind without a place, because it does not know which layer it works on; its
//! caller adds the place with [`Locate`]. A program can match on [`Error::kind`].
//!
//! ```
//! use mcsmoe::checkpoint::Checkpoint;
//! use mcsmoe::error::ErrorKind;
//!
//! let error = Checkpoint::open("no/such/folder").unwrap_err();
//! assert!(error.to_string().contains("no/such/folder"));
//! if let ErrorKind::Io { source, .. } = error.kind() {
//!     assert_eq!(source.kind(), std::io::ErrorKind::NotFound);
//! }
//! ```

use std::fmt;
use std::path::{Path, PathBuf};

/// The result of every fallible operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. New variants may be added in minor versions.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Two arrays, or an array and a declaration, disagree about their shape.
    #[error("{operation}: expected shape {expected}, found {found}")]
    Shape {
        /// The operation that needed the shapes to fit.
        operation: &'static str,
        /// The shape that would have fitted.
        expected: String,
        /// The shape that was given.
        found: String,
    },
    /// A weight, statistic or activation is NaN or infinite.
    #[error("{what} holds {value} at flat index {index}: every value must be finite")]
    NotFinite {
        /// What was checked.
        what: String,
        /// The offending value.
        value: f64,
        /// Row-major index of the first offending value.
        index: usize,
    },
    /// A number lies outside the range in which the operation is defined.
    #[error("{what}: expected {expected}, found {found}")]
    OutOfRange {
        /// The quantity.
        what: String,
        /// The accepted range.
        expected: String,
        /// The value given.
        found: String,
    },
    /// A stage needs something that the caller did not provide.
    #[error("{stage} needs {needs}, which the statistics do not hold: {remedy}")]
    Missing {
        /// The stage that asked.
        stage: String,
        /// What it asked for.
        needs: String,
        /// How to provide it.
        remedy: String,
    },
    /// The number of experts that was asked for cannot be reached.
    #[error("the expert budget cannot be met: {reason}")]
    Budget {
        /// Why, with the reachable numbers.
        reason: String,
    },
    /// A recipe, or a combination of its parts, is invalid.
    #[error("invalid recipe: {reason}")]
    Recipe {
        /// Which key and why.
        reason: String,
    },
    /// A file does not follow its format.
    #[error("malformed {format}: {reason}")]
    Format {
        /// The format that was expected.
        format: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A key of `config.json` is missing, of the wrong type, or contradicts the tensors.
    #[error("config key `{key}`: expected {expected}, found {found}")]
    Config {
        /// The key.
        key: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A model family, data type or feature that this crate does not handle.
    #[error("unsupported {what}: {found}; supported: {supported}")]
    Unsupported {
        /// The kind of thing.
        what: &'static str,
        /// What was found.
        found: String,
        /// What would have worked.
        supported: String,
    },
    /// The statistics belong to another model, or contradict themselves.
    #[error("statistics do not fit the model: {reason}")]
    Statistics {
        /// The contradiction.
        reason: String,
    },
    /// The target folder cannot be used.
    #[error("target folder: {reason}")]
    Target {
        /// Why not.
        reason: String,
    },
    /// A decomposition or solve failed numerically.
    #[error("{operation} failed numerically: {reason}")]
    Numerical {
        /// The operation.
        operation: &'static str,
        /// Why.
        reason: String,
    },
    /// A device other than the CPU cannot be had, or failed.
    #[error("{operation} on device `{device}`: {fault}")]
    Device {
        /// The device's name, or what was asked for.
        device: String,
        /// What was attempted.
        operation: &'static str,
        /// What happened.
        fault: DeviceFault,
    },
    /// A file was cut or written to while it was being read.
    #[error("the file was changed while it was open: expected {expected}, found {found}")]
    Changed {
        /// Its size and time when it was opened.
        expected: String,
        /// Its size and time now.
        found: String,
    },
    /// A rule that this crate keeps for itself does not hold: a defect of the crate.
    #[error("internal error (please report it): {what}")]
    Bug {
        /// The rule that is broken, and where.
        what: String,
    },
    /// The operating system refused.
    #[error("{operation}: {source}")]
    Io {
        /// What was attempted.
        operation: &'static str,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
}

/// How a device failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceFault {
    /// There is no such adapter.
    #[error("no such adapter; present: {present}")]
    Absent {
        /// The adapters that are present, or `none`.
        present: String,
    },
    /// The device was removed, reset or destroyed; every later operation fails likewise.
    #[error("the device was lost: {reason}")]
    Lost {
        /// The driver's reason.
        reason: String,
    },
    /// The device's memory does not hold what was asked for.
    #[error("out of device memory")]
    OutOfMemory,
    /// The driver refused for another reason.
    #[error("refused: {reason}")]
    Refused {
        /// The driver's reason.
        reason: String,
    },
}

/// Where it went wrong; every part is optional.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// The file being read or written.
    pub file: Option<PathBuf>,
    /// The tensor's name on disk.
    pub tensor: Option<String>,
    /// The layer, as written in statistics files (`layers.3`, `encoder.layers.1`).
    pub layer: Option<String>,
    /// The expert's index in its layer.
    pub expert: Option<usize>,
}

/// An error of this crate: a kind and a place.
///
/// One pointer wide, so that `Result` stays cheap to return.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    place: Place,
}

impl Error {
    /// What went wrong.
    pub fn kind(&self) -> &ErrorKind {
        &self.0.kind
    }

    /// Where it went wrong.
    pub fn place(&self) -> &Place {
        &self.0.place
    }

    /// A [`ErrorKind::Shape`] of two printable shapes.
    pub fn shape(
        operation: &'static str,
        expected: impl fmt::Debug,
        found: impl fmt::Debug,
    ) -> Self {
        let (expected, found) = (format!("{expected:?}"), format!("{found:?}"));
        ErrorKind::Shape { operation, expected, found }.into()
    }

    /// A [`ErrorKind::OutOfRange`].
    pub fn range(
        what: impl Into<String>,
        expected: impl fmt::Display,
        found: impl fmt::Display,
    ) -> Self {
        let (expected, found) = (expected.to_string(), found.to_string());
        ErrorKind::OutOfRange { what: what.into(), expected, found }.into()
    }

    /// A [`ErrorKind::Format`].
    pub fn malformed(format: &'static str, reason: impl fmt::Display) -> Self {
        ErrorKind::Format { format, reason: reason.to_string() }.into()
    }

    /// A [`ErrorKind::Io`].
    pub fn io(operation: &'static str, source: std::io::Error) -> Self {
        ErrorKind::Io { operation, source }.into()
    }

    /// A [`ErrorKind::Bug`]: an invariant of this crate is broken.
    pub fn bug(what: impl Into<String>) -> Self {
        ErrorKind::Bug { what: what.into() }.into()
    }

    fn fill(mut self, set: impl FnOnce(&mut Place)) -> Self {
        set(&mut self.0.place);
        self
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self(Box::new(Inner { kind, place: Place::default() }))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { file, tensor, layer, expert } = &self.0.place;
        if let Some(file) = file {
            write!(f, "{}: ", file.display())?;
        }
        if let Some(layer) = layer {
            write!(f, "{layer}: ")?;
        }
        if let Some(expert) = expert {
            write!(f, "expert {expert}: ")?;
        }
        if let Some(tensor) = tensor {
            write!(f, "tensor `{tensor}`: ")?;
        }
        self.0.kind.fmt(f)
    }
}

/// The same text as [`Display`](fmt::Display), because `fn main() -> mcsmoe::Result<()>` prints it.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.0.kind)
    }
}

/// Adds a place to an error on its way out. The innermost place wins: it knew best.
pub trait Locate: Sized {
    /// Names the file.
    fn in_file(self, file: &Path) -> Self;
    /// Names the tensor.
    fn in_tensor(self, tensor: &str) -> Self;
    /// Names the layer.
    fn in_layer(self, layer: impl fmt::Display) -> Self;
    /// Names the expert.
    fn in_expert(self, expert: usize) -> Self;
}

impl<T> Locate for Result<T> {
    fn in_file(self, file: &Path) -> Self {
        self.map_err(|e| {
            e.fill(|p| {
                p.file.get_or_insert_with(|| file.to_owned());
            })
        })
    }

    fn in_tensor(self, tensor: &str) -> Self {
        self.map_err(|e| {
            e.fill(|p| {
                p.tensor.get_or_insert_with(|| tensor.to_owned());
            })
        })
    }

    fn in_layer(self, layer: impl fmt::Display) -> Self {
        self.map_err(|e| {
            e.fill(|p| {
                p.layer.get_or_insert_with(|| layer.to_string());
            })
        })
    }

    fn in_expert(self, expert: usize) -> Self {
        self.map_err(|e| {
            e.fill(|p| {
                p.expert.get_or_insert(expert);
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pinned<T: Send + Sync + 'static>() {}

    #[test]
    fn error_is_one_pointer_and_crosses_threads() {
        pinned::<Error>();
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }

    #[test]
    fn message_names_place_then_kind_and_the_innermost_place_wins() {
        let result: Result<()> = Err(Error::shape("expert", [4, 8], [8, 4]));
        let error = result.in_expert(3).in_expert(9).in_layer("layers.2").unwrap_err();
        assert_eq!(
            error.to_string(),
            "layers.2: expert 3: expert: expected shape [4, 8], found [8, 4]"
        );
        assert_eq!(format!("{error:?}"), error.to_string());
        assert_eq!(error.place().expert, Some(3));
        assert!(matches!(error.kind(), ErrorKind::Shape { .. }));
    }
}
