# SPDX-License-Identifier: GPL-2.0-only
"""A table of numbers kept in memory, asked through standard input.

Usage: store.py SEED

Commands, one a line, each answered by one line:
  digest     BLAKE2b over all columns
  overwrite  turn the second half of every column round, in place
"""

import hashlib
import random
import sys
from array import array

COLUMNS = 4
ROWS = 512 * 1024  # of 8 bytes, 4 MiB a column


def column(seed, number):
    """The numbers that SEED puts into a column."""
    return array("Q", random.Random(f"{seed}/{number}").randbytes(ROWS * 8))


def overwrite(values):
    values[ROWS // 2 :] = values[: ROWS // 2 - 1 : -1]


def digest_of(columns):
    result = hashlib.blake2b()
    for values in columns:
        result.update(values)
    return result.hexdigest()


def main(seed):
    table = [column(seed, number) for number in range(COLUMNS)]
    print("ready", flush=True)

    for line in sys.stdin:
        match line.split():
            case ["digest"]:
                print(digest_of(table), flush=True)
            case ["overwrite"]:
                for values in table:
                    overwrite(values)
                print("done", flush=True)
            case _:
                print("unknown command", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
