// SPDX-License-Identifier: GPL-2.0-only

//! Kernel samepage merging, in place of the built-in.
//!
//! Layers that depend on each other one way: the [`service`] runs the [`engine`], which decides and
//! has no unsafe code, over [`ksm`], which merges and unmerges pages; [`takeover`] replaces the
//! built-in; [`kernel_ext`] wraps what the kernel crate lacks. This file loads and unloads.

use kernel::{
    prelude::*,
    sync::Arc, //
};

mod bindings;
#[expect(
    unreachable_pub,
    reason = "the engine is a crate of its own for the tests on the host"
)]
mod engine;
mod kernel_ext;
mod ksm;
#[forbid(unsafe_code)]
mod service;
mod takeover;

use engine::{
    governor::Limits,
    sysfs::{
        attribute::{
            self,
            Attribute, //
        },
        knobs::{
            Knobs,
            RunState, //
        },
    }, //
};
use kernel_ext::{
    compat,
    device::Device,
    kthread::{
        online_cpus, //
        Kthread,
    },
    memory_notifier::MemoryNotifier,
    symbols::Symbols,
    tracepoint::Probes, //
};
use ksm::{
    stable_nodes::StableNodes,
    trace::Trace,
    worker_pool::NICE, //
};
use service::{
    attributes::{
        builtin,
        OwnFiles, //
    },
    sweep::Sweeper,
    Ksm, //
};
use takeover::{
    inventory::Unfit,
    Takeover, //
};

module! {
    type: Rksm,
    name: "rksm",
    authors: ["The rksm authors"],
    description: "Kernel samepage merging, in place of the built-in",
    license: "GPL",
    params: {
        run: i32 {
            default: -1,
            description: "run: 0 stop, 1 merge, 2 unmerge; -1 (default) takes the built-in's over",
        },
        pages_to_scan: i64 {
            default: -1,
            description: "pages_to_scan: pages per batch; -1 (default) takes the built-in's over",
        },
        sleep_millisecs: i64 {
            default: -1,
            description: "sleep_millisecs: pause between batches; -1 (default) takes the built-in's over",
        },
        delay: u32 {
            default: 0,
            description: "delay: wait up to so many microseconds where races would happen, for tests (default 0)",
        },
        scan_threads: i64 {
            default: -1,
            description: "scan_threads: threads that share the scanning, 1 (default) to the number of CPUs",
        },
    },
}

/// The loaded module: what has been set up, to be undone in the reverse order.
struct Rksm {
    /// KSM is ours. Until then the built-in keeps its `run`.
    in_charge: bool,
    device: Option<Pin<KBox<Device<Ksm>>>>,
    files: Option<OwnFiles>,
    thread: Option<Kthread>,
    notifier: Option<Pin<KBox<MemoryNotifier<Ksm>>>>,
    probes: Option<Probes<Ksm>>,
    ksm: Arc<Ksm>,
    takeover: Takeover<&'static Attribute, Ksm>,
}

impl kernel::Module for Rksm {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        compat::check_kernel()?;
        kernel_ext::race_window::widen(compat::param(module_parameters::delay.value()));
        let symbols = Symbols::resolve()?;
        let layouts = takeover::btf::check_layouts(symbols)?;
        let ours = builtin().map(|file| (file.name, file));
        let takeover = Takeover::new(symbols, layouts, ours)?;
        let rksm = Self::start(symbols, takeover).map_err(Failure::into_error)?;
        pr_info!("KSM of the kernel taken over; rmmod rksm hands it back\n");
        Ok(rksm)
    }
}

/// Why the module does not load.
enum Failure {
    /// The log has a line on it already.
    Logged(Error),
    Unlogged(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Unlogged(error)
    }
}

impl Failure {
    /// Returns the error, of which the log has one line.
    fn into_error(self) -> Error {
        match self {
            Self::Logged(error) => error,
            Self::Unlogged(error) => {
                pr_err!("cannot load: {error:?}; the built-in KSM goes on\n");
                error
            }
        }
    }
}

impl Rksm {
    fn start(
        symbols: Symbols,
        takeover: Takeover<&'static Attribute, Ksm>,
    ) -> Result<Self, Failure> {
        let mut knobs = initial_knobs(&takeover)?;
        // `rksmd` does not scan before all that the built-in has merged is ours, or unmerged.
        let run = core::mem::replace(&mut knobs.run, RunState::Stop);
        // SAFETY: The engine, which keeps the contract, is given it, and nobody else. There is a
        // `Takeover`: the layouts have been checked, and the built-in is stopped. What it has
        // merged is taken over, or unmerged, before anything else uses them.
        let nodes = unsafe { StableNodes::new(symbols, Trace::new(symbols)) }?;
        let ksm = Ksm::new(
            symbols,
            takeover.builtin(),
            nodes,
            knobs,
            compat::param_check(),
        )?;
        // From here on dropping it undoes whatever has been done.
        let mut rksm = Self {
            in_charge: false,
            device: None,
            files: None,
            thread: None,
            notifier: None,
            probes: None,
            ksm: ksm.clone(),
            takeover,
        };
        // An mm that comes after the probes are there is told of by them, any other is on the
        // built-in's list.
        rksm.probes = Some(Probes::register(ksm.clone())?);
        ksm.register_all()?;
        rksm.notifier = Some(MemoryNotifier::register(ksm.clone())?);
        let scanner = ksm.clone();
        let sweeper = Sweeper::new()?;
        let thread = Kthread::run(symbols, c"rksmd", NICE, move |current| {
            scanner.scan_thread(current, sweeper)
        })?;
        rksm.thread = Some(thread);
        rksm.files = Some(OwnFiles::create(symbols, &ksm)?);
        rksm.take_pages(run)?;
        ksm.set_run(run);
        rksm.in_charge = true;
        rksm.takeover.open(ksm.clone());
        rksm.device = Some(Device::register(c"rksm", ksm)?);
        Ok(rksm)
    }

    /// Hands everything back to the built-in.
    fn hand_over(&self) {
        // First: the built-in changes some of them only while it has nothing merged.
        match self
            .ksm
            .hand_back(|name, text| self.takeover.builtin_store(name, text))
        {
            Ok(run) => self.takeover.set_final_run(run),
            Err(error) => {
                pr_warn!("not all files of the built-in KSM got their values back: {error:?}\n")
            }
        }
        kernel_ext::race_window::sleep();
        self.ksm.hand_over();
    }

    /// Takes over what the built-in has merged, or has it unmerge that: with `adopt=0`, and where
    /// `run` is to be 2 anyway.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// With nothing changed: `ENOMEM`, `EINTR` after a signal, `EINVAL` if what the built-in has is
    /// not known here. Those of [`Takeover::drain`].
    fn take_pages(&self, run: RunState) -> Result<(), Failure> {
        if compat::param_adopt() && run != RunState::Unmerge {
            match self.ksm.adopt() {
                Ok(()) => return Ok(()),
                Err(Unfit::NoMemory) => return Err(ENOMEM.into()),
                Err(Unfit::Interrupted) => return Err(EINTR.into()),
                Err(Unfit::Unknown(_)) if self.takeover.builtin().is_drained() => {}
                Err(Unfit::Unknown(what)) => {
                    pr_err!(
                        "cannot load: the built-in's merged pages cannot be taken over ({what}); see adopt=0\n"
                    );
                    return Err(Failure::Logged(EINVAL));
                }
            }
        }
        self.takeover.drain().map_err(Failure::Logged)?;
        self.ksm.follow();
        Ok(())
    }
}

impl Drop for Rksm {
    fn drop(&mut self) {
        self.device = None;
        self.files = None;
        self.takeover.close();
        kernel_ext::race_window::sleep();
        self.thread = None;
        kernel_ext::race_window::sleep();
        self.probes = None;
        if self.in_charge {
            self.hand_over();
        } else {
            self.ksm.forget_mms();
        }
        kernel_ext::race_window::sleep();
        self.notifier = None;
        if self.in_charge {
            pr_info!("KSM handed back to the kernel\n");
        }
    }
}

/// The built-in's knob values, overridden by the module's parameters.
fn initial_knobs(takeover: &Takeover<&'static Attribute, Ksm>) -> Result<Knobs, Failure> {
    let mut knobs = Knobs::new();
    knobs.limits = Limits::for_cpus(online_cpus());
    for file in builtin().filter(|file| file.store.is_some()) {
        file.take_over(&mut knobs, &takeover.builtin_show(file.name)?)?;
    }
    let parameters = [
        (
            &attribute::RUN,
            i64::from(compat::param::<i32>(module_parameters::run.value())),
        ),
        (
            &attribute::PAGES_TO_SCAN,
            compat::param(module_parameters::pages_to_scan.value()),
        ),
        (
            &attribute::SLEEP_MILLISECS,
            compat::param(module_parameters::sleep_millisecs.value()),
        ),
        (
            &attribute::SCAN_THREADS,
            compat::param(module_parameters::scan_threads.value()),
        ),
    ];
    for (file, value) in parameters {
        if value != -1 {
            let name = file.name;
            file.set_at_load(&mut knobs, value, online_cpus())
                .map_err(|error| {
                    pr_err!("cannot load: {name}={value} is no value for {name}\n");
                    Failure::Logged(error)
                })?;
        }
    }
    Ok(knobs)
}
