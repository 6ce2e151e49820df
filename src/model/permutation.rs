//! A permutation of hidden units.

use crate::error::{Error, Result};

/// A bijection of `0..n` as gather indices: entry `a` of the result comes from entry `p[a]`.
///
/// Applied to an expert's hidden units (`W_up[p, :]`, `W_gate[p, :]`, `W_down[:, p]`) it leaves the
/// expert's function unchanged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permutation(Vec<u32>);

impl Permutation {
    /// Checks that every index of `0..n` occurs once.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange) otherwise.
    pub fn new(gather: Vec<u32>) -> Result<Self> {
        let mut seen = vec![false; gather.len()];
        for &i in &gather {
            match seen.get_mut(i as usize) {
                Some(seen) if !*seen => *seen = true,
                _ => {
                    let expected = format!("each of 0..{} once", gather.len());
                    return Err(Error::range("permutation", expected, i));
                }
            }
        }
        Ok(Self(gather))
    }

    /// The permutation of `n` units that changes nothing.
    pub fn identity(n: usize) -> Self {
        Self((0..n as u32).collect())
    }

    /// Whether it changes nothing.
    pub fn is_identity(&self) -> bool {
        self.0.iter().enumerate().all(|(a, &b)| a == b as usize)
    }

    /// The gather indices.
    pub fn as_slice(&self) -> &[u32] {
        &self.0
    }

    /// Number of units.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no units.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The permutation that undoes it.
    pub fn inverse(&self) -> Self {
        let mut inverse = vec![0; self.0.len()];
        self.0.iter().enumerate().for_each(|(a, &b)| inverse[b as usize] = a as u32);
        Self(inverse)
    }

    /// First `self`, then `next`: entry `a` comes from entry `self[next[a]]`.
    ///
    /// # Errors
    /// [`ErrorKind::Shape`](crate::ErrorKind::Shape) when the lengths differ.
    pub fn then(&self, next: &Self) -> Result<Self> {
        if self.len() != next.len() {
            return Err(Error::shape("composition of permutations", self.len(), next.len()));
        }
        Ok(Self(next.0.iter().map(|&a| self.0[a as usize]).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inverse_and_composition() {
        let p = Permutation::new(vec![2, 0, 1, 3]).unwrap();
        assert!(p.then(&p.inverse()).unwrap().is_identity());
        assert!(p.inverse().then(&p).unwrap().is_identity());
        let q = Permutation::new(vec![1, 0, 2, 3]).unwrap();
        assert_eq!(p.then(&q).unwrap().as_slice(), [0, 2, 1, 3]);
        assert!(p.then(&Permutation::identity(3)).is_err());
    }

    #[test]
    fn repeats_and_strangers_are_refused() {
        assert!(Permutation::new(vec![0, 0]).is_err());
        assert!(Permutation::new(vec![0, 2]).is_err());
        assert!(Permutation::new(vec![]).unwrap().is_identity());
    }
}
