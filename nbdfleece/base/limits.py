"""Every bound of the program: what it is, and why it is that.

Whatever a peer can make longer, more or slower has its line here.
"""

from __future__ import annotations

from typing import Final

from nbdfleece.base.units import GiB, KiB, MiB

# --- NBD handshake ---------------------------------------------------------------------------
MAX_STRING: Final = 4096  # bytes of a name, description, query or error text (NBD: string)
MAX_OPTION_LENGTH: Final = 8 * MiB  # no legal option needs more: 1024 queries of 4100 bytes
MAX_OPTIONS: Final = 256  # per connection, besides MAX_OPTIONS_PER_EXPORT per export
MAX_OPTIONS_PER_EXPORT: Final = 4  # nbdinfo --list asks twice for each
MAX_META_QUERIES: Final = 1024  # more: NBD_REP_ERR_TOO_BIG
MAX_META_DATA: Final = 1 * MiB  # bytes of one meta context option; more: NBD_REP_ERR_TOO_BIG
MAX_OPTION_REPLIES: Final = 65536  # that our client takes for one option: exports of a LIST
HANDSHAKE_TIMEOUT_S: Final = 10.0  # greeting to transmission; the default of QEMU 9.1
MAX_ERROR_TEXT: Final = 900  # QEMU's client drops chunks above 1000 bytes

# --- NBD transmission ------------------------------------------------------------------------
MAX_PAYLOAD: Final = 32 * MiB  # advertised maximum of READ and WRITE
MAX_STRUCTURED_READ: Final = 64 * MiB  # one READ sent in chunks; longer: NBD_EOVERFLOW
MAX_DRAINED_PAYLOAD: Final = 64 * MiB  # a WRITE up to this is read, dropped and refused
MAX_REQUESTS_IN_FLIGHT: Final = 128  # per connection; then we stop reading the socket
MAX_BYTES_IN_FLIGHT: Final = 64 * MiB  # write payloads per connection; then likewise
MAX_CACHE: Final = 4 * GiB  # read for one CACHE; 64-bit lengths are no reason to read for hours
MAX_STATUS_EXTENTS: Final = 131072  # extents of one BLOCK_STATUS chunk: 1 MiB
MAX_EXTENT_LENGTH: Final = 4 * GiB - 64 * KiB  # a 32-bit extent, kept aligned
WRITE_STALL_S: Final = 300.0  # a client that takes no byte of a reply for so long is dropped

# --- NBD servers that we are a client of -----------------------------------------------------
MAX_OPTION_REPLY_BYTES: Final = 16 * MiB  # of all replies to one option: a LIST of 65536 exports
MAX_STATUS_PAYLOAD: Final = 16 * MiB + 8  # of one chunk: 2^20 extents, the most that is proper
MAX_READ_PIECES: Final = 4096  # of a READ that lie apart at a time; in order there is one
MAX_ERROR_CHUNKS: Final = 256  # of one reply: a READ may fail in several places
NBD_CONNECTIONS: Final = 4  # to an export that allows several; as nbdcopy
NBD_REQUESTS: Final = 64  # in flight per connection; as nbdcopy
NBD_UNFLUSHED_BYTES: Final = 64 * MiB  # kept for a server that comes back; full: we flush
NBD_UNFLUSHED_REQUESTS: Final = 16384  # the same, of zeroes, trims and short writes
NBD_ZERO_PIECE: Final = 1 * GiB  # zeroed or trimmed per request; takes some servers a while
NBD_DIAL_TIMEOUT_S: Final = 30.0  # to connect, TLS and handshake included, per attempt
NBD_RETRY_S: Final = (0.2, 0.4, 0.8, 1.6, 3.2, 5.0)  # between attempts to connect; the last stays
NBD_CLOSE_TIMEOUT_S: Final = 1.0  # NBD_CMD_DISC may take so long to be sent
NBD_KEEPALIVE_S: Final = 60  # of silence on TCP before the kernel asks whether the host is alive

# --- server ----------------------------------------------------------------------------------
MAX_CONNECTIONS: Final = 256  # over all listeners; --max-connections
MAX_CONNECTIONS_PER_EXPORT: Final = 0  # no bound but the one in all
MAX_CONNECTIONS_PER_IDENTITY: Final = 0  # likewise: who is known can be turned out
MAX_CONNECTIONS_PER_ADDRESS: Final = 128  # half of all: one machine alone cannot fill the server
MAX_TURNED_AWAY: Final = 16  # clients that are being told that the server is full, at a time
TURN_AWAY_S: Final = 1.0  # and how long each may take to hear it
MAX_COMPLAINTS: Final = 1024  # addresses and identities known to be over their limit
IDLE_TIMEOUT_S: Final = 0.0  # guests are idle for days
MAX_PSK_FILE: Final = 1 * MiB  # bytes of keys.psk
LISTEN_BACKLOG: Final = 1024  # a crowd that comes back at once must not keep others out
ACCEPT_RETRY_S: Final = 0.2  # pause when there are no descriptors for a new connection
SHUTDOWN_HANDSHAKE_S: Final = 1.0  # a client that haggles at shutdown may hear ERR_SHUTDOWN so long
DRAIN_TIMEOUT_S: Final = 20.0  # shutdown waits this long for requests in flight
ABORT_TIMEOUT_S: Final = 1.0  # and then for connections that were cut off

# --- who may do what -------------------------------------------------------------------------
MAX_RULE_FILE: Final = 1 * MiB  # bytes of a policy file or a file of authz rules
MAX_RULES: Final = 1024  # of one policy or authz list: all are looked at for every export listed
MAX_PATTERN: Final = 512  # characters; longer than any DISK@SNAPSHOT and any sane subject
MAX_CERTIFICATE: Final = 64 * KiB  # bytes of a client's own certificate
MAX_CERTIFICATE_NAMES: Final = 256  # attributes of its subject and alternative names together
MAX_TOKENS: Final = 1024  # valid at a time: each is compared whenever one is looked up
MAX_TOKEN_LIFETIME_S: Final = 366 * 24 * 3600.0  # what should last longer needs an identity

# --- datapath --------------------------------------------------------------------------------
READ_PIECE: Final = 256 * KiB  # bytes read and sent at once: fits the second-level cache
FILE_THREADS: Final = 16  # per file: reads that miss the page cache, syncs, holes
ZERO_PIECE: Final = 4 * MiB  # zeroes written at once where the file has no better way

# --- block graph and fleecing ----------------------------------------------------------------
MAX_NODE_NAME: Final = 31  # as QEMU
MAX_BITMAP_NAME: Final = 1023  # bytes; as QEMU
MAX_BITMAP_RUNS: Final = 4096  # of a bitmap, looked at by one status call
MAX_DISK_NAME: Final = 64
MAX_MAP_EXTENTS: Final = 16384  # of one answer of query-fleece-map, and some more; then ask on
MAX_THROTTLE_GROUPS: Final = 4096  # a group per disk, and some more
MAX_STATS_INTERVALS: Final = 16  # of one accounting: each costs every request
MAX_HISTOGRAM_BINS: Final = 4096  # of one histogram
MIN_CLUSTER: Final = 4 * KiB  # unit of copy-before-write where the target sets none
COPY_PIECE: Final = 1 * MiB  # bytes of old data copied at once
MAX_SIZE: Final = (1 << 63) - 1  # of a node: sizes from 2^63 break clients (CVE-2023-5215)

QUIET_TIMEOUT_S: Final = 10.0  # work on files, or requests of a hard removal, may take so long
QUIET_MOMENTS_S: Final = (0.2, 0.4, 0.8, 1.6, 2.0)  # a graph change stops guests so long per try

# --- qcow2 images ----------------------------------------------------------------------------
MAX_QCOW2_L1: Final = 32 * MiB  # bytes of an L1 table, which is kept in memory; as QEMU
MAX_QCOW2_REFCOUNT_TABLE: Final = 8 * MiB  # bytes of the refcount table, likewise; as QEMU
MAX_QCOW2_SNAPSHOTS: Final = 65536  # internal snapshots of an image; as QEMU
MAX_QCOW2_BACKING_NAME: Final = 1023  # bytes; the format's own bound
QCOW2_L2_CACHE: Final = 32 * MiB  # L2 tables in memory, where no option says; as QEMU
QCOW2_REFCOUNT_CACHE: Final = 8 * MiB  # refcount blocks in memory, likewise: tell of 256 GiB
QCOW2_GROW: Final = 64 * MiB  # an image's file gets so much longer at a time; holes cost nothing
MAX_QCOW2_FREES: Final = 65536  # places that wait to be freed; then their tables are written
MAX_BACKING_DEPTH: Final = 64  # images that a header may name, one below the other
MAX_QCOW2_EXTENSIONS: Final = 256  # header extensions of an image; five are known
MAX_QCOW2_SNAPSHOT_TABLE: Final = 64 * MiB  # bytes of the entries of its snapshots; as QEMU
MAX_QCOW2_SNAPSHOT_EXTRA: Final = 1024  # bytes of extra data of one; as QEMU
MAX_QCOW2_BITMAPS: Final = 65535  # of an image; as QEMU
MAX_QCOW2_BITMAP_DIRECTORY: Final = 64 * MiB - 1 * KiB  # bytes of their directory; as QEMU
MAX_QCOW2_BITMAP_NAME: Final = 1023  # bytes; as QEMU
MAX_QCOW2_BITMAP_BYTES: Final = 512 * MiB  # of the bits of one; as QEMU

# --- jobs ------------------------------------------------------------------------------------
BACKUP_CLUSTER: Final = 64 * KiB  # unit of a backup, at least; as QEMU
JOB_WORKERS: Final = 16  # pieces of a job in flight: a file has no more threads
JOB_STATUS_PIECE: Final = 1 * GiB  # looked at at once for what the top layer holds
JOB_RETRY_S: Final = 0.1  # before a piece is tried again under on-error=ignore
JOB_CANCEL_GRACE_S: Final = 2.0  # for pieces of a cancelled job; then the target's peer is let go

# --- backups in folders ------------------------------------------------------------------------
MAX_BACKUP_POINTS: Final = 16384  # of one disk in one folder: a point an hour for almost two years
MAX_BACKUP_MANIFEST: Final = 32 * MiB  # bytes of a manifest.json: so many points, and more
BACKUP_BATCH: Final = 2 * MiB  # of a disk that is read, hashed and packed together
BACKUP_READS: Final = 8  # batches on their way into one backup
BACKUP_WRITES: Final = 8  # pieces on their way to where a point is restored
MAX_BACKUP_RUNS: Final = 64  # backups of this daemon that are remembered after their end
BACKUP_THREADS: Final = 3  # that hash, pack and write for one backup

# --- QMP -------------------------------------------------------------------------------------
MAX_QMP_MESSAGE: Final = 16 * MiB  # bytes of one request
MAX_QMP_DEPTH: Final = 64  # nested objects and arrays
MAX_QMP_QUEUE: Final = 1024  # events waiting for one slow monitor, then the oldest go
MAX_QMP_MONITORS: Final = 64
