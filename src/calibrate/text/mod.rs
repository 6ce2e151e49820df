//! Text in: files become windows of token ids, for calibration and evaluation alike.
//!
//! [`Text::read`] takes one file or a folder of them, in order of their names:
//!
//! | file | holds |
//! |---|---|
//! | `.txt` | UTF-8 text |
//! | `.jsonl` | one JSON object a line, with a `text` field |
//! | `.safetensors` | one tensor of token ids, `I32` or `I64`: `[n]`, or `[windows, length]` |
//!
//! Text is tokenised with the checkpoint's own `tokenizer.json`, without special tokens, and cut
//! into windows of a fixed length that do not overlap; a shorter rest is left out. Lines of a
//! `.jsonl` file follow each other without a separator. Rows of a two-axis tensor are windows
//! already. What was read is recorded ([`TextRecord`]), so that a result can be traced to its text.
//!
//! Without the feature `text` there is no tokenizer, and only files of token ids are read.

mod ids;
mod load;
mod pcg64;
mod record;
mod select;
mod source;
mod span;
mod vocabulary;

pub use load::{Limits, Text, TextFile};
pub use record::{FileRecord, TextRecord};
pub use select::{Select, TextOptions};
pub use span::SpanCorruption;
pub use vocabulary::{Vocabulary, sentinels};
