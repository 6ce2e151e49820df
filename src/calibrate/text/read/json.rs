//! JSON text: objects one behind the other or in a list, each a document; read as a stream, so that
//! neither a long line nor a long list has to fit into memory.

use std::io::{self, BufRead, Read, Write};

use serde_json::{Map, Value};
use struson::reader::{
    JsonReader, JsonReaderPosition, JsonStreamReader, ReaderError, ReaderSettings, ValueType,
};
use struson::writer::{JsonStreamWriter, JsonWriter};

use super::conversation::{self, Conversation};
use super::decompress::failed;
use super::{Documents, malformed};
use crate::calibrate::text::pieces::Pieces;
use crate::error::{Error, Result};

const FORMAT: &str = "JSON text";
/// Most bytes of a conversation, which a template needs whole.
const MOST_CONVERSATION: usize = 64 << 20;
/// Fields of an object that an error lists.
const MOST_LISTED: usize = 12;

/// Reads the documents of a JSON file: of objects the text in a field (`text`, or the one asked
/// for) or a conversation, of strings themselves.
///
/// # Errors
/// [`Format`](crate::ErrorKind::Format) with the line, the fields that were found and what to do.
pub(super) fn read(
    text: &mut dyn BufRead,
    documents: &Documents<'_>,
    pieces: &mut Pieces,
) -> Result<()> {
    if is_blank(text)? {
        return Ok(());
    }
    let settings = ReaderSettings {
        allow_multiple_top_level: true,
        track_path: false,
        restrict_number_values: false,
        ..ReaderSettings::default()
    };
    let mut reader =
        Reader { json: JsonStreamReader::new_custom(text, settings), documents, pieces };
    reader.all().map_err(Failed::into_error)
}

/// Whether nothing but white space is left, which is skipped.
fn is_blank(text: &mut dyn BufRead) -> Result<bool> {
    loop {
        let block = text.fill_buf().map_err(failed)?;
        if block.is_empty() {
            return Ok(true);
        }
        // Ends of lines stay, so that lines are counted right: only whole blank blocks go.
        if block.iter().any(|b| !b.is_ascii_whitespace()) {
            return Ok(false);
        }
        let skipped = block.len();
        text.consume(skipped);
    }
}

struct Reader<'a, R: Read> {
    json: JsonStreamReader<R>,
    documents: &'a Documents<'a>,
    pieces: &'a mut Pieces,
}

/// Why reading ended, and the line.
enum Failed {
    Json(ReaderError),
    Here(u64, String),
}

impl From<ReaderError> for Failed {
    fn from(error: ReaderError) -> Self {
        Self::Json(error)
    }
}

type Outcome<T> = std::result::Result<T, Failed>;

impl<R: Read> Reader<'_, R> {
    fn all(&mut self) -> Outcome<()> {
        // The first value is there; whether there are more may be asked behind a value only.
        loop {
            if self.json.peek()? == ValueType::Array {
                self.json.begin_array()?;
                while !self.pieces.is_full() && self.json.has_next()? {
                    self.document()?;
                }
                if self.pieces.is_full() {
                    return Ok(());
                }
                self.json.end_array()?;
            } else {
                self.document()?;
            }
            if self.pieces.is_full() || !self.json.has_next()? {
                return Ok(());
            }
        }
    }

    /// One value: an object, or a string.
    fn document(&mut self) -> Outcome<()> {
        match self.json.peek()? {
            ValueType::Object => self.object(),
            ValueType::String => {
                self.stream()?;
                self.pieces.end_document();
                Ok(())
            }
            other => Err(self.here(format!("expected an object or a string, found {other}"))),
        }
    }

    fn object(&mut self) -> Outcome<()> {
        let line = self.line();
        let (mut found, mut fields, mut names) = (false, Map::new(), Vec::new());
        let wanted = self.documents.field.unwrap_or("text");
        let any = self.documents.field.is_none();
        self.json.begin_object()?;
        while self.json.has_next()? {
            let name = self.json.next_name_owned()?;
            if name == wanted {
                if std::mem::replace(&mut found, true) {
                    return Err(self.here(format!("`{name}` is there twice")));
                }
                self.field(&name, &mut fields)?;
            } else if any && conversation::is_part(&name) {
                let value = self.value(&name)?;
                fields.insert(name.clone(), value);
            } else {
                self.json.skip_value()?;
            }
            if names.len() <= MOST_LISTED {
                names.push(name);
            }
        }
        self.json.end_object()?;
        let at = |reason| Failed::Here(line, reason);
        if found {
            // A field that was asked for may hold a conversation.
            if let Some(value) = fields.get(wanted).filter(|_| !any) {
                let messages = conversation::of_list(wanted, value).map_err(at)?;
                self.conversation(line, &Conversation { messages, tools: None })?;
            }
            self.pieces.end_document();
            return Ok(());
        }
        match conversation::of_fields(&fields).map_err(at)? {
            Some(found) => {
                self.conversation(line, &found)?;
                self.pieces.end_document();
                Ok(())
            }
            None => Err(at(missing(wanted, any, &names))),
        }
    }

    /// The field that was looked for.
    fn field(&mut self, name: &str, fields: &mut Map<String, Value>) -> Outcome<()> {
        match self.json.peek()? {
            ValueType::String => self.stream(),
            ValueType::Null => Ok(self.json.next_null()?),
            ValueType::Array if self.documents.field.is_some() => {
                let value = self.value(name)?;
                fields.insert(name.to_owned(), value);
                Ok(())
            }
            other => Err(self.here(format!("`{name}`: expected a string, found {other}"))),
        }
    }

    /// A string, a block at a time.
    fn stream(&mut self) -> Outcome<()> {
        let line = self.line();
        let mut string = self.json.next_string_reader()?;
        let (mut block, mut held) = (vec![0; 1 << 14], 0);
        loop {
            let read = match string.read(&mut block[held..]) {
                Ok(read) => read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Failed::Here(line, e.to_string())),
            };
            let valid = &block[..held + read];
            // Blocks may end within a character.
            let end = match std::str::from_utf8(valid) {
                Ok(text) => text.len(),
                Err(e) => e.valid_up_to(),
            };
            self.pieces.text(std::str::from_utf8(&valid[..end]).unwrap_or_default());
            let all = held + read;
            block.copy_within(end..all, 0);
            held = all - end;
            if read == 0 {
                return match held {
                    0 => Ok(()),
                    _ => Err(Failed::Here(line, "the text is no UTF-8".into())),
                };
            }
        }
    }

    /// A value that is needed whole.
    fn value(&mut self, name: &str) -> Outcome<Value> {
        let line = self.line();
        let mut json = Bounded(Vec::new());
        let mut writer = JsonStreamWriter::new(&mut json);
        let copied = self.json.transfer_to(&mut writer);
        let copied = copied.map_err(|e| match e {
            struson::reader::TransferError::ReaderError(e) => Failed::Json(e),
            struson::reader::TransferError::WriterError(e) => {
                Failed::Here(line, format!("`{name}`: {e}"))
            }
        });
        copied?;
        writer.finish_document().map_err(|e| Failed::Here(line, format!("`{name}`: {e}")))?;
        serde_json::from_slice(&json.0).map_err(|e| Failed::Here(line, format!("`{name}`: {e}")))
    }

    fn conversation(&mut self, line: u64, found: &Conversation) -> Outcome<()> {
        let text = self.documents.template.render(found);
        let text = text.map_err(|reason| Failed::Here(line, reason))?;
        self.pieces.text(&text);
        Ok(())
    }

    fn line(&self) -> u64 {
        line(&self.json.current_position(false))
    }

    fn here(&self, reason: String) -> Failed {
        Failed::Here(self.line(), reason)
    }
}

/// The line of a position, counted from 1.
fn line(position: &JsonReaderPosition) -> u64 {
    position.line_pos.as_ref().map_or(0, |position| position.line) + 1
}

impl Failed {
    fn into_error(self) -> Error {
        let (line, reason) = match self {
            Self::Here(line, reason) => (line, reason),
            Self::Json(error) => match error {
                ReaderError::SyntaxError(e) => (line(&e.location), format!("{:?}", e.kind)),
                ReaderError::MaxNestingDepthExceeded { max_nesting_depth, location } => {
                    (line(&location), format!("more than {max_nesting_depth} values in each other"))
                }
                ReaderError::IoError { error, .. } => return failed(error),
                other => return malformed(FORMAT, other.to_string()),
            },
        };
        malformed(FORMAT, format!("line {line}: {reason}"))
    }
}

/// What an object lacks.
fn missing(wanted: &str, any: bool, names: &[String]) -> String {
    let list: Vec<String> =
        names.iter().take(MOST_LISTED).map(|name| format!("`{name}`")).collect();
    let more = if names.len() > MOST_LISTED { ", …" } else { "" };
    let found = match list.is_empty() {
        true => "none".to_owned(),
        false => format!("{}{more}", list.join(", ")),
    };
    let other = match any {
        true => {
            " and no conversation (`messages`, `conversations`, or a pair such as `prompt` \
                 and `response`)"
        }
        false => "",
    };
    format!("no field `{wanted}`{other}; its fields: {found}; name the one to read with --field")
}

/// A buffer with a limit.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MOST_CONVERSATION {
            let most = MOST_CONVERSATION >> 20;
            return Err(io::Error::other(format!("a conversation of more than {most} MiB")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
