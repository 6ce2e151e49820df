//! Which runtimes will load a target, which will not, and why.
//!
//! None of the runtimes was tried; what is said was read in their code and discussions, which
//! docs/CLI.md names, and ages.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::checkpoint::{Checkpoint, Export, WritePlan};
use crate::families::{self, Runtimes, Support};
use crate::model::{LayerId, RoutingRule};

/// Whether a runtime will load a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It will.
    Accepts,
    /// It will not.
    Refuses,
    /// The family is not in our list of what it knows.
    Unknown,
}

/// A program that runs checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Runtime {
    /// Hugging Face transformers.
    #[serde(rename = "transformers")]
    Transformers,
    /// vLLM.
    #[serde(rename = "vllm")]
    Vllm,
    /// llama.cpp, after conversion to GGUF.
    #[serde(rename = "llama.cpp")]
    LlamaCpp,
}

impl std::fmt::Display for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Transformers => "transformers",
            Self::Vllm => "vllm",
            Self::LlamaCpp => "llama.cpp",
        })
    }
}

/// What a runtime will make of a target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimePlan {
    /// Which runtime.
    pub runtime: Runtime,
    /// Whether it loads it.
    pub answer: Answer,
    /// Why not.
    pub reasons: Vec<String>,
    /// What to know where it does.
    pub notes: Vec<String>,
}

/// What is the same for all of them.
struct Planned {
    runtimes: Runtimes,
    export: Export,
    /// Experts of every layer on the disk, fewest and most.
    experts: (usize, usize),
    rule: RoutingRule,
    d_ff: usize,
    mtp: bool,
}

/// Most experts of a layer in llama.cpp (`LLAMA_MAX_EXPERTS`). 1024 is proposed, not released.
const LLAMA_MAX_EXPERTS: usize = 512;
/// Asks all of them.
pub(super) fn plan(
    source: &Checkpoint,
    write: &WritePlan,
    counts: &BTreeMap<LayerId, usize>,
    spread: bool,
) -> Vec<RuntimePlan> {
    let Some(layer) = source.layers().first() else { return Vec::new() };
    let on_disk = |l: &crate::checkpoint::LayerInfo| match write.export {
        Export::Expanded => l.experts,
        _ => counts.get(&l.id).copied().unwrap_or(l.experts),
    };
    let all = || source.layers().iter().map(on_disk);
    let groups = layer.rule.groups.filter(|_| !write.flatten_groups);
    let top_k = write.top_k.unwrap_or(layer.rule.top_k);
    let merges = write.groupings.values().any(|g| !g.is_identity());
    let planned = Planned {
        runtimes: families::find(source.family()).map_or(Runtimes::UNKNOWN, |f| f.runtimes),
        export: write.export,
        experts: (all().min().unwrap_or(0), all().max().unwrap_or(0)),
        rule: RoutingRule { top_k, groups, ..layer.rule },
        d_ff: layer.d_ff,
        mtp: source.mtp_tensors().next().is_some() && write.export != Export::Expanded && merges,
    };
    let common = planned.common(spread);
    vec![planned.transformers(common.clone()), planned.vllm(common.clone()), planned.llama(common)]
}

impl Planned {
    /// What every stock runtime refuses.
    fn common(&self, spread: bool) -> Vec<String> {
        let mut reasons = Vec::new();
        let (least, most) = self.experts;
        let k = self.rule.top_k;
        if self.export == Export::Native {
            reasons.push("config.json has model type `mcsmoe`, which it does not know".into());
            if least != most || spread {
                reasons.push(
                    "layers may keep different numbers of experts; its classes read one \
                              number for all"
                        .into(),
                );
            }
            return reasons;
        }
        if least != most {
            reasons.push(format!(
                "layers keep {least} to {most} experts, its classes read one number"
            ));
        }
        if k > least {
            reasons.push(format!("top-{k} of {least} experts"));
        }
        if let Some(misfit) = self.rule.groups.and_then(|g| g.misfit(least, k)) {
            reasons.push(format!("group-limited routing: {misfit}"));
        }
        reasons
    }

    fn transformers(&self, mut reasons: Vec<String>) -> RuntimePlan {
        let mut notes = Vec::new();
        if self.export == Export::Native && !self.runtimes.native_folder {
            reasons = vec!["the code in a native folder does not run this family".into()];
        } else if self.export == Export::Native {
            reasons.clear();
            notes
                .push("with trust_remote_code=True: the folder holds the code that runs it".into());
        }
        self.mtp_note(&mut notes);
        // Whatever it is, transformers has the class that config.json names.
        self.answer(Runtime::Transformers, Support::Loads, reasons, notes)
    }

    fn vllm(&self, reasons: Vec<String>) -> RuntimePlan {
        let mut notes = Vec::new();
        let m = self.experts.0;
        if self.export != Export::Native {
            let even = divisors(m, 64);
            notes.push(format!(
                "expert parallel: even over {even} ranks; other sizes up to {m} load, uneven, and \
                 --enable-eplb needs redundant experts that make them even"
            ));
            let widths = divisors(self.d_ff, 16);
            notes.push(format!("tensor parallel: {} units divide by {widths}", self.d_ff));
        }
        self.mtp_note(&mut notes);
        self.answer(Runtime::Vllm, self.runtimes.vllm, reasons, notes)
    }

    fn llama(&self, mut reasons: Vec<String>) -> RuntimePlan {
        let mut notes = Vec::new();
        let most = self.experts.1;
        if most > LLAMA_MAX_EXPERTS && self.export != Export::Native {
            reasons.push(format!("{most} experts in a layer, at most {LLAMA_MAX_EXPERTS}"));
        }
        if self.export != Export::Native && !self.d_ff.is_multiple_of(256) {
            notes.push(format!(
                "K-quants need rows of a multiple of 256: down projections of {} columns fall back \
                 to another type",
                self.d_ff
            ));
        }
        self.mtp_note(&mut notes);
        self.answer(Runtime::LlamaCpp, self.runtimes.llama_cpp, reasons, notes)
    }

    fn mtp_note(&self, notes: &mut Vec<String>) {
        if self.mtp && self.export != Export::Native {
            notes.push(
                "multi-token-prediction layers are left out, and the config says so: no \
                        speculative decoding with them"
                    .into(),
            );
        }
    }

    fn answer(
        &self,
        runtime: Runtime,
        support: Support,
        mut reasons: Vec<String>,
        notes: Vec<String>,
    ) -> RuntimePlan {
        if support == Support::Refuses {
            reasons.push("no encoder-decoder models with experts".into());
        }
        let answer = match (reasons.is_empty(), support) {
            (false, _) | (true, Support::Refuses) => Answer::Refuses,
            (true, Support::Loads) => Answer::Accepts,
            (true, Support::Unknown) => Answer::Unknown,
        };
        let notes = if answer == Answer::Accepts || self.export == Export::Native {
            notes
        } else {
            Vec::new()
        };
        RuntimePlan { runtime, answer, reasons, notes }
    }
}

/// The numbers up to `most` that divide `n`, in words.
fn divisors(n: usize, most: usize) -> String {
    let all = (1..=most.min(n)).filter(|d| n.is_multiple_of(*d));
    all.map(|d| d.to_string()).collect::<Vec<_>>().join(", ")
}
