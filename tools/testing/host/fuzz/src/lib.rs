// SPDX-License-Identifier: GPL-2.0-only

//! How libFuzzer, which has the `main` of a fuzz target, calls it.

/// Makes a function of bytes a fuzz target. Built without `--cfg fuzzing`, the program runs the
/// inputs in the files that it is given.
#[macro_export]
macro_rules! target {
    ($run:path) => {
        /// See `LLVMFuzzerTestOneInput()` in libFuzzer's `FuzzerInterface.h`. A panic aborts.
        #[cfg(fuzzing)]
        #[no_mangle]
        #[allow(non_snake_case, reason = "libFuzzer's name")]
        extern "C" fn LLVMFuzzerTestOneInput(data: *const u8, len: usize) -> core::ffi::c_int {
            if len > 0 {
                // SAFETY: libFuzzer keeps `len` bytes at `data` as they are until this returns.
                $run(unsafe { core::slice::from_raw_parts(data, len) });
            }
            0
        }

        #[cfg(not(fuzzing))]
        fn main() -> std::io::Result<()> {
            for name in std::env::args().skip(1) {
                $run(&std::fs::read(name)?);
            }
            Ok(())
        }
    };
}
