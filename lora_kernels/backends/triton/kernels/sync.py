"""How the programs of one launch agree on who does what and on what is ready.

`sync` is an int32 array that is zero before every launch and zero again after it:

    sync[0]        the next ticket
    sync[1 : ]     flags (how many parts of a row block are published) and counts (how many parts of a sum have arrived)

Work is claimed in the order of the tickets. An item waits only for items with lower tickets, which some running program
has claimed. So a launch ends however few programs are resident.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def claim(sync):
    """Return the next ticket."""
    return tl.atomic_add(sync, 1, sem="relaxed", scope="gpu")


@triton.jit
def publish(flag):
    """Count this program's stores as done: they happen before whatever follows a `wait` that sees the count."""
    # Behind a barrier one thread can release the stores of every thread. Triton 3.6 and 3.7 place none of their own
    # between a store and a release.
    tl.debug_barrier()
    tl.atomic_add(flag, 1, sem="release", scope="gpu")


@triton.jit
def wait(flag, count):
    """Return once `flag` has been published `count` times."""
    # An atomic add of nothing, because a volatile load in a loop followed by an unused acquire is removed as dead code.
    while tl.atomic_add(flag, 0, sem="acquire", scope="gpu") < count:
        pass


@triton.jit
def arrive(count, parts):
    """Count one of `parts` parts as stored. Return True for the last program to arrive, which then sees all stores."""
    tl.debug_barrier()  # as in `publish`
    return tl.atomic_add(count, 1, sem="acq_rel", scope="gpu") == parts - 1


@triton.jit
def leave(sync, ticket, items, used):
    """End a program whose ticket is the first beyond the work. The last program out, whose ticket is the highest,
    zeroes the first `used` elements of sync."""
    if ticket == items + tl.num_programs(0) - 1:
        for start in range(0, used, 256):
            slot = start + tl.arange(0, 256)
            tl.store(sync + slot, tl.zeros((256,), tl.int32), mask=slot < used)
