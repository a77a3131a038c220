// SPDX-License-Identifier: GPL-2.0-only

//! The threads that meet in the registry, and what they may never do to each other.

use super::{
    governor::nap::{
        Nap,
        AWAKE, //
    },
    mm_list::{
        MmList,
        Step,
        Visited, //
    },
    registry::{
        Claim,
        Next,
        Registry,
        SlotChunk, //
    },
    types::{
        MmPin,
        Progress,
        SlotId, //
    },
};

use crate::sim::{
    holds_lock,
    AnonVma,
    Mm,
    MmapRead,
    Pin,
    Space, //
};

use std::{
    collections::BTreeMap,
    rc::Rc, //
};

use kernel::prelude::{
    Result,
    GFP_KERNEL, //
};

use loom::{
    sync::{
        atomic::{
            fence,
            AtomicBool,
            AtomicI64,
            Ordering::{
                Relaxed,
                SeqCst, //
            }, //
        },
        Condvar,
        Mutex, //
    },
    thread, //
};

crate::pinned_mm!(MmPin);

/// What there is page state for: which slot, and whose pages.
#[derive(Debug, Default)]
struct Engine {
    tracked: BTreeMap<SlotId, usize>,
}

impl Engine {
    fn track(&mut self, slot: SlotId, mm: &Mm) {
        let before = self.tracked.insert(slot, mm.key());
        assert!(
            before.is_none_or(|key| key == mm.key()),
            "a slot has page state of another mm"
        );
    }

    fn forget(&mut self, slot: SlotId, mm: &Mm) {
        let before = self.tracked.remove(&slot);
        assert!(
            before.is_none_or(|key| key == mm.key()),
            "page state of another mm is dropped"
        );
    }
}

/// The module.
struct Module {
    /// `mmlist_lock`.
    registry: Mutex<Registry<Pin>>,
    /// `thread_mutex`.
    engine: Mutex<Engine>,
}

impl MmList for Module {
    type Mm = Pin;

    fn locked<R>(&self, f: impl FnOnce(&mut Registry<Pin>) -> R) -> R {
        let mut registry = self.registry.lock().unwrap();
        holds_lock(true);
        let result = f(&mut registry);
        holds_lock(false);
        if let Err(err) = registry.check() {
            panic!("the registry is corrupt: {err}");
        }
        result
    }
}

impl Module {
    /// The module as it is loaded, without room for any mm.
    fn load() -> Rc<Self> {
        Rc::new(Self {
            registry: Mutex::new(Registry::new()),
            engine: Mutex::new(Engine::default()),
        })
    }

    /// The module with room for mms. Not raced against by anybody: fewer steps to interleave.
    fn with_room() -> Rc<Self> {
        let module = Self::load();
        let chunk = SlotChunk::new(0, GFP_KERNEL).unwrap();
        assert!(module.registry.lock().unwrap().add_chunk(chunk).is_ok());
        module
    }

    fn fork(&self, key: usize) -> Process {
        let process = Process::new(key);
        self.enter(process.mm.pin());
        process
    }

    /// One full scan, or what is left of the list.
    fn scan(&self) {
        let mut engine = self.engine.lock().unwrap();
        if !self.locked(|registry| registry.begin()) {
            return;
        }
        while let Step::Visited { .. } = self.visit(|claim| look_at(&mut engine, claim)) {
            // The mmap lock was dropped in there.
        }
    }

    /// A share in one full scan with other threads: the engine is locked for the walk and for the
    /// decision, but not in between.
    fn scan_together(&self) {
        loop {
            let mut engine = self.engine.lock().unwrap();
            let claim = self.locked(|registry| {
                let Next::Visit(claim) = registry.claim() else {
                    return None;
                };
                registry.advance(&claim);
                Some(claim)
            });
            let Some(claim) = claim else {
                break;
            };
            let visited = look_at(&mut engine, &claim);
            drop(engine);

            // Here the pages are hashed.

            let engine = self.engine.lock().unwrap();
            let tracked = engine.tracked.contains_key(&claim.id());
            let exiting = visited.progress == Progress::Exiting;
            let released = self.locked(|registry| {
                if exiting {
                    registry.unregister(&claim);
                }
                registry.release(claim, tracked)
            });
            drop(engine);
            drop(released);
        }
    }

    /// What a task that asks for it does with one mm, wherever the scanner is.
    fn merge_now(&self, key: usize) {
        let mut engine = self.engine.lock().unwrap();
        self.visit_key(key, |claim| look_at(&mut engine, claim).tracked);
    }

    /// What the scanner does when it is woken, whether it may scan or not.
    fn reap_dead(&self) {
        let mut engine = self.engine.lock().unwrap();
        let forget = |slot, pin: &Pin| {
            engine.forget(slot, pin.mm());
            true
        };
        self.reap(forget, || false);
    }

    /// `run` = 2.
    fn unmerge_all(&self) -> Result {
        let mut engine = self.engine.lock().unwrap();
        self.unmerge(|claim| {
            let mm = claim.mm().mm();
            let mut space = mm.mmap_write_lock();
            if mm.exiting() {
                engine.forget(claim.id(), mm);
                return Ok(Visited {
                    progress: Progress::Exiting,
                    tracked: false,
                });
            }
            space.merged = false;
            engine.forget(claim.id(), mm);
            Ok(Visited {
                progress: Progress::Done,
                tracked: false,
            })
        })
    }

    /// The end of the module: the probes are gone, the scanner has stopped.
    fn unload(&self) {
        let mut engine = self.engine.lock().unwrap();
        self.clear(|slot, pin| engine.forget(slot, pin.mm()));
    }

    /// Checks that nothing is left of anybody, after everybody has exited.
    fn all_gone(&self, mms: &[&'static Mm]) {
        self.reap_dead();
        self.locked(|registry| {
            assert!(registry.is_empty(), "an mm that exited is still registered");
            assert_eq!(registry.nr_left(), 0, "a slot is lost");
        });
        let engine = self.engine.lock().unwrap();
        assert!(engine.tracked.is_empty(), "page state is left behind");
        for mm in mms {
            assert!(mm.freed(), "an mm is never freed");
        }
    }
}

/// A visit by the scanner.
fn look_at(engine: &mut Engine, claim: &Claim<Pin>) -> Visited {
    let mm = claim.mm().mm();
    let space = mm.mmap_read_lock();
    let live = !mm.exiting();
    let visited = if live {
        assert!(space.vmas(), "vmas are walked that are gone");
        if space.pages() {
            engine.track(claim.id(), mm);
        }
        Visited {
            progress: Progress::Done,
            tracked: space.pages(),
        }
    } else {
        engine.forget(claim.id(), mm);
        Visited {
            progress: Progress::Exiting,
            tracked: false,
        }
    };
    drop(space);
    visited
}

/// A process, from its first breath to its last.
struct Process {
    mm: &'static Mm,
    pin: Pin,
}

impl Process {
    /// A process with pages, of which none is merged.
    fn new(key: usize) -> Self {
        Self::with(key, true, false)
    }

    fn with(key: usize, pages: bool, merged: bool) -> Self {
        let (mm, pin) = Mm::create(
            key,
            Space {
                vmas: true,
                pages,
                merged,
            },
        );
        Self { mm, pin }
    }

    /// `__mmput()` of the last user: `ksm_exit()`, `exit_mmap()`, `mmdrop()`.
    fn exit(self, module: &Module) {
        self.mm.last_user_goes();
        module.exit(self.mm.key());
        self.mm.mmap_write_lock().vmas = false;
        drop(self.pin);
    }
}

fn spawn(f: impl FnOnce() + 'static) -> thread::JoinHandle<()> {
    thread::spawn(f)
}

/// A process exits while it is scanned.
pub fn scan_against_exit() {
    let module = Module::with_room();
    let a = module.fork(1);
    let mm = a.mm;
    let exit = {
        let module = module.clone();
        spawn(move || a.exit(&module))
    };
    module.scan();
    exit.join().unwrap();
    module.all_gone(&[mm]);
}

/// A process exits while it is scanned, and has no page to scan: its slot is freed at once.
pub fn scan_against_exit_of_empty() {
    let module = Module::with_room();
    let a = Process::with(1, false, false);
    let mm = a.mm;
    module.enter(mm.pin());
    let exit = {
        let module = module.clone();
        spawn(move || a.exit(&module))
    };
    module.scan();
    exit.join().unwrap();
    module.all_gone(&[mm]);
}

/// A process exits, and its slot goes to a new one, while both are scanned.
pub fn scan_against_reuse() {
    let module = Module::with_room();
    let a = module.fork(1);
    let mm = a.mm;
    let other = {
        let module = module.clone();
        thread::spawn(move || {
            a.exit(&module);
            let b = module.fork(2);
            let mm = b.mm;
            b.exit(&module);
            mm
        })
    };
    module.scan();
    let other = other.join().unwrap();
    module.all_gone(&[mm, other]);
}

/// The module is unloaded while a process exits, after its scanner has stopped.
pub fn unload_against_exit() {
    let module = Module::with_room();
    let a = module.fork(1);
    let b = module.fork(2);
    let mms = [a.mm, b.mm];
    module.scan();
    let exit = {
        let module = module.clone();
        spawn(move || a.exit(&module))
    };
    module.unload();
    exit.join().unwrap();
    b.exit(&module);
    module.all_gone(&mms);
}

/// The scanner sees that a process exits, the process exits, and the dead are reaped by another.
pub fn scan_against_exit_and_reaper() {
    let module = Module::with_room();
    let a = module.fork(1);
    let mm = a.mm;
    let exit = {
        let module = module.clone();
        spawn(move || a.exit(&module))
    };
    let reaper = {
        let module = module.clone();
        spawn(move || module.reap_dead())
    };
    module.scan();
    exit.join().unwrap();
    reaper.join().unwrap();
    module.all_gone(&[mm]);
}

/// Two threads share a full scan, and a process that they scan exits.
pub fn two_scanners_against_exit() {
    let module = Module::with_room();
    let a = module.fork(1);
    let b = module.fork(2);
    let mms = [a.mm, b.mm];
    assert!(module.locked(|registry| registry.begin()));
    let exit = {
        let module = module.clone();
        spawn(move || a.exit(&module))
    };
    let other = {
        let module = module.clone();
        spawn(move || module.scan_together())
    };
    module.scan_together();
    exit.join().unwrap();
    other.join().unwrap();
    b.exit(&module);
    module.all_gone(&mms);
}

/// Processes enter and exit, everything is scanned, unmerged, and unloaded.
pub fn everything_at_once() {
    let module = Module::with_room();
    let a = module.fork(1);
    let first = a.mm;
    let exit = {
        let module = module.clone();
        spawn(move || a.exit(&module))
    };
    let enter = {
        let module = module.clone();
        thread::spawn(move || {
            let b = module.fork(2);
            let mm = b.mm;
            b.exit(&module);
            mm
        })
    };
    let unmerge = {
        let module = module.clone();
        spawn(move || module.unmerge_all().unwrap())
    };
    module.scan();
    unmerge.join().unwrap();
    module.unload();
    exit.join().unwrap();
    let second = enter.join().unwrap();
    module.all_gone(&[first, second]);
}

/// A process exits while a task has it merged, and while it is scanned.
pub fn merge_now_against_scan_and_exit() {
    let module = Module::with_room();
    let a = module.fork(1);
    let mm = a.mm;
    let exit = {
        let module = module.clone();
        spawn(move || a.exit(&module))
    };
    let merge = {
        let module = module.clone();
        spawn(move || module.merge_now(1))
    };
    module.scan();
    exit.join().unwrap();
    merge.join().unwrap();
    module.all_gone(&[mm]);
}

/// Memory runs out while everything is unmerged, and comes back only with the victim's exit.
pub fn unmerge_against_oom_kill() {
    let module = Module::with_room();
    let a = module.fork(1);
    let mm = a.mm;
    module.scan();
    let memory = Rc::new((Mutex::new(false), Condvar::new()));
    let exit = {
        let (module, memory) = (module.clone(), memory.clone());
        spawn(move || {
            a.exit(&module);
            *memory.0.lock().unwrap() = true;
            memory.1.notify_one();
        })
    };
    {
        let _engine = module.engine.lock().unwrap();
        let mut free = memory.0.lock().unwrap();
        while !*free {
            free = memory.1.wait(free).unwrap();
        }
    }
    exit.join().unwrap();
    module.all_gone(&[mm]);
}

/// A process with merged pages forks while everything is unmerged.
pub fn unmerge_against_fork() {
    let module = Module::with_room();
    // Scanned before its parent if it goes behind the cursor.
    let first = module.fork(1);
    let parent = Process::with(2, true, true);
    module.enter(parent.mm.pin());
    let child = {
        let (module, parent) = (module.clone(), parent.mm);
        spawn_child(module, parent)
    };
    module.unmerge_all().unwrap();
    let child = child.join().unwrap();
    for process in [&first, &parent, &child] {
        let merged = process.mm.mmap_write_lock().merged;
        assert!(!merged, "a merged page is left after unmerging");
    }
    let mms = [first.mm, parent.mm, child.mm];
    for process in [first, parent, child] {
        process.exit(&module);
    }
    module.all_gone(&mms);
}

/// `dup_mmap()`: the child is registered before it has pages, with both mmap locks held.
fn spawn_child(module: Rc<Module>, parent: &'static Mm) -> thread::JoinHandle<Process> {
    thread::spawn(move || {
        let child = Process::new(3);
        let old = parent.mmap_write_lock();
        let mut new = child.mm.mmap_write_lock();
        module.enter(child.mm.pin());
        new.merged = old.merged;
        drop((new, old));
        child
    })
}

/// An mm that was found on the built-in's list is registered while it exits.
pub fn late_enter_against_exit() {
    let module = Module::with_room();
    let a = Process::new(1);
    let mm = a.mm;
    let pin = mm.pin();
    let exit = {
        let module = module.clone();
        spawn(move || a.exit(&module))
    };
    module.enter(pin);
    exit.join().unwrap();
    module.all_gone(&[mm]);
}

/// An mm enters while there is no room, and a worker makes some.
pub fn enter_against_refill() {
    let module = Module::load();
    let a = Process::new(1);
    // The built-in's list, which has the mm before its probe is called.
    let builtin = a.mm;
    let work = |module: &Module| {
        module.refill(GFP_KERNEL).unwrap();
        if module.locked(|registry| registry.take_missed()) {
            module.enter(builtin.pin());
        }
    };
    let enter = {
        let module = module.clone();
        thread::spawn(move || {
            let entered = module.enter(builtin.pin());
            (a, entered.refill)
        })
    };
    work(&module);
    let (a, woken) = enter.join().unwrap();
    if woken {
        work(&module);
    }
    assert_eq!(
        module.locked(|registry| registry.len()),
        1,
        "an mm is forgotten"
    );
    a.exit(&module);
    module.all_gone(&[builtin]);
}

/// A reference to an `anon_vma`, as an rmap item has one.
struct Item(&'static AnonVma);

impl Item {
    fn new(anon_vma: &'static AnonVma) -> Self {
        anon_vma.get();
        Self(anon_vma)
    }
}

impl Drop for Item {
    fn drop(&mut self) {
        self.0.put();
    }
}

/// Merges a page: its rmap item goes on the node's list, and has a reference to the `anon_vma`.
fn merge(space: MmapRead, anon_vma: &'static AnonVma, node: &Mutex<Vec<&'static AnonVma>>) -> Item {
    let item = Item::new(anon_vma);
    node.lock().unwrap().push(anon_vma);
    drop(space);
    item
}

/// A page is merged while its process unmaps it and somebody walks the merged page's mappings.
///
/// The order is that of the mm layer, which the host cannot run.
pub fn merge_against_unmap_and_rmap_walk() {
    let anon_vma = AnonVma::create();
    // The list of a stable node, under the folio lock.
    let node = Rc::new(Mutex::new(Vec::<&'static AnonVma>::new()));
    let process = Process::new(1);
    let mm = process.mm;

    let unmap = spawn(move || {
        mm.mmap_write_lock().vmas = false;
        anon_vma.put();
    });
    let walker = {
        let node = node.clone();
        spawn(move || {
            for anon_vma in node.lock().unwrap().iter() {
                anon_vma.walk();
            }
        })
    };
    let space = mm.mmap_read_lock();
    let item = if space.vmas() {
        Some(merge(space, anon_vma, &node))
    } else {
        drop(space);
        None
    };
    unmap.join().unwrap();
    walker.join().unwrap();
    node.lock().unwrap().clear();
    drop(item);
    drop(process);
}

/// What `rksmd` and those that announce mms share, and the wait queue.
struct Sleeper {
    newcomers: AtomicBool,
    asleep_until: AtomicI64,
    /// `rksmd` is in the queue, and nobody has woken it.
    queued: Mutex<bool>,
    woken: Condvar,
}

impl Nap for Sleeper {
    fn set_newcomers(&self) {
        fence(SeqCst);
        self.newcomers.store(true, Relaxed);
        fence(SeqCst);
    }

    fn newcomers(&self) -> bool {
        self.newcomers.load(Relaxed)
    }

    fn asleep_until(&self) -> i64 {
        self.asleep_until.load(Relaxed)
    }

    fn set_asleep_until(&self, until: i64) {
        self.asleep_until.store(until, Relaxed);
    }

    fn now(&self) -> i64 {
        1
    }

    fn wake(&self) {
        // It looks at the queue without its lock only after a full barrier.
        fence(SeqCst);
        *self.queued.lock().unwrap() = false;
        self.woken.notify_one();
    }
}

impl Sleeper {
    /// Sleeps until a time that does not come: who is not woken sleeps for ever.
    fn sleep(&self) {
        self.set_asleep_until(1_000_000_000);
        while !self.is_over() {
            // `prepare_to_wait_event()`.
            *self.queued.lock().unwrap() = true;
            fence(SeqCst);
            if self.is_over() {
                break;
            }
            let mut queued = self.queued.lock().unwrap();
            while *queued {
                queued = self.woken.wait(queued).unwrap();
            }
        }
        self.set_asleep_until(AWAKE);
    }
}

/// Mms are announced while `rksmd` goes to sleep for a second: it sees all of them, and is not left
/// to sleep by a wake-up that is lost.
fn announced_against_sleep(newcomers: usize) {
    let sleeper = Rc::new(Sleeper {
        newcomers: AtomicBool::new(false),
        asleep_until: AtomicI64::new(AWAKE),
        queued: Mutex::new(false),
        woken: Condvar::new(),
    });
    let registered = Rc::new(Mutex::new(0));
    let announce = || {
        let (sleeper, registered) = (sleeper.clone(), registered.clone());
        spawn(move || {
            *registered.lock().unwrap() += 1;
            sleeper.announce();
        })
    };
    let others: Vec<_> = (0..newcomers).map(|_| announce()).collect();
    let mut seen = 0;
    while seen < newcomers {
        if sleeper.newcomers() {
            sleeper.newcomers.store(false, Relaxed);
            fence(SeqCst);
            seen = *registered.lock().unwrap();
        } else {
            sleeper.sleep();
        }
    }
    for other in others {
        other.join().unwrap();
    }
}

/// One mm.
pub fn newcomer_against_sleep() {
    announced_against_sleep(1);
}

/// Two of them.
pub fn newcomers_against_sleep() {
    announced_against_sleep(2);
}
