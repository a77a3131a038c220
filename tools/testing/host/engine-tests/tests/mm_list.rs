// SPDX-License-Identifier: GPL-2.0-only

//! The steps on the registry, one thread at a time: what each reports, and what it leaves behind.

use engine_tests::engine::{
    mm_list::{
        Entered,
        MmList,
        Step,
        Visited, //
    },
    registry::Registry,
    types::{
        MmPin,
        Progress, //
    }, //
};

use kernel::{
    error::code::{
        EINTR,
        ENOMEM, //
    },
    prelude::GFP_KERNEL,
    testing::{
        self,
        Fail, //
    }, //
};

use std::{
    cell::{
        Cell,
        RefCell, //
    },
    rc::Rc, //
};

/// A pin on an mm: its key, and whether it is exiting.
#[derive(Debug)]
struct Pin(usize, Rc<Cell<bool>>);

impl Pin {
    fn new(key: usize) -> Self {
        Self(key, Rc::default())
    }
}

impl MmPin for Pin {
    fn key(&self) -> usize {
        self.0
    }

    fn exiting(&self) -> bool {
        self.1.get()
    }

    fn clone_pin(&self) -> Self {
        Self(self.0, self.1.clone())
    }
}

/// The registry behind a lock that panics if it is taken twice.
struct List(RefCell<Registry<Pin>>);

impl MmList for List {
    type Mm = Pin;

    fn locked<R>(&self, f: impl FnOnce(&mut Registry<Pin>) -> R) -> R {
        let mut registry = self.0.borrow_mut();
        let result = f(&mut registry);
        assert_eq!(registry.check(), Ok(()));
        result
    }
}

impl List {
    fn new() -> Self {
        let list = Self(RefCell::new(Registry::new()));
        assert_eq!(list.refill(GFP_KERNEL), Ok(()));
        list
    }

    fn with(keys: &[usize]) -> Self {
        let list = Self::new();
        for &key in keys {
            list.enter(Pin::new(key));
        }
        list
    }

    fn len(&self) -> usize {
        self.locked(|registry| registry.len())
    }

    /// Visits the next mm. Returns which one, from where, and the outcome.
    fn next(&self, progress: Progress, tracked: bool) -> (Option<(usize, usize)>, Step) {
        let mut seen = None;
        let step = self.visit(|claim| {
            seen = Some((claim.mm().key(), claim.address()));
            Visited { progress, tracked }
        });
        (seen, step)
    }

    fn reap_all(&self, mut forget: impl FnMut(&Pin)) {
        let forget_all = |_, mm: &Pin| {
            forget(mm);
            true
        };
        assert!(self.reap(forget_all, || false));
    }
}

const DONE: Visited = Visited {
    progress: Progress::Done,
    tracked: false,
};

#[test]
fn enter_reports_what_to_wake() {
    let list = List(RefCell::new(Registry::new()));
    let nothing = Entered::default();
    let refill = Entered {
        refill: true,
        ..nothing
    };
    assert_eq!(list.enter(Pin::new(1)), refill);
    assert!(list.locked(|registry| registry.take_missed()));

    let list = List::new();
    let registered = Entered {
        registered: true,
        ..nothing
    };
    let scanner = Entered {
        wake_scanner: true,
        ..registered
    };
    assert_eq!(list.enter(Pin::new(1)), scanner);
    assert_eq!(list.enter(Pin::new(1)), nothing);
    assert_eq!(list.enter(Pin::new(2)), registered);
    let gone = Pin::new(3);
    gone.1.set(true);
    assert_eq!(list.enter(gone), nothing);
    assert_eq!(list.len(), 2);
    let low = Entered {
        refill: true,
        ..registered
    };
    let low = (3..300).find(|&key| list.enter(Pin::new(key)) == low);
    assert_eq!(low, Some(256 - 96 + 1));
}

#[test]
fn refill_adds_until_there_is_enough_or_memory_runs_out() {
    let list = List(RefCell::new(Registry::new()));
    testing::fail(Fail::From(0));
    assert_eq!(list.refill(GFP_KERNEL), Err(ENOMEM));
    testing::fail(Fail::Never);
    assert_eq!(list.refill(GFP_KERNEL), Ok(()));
    assert_eq!(list.locked(|registry| registry.wanted()), None);
    let bytes = list.locked(|registry| registry.bytes());
    assert_eq!(list.refill(GFP_KERNEL), Ok(()));
    assert_eq!(list.locked(|registry| registry.bytes()), bytes);
}

#[test]
fn exit_reports_when_the_reaper_is_due() {
    let list = List::with(&[1, 2]);
    assert!(!list.exit(3));
    assert!(list.locked(|registry| registry.begin()));
    assert_eq!(list.next(Progress::Done, true).0, Some((1, 0)));
    assert_eq!(list.next(Progress::Done, false).0, Some((2, 0)));
    assert!(list.exit(1));
    assert!(!list.exit(1));
    assert!(!list.exit(2));
    let mut forgotten = Vec::new();
    list.reap_all(|mm| forgotten.push(mm.key()));
    assert_eq!(forgotten, [1]);
    assert_eq!(list.locked(|registry| registry.nr_left()), 0);
}

#[test]
fn visits_go_on_where_the_last_one_ended() {
    let list = List::with(&[1, 2, 3]);
    assert_eq!(list.next(Progress::Done, false), (None, Step::Idle));
    assert!(list.locked(|registry| registry.begin()));
    let visited = Step::Visited { reap: false };
    let next = |progress| list.next(progress, false);
    assert_eq!(next(Progress::At(0x5000)), (Some((1, 0)), visited));
    assert_eq!(next(Progress::Done), (Some((1, 0x5000)), visited));
    // Its exit has not been reported, and will find nothing.
    let reap = Step::Visited { reap: true };
    assert_eq!(next(Progress::Exiting), (Some((2, 0)), reap));
    assert!(!list.exit(2));
    assert_eq!(next(Progress::Done), (Some((3, 0)), visited));
    assert_eq!(next(Progress::Done), (None, Step::End));
    assert_eq!(next(Progress::Done), (None, Step::Idle));
    list.reap_all(|mm| assert_eq!(mm.key(), 2));
    assert_eq!(list.len(), 2);
}

#[test]
fn an_exit_during_the_visit_is_reaped_after_it() {
    let list = List::with(&[1]);
    assert!(list.locked(|registry| registry.begin()));
    let step = list.visit(|_| {
        assert!(!list.exit(1));
        list.reap_all(|_| panic!("reaped while it is visited"));
        DONE
    });
    assert_eq!(step, Step::Visited { reap: true });
    let mut reaped = 0;
    list.reap_all(|_| reaped += 1);
    assert_eq!((reaped, list.len()), (1, 0));
}

#[test]
fn reaping_ends_early_and_goes_on() {
    let list = List::with(&[1, 2, 3]);
    assert!(list.locked(|registry| registry.begin()));
    for key in [1, 2, 3] {
        assert_eq!(list.next(Progress::Done, true).0, Some((key, 0)));
    }
    for key in [1, 2, 3] {
        assert!(list.exit(key));
    }
    // The first takes three steps; after each mm that is gone a pause is due.
    let steps = Cell::new(0);
    let reap = || {
        let forget = |_, mm: &Pin| {
            steps.set(steps.get() + 1);
            mm.key() != 1 || steps.get() > 4
        };
        let all = list.reap(forget, || true);
        let left = list.locked(|registry| registry.nr_left());
        (all, left)
    };
    assert_eq!(reap(), (false, 3));
    assert_eq!(reap(), (false, 2));
    assert_eq!(reap(), (false, 1));
    assert_eq!(reap(), (false, 1));
    assert_eq!(reap(), (false, 0));
    assert_eq!(reap(), (true, 0));
    assert_eq!(steps.get(), 5);
}

#[test]
fn unmerging_visits_mms_that_enter_meanwhile() {
    let list = List::with(&[1, 2]);
    // A scan under way is over.
    assert!(list.locked(|registry| registry.begin()));
    assert_eq!(list.next(Progress::Done, true).0, Some((1, 0)));
    let mut seen = Vec::new();
    let result = list.unmerge(|claim| {
        seen.push(claim.mm().key());
        if seen.len() < 3 {
            list.enter(Pin::new(10 + seen.len()));
        }
        Ok(DONE)
    });
    assert_eq!(result, Ok(()));
    assert_eq!(seen, [1, 2, 11, 12]);
    assert!(!list.locked(|registry| registry.scanning()));
}

#[test]
fn unmerging_ends_at_the_first_error() {
    let list = List::with(&[1, 2, 3]);
    let mut seen = Vec::new();
    let result = list.unmerge(|claim| {
        seen.push(claim.mm().key());
        match claim.mm().key() {
            2 => Err(EINTR),
            _ => Ok(DONE),
        }
    });
    assert_eq!(result, Err(EINTR));
    assert_eq!(seen, [1, 2]);
    assert!(!list.locked(|registry| registry.scanning()));
    // What is left of the second is not known: it is not freed without the reaper.
    assert!(!list.exit(1));
    assert!(list.exit(2));
}

#[test]
fn clearing_leaves_no_mm() {
    let list = List::with(&[1, 2, 3]);
    assert!(list.locked(|registry| registry.begin()));
    while let (Some(_), _) = list.next(Progress::Done, true) {}
    assert!(list.exit(2));
    let mut forgotten = Vec::new();
    list.clear(|_, mm| forgotten.push(mm.key()));
    assert_eq!(forgotten, [2, 1, 3]);
    assert_eq!(list.len(), 0);
    assert_eq!(list.locked(|registry| registry.nr_left()), 0);
}
