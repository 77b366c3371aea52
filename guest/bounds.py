"""Every maximum of the contract, in one place. Sizes are bytes, times are seconds.

A peer that exceeds one is answered with the error named in docs/reference/protocol.md, or dropped.
"""

# ── the wire ─────────────────────────────────────────────────────────────────────────────────────
HELLO_PAYLOAD = 4 * 1024  # all that an unauthenticated peer can make the agent hold
HELLO_TIMEOUT = 2.0  # from accept to a complete hello
CONTROL_PAYLOAD = 4 * 1024 * 1024  # a request; Linux's own limit for argv + env is 2 MiB by default
DATA_PAYLOAD = 1024 * 1024  # one data frame; a pipe holds at most this much by default
RESPONSE_PAYLOAD = 1024 * 1024  # a hostile agent must not fill the host's memory
ERROR_PAYLOAD = 512 * 1024  # holds the longest message and fields, whatever their script
ERROR_MESSAGE = 4 * 1024  # characters, of text fields as well; longer ones are cut with …
ERROR_FIELDS = 16  # fields of one error; the sender drops what is over
TOKEN_MIN = 16  # ASCII characters
TOKEN_MAX = 256
STOP_GRACE_MAX = 3600.0
SECONDS_MAX = 10 * 365 * 86400.0  # of a timeout, a grace or a wait: within every clock's range
SECCOMP_FILTER = 32 * 1024  # the kernel's own: 4096 instructions (BPF_MAXINSNS) of 8 bytes
CREDIT_MAX = 2**63 - 1  # bytes of stdin on one connection: a signed 64-bit counter
OFFSET_MAX = 2**62  # bytes of an output so far: what comes after can be counted in 64 bits as well
SEED = 512  # random bytes of a host for the kernel's pool; ChaCha's key has 32
NANOSECONDS_MAX = 2**63 // 2  # of a clock: the year 2116, within what clock_settime(2) takes
LABEL = 256  # characters of a process's label
LISTED_ARGV = 1024  # characters of a process's arguments together, in a list
KEEP_BUFFER_MIN = 4 * 1024  # of each output of a kept process: one page
KEEP_BUFFER_MAX = 64 * 1024 * 1024
KEEP_RETAIN_MAX = 7 * 86400.0  # status and output of a kept process after its exit
KEPT_PROCESSES = 256  # the workload and those that have ended and are retained included

# ── the agent ────────────────────────────────────────────────────────────────────────────────────
CONNECTIONS = 1024  # accepted and past hello
UNAUTHENTICATED = 128  # accepted and not past hello; the oldest is dropped for a new one
LISTEN_BACKLOG = 1024
ROOT_WAIT = 30.0  # how long a start waits for PID 1 to finish the root
STREAM_IDLE_AFTER_EXIT = 0.1  # a stream that a grandchild holds open is cut when idle this long
STREAM_CAP_AFTER_EXIT = 0.5  # and in any case after this long
TIMEOUT_GRACE = 1.0  # between TERM and KILL of a process whose timeout is over
STREAM_READ = 64 * 1024  # out of a socket at a time; the kernel holds the rest
OUTPUT_READ = 16 * 1024  # out of a process's pipe or terminal at a time; more is spliced
BULK_READ = 256 * 1024  # the same where bulk cannot be spliced
HELD_PIPES = 8 * 1024 * 1024  # moved into the agent's pipes and not written yet, as HELD_BULK
HELD_BULK = 1024 * 1024  # read like that and not written yet, of all connections
INPUT_WINDOW = 64 * 1024  # of a process's input, on its way or held, and not taken by it yet
BULK_INPUT_WINDOW = 512 * 1024  # the same where the process takes its input as fast as it comes
BULK_INPUT = 8 * 1024 * 1024  # what all connections have above INPUT_WINDOW together
IDLE_CGROUPS = 64  # emptied ones that wait for the next process
AGENT_MEMORY = 32 * 1024 * 1024  # bytes that are the agent's own however short memory is
MEMORY_RESERVE = 24 * 1024 * 1024  # bytes that hosts' processes, and the workload, each leave free
PIDS_RESERVE = 256  # processes and threads that hosts' processes and the workload leave together
LATE_PROCESSES = 128  # of these, for what hosts start while theirs have nearly all they may have
TERMINALS = 2048  # of the machine's /dev/pts, whoever opens them
HOSTS_TERMINALS = 1024  # beside them, for hosts' processes once those are taken
REMEMBERED_IDENTITIES = 256  # users that were looked up in the image's files
MAIN_WAIT = 5.0  # from an attach, and the root's being ready, for the workload to be started
COLLECT_WAIT = 5.0  # where the end was asked for: for a reader to take the rest and close
LOCK_HELD = 4.0  # of each LOCK_MINUTE the locks of a user's streams may keep the agent standing
LOCK_MINUTE = 60.0
LOCK_KILL_WAIT = 2.0  # from each measure against who holds it to the next one
LOCK_SEARCH = 5.0  # for those who may hold it, each time
TRACER_WAIT = 1.0  # for a debugger to take the end of what it traces; then it is killed
TRACED_END = 5.0  # from the end of what is traced until its end is told, whoever still traces it
ACCOUNT_FILE = 1024 * 1024  # the image's /etc/passwd and /etc/group; larger ones are not read

# ── reports from PID 1 to the host, and between PID 1 and the agent ─────────────────────────────
REPORT_LINE = 64 * 1024
LEFT_OUT = 16  # sentences on what a boot did without
LEFT_OUT_TEXT = 256  # characters of each
REPORT_CONNECT_TIMEOUT = 5.0  # the host listens before it starts the machine; it may be slow
SUPERVISION_MESSAGE = 64 * 1024
KEPT_META = 16 * 1024  # what the agent deposits with PID 1 about a kept process, printable ASCII
KEPT_NAME = 64  # characters of its id there, and of the name of each of its descriptors
SUPERVISION_DESCRIPTORS = 8  # beside one message
IMAGE_DEFAULTS = 48 * 1024  # as JSON: has to fit into one supervision message with the rest

# ── the boot ─────────────────────────────────────────────────────────────────────────────────────
BOOT_DEADLINE = 60.0  # from PID 1's first line to the start of the workload
LAYERS = 64  # of a root; the kernel's own limit for overlayfs is 500
VOLUMES = 64
HIDDEN_PATHS = 64  # masked and read-only ones
SYSCTLS = 256
INTERFACES = 16
ADDRESSES = 32  # of one interface; so are its routes, and name servers and search domains
HOSTS = 256  # addresses that /etc/hosts is given
LINK_WAIT = 3.0  # for a network interface of the config to be there
CARRIER_WAIT = 1.0  # for it to carry packets; a cable that is pulled out does not stop the boot
DHCP_WAIT = 10.0  # for the leases of all interfaces together
RUN_ENTRIES = 1024  # of an image's own /run that a machine's has as well
RUN_BYTES = 1024 * 1024  # of its files together
RUN_DEPTH = 16  # directories in one another
DISK_WAIT = 3.0  # for a disk of the root to be found by the kernel
AGENT_READY_TIMEOUT = 30.0  # from the end of the boot's other steps to AgentReady
AGENT_BOOT_CRASHES = 4  # an agent that died so often before it ever served fails the boot

# ── ending ───────────────────────────────────────────────────────────────────────────────────────
STOP_GRACE = 5.0  # between TERM and KILL of everything that is left
# How long an ended workload's output waits for a host to come back, from the moment that an agent
# serves and the last host has left; and a terminal's output, from the start, for the first one.
OUTPUT_GRACE = 10.0
# The longest `output_wait` of a config: for a host that is there, however slowly it reads, or that
# has not come yet, from the moment that an agent serves. A host that is gone has closed.
OUTPUT_WAIT_MAX = 3600.0
AGENT_RESTART_DELAYS = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)  # seconds; the last one repeats
AGENT_CRASH_LIMIT = 20  # crashes after which the agent stays down and the state says so
RESTART_DELAY_MAX = 3600.0  # of the workload
RESTART_RESET = 10.0  # seconds of life after which a workload counts as healthy
LAST_WORDS = 4 * 1024  # of what the agent wrote to stderr, beside the report of its end
AGENT_HEALTHY = 60.0  # seconds of service after which an agent's crashes are counted anew
OOM_REPORTS = 256  # processes killed for memory that are reported in one boot
WATCHDOG_INTERVAL = 10.0  # between two questions to the agent whether it is there
WATCHDOG_MIN = 0.1  # shorter intervals cost more than they tell
WATCHDOG_MISSES = 6  # intervals without an answer, and without having run or wanted to: it hangs
OTHERS_GRACE = 1.0  # of STOP_GRACE for all others, should the workload take all of it
FAILED_GRACE = 0.5  # instead of STOP_GRACE where the boot or the workload's start failed
INIT_ALLOWANCE = 5.0  # beyond the grace, for an init of the image's own to end everything
KILL_WAIT = 2.0  # for killed processes to be gone; those that hang in the kernel stay
SYNC_WAIT = 5.0  # for sync and unmounts; a hung device does not stop the power-off
FAREWELL_WAIT = 2.0  # for the host to close the report connection after the last report was sent
