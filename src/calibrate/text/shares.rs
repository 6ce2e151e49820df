//! How many windows each source gives, and which.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::options::{Select, TextOptions};
use crate::error::{Error, Result};

/// The share of each source: equal ones, or those of [`TextOptions::mix`].
///
/// # Errors
/// [`OutOfRange`](crate::ErrorKind::OutOfRange) for a name that is no source, a source without a
/// share, and shares that are negative, not finite or all 0.
pub(super) fn shares(names: &[String], options: &TextOptions) -> Result<Vec<f64>> {
    let mix = &options.mix;
    if mix.is_empty() {
        return Ok(vec![1.0; names.len()]);
    }
    let known = || format!("one of the sources {}", names.join(", "));
    for (i, (name, share)) in mix.iter().enumerate() {
        if !names.contains(name) {
            return Err(Error::range("name in the mix", known(), name));
        }
        if mix[..i].iter().any(|(other, _)| other == name) {
            return Err(Error::range("name in the mix", "every source once", name));
        }
        if !(share.is_finite() && *share >= 0.0) {
            return Err(Error::range(format!("share of {name}"), "0 or more", share));
        }
    }
    if mix.iter().all(|(_, share)| *share == 0.0) {
        return Err(Error::range("shares of the mix", "one above 0", 0));
    }
    let share = |name: &String| {
        let found = mix.iter().find(|(other, _)| other == name).map(|(_, share)| *share);
        let expected = "a share of every source; 0 leaves it out";
        found.ok_or_else(|| Error::range("mix", expected, format!("none of {name}")))
    };
    names.iter().map(share).collect()
}

/// Which windows of each source are used, ascending.
pub(super) fn choose(
    available: &[usize],
    shares: &[f64],
    window: usize,
    options: &TextOptions,
) -> Vec<Vec<usize>> {
    match options.select {
        Select::All => available.iter().map(|&n| (0..n).collect()).collect(),
        Select::Windows(n) => {
            let sources = available.iter().filter(|&&n| n > 0).count();
            let each = (n / sources.max(1)).max(1);
            available.iter().map(|&n| (0..n.min(each)).collect()).collect()
        }
        Select::Tokens(tokens) => {
            let wanted = (tokens / window.max(1)).max(1);
            let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
            // A mix that was asked for is kept even if that leaves fewer windows.
            let fill = options.mix.is_empty();
            let counts = allocate(available, shares, wanted, fill, &mut rng);
            let draw = |(&all, count)| draw(all, count, &mut rng);
            available.iter().zip(counts).map(draw).collect()
        }
    }
}

/// `wanted` windows in proportion to the shares, rounded so that they sum up: the largest
/// remainders first, of equal ones those that the generator puts first. A source gives no more than
/// it has; with `fill` the others give what it lacks.
fn allocate(
    available: &[usize],
    shares: &[f64],
    wanted: usize,
    fill: bool,
    rng: &mut ChaCha8Rng,
) -> Vec<usize> {
    let mut counts = vec![0; available.len()];
    let mut left = wanted;
    loop {
        let open: Vec<usize> =
            (0..counts.len()).filter(|&i| counts[i] < available[i] && shares[i] > 0.0).collect();
        if left == 0 || open.is_empty() {
            return counts;
        }
        for (i, quota) in open.iter().zip(proportional(left, &open, shares, rng)) {
            let given = quota.min(available[*i] - counts[*i]);
            counts[*i] += given;
            left -= given;
        }
        if !fill {
            return counts;
        }
    }
}

/// `total` in whole parts in proportion to the shares of `open`.
fn proportional(total: usize, open: &[usize], shares: &[f64], rng: &mut ChaCha8Rng) -> Vec<usize> {
    let sum: f64 = open.iter().map(|&i| shares[i]).sum();
    let exact: Vec<f64> = open.iter().map(|&i| total as f64 * shares[i] / sum).collect();
    let mut parts: Vec<usize> = exact.iter().map(|x| x.floor() as usize).collect();
    let rest = total.saturating_sub(parts.iter().sum());
    if rest > 0 {
        let mut order: Vec<usize> = (0..open.len()).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, rng.random_range(0..=i));
        }
        let remainder = |i: usize| exact[i] - exact[i].floor();
        order.sort_by(|&a, &b| remainder(b).total_cmp(&remainder(a)));
        order.iter().cycle().take(rest).for_each(|&i| parts[i] += 1);
    }
    parts
}

/// `wanted` of `all`, ascending: the first of a Fisher–Yates shuffle.
fn draw(all: usize, wanted: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..all).collect();
    let wanted = wanted.min(all);
    for i in 0..wanted {
        let j = rng.random_range(i..all);
        order.swap(i, j);
    }
    order.truncate(wanted);
    order.sort_unstable();
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(n: usize, seed: u64) -> TextOptions {
        TextOptions::new(4).select(Select::Tokens(n)).seed(seed)
    }

    fn counts(available: &[usize], mix: &[f64], n: usize) -> Vec<usize> {
        let mut options = tokens(4 * n, 1);
        let names: Vec<String> = (0..available.len()).map(|i| i.to_string()).collect();
        options.mix = names.iter().cloned().zip(mix.iter().copied()).collect();
        let shares = shares(&names, &options).unwrap();
        choose(available, &shares, 4, &options).iter().map(Vec::len).collect()
    }

    #[test]
    fn the_first_of_each_source() {
        let options = TextOptions::new(4).select(Select::Windows(5));
        assert_eq!(choose(&[5, 7, 0], &[1.0; 3], 4, &options), [vec![0, 1], vec![0, 1], vec![]]);
    }

    #[test]
    fn drawn_windows_fit_the_tokens_stay_in_order_and_follow_the_seed() {
        let drawn = |n, seed| choose(&[12], &[1.0], 4, &tokens(n, seed)).concat();
        let first = drawn(19, 1);
        assert_eq!((first.len(), first.is_sorted()), (4, true));
        assert_eq!(drawn(19, 1), first);
        assert!((2..9).any(|seed| drawn(19, seed) != first));
        assert_eq!(drawn(1_000, 1), (0..12).collect::<Vec<_>>());
        assert_eq!(drawn(0, 1).len(), 1);
    }

    #[test]
    fn sources_give_alike_and_what_one_lacks_the_others_give() {
        assert_eq!(counts(&[100, 100], &[], 8), [4, 4]);
        assert_eq!(counts(&[1, 100, 3], &[], 12), [1, 8, 3]);
        let few = counts(&[9; 5], &[], 3);
        assert!(few.iter().sum::<usize>() == 3 && few.iter().all(|&n| n <= 1), "{few:?}");
        assert_eq!(counts(&[2, 1], &[], 9), [2, 1]);
    }

    #[test]
    fn a_mix_is_kept_and_checked() {
        assert_eq!(counts(&[100, 100], &[0.75, 0.25], 8), [6, 2]);
        assert_eq!(counts(&[100, 100], &[3.0, 0.0], 8), [8, 0]);
        assert_eq!(counts(&[2, 100], &[0.5, 0.5], 8), [2, 4]);
        let names = ["code".to_owned(), "prose".to_owned()];
        for (mix, says) in [
            (vec![("law", 1.0)], "one of the sources code, prose, found law"),
            (vec![("code", 1.0)], "none of prose"),
            (vec![("code", -1.0), ("prose", 1.0)], "share of code: expected 0 or more"),
            (vec![("code", 0.0), ("prose", 0.0)], "one above 0"),
            (vec![("code", 1.0), ("code", 1.0)], "every source once"),
        ] {
            let mix = mix.into_iter().map(|(name, share)| (name.to_owned(), share)).collect();
            let error = shares(&names, &TextOptions { mix, ..tokens(4, 1) }).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
    }
}
