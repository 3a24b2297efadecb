"""Driver `qcow2`: a disk in an image file that grows, over an optional backing.

::

    driver    the verbs: reads, status, life            children  what an image names: backing, data
    writer    writes, zeroes, discards                  repair    refcounts counted anew
    tables    L1 and L2 tables in memory                resize    another size
    counts    refcounts in memory; allocation           image     what these share
    commit    the order in which metadata goes to disk

Metadata changes in memory only, in one step without an await, and goes to disk by `commit`, whose
order is why a crash at any moment leaves an image that is whole (its docstring proves it).

Follows: QEMU docs/interop/qcow2.rst (the layout), block/qcow2*.c (behaviour).
"""
