//! A grouping: which experts of a layer become one.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How groups are numbered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Numbering {
    /// By the index of the dominant expert, so that kept experts keep their order on disk.
    ByDominant,
    /// By the smallest member (HC-SMoE, REAP).
    ByFirstMember,
}

/// A partition of a layer's experts into groups, each with a dominant expert; an expert may also be
/// dropped, that is, belong to no group: the router can no longer choose it.
///
/// Every group holds its dominant expert, so none is empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Raw")]
pub struct Grouping {
    label: Vec<Option<usize>>,
    dominant: Vec<usize>,
}

#[derive(Deserialize)]
struct Raw {
    label: Vec<Option<usize>>,
    dominant: Vec<usize>,
}

impl TryFrom<Raw> for Grouping {
    type Error = Error;

    fn try_from(raw: Raw) -> Result<Self> {
        Self::new(raw.label, raw.dominant)
    }
}

impl Grouping {
    /// `label[i]`: the group of expert `i`, `None` when dropped; `dominant[g]`: the dominant expert
    /// of group `g`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) when there is no group, a label has
    /// no group, or a dominant expert is not in its own group.
    pub fn new(label: Vec<Option<usize>>, dominant: Vec<usize>) -> Result<Self> {
        let groups = dominant.len();
        if groups == 0 {
            return Err(Error::range("grouping", "at least one group", 0));
        }
        if let Some(g) = label.iter().flatten().find(|&&g| g >= groups) {
            return Err(Error::range("group label", format!("below {groups}"), g));
        }
        for (g, &d) in dominant.iter().enumerate() {
            if label.get(d).copied().flatten() != Some(g) {
                return Err(Error::range("dominant expert", format!("a member of group {g}"), d));
            }
        }
        Ok(Self { label, dominant })
    }

    /// Every expert alone: nothing is merged.
    pub fn identity(n: usize) -> Self {
        Self { label: (0..n).map(Some).collect(), dominant: (0..n).collect() }
    }

    /// Number of experts before merging.
    pub fn experts(&self) -> usize {
        self.label.len()
    }

    /// Number of groups, i.e. experts after merging.
    pub fn groups(&self) -> usize {
        self.dominant.len()
    }

    /// The group of every expert; `None` when dropped. This is the native export's expert map.
    pub fn labels(&self) -> &[Option<usize>] {
        &self.label
    }

    /// The dominant expert of every group.
    pub fn dominants(&self) -> &[usize] {
        &self.dominant
    }

    /// Members of group `g`, ascending.
    pub fn members(&self, g: usize) -> Vec<usize> {
        (0..self.label.len()).filter(|&i| self.label[i] == Some(g)).collect()
    }

    /// Whether nothing is merged, dropped or renumbered.
    pub fn is_identity(&self) -> bool {
        self.label.iter().enumerate().all(|(i, &g)| g == Some(i))
    }

    /// The same partition with other group numbers.
    pub fn renumbered(&self, numbering: Numbering) -> Self {
        let key = |g: &usize| match numbering {
            Numbering::ByDominant => self.dominant[*g],
            Numbering::ByFirstMember => {
                self.label.iter().position(|l| *l == Some(*g)).unwrap_or(usize::MAX)
            }
        };
        let mut order: Vec<usize> = (0..self.groups()).collect();
        order.sort_by_key(key);
        let mut new = vec![0; order.len()];
        order.iter().enumerate().for_each(|(rank, &g)| new[g] = rank);
        Self {
            label: self.label.iter().map(|l| l.map(|g| new[g])).collect(),
            dominant: order.iter().map(|&g| self.dominant[g]).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_checked() {
        assert!(Grouping::new(vec![Some(0), Some(1), None], vec![0, 1]).is_ok());
        assert!(Grouping::new(vec![Some(0)], vec![]).is_err());
        assert!(Grouping::new(vec![Some(2), Some(0)], vec![0]).is_err());
        assert!(Grouping::new(vec![Some(0), Some(0)], vec![2]).is_err());
        assert!(Grouping::new(vec![Some(0), Some(1)], vec![0, 0]).is_err());
    }

    #[test]
    fn renumbering_keeps_the_partition() {
        let label = vec![Some(1), Some(0), Some(1), Some(0), None];
        let grouping = Grouping::new(label, vec![1, 2]).unwrap();
        let by_first = grouping.renumbered(Numbering::ByFirstMember);
        assert_eq!(by_first.labels(), [Some(0), Some(1), Some(0), Some(1), None]);
        assert_eq!(by_first.dominants(), [2, 1]);
        assert_eq!(by_first.members(0), [0, 2]);
        assert_eq!(by_first.renumbered(Numbering::ByDominant), grouping);
        assert!(Grouping::identity(3).is_identity() && !grouping.is_identity());
    }

    #[test]
    fn deserialising_checks_too() {
        let bad = serde_json::from_str::<Grouping>(r#"{"label": [0, 7], "dominant": [0]}"#);
        assert!(bad.unwrap_err().to_string().contains("group label"));
    }
}
