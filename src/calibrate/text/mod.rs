//! Text in: files become windows of token ids, for calibration and evaluation alike.
//!
//! [`Text::read`] takes one file or a folder. A file is a *source*; of a folder every file and
//! every subfolder is one, in order of their names.
//!
//! | file | holds |
//! |---|---|
//! | `.txt` | UTF-8 text, one document |
//! | `.jsonl`, `.json` | a `text` field, [another](TextOptions::field), or a conversation |
//! | `.safetensors` | token ids, `[n]` or `[windows, length]`, and perhaps their `attention_mask` |
//!
//! Text files may be compressed by gzip or Zstandard. Conversations are `messages`,
//! `conversations` (ShareGPT) or pairs such as `prompt` and `response`; the model's own chat
//! template makes text of them.
//!
//! Text is tokenised with the checkpoint's own `tokenizer.json`. The documents of a source are
//! joined with the model's end-of-sequence token and cut into windows of a fixed length that do not
//! overlap. Each begins with the special tokens that the tokenizer's post-processor puts before a
//! text. Rows of a two-axis tensor are windows already. Sources of a folder that are shorter than a
//! window are joined. What was read is recorded ([`TextRecord`]), so that a result can be traced to
//! its text.
//!
//! # Memory
//! Text is read as a stream. Of all sources together about 16 MiB of text are kept, of a longer one
//! a sample of pieces of 64 KiB drawn by the seed, and their tokens; more only if more tokens are
//! asked for. Neither depends on the size of the files.
//!
//! Without the feature `text` there is no tokenizer, and only files of token ids are read.

mod load;
mod options;
mod pcg64;
mod pieces;
mod plain_tokens;
mod read;
mod record;
mod shares;
mod span;
mod vocabulary;
mod windows;

pub use load::{Limits, Text, TextSource};
pub use options::{Conversations, OwnTextOptions, Select, Separator, SpecialTokens, TextOptions};
pub use plain_tokens::plain_tokens;
pub use record::{FileRecord, SourceRecord, TemplateRecord, TextRecord};
pub use span::SpanCorruption;
pub use vocabulary::{Vocabulary, sentinels};
