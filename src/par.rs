//! Parallelism whose results do not depend on the number of threads.
//!
//! Independent outputs in order ([`map`], [`in_turn`], [`map_mut`], [`for_each_chunk`]), sums over
//! fixed blocks that are added in block order ([`sum_blocks`]), and a producer with a consumer on a
//! thread of its own ([`producer_consumer`]). None lets rayon decide an order of floating-point
//! additions. The caller's rayon pool decides the width; there is no global switch.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Evaluates `f(0), …, f(n − 1)` in parallel and returns the results in order.
///
/// # Errors
/// The error of the smallest failing index, whichever thread finished first.
pub(crate) fn map<T: Send>(n: usize, f: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    let results: Vec<Result<T>> = (0..n).into_par_iter().map(&f).collect();
    results.into_iter().collect()
}

/// As [`map`], but evaluations begin in the order of their indices, one per thread at a time, so
/// that what is done early is what comes first. For results that are handed on while others are
/// still being computed. Begins nothing new once an evaluation has failed.
///
/// # Errors
/// The error of the smallest index that failed.
pub(crate) fn in_turn<T: Send>(n: usize, f: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let parts = rayon::broadcast(|_| {
        let mut done = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n {
                break;
            }
            let result = f(i);
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            done.push((i, result));
        }
        done
    });
    let mut results: Vec<_> = parts.into_iter().flatten().collect();
    results.sort_unstable_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Evaluates `f(i, &mut items[i])` for every item in parallel and returns the results in order.
///
/// # Errors
/// The error of the smallest failing index; the other items were changed all the same.
pub(crate) fn map_mut<T: Send, U: Send>(
    items: &mut [T],
    f: impl Fn(usize, &mut T) -> Result<U> + Sync,
) -> Result<Vec<U>> {
    let results: Vec<Result<U>> =
        items.par_iter_mut().enumerate().map(|(i, item)| f(i, item)).collect();
    results.into_iter().collect()
}

/// Runs `produce` on this thread and, on another, `consume` on each item that `produce` sends, in
/// order. At most `capacity` items wait between the two. A `produce` whose sending fails should
/// stop: `consume` has failed.
///
/// Called inside a rayon pool, the consumer gets a pool of its own of the same width, so that
/// nothing runs on rayon's global pool: at most twice as many threads are busy. Called outside,
/// both use the global pool.
///
/// # Errors
/// That of `consume`, which is then the cause of both; else that of `produce`.
/// [`ErrorKind::Io`](crate::ErrorKind::Io) when the system grants no further threads.
pub(crate) fn producer_consumer<T: Send, R>(
    capacity: usize,
    consume: impl FnMut(T) -> Result<()> + Send,
    produce: impl FnOnce(&SyncSender<T>) -> Result<R>,
) -> Result<R> {
    let pool = pool_of_the_same_width()?;
    std::thread::scope(|scope| {
        let (send, receive) = sync_channel(capacity);
        let consumer = scope.spawn(move || {
            let consume_all = move || receive.iter().try_for_each(consume);
            match pool {
                Some(pool) => pool.install(consume_all),
                None => consume_all(),
            }
        });
        let produced = produce(&send);
        drop(send);
        let consumed = consumer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        consumed.and(produced)
    })
}

/// A pool as wide as the one that this thread belongs to; `None` outside every pool.
fn pool_of_the_same_width() -> Result<Option<rayon::ThreadPool>> {
    if rayon::current_thread_index().is_none() {
        return Ok(None);
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(rayon::current_num_threads()).build();
    pool.map(Some).map_err(|e| Error::io("start threads", std::io::Error::other(e)))
}

/// Sums `f(range)` over the blocks `[0, block), [block, 2·block), …` of `0..n`.
///
/// Blocks are evaluated in parallel, a fixed number at a time, and folded in block order with
/// `add`, so the rounding is that of one thread. `None` when `n` is 0. At most `WAVE` results are
/// held at once.
///
/// # Errors
/// The error of the first failing block.
pub(crate) fn sum_blocks<T: Send>(
    n: usize,
    block: usize,
    f: impl Fn(std::ops::Range<usize>) -> Result<T> + Sync,
    mut add: impl FnMut(&mut T, T),
) -> Result<Option<T>> {
    const WAVE: usize = 8;
    let blocks = n.div_ceil(block.max(1));
    let mut total: Option<T> = None;
    for wave in (0..blocks).step_by(WAVE) {
        let parts = map(WAVE.min(blocks - wave), |i| {
            let start = (wave + i) * block;
            f(start..(start + block).min(n))
        })?;
        for part in parts {
            match &mut total {
                Some(total) => add(total, part),
                None => total = Some(part),
            }
        }
    }
    Ok(total)
}

/// Calls `f(index, chunk)` in parallel on the consecutive chunks of `data`.
pub(crate) fn for_each_chunk<T: Send>(
    data: &mut [T],
    chunk: usize,
    f: impl Fn(usize, &mut [T]) + Sync,
) {
    data.par_chunks_mut(chunk.max(1)).enumerate().for_each(|(i, part)| f(i, part));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn map_keeps_order_and_reports_the_first_failure() {
        assert_eq!(map(5, |i| Ok(i * i)).unwrap(), [0, 1, 4, 9, 16]);
        let failure = map(100, |i| if i % 7 == 6 { Err(Error::range("i", "", i)) } else { Ok(i) });
        assert!(failure.unwrap_err().to_string().ends_with("found 6"));
    }

    #[test]
    fn items_are_changed_in_place_and_answer_in_order() {
        let mut items = [1, 2, 3];
        let answers = map_mut(&mut items, |i, x| {
            *x += 10;
            Ok(i as i32 + *x)
        });
        assert_eq!((answers.unwrap(), items), (vec![11, 13, 15], [11, 12, 13]));
    }

    #[test]
    fn block_sums_have_the_same_bits_at_any_width() {
        // A harmonic sum in f32 rounds differently for nearly every order of additions.
        let sum = || {
            let part = |r: std::ops::Range<usize>| Ok(r.map(|i| 1.0 / (i + 1) as f32).sum::<f32>());
            sum_blocks(100_003, 97, part, |a, b| *a += b).unwrap().unwrap().to_bits()
        };
        let one = pool(1).install(sum);
        assert!([2, 3, 8].iter().all(|&t| pool(t).install(sum) == one));
    }

    #[test]
    fn empty_sum_is_none() {
        assert_eq!(sum_blocks(0, 4, |_| Ok(1), |a, b| *a += b).unwrap(), None);
    }

    #[test]
    fn in_turn_keeps_the_order_and_stops_at_an_error() {
        assert_eq!(
            in_turn(100, |i| Ok(i * i)).unwrap(),
            (0..100).map(|i| i * i).collect::<Vec<_>>()
        );
        let fails = |i| if i == 7 { Err(Error::range("i", "not 7", i)) } else { Ok(i) };
        assert!(in_turn(1000, fails).unwrap_err().to_string().contains("not 7"));
        assert!(in_turn(0, fails).unwrap().is_empty());
    }

    #[test]
    fn items_are_consumed_in_order_and_the_error_of_the_consumer_comes_first() {
        let mut taken = Vec::new();
        let take = |i: usize| {
            taken.push(i);
            Ok(())
        };
        let made = producer_consumer(0, take, |send| {
            (0..5).try_for_each(|i| send.send(i)).unwrap();
            Ok(9)
        });
        assert_eq!((made.unwrap(), taken), (9, vec![0, 1, 2, 3, 4]));
        let bad = |what: &str| Error::range(what, "nothing", 0);
        let both = producer_consumer(
            0,
            |_: usize| Err(bad("taking")),
            |send| {
                while send.send(1).is_ok() {}
                Err::<(), _>(bad("making"))
            },
        );
        assert!(both.unwrap_err().to_string().starts_with("taking"));
        let made = producer_consumer(1, |_: usize| Ok(()), |_| Err::<(), _>(bad("making")));
        assert!(made.unwrap_err().to_string().starts_with("making"));
    }

    #[test]
    fn the_consumer_works_on_as_many_threads_as_the_pool_of_the_producer() {
        for threads in [1, 3] {
            let mut widths = Vec::new();
            let consume = |_: usize| {
                widths
                    .push((rayon::current_num_threads(), rayon::current_thread_index().is_some()));
                Ok(())
            };
            let produce = |send: &SyncSender<usize>| {
                send.send(1).map_err(|_| Error::bug("the consumer is gone"))
            };
            pool(threads).install(|| producer_consumer(0, consume, produce)).unwrap();
            assert_eq!(widths, [(threads, true)]);
        }
    }
}
