//! What a run did, for people: a page with pictures, and a model card.
//!
//! [`html()`] is one file that loads nothing: style and pictures (SVG) are in it, and its content
//! security policy forbids everything else. [`model_card`] is a `README.md` as model hubs read it.
//! Both come from a [`Report`](crate::Report) and what is known beside it ([`Details`]); the same
//! input gives the same bytes. All text is escaped: names of models and files are not trusted.
//!
//! ```no_run
//! use std::path::Path;
//! use mcsmoe::report::{Details, html};
//!
//! let target = Path::new("Mixtral-4x7B");
//! let page = html(&mcsmoe::Report::read(target)?, &Details::read(target)?)?;
//! # Ok::<(), mcsmoe::Error>(())
//! ```

mod card;
mod chart;
mod curves;
mod details;
mod facts;
mod front;
mod heat;
mod layers;
mod page;
mod text;

pub use card::{model_card, with_original, with_text};
pub use details::{Details, FileRecord, Quality};
pub use facts::{layer_outcomes, outcomes};
pub use page::html;
pub use text::{bytes, count};
