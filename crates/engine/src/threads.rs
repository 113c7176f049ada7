//! A fork-join pool: one call spreads its tasks over the threads, the caller among them, and returns when all are done.
//!
//! Tasks are claimed one by one from a counter, so that a thread which the system holds up delays only the task it is
//! in, and a worker that sleeps too deep is not waited for. Between calls a worker spins for some microseconds, about as
//! long as the gaps between the steps of a layer are, and then parks.
//!
//! Invariant: when [`Pool::for_each`] returns or unwinds, no thread holds anything of its arguments. Which thread runs a
//! task must not change what the task computes. Left out: futures, stealing, nesting (a task must not call its pool).

use std::any::Any;
use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a thread spins before it parks. Longer than the serial steps between two products of a layer, short
/// beside the milliseconds that spinning costs others where threads are more than processors.
const SPIN: Duration = Duration::from_micros(50);

/// Threads that compute together.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    /// Held during a call, so that callers take turns.
    turn: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `n_threads`, the caller counted: `n_threads - 1` are started, or as many as the system starts. 0
    /// counts as 1.
    pub fn new(n_threads: usize) -> Pool {
        let n_workers = n_threads.max(1) - 1;
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            seats: (0..n_workers).map(|_| Seat::default()).collect(),
            caller: Mutex::new(None),
            caller_is_parked: AtomicBool::new(false),
            is_resting: AtomicBool::new(false),
            is_closing: AtomicBool::new(false),
        });
        let workers = (0..n_workers)
            .map_while(|seat| {
                let shared = Arc::clone(&shared);
                let name = format!("pool-{}", seat + 1);
                let thread = thread::Builder::new().name(name);
                thread.spawn(move || shared.work(seat)).ok()
            })
            .collect();
        Pool {
            shared,
            turn: Mutex::new(()),
            workers,
        }
    }

    /// Threads, the caller counted.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task` once with each item, on any thread, in any order. Several callers take turns. Allocates a list of
    /// the items.
    ///
    /// # Panics
    /// With the first panic of a task, after the others have ended.
    pub fn for_each<T: Send>(&self, items: impl IntoIterator<Item = T>, task: impl Fn(T) + Sync) {
        let items = items.into_iter();
        if self.workers.is_empty() {
            return items.for_each(task);
        }
        let mut items: Vec<Option<T>> = items.map(Some).collect();
        let n_items = items.len();
        if n_items <= 1 {
            return items.into_iter().flatten().for_each(task);
        }
        let first = First(items.as_mut_ptr());
        self.run(n_items, &|i| {
            let first = &first;
            // SAFETY: `run` calls this once for each i below n_items, so that no two calls have the same item; `items`
            // is alive and not touched until `run` returns, and T may go to another thread.
            let item = unsafe { &mut *first.0.add(i) };
            if let Some(item) = item.take() {
                task(item);
            }
        });
    }

    /// Tells that nothing will be asked for a while: workers park at once. To be called before waiting for something
    /// outside, for which another thread of this machine may need the processor.
    pub fn rest(&self) {
        self.shared.is_resting.store(true, Ordering::Relaxed);
    }

    fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let turn = lock(&self.turn);
        let shared = &*self.shared;
        let job = Job {
            // SAFETY: only the lifetime changes. The reference is used by threads inside the gate, and this function
            // returns after the gate was closed and everyone has left it; nothing before that can unwind.
            task: unsafe {
                std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(
                    task,
                )
            },
            n_tasks,
        };
        // SAFETY: the gate is closed and nobody is inside, so that no other thread looks at the job.
        unsafe { *shared.job.get() = Some(job) };
        shared.next.store(0, Ordering::Relaxed);
        shared.is_resting.store(false, Ordering::Relaxed);
        let round = (shared.gate.load(Ordering::Relaxed) / ROUND).wrapping_add(1);
        shared
            .gate
            .store(round.wrapping_mul(ROUND) | OPEN, Ordering::SeqCst);
        for seat in shared.seats.iter().take(n_tasks - 1) {
            seat.wake();
        }
        shared.take_tasks(job);
        shared.close();
        let panic = lock(&shared.panic).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.is_closing.store(true, Ordering::SeqCst);
        for seat in &self.shared.seats {
            seat.wake();
        }
        for worker in self.workers.drain(..) {
            // A worker catches the panics of tasks and has none of its own.
            let _ = worker.join();
        }
    }
}

/// Where the items lie.
struct First<T>(*mut Option<T>);

// SAFETY: see `for_each`: each item is used by one thread, and T may go to another thread.
unsafe impl<T: Send> Sync for First<T> {}

#[derive(Clone, Copy)]
struct Job {
    task: &'static (dyn Fn(usize) + Sync),
    n_tasks: usize,
}

/// A gate is `round * ROUND | OPEN if workers may enter | how many are inside`.
const OPEN: u64 = 1 << 31;
const ROUND: u64 = 1 << 32;
const INSIDE: u64 = OPEN - 1;

struct Shared {
    /// Workers enter it to look at `job`, and the caller changes `job` only when it is closed and empty.
    gate: AtomicU64,
    /// The next task that nobody has claimed.
    next: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    /// The first panic of a task.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    seats: Vec<Seat>,
    /// The caller that waits for workers to leave.
    caller: Mutex<Option<Thread>>,
    caller_is_parked: AtomicBool,
    is_resting: AtomicBool,
    is_closing: AtomicBool,
}

// SAFETY: `job` is the one field that is not Sync by itself; the gate orders its uses: it is written while the gate is
// closed and empty, and read by whoever is inside.
unsafe impl Sync for Shared {}
// SAFETY: as above; `job` holds a reference that may go to another thread.
unsafe impl Send for Shared {}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}

/// Where a worker parks.
#[derive(Default)]
struct Seat {
    is_parked: AtomicBool,
    thread: OnceLock<Thread>,
}

impl Seat {
    fn wake(&self) {
        if self.is_parked.load(Ordering::SeqCst)
            && self.is_parked.swap(false, Ordering::SeqCst)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }
}

impl Shared {
    /// A worker's life.
    fn work(&self, seat: usize) {
        let seat = &self.seats[seat];
        seat.thread.get_or_init(thread::current);
        let mut last_round = 0;
        while let Some(round) = self.enter(seat, last_round) {
            // SAFETY: this thread is inside the gate, so that the job is not changed until it has left.
            if let Some(job) = unsafe { *self.job.get() } {
                self.take_tasks(job);
            }
            last_round = round;
            let gate = self.gate.fetch_sub(1, Ordering::SeqCst);
            if gate & (OPEN | INSIDE) == 1
                && self.caller_is_parked.swap(false, Ordering::SeqCst)
                && let Some(caller) = lock(&self.caller).as_ref()
            {
                caller.unpark();
            }
        }
    }

    /// Waits for a round after `last_round` and enters the gate; `None` when the pool closes.
    fn enter(&self, seat: &Seat, last_round: u64) -> Option<u64> {
        let try_enter = || {
            let gate = self.gate.load(Ordering::SeqCst);
            let is_new = gate & OPEN != 0 && gate / ROUND != last_round;
            let entered = is_new
                && self
                    .gate
                    .compare_exchange(gate, gate + 1, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok();
            entered.then_some(gate / ROUND)
        };
        loop {
            let begun = Instant::now();
            while !self.is_closing.load(Ordering::Relaxed) {
                for _ in 0..16 {
                    if let Some(round) = try_enter() {
                        return Some(round);
                    }
                    spin_loop();
                }
                if self.is_resting.load(Ordering::Relaxed) || begun.elapsed() > SPIN {
                    break;
                }
            }
            // First said, then looked again: whoever opens the gate after this look sees that this thread is parked.
            seat.is_parked.store(true, Ordering::SeqCst);
            if self.is_closing.load(Ordering::SeqCst) {
                return None;
            }
            if let Some(round) = try_enter() {
                seat.is_parked.store(false, Ordering::SeqCst);
                return Some(round);
            }
            thread::park();
            seat.is_parked.store(false, Ordering::SeqCst);
        }
    }

    fn take_tasks(&self, job: Job) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= job.n_tasks {
                return;
            }
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (job.task)(i))) {
                lock(&self.panic).get_or_insert(panic);
            }
        }
    }

    /// Lets nobody in any more and waits until everyone has left.
    fn close(&self) {
        if self.gate.fetch_and(!OPEN, Ordering::SeqCst) & INSIDE == 0 {
            return;
        }
        let is_empty = || self.gate.load(Ordering::SeqCst) & INSIDE == 0;
        let begun = Instant::now();
        while begun.elapsed() < SPIN {
            for _ in 0..16 {
                if is_empty() {
                    return;
                }
                spin_loop();
            }
        }
        *lock(&self.caller) = Some(thread::current());
        loop {
            self.caller_is_parked.store(true, Ordering::SeqCst);
            if is_empty() {
                self.caller_is_parked.store(false, Ordering::SeqCst);
                return;
            }
            thread::park();
        }
    }
}

/// The lock, whatever panicked while it was held: what these guard is whole at any moment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_taken_once_however_many_threads() {
        for n_threads in [1, 2, 3, 8] {
            let pool = Pool::new(n_threads);
            for n_items in [0, 1, 2, 7, 1000] {
                let mut seen = vec![0_u32; n_items];
                pool.for_each(seen.iter_mut().enumerate(), |(i, seen)| {
                    *seen += i as u32 + 1
                });
                let expected: Vec<u32> = (1..=n_items as u32).collect();
                assert_eq!(seen, expected, "{n_threads} threads");
            }
        }
    }

    #[test]
    fn rounds_follow_one_another_with_and_without_rest() {
        let pool = Pool::new(3);
        let total = AtomicUsize::new(0);
        for round in 0..5_000 {
            pool.for_each(0..5, |i| {
                total.fetch_add(i, Ordering::Relaxed);
            });
            match round % 100 {
                0 => thread::sleep(Duration::from_micros(100)),
                50 => pool.rest(),
                _ => {}
            }
        }
        assert_eq!(total.into_inner(), 50_000);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(2);
        let done = AtomicUsize::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.for_each(0..10, |i| {
                assert_ne!(i, 3, "three");
                done.fetch_add(1, Ordering::Relaxed);
            });
        }));
        assert!(result.is_err());
        assert_eq!(done.load(Ordering::Relaxed), 9);
        pool.for_each(0..10, |_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 19);
    }

    #[test]
    fn callers_take_turns() {
        let pool = Pool::new(2);
        let total = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        pool.for_each(0..4, |i| {
                            total.fetch_add(i, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 500 * 6);
    }
}
