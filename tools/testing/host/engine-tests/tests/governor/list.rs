// SPDX-License-Identifier: GPL-2.0-only

//! The registry with mms of which only the number of anonymous pages matters.

use engine_tests::engine::{
    mm_list::MmList,
    registry::Registry,
    types::MmPin, //
};

use kernel::prelude::GFP_KERNEL;

use std::{
    cell::{
        Cell,
        RefCell, //
    },
    rc::Rc, //
};

/// What of an mm is not the governor's.
#[derive(Debug, Default)]
pub(crate) struct Mm {
    pub(crate) key: usize,
    pub(crate) anon: Cell<usize>,
    pub(crate) exiting: Cell<bool>,
}

/// A pin on an mm.
#[derive(Clone, Debug)]
pub(crate) struct Pin(pub(crate) Rc<Mm>);

impl Pin {
    pub(crate) fn new(key: usize) -> Self {
        Self(Rc::new(Mm {
            key,
            ..Mm::default()
        }))
    }
}

impl MmPin for Pin {
    fn key(&self) -> usize {
        self.0.key
    }

    fn exiting(&self) -> bool {
        self.0.exiting.get()
    }

    fn clone_pin(&self) -> Self {
        self.clone()
    }
}

/// The registry behind a lock that panics if it is taken twice.
pub(crate) struct List(RefCell<Registry<Pin>>);

impl MmList for List {
    type Mm = Pin;

    fn locked<R>(&self, f: impl FnOnce(&mut Registry<Pin>) -> R) -> R {
        f(&mut self.0.borrow_mut())
    }
}

impl List {
    pub(crate) fn new() -> Self {
        let list = Self(RefCell::new(Registry::new()));
        list.refill(GFP_KERNEL).expect("memory for slots");
        list
    }

    /// Registers mms with these keys.
    pub(crate) fn with(keys: &[usize]) -> Self {
        let list = Self::new();
        for &key in keys {
            list.enter(Pin::new(key));
        }
        list
    }

    pub(crate) fn check(&self) {
        assert_eq!(self.locked(|registry| registry.check()), Ok(()));
    }
}
