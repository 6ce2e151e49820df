//! SHA-256 as text.

use sha2::{Digest, Sha256};

/// A finished hash in hexadecimal digits.
pub(crate) fn hexadecimal(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
