#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Usage (in a guest without rksm): on_builtin.py

rksmctl on the built-in KSM.
"""

import shared
from ctl import check, ctl, end, finish, hold, says

shared.all_of_it("built-in KSM", "built-in KSM", False, 4, 2)
holders = hold(1, 1, 1)
pid = holders[0].pid
for words in (["enable", pid], ["disable", pid], ["never", pid], ["merge", pid], ["unmerge", pid],
              ["rules"], ["rules", "apply"], ["enable", "--cgroup", "/"]):
    run = ctl(*words)
    check(says(run, 3, "needs rksm, which is not loaded"),
          f"{' '.join(w for w in words if w != pid)} needs rksm, and says so", run)
end(holders)
finish()
