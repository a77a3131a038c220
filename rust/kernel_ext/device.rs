// SPDX-License-Identifier: GPL-2.0-only

//! A misc device whose calls go to an object.
//!
//! [`MiscDevice::open`] is told nothing but the registration, so the object is beside that.

use kernel::{
    fs::File,
    miscdevice::{
        MiscDevice,
        MiscDeviceOptions,
        MiscDeviceRegistration, //
    },
    prelude::*,
    sync::Arc, //
};

/// The calls of a device.
pub(crate) trait DeviceCalls: Send + Sync + 'static {
    /// Somebody opens the device.
    ///
    /// # Context
    ///
    /// The task that opens it. May sleep.
    ///
    /// # Errors
    ///
    /// Why it may not.
    fn open(&self) -> Result;

    /// Somebody calls `ioctl`.
    ///
    /// # Context
    ///
    /// The task that calls. May sleep.
    ///
    /// # Errors
    ///
    /// Those of the call.
    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize>;
}

/// An open file of the device.
struct OpenDevice<T>(Arc<T>);

#[vtable]
impl<T: DeviceCalls> MiscDevice for OpenDevice<T> {
    type Ptr = KBox<Self>;

    fn open(_file: &File, misc: &MiscDeviceRegistration<Self>) -> Result<KBox<Self>> {
        // SAFETY: Registrations for this type are made by `Device::register` alone, which puts them
        // into a `Device`. That is pinned, and is not dropped before the registration, in whose
        // call this is.
        let device =
            unsafe { &*kernel::container_of!(core::ptr::from_ref(misc), Device<T>, registration) };
        device.calls.open()?;
        Ok(KBox::new(Self(device.calls.clone()), GFP_KERNEL)?)
    }

    fn ioctl(this: &Self, _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        this.0.ioctl(cmd, arg)
    }
}

/// A registered device. Dropping it removes it; files that are open keep the module.
#[pin_data]
pub(crate) struct Device<T: DeviceCalls> {
    calls: Arc<T>,
    #[pin]
    registration: MiscDeviceRegistration<OpenDevice<T>>,
}

impl<T: DeviceCalls> Device<T> {
    /// Registers a device of this name, which `devtmpfs` makes for root alone.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, and what `misc_register()` returns.
    pub(crate) fn register(name: &'static CStr, calls: Arc<T>) -> Result<Pin<KBox<Self>>> {
        KBox::try_pin_init(
            try_pin_init!(Self {
                // First: the device may be opened as soon as it is registered.
                calls,
                registration <- MiscDeviceRegistration::register(MiscDeviceOptions { name }),
            }),
            GFP_KERNEL,
        )
    }
}
