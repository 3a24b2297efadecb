"""The hot room: what happens to every request, without policy. Flat where that pays.

The life of a cached 4 KiB READ of a snapshot, at depth 16
----------------------------------------------------------
One wake-up of the event loop finds up to 16 request headers in the inbox (`inbox`). For each,
`pump` unpacks the header in place, checks it in one comparison, and calls `Route.read_now`. That
goes through the graph as plain calls: access node, filter (one look at the state map, `states`),
file node, and one `preadv` with RWF_NOWAIT (`fileio`) straight into the outbox, behind the place
of the reply's header. All replies of the wake-up leave with one `send` (`outbox`). Nothing is
allocated, no coroutine is made, nothing is copied but by the two system calls.

    microseconds   what
    1.1            preadv of a cached page
    0.5            five calls down the graph
    1.5            header in, header out, bookkeeping
    0.6            a 16th of the loop's turn, of recv and of send
    ~4             in all, by estimate but for the first line; a client sees 6

At depth 1 the processor's sleep is the larger part: it takes tens of microseconds to wake. So the
loop looks for the next request for a moment before it sleeps (`poller`).

A read that is not cached, or touches a cluster whose copy is in flight, is tried, refused, and
runs as a coroutine that awaits a thread: about 65 microseconds more, which the disk hides.

The life of a 4 KiB WRITE
-------------------------
Buffered writes may block (a frozen file system, a throttled device), so they go to a thread: one
hop there and one back, some 60 of its 75 microseconds at depth 1. Most writes are one system call
and nothing else: the graph is asked where that goes (`Route.begin_write`), and no coroutine is
made. Others are coroutines, stepped by hand (`step`); what they await is an `Op` (`workers`), which
resumes them in the very callback that learns of the result. At depth 16 what has gathered is handed
over together when the loop is about to wait and the thread is free, is made by one system call
(`writes`), and comes back together, about 20 microseconds each. The first write to a cluster under
a snapshot is the same one hop: save old data, mark DONE, write new data; these are made one by one.

On a unix socket without TLS, WRITEs are answered by the thread that made them, those of a batch in
one call: the client does not wait for the way back, a sixth of the time at depth 1. Bitmaps have
been marked by then; where something is counted behind the write, the event loop replies as ever.

Over TLS
--------
The same boxes, with OpenSSL between them and the socket (`tls`). Of the 0.52 seconds of processor
that a GiB of replies costs then, AES takes 0.24, and copying (page cache, OpenSSL, socket) most of
the rest; a short request costs 3 microseconds more. QEMU takes 0.67 for the same GiB.

What was tried and left
-----------------------
- Old data of many writes saved by one call, and then all those writes by another: 10 % slower than
  one by one, as nothing is answered, and the loop has nothing to do, before the last is made.
- Not waking the loop for writes that have been answered, until it comes by: no gain at depth 16,
  and a quarter slower at depth 1.
- A task per request: by estimate 4 microseconds more than stepping.
- asyncio.Future for results of threads: a loop turn more, by estimate 5 microseconds at depth 1.
- Handing each write to its thread at once: the thread wakes while the loop still works, and the two
  fight for the interpreter lock: reads of 1 microsecond took 70 under a profiler.
- copy_file_range for old data: 6 against 5 microseconds for 4 KiB and 520 against 170 for 1 MiB on
  ext4. With reflinks on XFS large pieces gain a factor of two and small ones lose three, and every
  later guest write to a shared extent pays for it. Read and write win for the guest.
- Inline writes with RWF_NOWAIT: ext4 refuses them; XFS takes them, but a frozen file system blocks
  the call all the same, and with it every export.
- sendfile and splice to the client: the pages wait in the socket and change when the guest
  overwrites them. Wrong data; never from the active disk.
- mmap and send: a fifth faster than preadv and send for large reads, but it blocks, or fails with a
  signal, where a page is not there, and counts the disk as the process's memory.
- ssl.SSLSocket on the socket itself: two system calls per record received, one per record sent, and
  no knowing whether more is there without an error that costs 3 microseconds.
- Encrypting 64 KiB at a time: 10 % more time than 256 KiB.
- Larger and smaller pieces of long reads than 256 KiB: smaller cost system calls, larger leave the
  second-level cache.

Figures: two cores of a virtual machine, Linux 6.18, Python 3.11, 2026-11. Ratios are in
docs/performance.md. Exceptions granted to this room: functions up to 150 lines, `__init__` up to
40, tuples and ints in place of dataclasses. Each trick is marked FAST and has its plain twin in
tests/reference/, with which a test compares it.
"""
